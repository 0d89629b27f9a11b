package e2e

import (
	"context"
	"errors"
	"testing"
	"time"

	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
	"kagami/tests/e2e/stage"
)

const sameRecord = "both sites stopped at the same record"

// TestCleanRestart: both sites are stopped and started while a workload runs
// on a live ext4. It stalls and goes on, without an error; nothing is compared.
func TestCleanRestart(t *testing.T) {
	t.Parallel()
	n := seed(t)
	r, ctx := newRig(t, 90*time.Second, rounds.Options{RTT: 5 * time.Millisecond, Limits: rounds.QuickLink(),
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 64 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	files := r.NewFiles("g", "d", n)
	must(t, files.Start(ctx, true))
	must(t, files.AwaitProgress(ctx))
	for i, order := range [][2]*stage.Site{{r.Main, r.DR}, {r.DR, r.Main}} {
		t.Logf("restart %d: %s first", i+1, order[0].Name)
		must(t, r.Main.Stop())
		must(t, r.DR.Stop())
		must(t, order[0].Start(ctx))
		time.Sleep(300 * time.Millisecond)
		must(t, order[1].Start(ctx))
		must(t, files.AwaitProgress(ctx))
		undisturbed(ctx, t, r)
	}
	must(t, r.Main.Stop()) // alone, twice: nothing may be written in between
	must(t, r.Main.Start(ctx))
	must(t, files.AwaitProgress(ctx))
	undisturbed(ctx, t, r)
	must(t, files.Stop())
	stoppedEqual(ctx, t, r, "g")
	must(t, rounds.Fsck(ctx, r.Replica("g", "d")))
}

// undisturbed looks for signs of a resync.
func undisturbed(ctx context.Context, t *testing.T, r *rounds.Rig) {
	t.Helper()
	g, err := r.Await(ctx, "g", "streaming")
	must(t, err)
	if !has(g, sameRecord) || g.Resynced != 0 || has(g, "resyncing") {
		t.Errorf("after a clean stop: %d bytes shipped by a resync; %q", g.Resynced, said(g))
	}
}

// TestCleanIdle: with nothing to ship, the order of stopping does not matter,
// nor how often.
func TestCleanIdle(t *testing.T) {
	t.Parallel()
	r, ctx, h := settled(t, nil)
	must(t, r.AwaitDrained(ctx, "g"))
	for range 2 {
		must(t, r.DR.Stop())
		began := time.Now()
		must(t, r.Main.Stop())
		if took := time.Since(began); took > 10*time.Second {
			t.Errorf("a source with nothing to ship took %v to stop", took)
		}
		must(t, r.StartBoth(ctx))
		undisturbed(ctx, t, r)
	}
	fill(ctx, t, r, h, 0, 2<<20)
	stoppedEqual(ctx, t, r, "g")
	checkImage(t, h, r.Replica("g", "d"))
}

// TestStopWithoutLine: a source that has something to ship and cannot reach
// the other site still stops, in bounded time; the next start brings it over.
func TestStopWithoutLine(t *testing.T) {
	t.Parallel()
	r, ctx, h := settled(t, nil)
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()
	r.Link.Cut()
	seq := h.Begin(raw.Op{Kind: raw.Write, Off: 3 << 20, Len: 64 << 10})
	p := make([]byte, 64<<10)
	h.Fill(p, seq, 0, 3<<20)
	must(t, c.Write(p, 3<<20, false))
	h.End(seq, nil)
	flushed := later(c.Flush)
	began := time.Now()
	must(t, r.Main.Stop())
	if took := time.Since(began); took > 30*time.Second {
		t.Errorf("the source took %v to stop", took)
	}
	if err := within(ctx, flushed, "the FLUSH"); !errors.Is(err, raw.ErrDisconnected) {
		t.Errorf("a FLUSH that the other site has not got was answered with %v: the client must come back and send it again", err)
	}
	r.Link.Restore()
	must(t, r.Main.Start(ctx))
	must(t, r.AwaitProtected(ctx))
	stoppedEqual(ctx, t, r, "g")
	checkImage(t, h, r.Replica("g", "d"))
}
