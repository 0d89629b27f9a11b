package e2e

import (
	"strings"
	"testing"
	"time"

	"kagami/tests/e2e/soak/rounds"
)

// TestContinue: the line is cut under a workload on a live ext4. Told to continue, it goes
// on without the other site, over a SIGKILL of its daemon; with the line
// back only what was written meanwhile is shipped, and both sites are equal. In a second outage, which the daemon
// lives through, nothing has to be compared.
func TestContinue(t *testing.T) {
	t.Parallel()
	const size = 256 << 20
	r, ctx := newRig(t, 2*time.Minute, rounds.Options{RTT: 5 * time.Millisecond, Limits: rounds.QuickLink(),
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: size}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	files := r.NewFiles("g", "d", seed(t))
	must(t, files.Start(ctx, true))
	must(t, files.AwaitProgress(ctx))
	r.Link.Cut()
	_, err := r.Await(ctx, "g", "stalled")
	must(t, err)
	out, err := r.Main.Kagami(ctx, "set", "g", "--on-link-loss", "continue")
	must(t, err)
	if !strings.Contains(out, "on link loss: continue") {
		t.Errorf("set says %q", out)
	}
	must(t, files.AwaitProgress(ctx))
	g, err := r.Await(ctx, "g", "disconnected")
	must(t, err)
	if g.Protected || len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "goes on without it") {
		t.Errorf("apart: protected %v, alarms %q", g.Protected, g.Alarms)
	}
	must(t, r.Main.Kill())
	must(t, r.Main.Start(ctx))
	must(t, files.AwaitProgress(ctx))
	if g, err = r.Await(ctx, "g", "disconnected"); err != nil || g.RPOSeconds < 1 {
		t.Errorf("after a SIGKILL: RPO %v s, %v", g.RPOSeconds, err)
	}

	r.Link.Restore()
	if g, err = r.Await(ctx, "g", "streaming"); err != nil || !g.Protected || len(g.Alarms) > 0 {
		t.Errorf("together: %+v, %v", g, err)
	}
	t.Logf("%d bytes shipped by the resync", g.Resynced)
	if g.Resynced == 0 || g.Resynced > size/4 {
		t.Errorf("the resync shipped %d bytes", g.Resynced)
	}
	must(t, files.AwaitProgress(ctx))

	// Once more, with a daemon that lives: what was written is sent in order, and nothing is compared.
	compared := g.Resynced
	r.Link.Cut()
	_, err = r.Await(ctx, "g", "disconnected")
	must(t, err)
	for range 3 {
		must(t, files.AwaitProgress(ctx))
	}
	r.Link.Restore()
	if g, err = r.Await(ctx, "g", "streaming"); err != nil || !g.Protected || len(g.Alarms) > 0 || g.Resynced != compared {
		t.Errorf("caught up: %+v, %v", g, err)
	}
	must(t, files.AwaitProgress(ctx))
	must(t, files.Stop())
	stoppedEqual(ctx, t, r, "g")
	must(t, rounds.Fsck(ctx, r.Replica("g", "d")))
}
