package e2e

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
	"kagami/tests/e2e/stage"
	"kagami/tests/wan"
)

// refuses runs a command that must fail with an exit code and say a text.
func refuses(ctx context.Context, t *testing.T, s *stage.Site, code int, text string, args ...string) {
	t.Helper()
	out, err := s.Kagami(ctx, args...)
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != code || !strings.Contains(out, text) {
		t.Errorf("kagami %v: wanted exit code %d and %q: %v", args, code, text, err)
	}
}

// TestFailoverRefusals: what a failover refuses, what --force overrides, and
// that a source which is still there is fenced at once.
func TestFailoverRefusals(t *testing.T) {
	t.Parallel()
	r, ctx, h := settled(t, nil)
	refuses(ctx, t, r.DR, control.ExitNotFound, "has no group nosuch", "failover", "nosuch")
	refuses(ctx, t, r.Main, control.ExitRefused, "run kagami failover at site dr", "failover", "g")
	refuses(ctx, t, r.DR, control.ExitRefused, "--force", "failover", "g")
	_, err := r.DR.Kagami(ctx, "failover", "g", "--force", "--dry-run")
	must(t, err)
	if g, err := r.Main.Group(ctx, "g"); err != nil || g.State != "streaming" {
		t.Fatalf("after refusals and a dry run: %+v, %v", g, err)
	}
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()

	_, err = r.Failover(ctx, "g", "--force")
	must(t, err)
	g, err := r.Await(ctx, "g", "fenced")
	must(t, err)
	if g.Protected || !has(g, "promoted at site dr") {
		t.Errorf("fenced: protected %v; %q", g.Protected, said(g))
	}
	if _, err := c.ReadAt(make([]byte, 512), 0); !errors.Is(err, raw.ErrDisconnected) {
		t.Errorf("a client of the fenced source reads: %v", err)
	}
	refuses(ctx, t, r.DR, control.ExitRefused, "was already failed over", "failover", "g")
	promoted(ctx, t, r, h)

	// Both sides stay what they are.
	must(t, r.Main.Kill())
	must(t, r.DR.Kill())
	must(t, r.StartBoth(ctx))
	if g, err := r.Await(ctx, "g", "fenced"); err != nil || g.Disks[0].Clients != 0 {
		t.Errorf("after a restart: %+v, %v", g, err)
	}
	refuses(ctx, t, r.DR, control.ExitRefused, "was already failed over", "failover", "g")
	refuses(ctx, t, r.Main, control.ExitRefused, "was failed over to site dr", "failover", "g")
	promoted(ctx, t, r, h)
}

// promoted writes to the promoted disk and reads all of it back.
func promoted(ctx context.Context, t *testing.T, r *rounds.Rig, h *raw.History) {
	t.Helper()
	g, err := r.DR.Group(ctx, "g")
	must(t, err)
	if g.Role != "promoted" || g.State != "unmirrored" || g.Protected || g.Failover == nil {
		t.Errorf("promoted: %+v", g)
	}
	c, err := rounds.Dial(ctx, r.DR, "g", "d")
	must(t, err)
	defer c.Kill()
	seq := h.Begin(raw.Op{Kind: raw.Write, Off: 3 << 20, Len: 1 << 20, FUA: true})
	p := make([]byte, 1<<20)
	h.Fill(p, seq, 0, 3<<20)
	must(t, c.Write(p, 3<<20, true))
	h.End(seq, nil)
	rep, err := raw.Check(h, raw.Options{Completed: true, TrimIsZero: true}, c)
	must(t, err)
	must(t, rep.Err())
}

// TestFirstSyncNeverEnded: there is nothing to fail over to.
func TestFirstSyncNeverEnded(t *testing.T) {
	t.Parallel()
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: 2 * time.Millisecond, Rate: 8e6, Limits: rounds.QuickLink(),
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 64 << 20}}}}})
	fillImage(t, r.Image("g", "d"), 64<<20, seed(t))
	must(t, r.StartBoth(ctx))
	_, err := r.Main.AwaitGroup(ctx, "g", "the first sync to be under way", func(g control.Group) bool { return g.Sync != nil && g.Sync.Done > 4<<20 })
	must(t, err)
	refuses(ctx, t, r.DR, control.ExitRefused, "never ended", "failover", "g", "--force")
	must(t, r.Main.Kill())
	_, err = r.DR.AwaitGroup(ctx, "g", "the source to be gone", func(g control.Group) bool { return !g.PeerUp })
	must(t, err)
	refuses(ctx, t, r.DR, control.ExitRefused, "never ended", "failover", "g")
	g, err := r.DR.Group(ctx, "g")
	must(t, err)
	if g.Protected || g.Complete || g.State != "waiting" {
		t.Errorf("the replica: %+v", g)
	}
	// It is taken up again, and then a failover is possible.
	must(t, r.Link.Change(func(p *wan.Params) { p.Rate = 1e9 }))
	must(t, r.Main.Start(ctx))
	must(t, r.AwaitProtected(ctx))
	must(t, r.Main.Kill())
	_, err = r.Failover(ctx, "g")
	must(t, err)
	must(t, r.DR.Stop())
	must(t, r.SameImages("g"))
}

// reissue replaces a site's keys.
func reissue(ctx context.Context, t *testing.T, r *rounds.Rig, args ...string) {
	t.Helper()
	_, err := r.Main.Kagami(ctx, append([]string{"pki"}, args...)...)
	must(t, err)
}

// TestTrust: a peer is refused by its certificate, by what that allows, and by
// the name in it (a daemon takes no certificate of another site); each time the
// source's status says why, and nothing is protected.
func TestTrust(t *testing.T) {
	t.Parallel()
	pki := func(s *stage.Site) string { return filepath.Join(filepath.Dir(s.Config()), "pki") }
	for name, c := range map[string]struct {
		spoil func(context.Context, *testing.T, *rounds.Rig)
		says  string
	}{
		"certificate of another CA": {func(ctx context.Context, t *testing.T, r *rounds.Rig) {
			other := t.TempDir()
			reissue(ctx, t, r, "init", "--site", "main", "--dir", other)
			must(t, os.RemoveAll(pki(r.DR)))
			reissue(ctx, t, r, "issue", "dr", "--dir", other, "--out", pki(r.DR))
		}, "certificate"},
		"certificate for another group": {func(ctx context.Context, t *testing.T, r *rounds.Rig) {
			reissue(ctx, t, r, "issue", "main", "--group", "web", "--force", "--dir", pki(r.Main), "--out", pki(r.Main))
		}, "does not allow group g"},
		"another site": {func(ctx context.Context, t *testing.T, r *rounds.Rig) {
			must(t, os.RemoveAll(pki(r.DR)))
			reissue(ctx, t, r, "issue", "elsewhere", "--dir", pki(r.Main), "--out", pki(r.DR))
			b, err := os.ReadFile(r.DR.Config())
			must(t, err)
			must(t, os.WriteFile(r.DR.Config(), []byte(strings.Replace(string(b), "site: dr\n", "site: elsewhere\n", 1)), 0o600))
		}, "elsewhere"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, ctx := newRig(t, 30*time.Second, rounds.Options{RTT: 2 * time.Millisecond, Limits: rounds.QuickLink(),
				Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 1 << 20}}}}})
			c.spoil(ctx, t, r)
			must(t, r.StartBoth(ctx))
			deadline := time.Now().Add(10 * time.Second)
			for {
				st, err := r.Main.Status(ctx)
				must(t, err)
				text := strings.Join(append(said(st.Groups[0]), st.Peers[0].Error), "\n")
				if st.Groups[0].Protected || st.Groups[0].Complete {
					t.Fatalf("protected: %+v", st)
				}
				if strings.Contains(text, c.says) {
					t.Logf("status says: %s", text)
					break
				}
				if time.Now().After(deadline) {
					t.Fatalf("status does not say %q: %s", c.says, text)
				}
				time.Sleep(50 * time.Millisecond)
			}
			if st, err := r.DR.Status(ctx); err != nil || len(st.Groups) != 0 {
				t.Errorf("the other site made a group: %+v, %v", st, err)
			}
		})
	}
}
