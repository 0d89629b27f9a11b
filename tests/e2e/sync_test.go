package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
	"kagami/tests/e2e/stage"
)

// fillImage makes an ext4 with files at the place of a declared image.
func fillImage(t *testing.T, path string, size int64, seed uint64) {
	t.Helper()
	rng := rand.NewChaCha8([32]byte(fmt.Appendf(nil, "%032d", seed)))
	tree := t.TempDir()
	for _, name := range []string{"a", "b/c", "b/d"} {
		p := filepath.Join(tree, name)
		must(t, os.MkdirAll(filepath.Dir(p), 0o755))
		content := make([]byte, 10<<20)
		_, err := rng.Read(content)
		must(t, err)
		must(t, os.WriteFile(p, content, 0o644))
	}
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	if out, err := exec.Command("mke2fs", "-q", "-F", "-t", "ext4", "-d", tree, path).CombinedOutput(); err != nil {
		t.Fatalf("mke2fs: %v: %s", err, out)
	}
}

// states records the states of a group at the main site, in order, until ctx ends.
type states struct {
	seen []control.Group
	done chan struct{}
}

func watchStates(ctx context.Context, s *stage.Site, group string) *states {
	w := &states{done: make(chan struct{})}
	go func() {
		defer close(w.done)
		c := control.NewClient(s.Control())
		for ctx.Err() == nil {
			if st, err := c.Status(ctx); err == nil {
				w.add(st, group)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return w
}

func (w *states) add(st control.Status, group string) {
	for _, g := range st.Groups {
		if n := len(w.seen); g.Name == group && (n == 0 || w.seen[n-1].State != g.State || w.seen[n-1].Protected != g.Protected) {
			w.seen = append(w.seen, g)
		}
	}
}

// TestFirstSync: an image that already holds a file system is synced while one
// client works in it and another writes a second disk of the same group. It is
// protected only when the copy is complete, and then both sites are equal.
func TestFirstSync(t *testing.T) {
	t.Parallel()
	n := seed(t)
	limits := rounds.QuickLink()
	limits["queue_bytes"] = "1MiB" // the sync must share it with the clients
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: 5 * time.Millisecond, Rate: 200e6, Limits: limits, Groups: []rounds.Group{
		{Name: "g", Disks: []rounds.Disk{{Name: "fs", Size: 96 << 20}, {Name: "raw", Size: 8 << 20}}}}})
	fillImage(t, r.Image("g", "fs"), 96<<20, n)
	must(t, os.WriteFile(r.Image("g", "raw"), nil, 0o600))
	must(t, os.Truncate(r.Image("g", "raw"), 8<<20))

	must(t, r.Main.Start(ctx))
	if g, err := r.Main.Group(ctx, "g"); err != nil || g.Protected || g.Complete || g.LSN.Assigned != 0 {
		t.Fatalf("without the other site: %+v, %v", g, err)
	}
	watching, stop := context.WithCancel(ctx)
	seen := watchStates(watching, r.Main, "g")
	must(t, r.DR.Start(ctx))
	files := r.NewFiles("g", "fs", n)
	must(t, files.Start(ctx, false))
	load, end := context.WithTimeout(ctx, 3*time.Second)
	defer end()
	w := rawDisk(t, r, "g", 1, n)
	must(t, w.start(load))
	_, err := r.Await(ctx, "g", "streaming")
	must(t, err)
	must(t, files.AwaitProgress(ctx))
	stop()
	<-seen.done
	syncing := slices.IndexFunc(seen.seen, func(g control.Group) bool { return g.State == "syncing" })
	if syncing < 0 {
		t.Fatalf("the group was never seen syncing: %+v", seen.seen)
	}
	for _, g := range seen.seen {
		if g.Protected != (g.State == "streaming") {
			t.Errorf("protected is %v while %s", g.Protected, g.State)
		}
	}
	must(t, files.Stop())
	must(t, w.wait())
	stoppedEqual(ctx, t, r, "g")
	must(t, rounds.Fsck(ctx, r.Replica("g", "fs")))
	checkImage(t, w.h, r.Replica("g", "raw"))
}

// oneDisk is a raw load on one disk of a group.
type oneDisk struct {
	h    *raw.History
	c    *raw.Client
	load raw.Load
	err  chan error
}

func rawDisk(t *testing.T, r *rounds.Rig, group string, disk int, seed uint64) *oneDisk {
	t.Helper()
	d := r.Disks(group)[disk]
	c, err := raw.Dial(t.Context(), "unix", r.Main.Socket(group, d.Name), d.Name)
	must(t, err)
	t.Cleanup(c.Kill)
	return &oneDisk{h: raw.NewHistory(seed, raw.Disk{Len: d.Size}), c: c, err: make(chan error, 1),
		load: raw.Load{Seed: seed, Workers: 4, Zeroes: 0.05, Trims: 0.05, FUA: 0.05}}
}

func (d *oneDisk) start(ctx context.Context) error {
	go func() { d.err <- d.load.Run(ctx, d.h, d.c) }()
	return nil
}

func (d *oneDisk) wait() error { return <-d.err }
