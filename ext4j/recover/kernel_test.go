package recover

import (
	"bytes"
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// combo is one kind of file system as the kernel writes it.
type combo struct {
	name  string
	mib   int64
	mkfs  []string
	mount string
	want  jbd2.Features
}

// combos are the kinds this package must recover exactly. The first quickCombos run
// in every go test, all with EXT4_SOAK set to the number of rounds.
var combos = []combo{
	{"default 4k", 64, []string{"-t", "ext4", "-b", "4096"}, "", jbd2.SumV3},
	{"small journal 1k", 32, []string{"-t", "ext4", "-b", "1024", "-J", "size=1"}, "", jbd2.SumV3},
	{"data=journal", 64, []string{"-t", "ext4", "-b", "4096", "-J", "size=8"}, "data=journal", jbd2.SumV3},
	{"checksum v1", 64, []string{"-t", "ext4", "-b", "4096", "-O", "^metadata_csum"}, "journal_checksum", jbd2.SumV1},
	{"indirect", 64, []string{"-t", "ext4", "-b", "1024", "-O", "^extent,^64bit,^metadata_csum", "-J", "size=2"}, "", 0},
	{"meta_bg", 64, []string{"-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"}, "", jbd2.SumV3},
	{"bigalloc", 64, []string{"-t", "ext4", "-b", "4096", "-O", "bigalloc", "-C", "16384"}, "", jbd2.SumV3},
	{"async commit", 64, []string{"-t", "ext4", "-b", "4096"}, "journal_async_commit,data=writeback", jbd2.SumV3 | jbd2.AsyncCommit},

	{"32 bit", 64, []string{"-t", "ext4", "-b", "4096", "-O", "^64bit"}, "", jbd2.SumV3},
	{"no checksums", 64, []string{"-t", "ext4", "-b", "4096", "-O", "^metadata_csum"}, "", 0},
	{"no checksums 32 bit", 64, []string{"-t", "ext4", "-b", "4096", "-O", "^metadata_csum,^64bit"}, "", 0},
	{"checksum v1 32 bit", 64, []string{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^64bit"}, "journal_checksum", jbd2.SumV1},
	{"checksum v1 async", 64, []string{"-t", "ext4", "-b", "4096", "-O", "^metadata_csum"}, "journal_async_commit,data=writeback", jbd2.SumV1 | jbd2.AsyncCommit},
	{"checksum v1 data=journal", 64, []string{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum"}, "data=journal,journal_checksum", jbd2.SumV1},
	{"data=journal 1k small", 64, []string{"-t", "ext4", "-b", "1024", "-J", "size=2"}, "data=journal", jbd2.SumV3},
	{"writeback", 64, []string{"-t", "ext4", "-b", "4096"}, "data=writeback", jbd2.SumV3},
	{"nodelalloc", 64, []string{"-t", "ext4", "-b", "2048"}, "nodelalloc", jbd2.SumV3},
	{"ext3", 64, []string{"-t", "ext3", "-b", "4096"}, "", 0},
	{"ext3 1k data=journal", 64, []string{"-t", "ext3", "-b", "1024", "-J", "size=4"}, "data=journal", 0},
	{"uninit_bg", 64, []string{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"}, "", 0},
	{"csum seed", 64, []string{"-t", "ext4", "-b", "4096", "-O", "metadata_csum_seed"}, "", jbd2.SumV3},
	{"sparse_super2", 64, []string{"-t", "ext4", "-b", "1024", "-O", "sparse_super2,^resize_inode"}, "", jbd2.SumV3},
	{"no flex_bg", 64, []string{"-t", "ext4", "-b", "1024", "-O", "^flex_bg"}, "", jbd2.SumV3},
	{"inode 128", 64, []string{"-t", "ext4", "-b", "4096", "-I", "128"}, "", jbd2.SumV3},
	{"inode 1024", 64, []string{"-t", "ext4", "-b", "4096", "-I", "1024"}, "", jbd2.SumV3},
	{"inline_data", 64, []string{"-t", "ext4", "-b", "4096", "-O", "inline_data"}, "", jbd2.SumV3},
	{"orphan_file", 64, []string{"-t", "ext4", "-b", "4096", "-O", "orphan_file"}, "", jbd2.SumV3},
	{"ea_inode large_dir", 64, []string{"-t", "ext4", "-b", "4096", "-O", "ea_inode,large_dir"}, "", jbd2.SumV3},
	{"bigalloc 1k", 64, []string{"-t", "ext4", "-b", "1024", "-O", "bigalloc", "-C", "8192"}, "", jbd2.SumV3},
	{"bigalloc data=journal", 64, []string{"-t", "ext4", "-b", "4096", "-O", "bigalloc", "-C", "65536"}, "data=journal", jbd2.SumV3},
	{"meta_bg 4k", 128, []string{"-t", "ext4", "-b", "4096", "-O", "meta_bg,^resize_inode", "-g", "512"}, "", jbd2.SumV3},
	{"small groups", 64, []string{"-t", "ext4", "-b", "1024", "-g", "1024"}, "", jbd2.SumV3},
	{"tiny inodes", 64, []string{"-t", "ext4", "-b", "4096", "-N", "600"}, "", jbd2.SumV3},
}

// quickCombos is how many of combos run without EXT4_SOAK.
const quickCombos = 8

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
	list, points := combos[:quickCombos], 2
	if os.Getenv("EXT4_SOAK") != "" {
		list, points = combos, 5
	}
	wrapped := 0
	for _, c := range list {
		t.Run(c.name, func(t *testing.T) {
			seed := seedOf(t)
			for round := range soak(t) {
				for i, img := range crashes(t, c, seed+uint64(round), points) {
					t.Run(fmt.Sprintf("%d.%d", round, i), func(t *testing.T) {
						checkKind(t, c, img, &wrapped)
						compareRecoveries(t, img, c.mount)
					})
				}
			}
		})
	}
	if wrapped == 0 {
		t.Error("no log wrapped: the small journals are not small enough")
	}
}

// checkKind makes sure that an image is of the kind its combo is about.
func checkKind(t *testing.T, c combo, img string, wrapped *int) {
	t.Helper()
	fs, j, _ := journalOf(t, img)
	if fs.Incompat&ext4.Recover == 0 || j.super.Start == 0 {
		t.Fatalf("nothing to recover: %v, %+v", fs.Incompat, j.super)
	}
	const kinds = jbd2.SumV1 | jbd2.SumV2 | jbd2.SumV3 | jbd2.AsyncCommit
	if got := j.super.Features & kinds; got != c.want {
		t.Errorf("the journal has %v, want %v", got, c.want)
	}
	log, err := jbd2.Scan(j.super.Journal(), j.read)
	if err != nil {
		t.Fatal(err)
	}
	if log.Head != 0 && log.Head <= j.super.Start {
		*wrapped++
	}
}

// crashes makes images of n moments in the life of a file system.
func crashes(t testing.TB, c combo, seed uint64, n int) []string {
	t.Helper()
	img := format(t, c.mib, c.mkfs...)
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
func journalOf(t testing.TB, img string) (*ext4.FS, *journal, int64) {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, _ := f.Stat()
	fs, err := ext4.Probe(f, 0, st.Size())
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
	except := append(metaBgCopies(fs), area{ext4.Offset, ext4.Size}, area{at, jbd2.SuperblockSize})
	if d := differing(t, ours, theirs, int64(fs.BlockSize), except...); len(d) > 0 {
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

// metaBgCopies are the copies of group descriptors with meta_bg, which e2fsck
// renews whenever it writes the superblock; the kernel and this package leave them.
func metaBgCopies(fs *ext4.FS) []area {
	if fs.Incompat&ext4.MetaBg == 0 {
		return nil
	}
	var out []area
	per, bs := fs.BlockSize/fs.DescSize, int64(fs.BlockSize)
	for g := range fs.Groups {
		if g%per == 1 || g%per == per-1 {
			at := int64(fs.FirstDataBlock) + int64(g)*int64(fs.BlocksPerGroup)
			out = append(out, area{at * bs, 2 * bs}) // a copy of the superblock may come first
		}
	}
	return out
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
	if d := differing(t, ours, theirs, int64(fs.BlockSize), area{ext4.Offset, ext4.Size}, area{at, jbd2.SuperblockSize}); len(d) > 0 {
		t.Errorf("blocks %v differ from the kernel's", d)
	}
	if d := without(superFields(t, ours, theirs), "wtime", "wtime hi", "kbytes written", "checksum"); len(d) > 0 {
		t.Errorf("superblock differs from the kernel's in %v", d)
	}
	_, k, _ := journalOf(t, theirs)
	if j.super.Features.Has(jbd2.SumV2) {
		// The kernel makes v3 of checksums v2 when it mounts; no more than that may differ.
		j.super.Features ^= jbd2.SumV2 | jbd2.SumV3
		if j.super != k.super {
			t.Errorf("journal is left as %+v, the kernel leaves %+v", j.super, k.super)
		}
	} else if !bytes.Equal(j.raw[:], k.raw[:]) {
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
