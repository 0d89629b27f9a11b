package recover

import (
	"bytes"
	"errors"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// change edits an image's journal through a callback on block n of it.
func changeJournal(t testing.TB, img string, n uint32, edit func([]byte)) {
	t.Helper()
	_, j, _ := journalOf(t, img)
	b := make([]byte, j.super.BlockSize)
	if err := j.read(n, b); err != nil {
		t.Fatal(err)
	}
	edit(b)
	at, _ := j.bmap.Physical(uint64(n))
	f, err := os.OpenFile(img, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = f.WriteAt(b, int64(at)*int64(len(b)))
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
}

// logOf reads the log of an image.
func logOf(t testing.TB, img string) jbd2.Log {
	t.Helper()
	_, j, _ := journalOf(t, img)
	log, err := jbd2.Scan(j.super.Journal(), j.read)
	if err != nil {
		t.Fatal(err)
	}
	return log
}

// TestCuts ends the log early, at each of its last transactions, in ways
// a crash can: what e2fsck makes of that is made here too.
func TestCuts(t *testing.T) {
	needMount(t)
	seed := seedOf(t)
	for _, c := range []combo{combos[1], combos[3]} {
		t.Run(c.name, func(t *testing.T) {
			imgs := crashes(t, c, seed, 2)
			img := imgs[1]
			trs := logOf(t, img).Transactions
			for back := range min(2, len(trs)) {
				tr := trs[len(trs)-1-back]
				for name, at := range map[string]uint32{"commit": tr.Last, "first block": tr.First} {
					cut := copyFile(t, img)
					changeJournal(t, cut, at, func(b []byte) { clear(b) })
					rep := compareCut(t, cut)
					if want := len(trs) - 1 - back; rep.Transactions != want || rep.End != jbd2.EndMagic {
						t.Errorf("%s of transaction %d cut: %d transactions, want %d (%s)", name, tr.TID, rep.Transactions, want, rep.EndReason)
					}
				}
			}
		})
	}
}

// compareCut recovers an image that need not be consistent afterwards, and compares with e2fsck.
func compareCut(t *testing.T, img string) Report {
	t.Helper()
	ours := copyFile(t, img)
	rep, err := recoverFile(t, ours, Options{})
	if err != nil {
		t.Fatal(err)
	}
	compareE2fsck(t, img, ours, rep)
	return rep
}

// TestDamage: journals that the kernel does not accept.
func TestDamage(t *testing.T) {
	needMount(t)
	img := crashes(t, combos[0], seedOf(t), 2)[1]
	trs := logOf(t, img).Transactions
	tr := trs[len(trs)-2]
	flip := func(off int) func([]byte) { return func(b []byte) { b[off] ^= 0x10 } }
	refusedByKernel := func(t *testing.T, img string) {
		t.Helper()
		if m, err := tryMount(t, copyFile(t, img), unix.MS_RDONLY, ""); err == nil {
			m.unmount()
			t.Error("the kernel accepts this journal")
		}
	}

	t.Run("commit", func(t *testing.T) {
		bad := copyFile(t, img)
		changeJournal(t, bad, tr.Last, flip(50))
		refusedByKernel(t, bad)
		ours, theirs := copyFile(t, bad), copyFile(t, bad)
		rep, err := recoverFile(t, ours, Options{})
		if err != nil || rep.End != jbd2.EndBadCommit || !rep.MarkedErrors || rep.Transactions != len(trs)-2 {
			t.Fatalf("%+v, %v", rep, err)
		}
		compareDamaged(t, ours, theirs, rep.LastTID+2+jbd2.TID(ring(t, ours)))
	})
	t.Run("data", func(t *testing.T) {
		bad, e := copyFile(t, img), lastKept(trs)
		changeJournal(t, bad, e.Logical, flip(77))
		refusedByKernel(t, bad)
		ours, theirs := copyFile(t, bad), copyFile(t, bad)
		rep, err := recoverFile(t, ours, Options{})
		if err != nil || rep.Damaged != 1 || rep.BadBlocks[0].Block != e.Block || rep.MarkedErrors {
			t.Fatalf("%+v, %v", rep, err)
		}
		compareDamaged(t, ours, theirs, rep.LastTID+2)
	})
	t.Run("descriptor", func(t *testing.T) {
		bad := copyFile(t, img)
		changeJournal(t, bad, tr.Blocks[0].Logical-1, flip(1000))
		refusedByKernel(t, bad)
		if _, err := recoverFile(t, bad, Options{}); !errors.Is(err, ErrRefused) {
			t.Errorf("%v", err)
		}
	})
	t.Run("commit tail lost", func(t *testing.T) {
		// Only the kernel accepts this one.
		bad := copyFile(t, img)
		changeJournal(t, bad, tr.Last, func(b []byte) { copy(b[512:], bytes.Repeat([]byte{0xee}, 512)) })
		ours := copyFile(t, bad)
		rep, err := recoverFile(t, ours, Options{})
		if err != nil || rep.PartialTail != 1 || rep.Transactions != len(trs) {
			t.Fatalf("%+v, %v", rep, err)
		}
		compareKernel(t, bad, ours, "", rep)
	})
}

func ring(t *testing.T, img string) uint32 {
	_, j, _ := journalOf(t, img)
	return j.super.Last() - j.super.First
}

// lastKept is the last block of a log that no revoke voids.
func lastKept(trs []jbd2.Transaction) jbd2.Entry {
	blocks := trs[len(trs)-1].Blocks
	return blocks[len(blocks)-1]
}

// compareDamaged compares with what e2fsck does to the same image, the journal's sequence
// excepted: e2fsck leaves one there that could bring stale transactions back.
func compareDamaged(t *testing.T, ours, theirs string, next jbd2.TID) {
	t.Helper()
	t.Setenv("E2FSCK_TIME", "1800000000")
	out := run(t, 15, "e2fsck", "-y", "-E", "journal_only", theirs)
	fs, j, at := journalOf(t, ours)
	if j.super.Start != 0 || j.super.Sequence != next {
		t.Errorf("journal is left as %+v, want sequence %d", j.super, next)
	}
	if fs.LastOrphan != 0 {
		run(t, 15, "e2fsck", "-y", "-E", "journal_only", ours)
	}
	if d := differing(t, ours, theirs, int64(fs.BlockSize), area{ext4.Offset, ext4.Size}, area{at, jbd2.SuperblockSize}); len(d) > 0 {
		t.Errorf("blocks %v differ from e2fsck's\n%s", d, out)
	}
	if d := without(superFields(t, ours, theirs), "wtime", "wtime hi", "kbytes written", "checksum", "free blocks", "free inodes"); len(d) > 0 {
		t.Errorf("superblock differs from e2fsck's in %v\n%s", d, out)
	}
}

// TestErrorRecord: the record of errors is left as the kernel leaves it: as it
// is on disk, whatever the journal's copy of the superblock says.
func TestErrorRecord(t *testing.T) {
	needMount(t)
	m := mountImage(t, format(t, 64, "-t", "ext4", "-b", "4096"), 0, "")
	w := newWorker(t, m.dir, seedOf(t))
	w.steps(50)
	trigger := "/sys/fs/ext4/" + m.loop + "/trigger_fs_error"
	if err := os.WriteFile(trigger, []byte("kagami test"), 0); err != nil {
		missing(t, "no way to make the kernel note an error: %v", err)
	}
	w.steps(50)
	imgs := []string{m.snapshot()} // the record is in the journal only
	unix.Sync()
	w.steps(50)
	imgs = append(imgs, m.snapshot()) // and on disk
	m.unmount()
	for i, img := range imgs {
		ours := copyFile(t, img)
		rep, err := recoverFile(t, ours, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if fs, _, _ := journalOf(t, ours); fs.State&ext4.StateErrors == 0 {
			t.Errorf("image %d: no mark of errors: state %d", i, fs.State)
		}
		if count := rawAt(t, ours, ext4.Offset+0x194, 1)[0]; int(count) != i {
			t.Errorf("image %d: %d errors on record", i, count)
		}
		compareKernel(t, img, ours, "", rep)
	}
}
