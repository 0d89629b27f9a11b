package recover

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kagami/ext4j/jbd2"
	"kagami/ext4j/super"
)

// combo is one kind of file system as the kernel writes it.
type combo struct {
	name  string
	mib   int64
	mkfs  []string
	mount string
	prep  []string // debugfs commands after mkfs
}

// combos are the kinds this package must recover exactly. The first ones run
// in every go test, all with EXT4_SOAK set.
var combos = []combo{
	{"default 4k", 64, []string{"-t", "ext4", "-b", "4096"}, "", nil},
	{"small journal 1k wraps", 32, []string{"-t", "ext4", "-b", "1024", "-J", "size=1"}, "", nil},
	{"data=journal", 64, []string{"-t", "ext4", "-b", "4096", "-J", "size=8"}, "data=journal", nil},
	{"checksum v1", 64, []string{"-t", "ext4", "-b", "4096", "-O", "^metadata_csum"}, "journal_checksum", nil},
	{"indirect", 64, []string{"-t", "ext4", "-b", "1024", "-O", "^extent,^64bit,^metadata_csum", "-J", "size=2"}, "", nil},
	{"checksum v2", 64, []string{"-t", "ext4", "-b", "4096", "-O", "^64bit"}, "", []string{"jo -c -v 2", "jc"}},
}

func soak(t testing.TB) int {
	n, err := strconv.Atoi(os.Getenv("EXT4_SOAK"))
	if err != nil || n < 1 {
		return 1
	}
	return n
}

// seedOf is the seed of a test's random choices: EXT4_SEED or a fixed one, always printed.
func seedOf(t testing.TB) uint64 {
	seed, err := strconv.ParseUint(os.Getenv("EXT4_SEED"), 10, 64)
	if err != nil {
		seed = 1
	}
	t.Logf("EXT4_SEED=%d", seed)
	return seed
}

// TestKernelImages: for crash points in file systems written by the kernel, the
// result equals that of the kernel's own recovery and of e2fsck's.
func TestKernelImages(t *testing.T) {
	needMount(t)
	for _, c := range combos {
		t.Run(c.name, func(t *testing.T) {
			seed := seedOf(t)
			for round := range soak(t) {
				for i, img := range crashes(t, c, seed+uint64(round), 3) {
					t.Run(fmt.Sprintf("%d.%d", round, i), func(t *testing.T) { compareRecoveries(t, img, c.mount) })
				}
			}
		})
	}
}

// crashes makes images of n moments in the life of a file system.
func crashes(t testing.TB, c combo, seed uint64, n int) []string {
	t.Helper()
	img := format(t, c.mib, c.mkfs...)
	for _, cmd := range [][]string{c.prep} {
		if len(cmd) > 0 {
			script := t.TempDir() + "/script"
			if err := os.WriteFile(script, []byte(strings.Join(cmd, "\n")+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			run(t, 0, "debugfs", "-w", "-f", script, img)
		}
	}
	m := mountImage(t, img, 0, c.mount)
	w := newWorker(t, m.dir, seed)
	var images []string
	for i := range n {
		w.orphans = i == n-1
		w.steps(60 + w.rng.IntN(150))
		images = append(images, m.snapshot())
	}
	w.release()
	m.unmount()
	return images
}

// compareRecoveries recovers copies of an image three ways.
func compareRecoveries(t *testing.T, img, mount string) {
	ours := copyFile(t, img)
	dry, err := recoverFile(t, ours, Options{DryRun: true})
	if err != nil {
		t.Fatal(err)
	}
	if d := differing(t, ours, img, 512); len(d) > 0 {
		t.Fatalf("a dry run wrote sectors %v", d)
	}
	rep, err := recoverFile(t, ours, Options{})
	if err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(dry) != fmt.Sprint(rep) {
		t.Errorf("dry run says %+v, then %+v", dry, rep)
	}
	t.Logf("%d transactions, %d of %d blocks written, %d revokes, %d skipped, orphans %v, %s", rep.Transactions, rep.Written, rep.Logged, rep.Revokes, rep.Skipped, rep.Orphans, rep.EndReason)
	compareE2fsck(t, img, ours, rep)
	compareKernel(t, img, ours, mount, rep)
	checkFsck(t, ours, mount, rep)
}

// journalOf probes an image and finds its journal's superblock.
func journalOf(t testing.TB, img string) (*super.FS, *journal, int64) {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, _ := f.Stat()
	fs, err := super.Probe(f, 0, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	j, err := openJournal(fs)
	if err != nil {
		t.Fatal(err)
	}
	at, _ := j.bmap.Physical(0)
	return fs, j, int64(at) * int64(fs.BlockSize)
}

// compareE2fsck: block for block, but for the superblock and the journal's superblock, of
// which the fields are compared. e2fsck goes on to release orphans; so that
// it does the same to the result, it is run on a copy of that too.
func compareE2fsck(t *testing.T, img, ours string, rep Report) {
	t.Helper()
	t.Setenv("E2FSCK_TIME", "1800000000")
	theirs := copyFile(t, img)
	out := run(t, 1, "e2fsck", "-y", "-E", "journal_only", theirs)
	fs, j, at := journalOf(t, ours)
	if rep.Orphans {
		ours = copyFile(t, ours)
		run(t, 1, "e2fsck", "-y", "-E", "journal_only", ours)
	}
	d := differing(t, ours, theirs, int64(fs.BlockSize), area{super.Offset, super.Size}, area{at, jbd2.SuperblockSize})
	if len(d) > 0 {
		t.Errorf("blocks %v differ from e2fsck's\n%s", d, out)
	}
	if d := without(superFields(t, ours, theirs), "wtime", "wtime hi", "kbytes written", "checksum", "free blocks", "free inodes"); len(d) > 0 {
		t.Errorf("superblock differs from e2fsck's in %v", d)
	}
	_, k, _ := journalOf(t, theirs)
	if j.super.Start != 0 || k.super.Sequence != j.super.Sequence || k.super.Start != 0 {
		t.Errorf("journal is left as %+v, e2fsck leaves %+v", j.super, k.super)
	}
}

// compareKernel mounts a copy read-only, which recovers and then writes nothing
// else but what orphans need.
func compareKernel(t *testing.T, img, ours, mount string, rep Report) {
	t.Helper()
	theirs := copyFile(t, img)
	m := mountImage(t, theirs, unix.MS_RDONLY, mount)
	want := tree(t, m.dir)
	m.unmount()
	if got := treeOf(t, copyFile(t, ours), mount); strings.Join(got, "\n") != strings.Join(want, "\n") {
		t.Errorf("trees differ (+ ours, - the kernel's):\n%s", diffLines(got, want))
	}
	if rep.Orphans {
		return
	}
	fs, j, at := journalOf(t, ours)
	if d := differing(t, ours, theirs, int64(fs.BlockSize), area{super.Offset, super.Size}, area{at, jbd2.SuperblockSize}); len(d) > 0 {
		t.Errorf("blocks %v differ from the kernel's", d)
	}
	if d := without(superFields(t, ours, theirs), "wtime", "wtime hi", "kbytes written", "checksum"); len(d) > 0 {
		t.Errorf("superblock differs from the kernel's in %v", d)
	}
	if _, k, _ := journalOf(t, theirs); !bytes.Equal(j.raw[:], k.raw[:]) {
		t.Errorf("journal is left as %+v, the kernel leaves %+v", j.super, k.super)
	}
}

// checkFsck: clean at once without orphans; with orphans, after the kernel has dealt with them.
func checkFsck(t *testing.T, ours, mount string, rep Report) {
	t.Helper()
	if rep.Orphans {
		ours = copyFile(t, ours)
		mountImage(t, ours, 0, mount).unmount()
	}
	run(t, 0, "e2fsck", "-fn", ours)
}
