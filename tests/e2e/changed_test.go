package e2e

import (
	"bytes"
	"cmp"
	"context"
	le "encoding/binary"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
	"kagami/tests/e2e/stage"
)

// settled is a pair of sites with one group of one disk that holds something
// everywhere, drained, and the history of it.
func settled(t *testing.T, limits map[string]string) (*rounds.Rig, context.Context, *raw.History) {
	t.Helper()
	if limits == nil {
		limits = rounds.QuickLink()
	}
	r, ctx := newRig(t, 90*time.Second, rounds.Options{RTT: 2 * time.Millisecond, Limits: limits,
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 24 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	h := raw.NewHistory(seed(t), raw.Disk{Len: 24 << 20})
	fill(ctx, t, r, h, 0, 24<<20)
	return r, ctx, h
}

// fill writes [off, end) and flushes it.
func fill(ctx context.Context, t *testing.T, r *rounds.Rig, h *raw.History, off, end int64) {
	t.Helper()
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()
	p := make([]byte, 128<<10)
	for ; off < end; off += int64(len(p)) {
		seq := h.Begin(raw.Op{Kind: raw.Write, Off: off, Len: int64(len(p))})
		h.Fill(p, seq, 0, off)
		must(t, c.Write(p, off, false))
		h.End(seq, nil)
	}
	seq := h.Begin(raw.Op{Kind: raw.Flush})
	must(t, c.Flush())
	h.End(seq, nil)
}

// scribble overwrites part of a file, as somebody does who mounts an image
// behind kagami's back.
func scribble(t *testing.T, path string, off int64, text string) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	must(t, err)
	_, err = f.WriteAt([]byte(text), off)
	must(t, err)
	must(t, f.Close())
}

// reconciled waits until the group streams after a compare that says why, and
// finds both sites equal.
func reconciled(ctx context.Context, t *testing.T, r *rounds.Rig, why string) {
	t.Helper()
	g, err := r.Await(ctx, "g", "streaming")
	must(t, err)
	if !has(g, why) {
		t.Errorf("status does not say %q: %q", why, said(g))
	}
	if g.Resynced == 0 {
		t.Error("nothing was shipped")
	}
	stoppedEqual(ctx, t, r, "g")
}

const behind = "was changed while kagami did not run"

// TestSourceChanged: what was written to the source's image while kagami did
// not run reaches the replica, even if the first start that notices it is cut
// short.
func TestSourceChanged(t *testing.T) {
	t.Parallel()
	for name, between := range map[string]func(*rounds.Rig, context.Context) error{
		"seen at once": func(*rounds.Rig, context.Context) error { return nil },
		"killed before the other site was reached": func(r *rounds.Rig, ctx context.Context) error {
			if err := r.Main.Start(ctx); err != nil {
				return err
			}
			return r.Main.Kill()
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, ctx, _ := settled(t, nil)
			must(t, r.Main.Stop())
			must(t, r.DR.Stop())
			scribble(t, r.Image("g", "d"), 5<<20, "written while kagami did not run")
			must(t, between(r, ctx))
			must(t, r.StartBoth(ctx))
			reconciled(ctx, t, r, behind)
		})
	}
}

// TestSourceReplaced: another file in the place of the source's image is
// served, as the operator will have meant, and compared.
func TestSourceReplaced(t *testing.T) {
	t.Parallel()
	r, ctx, _ := settled(t, nil)
	must(t, r.Main.Stop())
	must(t, r.DR.Stop())
	image := r.Image("g", "d")
	b, err := os.ReadFile(image)
	must(t, err)
	copy(b[9<<20:], "from a backup")
	must(t, os.Remove(image))
	must(t, os.WriteFile(image, b, 0o600))
	must(t, r.Main.Start(ctx)) // finds it, and is killed before it can tell
	must(t, r.Main.Kill())
	must(t, r.StartBoth(ctx))
	reconciled(ctx, t, r, "was replaced by a file that kagami did not make")
}

// TestSourceGone: an image that is not there fails its group; none is made in its place.
func TestSourceGone(t *testing.T) {
	t.Parallel()
	r, ctx, h := settled(t, nil)
	must(t, r.AwaitDrained(ctx, "g"))
	must(t, r.Main.Stop())
	image := r.Image("g", "d")
	must(t, os.Rename(image, image+".away"))
	must(t, r.Main.Start(ctx))
	g, err := r.Await(ctx, "g", "failed")
	must(t, err)
	if g.Protected || !has(g, "no such file") {
		t.Errorf("protected %v: %q", g.Protected, said(g))
	}
	if _, err := os.Stat(image); err == nil {
		t.Error("a new image was made")
	}
	must(t, r.Main.Stop())
	must(t, os.Rename(image+".away", image))
	must(t, r.Main.Start(ctx))
	_, err = r.Await(ctx, "g", "streaming")
	must(t, err)
	stoppedEqual(ctx, t, r, "g")
	checkImage(t, h, r.Replica("g", "d"))
}

// TestReplicaChanged: the same at the other site. While the replica is not
// known to be right, nothing is protected, and a failover says so.
func TestReplicaChanged(t *testing.T) {
	t.Parallel()
	for name, between := range map[string]func(*testing.T, *rounds.Rig, context.Context){
		"seen at once": func(*testing.T, *rounds.Rig, context.Context) {},
		"killed before the source came": func(t *testing.T, r *rounds.Rig, ctx context.Context) {
			must(t, r.DR.Start(ctx))
			g, err := r.DR.AwaitGroup(ctx, "g", "the change to be noticed", func(g control.Group) bool { return has(g, behind) })
			must(t, err)
			if g.Protected {
				t.Error("a replica that somebody changed counts as protection")
			}
			refuses(ctx, t, r.DR, control.ExitRefused, behind, "failover", "g")
			out, err := r.DR.Kagami(ctx, "failover", "g", "--dry-run", "--force")
			must(t, err)
			if !strings.Contains(out, behind) {
				t.Errorf("failover --dry-run does not say so: %s", out)
			}
			must(t, r.DR.Kill())
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r, ctx, h := settled(t, nil)
			must(t, r.AwaitDrained(ctx, "g"))
			must(t, r.Main.Stop())
			must(t, r.DR.Stop())
			scribble(t, r.Replica("g", "d"), 7<<20, "written while kagami did not run")
			between(t, r, ctx)
			must(t, r.StartBoth(ctx))
			reconciled(ctx, t, r, behind)
			checkImage(t, h, r.Replica("g", "d"))
		})
	}
}

// TestReplicaGone: a replica whose image is not there says so at both sites and
// protects nothing; an empty file in its place is filled by a compare.
func TestReplicaGone(t *testing.T) {
	t.Parallel()
	r, ctx, h := settled(t, nil)
	must(t, r.AwaitDrained(ctx, "g"))
	must(t, r.DR.Stop())
	image := r.Replica("g", "d")
	must(t, os.Remove(image))
	must(t, r.DR.Start(ctx))
	g, err := r.DR.AwaitGroup(ctx, "g", "failure", func(g control.Group) bool { return g.State == "failed" })
	must(t, err)
	if g.Protected || !has(g, "no such file") {
		t.Errorf("at the replica: protected %v: %q", g.Protected, said(g))
	}
	g, err = r.Main.AwaitGroup(ctx, "g", "the refusal", func(g control.Group) bool { return has(g, "failed at site dr") })
	must(t, err)
	if g.Protected {
		t.Errorf("at the source: a replica that has failed counts as protection: %q", said(g))
	}
	if out, err := r.DR.Kagami(ctx, "failover", "g", "--force"); err == nil {
		t.Errorf("failed over without an image: %s", out)
	}
	must(t, r.DR.Stop())
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, 24<<20))
	must(t, r.DR.Start(ctx))
	reconciled(ctx, t, r, "was replaced by a file that kagami did not make")
	checkImage(t, h, r.Replica("g", "d"))
}

// corruptSpool damages the last records of a replica's spool, those in the
// segment with the highest number, or, with all, the first ones.
func corruptSpool(t *testing.T, r *rounds.Rig, all bool) {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(r.DR.StateDir(), "groups", "g", "spool", "*.seg"))
	must(t, err)
	type segment struct {
		name   string
		number uint64
		end    int64
	}
	var found []segment
	for _, name := range names {
		b, err := os.ReadFile(name)
		must(t, err)
		if n := le.LittleEndian.Uint64(b[24:]); n > 0 && string(b[:8]) == "KAGAMISP" {
			found = append(found, segment{name, n, int64(len(bytes.TrimRight(b, "\x00")))})
		}
	}
	slices.SortFunc(found, func(a, b segment) int { return cmp.Compare(a.number, b.number) })
	if len(found) == 0 || found[len(found)-1].end < 4096+128<<10 {
		t.Fatalf("too little to damage in the spool: %v", found)
	}
	last := found[len(found)-1]
	if all {
		scribble(t, found[0].name, 4096+100<<10, "this was a record")
	} else {
		scribble(t, last.name, last.end-100<<10, "this was a record")
	}
}

// TestSpoolDamaged: a spool damaged at its end is recovered to the last whole
// epoch; the source, restarted or not, learns that acknowledged epochs are gone
// and repairs the replica.
func TestSpoolDamaged(t *testing.T) {
	t.Parallel()
	for name, restart := range map[string]func(*stage.Site) error{
		"the source ran on":      nil,
		"the source was killed":  (*stage.Site).Kill,
		"the source was stopped": (*stage.Site).Stop,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			limits := rounds.QuickLink()
			limits["apply_age"], limits["apply_bytes"], limits["active_log_bytes"] = "1h", "48MiB", "4MiB"
			limits["segment_bytes"], limits["spool_bytes"] = "32MiB", "160MiB" // one segment holds all
			r, ctx, h := settled(t, limits)
			if restart != nil {
				must(t, restart(r.Main))
			}
			must(t, r.DR.Kill())
			corruptSpool(t, r, false)
			must(t, r.DR.Start(ctx))
			// Whether it had been acknowledged, only the source knows.
			_, err := r.DR.AwaitGroup(ctx, "g", "the damage to be told", func(g control.Group) bool { return has(g, "torn or damaged") })
			must(t, err)
			if restart != nil {
				must(t, r.Main.Start(ctx))
			}
			g, err := r.Await(ctx, "g", "streaming")
			must(t, err)
			if !has(g, "equal again") || g.Resynced == 0 || has(g, "alarm: ") {
				t.Errorf("the source resynced %d bytes and says: %q", g.Resynced, said(g))
			}
			fill(ctx, t, r, h, 0, 1<<20)
			must(t, r.Main.Stop())
			out, err := r.Failover(ctx, "g")
			must(t, err)
			t.Log(out)
			must(t, r.DR.Stop())
			checkImage(t, h, r.Replica("g", "d"))
		})
	}
}
