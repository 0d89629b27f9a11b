package recover

import (
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"kagami/ext4j/jbd2"
)

// TestFastCommit: images with pending fast commits are refused; without, they are recovered
// as the kernel does, the log's ring being shorter.
func TestFastCommit(t *testing.T) {
	needMount(t)
	c := combo{"fast_commit", 64, []string{"-t", "ext4", "-b", "1024", "-O", "fast_commit", "-J", "size=2,fast_commit_size=256"}, "", jbd2.SumV3 | jbd2.FastCommit}
	m := mountImage(t, format(t, c.mib, c.mkfs...), 0, "")
	w := newWorker(t, m.dir, seedOf(t))
	pending, exact, wrapped := 0, 0, 0
	for i := range 14 {
		w.steps(15)
		if i%2 == 0 {
			fullCommit(t, m.dir)
		}
		img := m.snapshot()
		_, j, _ := journalOf(t, img)
		if !j.super.Features.Has(jbd2.FastCommit) {
			t.Fatal("the journal has no fast commits")
		}
		_, err := recoverFile(t, copyFile(t, img), Options{DryRun: true})
		switch {
		case errors.Is(err, ErrRefused):
			pending++
		case err != nil:
			t.Fatal(err)
		default:
			exact++
			if log := logOf(t, img); log.Head != 0 && log.Head <= j.super.Start {
				wrapped++
			}
			compareFast(t, img)
		}
	}
	m.unmount()
	t.Logf("%d refused, %d recovered, %d of them wrapped", pending, exact, wrapped)
	if pending == 0 || exact == 0 {
		t.Error("both kinds must occur")
	}
}

// fullCommit makes the kernel commit a whole transaction: renaming a
// directory is nothing a fast commit can hold.
func fullCommit(t *testing.T, dir string) {
	t.Helper()
	a, b := dir+"/full-a", dir+"/full-b"
	f, err := os.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := errors.Join(os.Mkdir(a, 0o755), os.Rename(a, b), os.Remove(b), unix.Lsetxattr(dir, "trusted.full", []byte{1}, 0), f.Sync()); err != nil {
		t.Fatal(err)
	}
}

// compareFast compares with the kernel only: e2fsck is wrong about fast commits.
func compareFast(t *testing.T, img string) {
	t.Helper()
	ours := copyFile(t, img)
	rep, err := recoverFile(t, ours, Options{})
	if err != nil {
		t.Fatal(err)
	}
	compareKernel(t, img, ours, "", rep)
	checkFsck(t, ours, "", rep)
}
