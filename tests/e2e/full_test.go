package e2e

import (
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
	"kagami/tests/e2e/stage"
)

// occupy fills a site's disk up to some bytes and returns what gives the space back.
func occupy(t *testing.T, s *stage.Site, leave int64) (free func()) {
	t.Helper()
	name := filepath.Join(s.StateDir(), "..", "occupied")
	f, err := os.Create(name)
	must(t, err)
	defer f.Close()
	var st syscall.Statfs_t
	must(t, syscall.Statfs(name, &st))
	must(t, syscall.Fallocate(int(f.Fd()), 0, 0, int64(st.Bavail)*st.Bsize-leave))
	return func() { must(t, os.Remove(name)) }
}

// writeAll writes to every block of [off, end) of a group's disk d, and notes
// what was refused.
func writeAll(h *raw.History, c *raw.Client, off, end int64) error {
	p := make([]byte, 64<<10)
	for ; off < end; off += int64(len(p)) {
		seq := h.Begin(raw.Op{Kind: raw.Write, Off: off, Len: int64(len(p))})
		h.Fill(p, seq, 0, off)
		err := c.Write(p, off, false)
		h.End(seq, err)
		if err != nil {
			return err
		}
	}
	seq := h.Begin(raw.Op{Kind: raw.Flush})
	err := c.Flush()
	h.End(seq, err)
	return err
}

// TestReplicaDiskFull: without space for its image the replica keeps the last
// point, the source stalls when the spool is full, a failover is refused and
// leaves everything as it was; with space again all goes on by itself.
func TestReplicaDiskFull(t *testing.T) {
	t.Parallel()
	limits := rounds.QuickLink()
	limits["spool_bytes"], limits["active_log_bytes"], limits["apply_bytes"] = "16MiB", "8MiB", "1MiB"
	r, ctx := newRig(t, 90*time.Second, rounds.Options{RTT: 2 * time.Millisecond, Limits: limits, Disk: map[string]int64{stage.DRName: 256 << 20},
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 64 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	h := raw.NewHistory(seed(t), raw.Disk{Len: 64 << 20})
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()
	must(t, writeAll(h, c, 0, 12<<20)) // the spool's segments are made
	must(t, r.AwaitDrained(ctx, "g"))
	free := occupy(t, r.DR, 4<<20)
	done := later(func() error { return writeAll(h, c, 12<<20, 64<<20) })
	g, err := r.DR.AwaitGroup(ctx, "g", "the full disk to be told", func(g control.Group) bool { return has(g, "no space") })
	must(t, err)
	if !g.Protected {
		t.Errorf("the replica has everything that was acknowledged: %q", said(g))
	}
	_, err = r.Main.AwaitGroup(ctx, "g", "the full spool to be told", func(g control.Group) bool { return has(g, "spool is full") })
	must(t, err)
	if out, err := r.DR.Kagami(ctx, "failover", "g", "--force"); err == nil || !strings.Contains(out, "no space") {
		t.Errorf("failover on a full disk: %v: %s", err, out)
	}
	select {
	case err := <-done:
		t.Fatalf("64 MiB were taken without room for them: %v", err)
	default:
	}
	free()
	must(t, within(ctx, done, "the writes"))
	must(t, r.AwaitProtected(ctx))
	stoppedEqual(ctx, t, r, "g")
	checkImage(t, h, r.Replica("g", "d"))
}

// TestSourceDiskFull: a write that the source's disk has no room for fails for
// the client, and only that; both sites hold the same.
func TestSourceDiskFull(t *testing.T) {
	t.Parallel()
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: 2 * time.Millisecond, Limits: rounds.QuickLink(), Disk: map[string]int64{stage.MainName: 128 << 20},
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 64 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	h := raw.NewHistory(seed(t), raw.Disk{Len: 64 << 20})
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()
	free := occupy(t, r.Main, 8<<20)
	if err := writeAll(h, c, 0, 64<<20); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("writing 64 MiB with room for 8: %v", err)
	}
	must(t, writeAll(h, c, 0, 1<<20)) // what has its space
	g, err := r.Await(ctx, "g", "streaming")
	must(t, err)
	if !g.Protected {
		t.Errorf("a full disk ended the protection: %q", said(g))
	}
	must(t, r.Main.Kill())
	c.Kill()
	free()
	must(t, r.Main.Start(ctx))
	must(t, r.AwaitProtected(ctx))
	if c, err = rounds.Dial(ctx, r.Main, "g", "d"); err != nil {
		t.Fatal(err)
	}
	defer c.Kill()
	must(t, writeAll(h, c, 32<<20, 64<<20))
	stoppedEqual(ctx, t, r, "g")
	checkImage(t, h, r.Replica("g", "d"))
}

// TestResyncBesideWriter: a resync has to fit the replica's spool as one epoch,
// together with what clients that never flush write meanwhile, again and again to
// the same place.
func TestResyncBesideWriter(t *testing.T) {
	t.Parallel()
	limits := rounds.QuickLink()
	limits["spool_bytes"], limits["active_log_bytes"], limits["apply_bytes"], limits["queue_bytes"] = "8MiB", "4MiB", "4MiB", "1MiB"
	limits["apply_age"], limits["segment_bytes"], limits["compression"] = "1h", "2MiB", "none"
	const size = 3 << 20
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: 2 * time.Millisecond, Rate: 20e6, Limits: limits,
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: size}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	h := raw.NewHistory(seed(t), raw.Disk{Len: size})
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()
	must(t, writeAll(h, c, 0, size))
	must(t, r.DR.Kill())
	corruptSpool(t, r, true)
	load, stop := context.WithCancel(ctx)
	defer stop()
	var writers sync.WaitGroup
	for i := range uint64(8) {
		writers.Go(func() {
			if err := overwrite(load, h, c, 1<<20, rand.New(rand.NewPCG(i, 1))); err != nil {
				t.Errorf("writer %d: %v", i, err)
			}
		})
	}
	must(t, r.DR.Start(ctx))
	g, err := r.Await(ctx, "g", "streaming")
	must(t, err)
	t.Logf("%d bytes resynced, %d written by clients; %q", g.Resynced, g.Written, said(g))
	if !has(g, "had been durable and are lost") {
		t.Errorf("status does not say why: %q", said(g))
	}
	stop()
	must(t, within(ctx, later(func() error { writers.Wait(); return nil }), "the writers"))
	must(t, r.Main.Stop())
	_, err = r.Failover(ctx, "g")
	must(t, err)
	must(t, r.DR.Stop())
	must(t, r.SameImages("g"))
	checkImage(t, h, r.Replica("g", "d"))
}

// overwrite writes at random places until ctx ends.
func overwrite(ctx context.Context, h *raw.History, c *raw.Client, size int64, rng *rand.Rand) error {
	p := make([]byte, 64<<10)
	for ctx.Err() == nil {
		off := rng.Int64N(size>>16) << 16
		seq := h.Begin(raw.Op{Kind: raw.Write, Off: off, Len: int64(len(p))})
		h.Fill(p, seq, 0, off)
		err := c.Write(p, off, false)
		h.End(seq, err)
		if err != nil {
			return err
		}
	}
	return nil
}

// TestReplicaRebuilt: a replica whose image was lost, and replaced by an empty
// file larger than the spool, is rebuilt while a workload goes on.
func TestReplicaRebuilt(t *testing.T) {
	t.Parallel()
	limits := rounds.QuickLink()
	limits["spool_bytes"], limits["active_log_bytes"], limits["apply_bytes"] = "16MiB", "8MiB", "1MiB"
	const size = 64 << 20
	n := seed(t)
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: 2 * time.Millisecond, Rate: 200e6, Limits: limits,
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: size}}}}})
	fillImage(t, r.Image("g", "d"), size, n)
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	files := r.NewFiles("g", "d", n)
	must(t, files.Start(ctx, false))
	must(t, files.AwaitProgress(ctx))
	must(t, r.DR.Stop())
	image := r.Replica("g", "d")
	must(t, os.Remove(image))
	must(t, os.WriteFile(image, nil, 0o600))
	must(t, os.Truncate(image, size))
	must(t, r.DR.Start(ctx))
	g, err := r.Await(ctx, "g", "syncing")
	must(t, err)
	if g.Protected || !has(g, "was replaced by a file") {
		t.Errorf("while the replica is rebuilt: protected %v; %q", g.Protected, said(g))
	}
	refuses(ctx, t, r.DR, control.ExitRefused, "was replaced by a file", "failover", "g")
	must(t, files.AwaitProgress(ctx))
	must(t, r.AwaitProtected(ctx))
	must(t, files.AwaitProgress(ctx))
	must(t, files.Stop())
	stoppedEqual(ctx, t, r, "g")
	must(t, rounds.Fsck(ctx, r.Replica("g", "d")))
}
