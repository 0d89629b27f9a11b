package recover

import (
	"bytes"
	"fmt"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// job is a recovery that is decided and not yet written.
type job struct {
	fs      *ext4.FS // as it is
	journal *journal
	view    *view // as it will be
	rep     *Report

	disk   ext4.Raw                  // the superblock as it is
	replay ext4.Raw                  // of step 2: replayed, needs_recovery still set
	final  ext4.Raw                  // of step 4
	empty  [jbd2.SuperblockSize]byte // the journal's superblock of step 3
}

// sector is what a device writes whole or not at all, in bytes.
const sector = 512

// prepare reads and checks everything and decides what will be written.
func (k *job) prepare(size int64) error {
	log, err := k.scan()
	if err != nil {
		return err
	}
	k.view.journal = k.journal
	limit := uint64(size) / uint64(k.fs.BlockSize)
	if k.view.copies, err = collect(k.journal, log, limit, k.rep); err != nil {
		return err
	}
	k.rep.Written = len(k.view.copies)
	if err := k.superblocks(); err != nil {
		return err
	}
	k.emptyJournal(log)
	return k.checkTorn()
}

// scan follows the log and notes what it holds.
func (k *job) scan() (jbd2.Log, error) {
	log, err := jbd2.Scan(k.journal.super.Journal(), k.journal.read)
	if err != nil {
		return log, asRefusal("journal", err)
	}
	pending, err := jbd2.FastPending(k.journal.super, log, k.journal.read)
	if err != nil {
		return log, asRefusal("journal", err)
	}
	if pending {
		return log, refuse("the journal holds fast commits after transaction %d; only the kernel can replay them", log.EndTID-1)
	}
	r := k.rep
	r.End, r.EndReason, r.Transactions = log.End, log.End.String(), len(log.Transactions)
	for _, tr := range log.Transactions {
		if tr.Sum == jbd2.SumPartial {
			r.PartialTail++
		}
	}
	if n := len(log.Transactions); n > 0 {
		r.FirstTID, r.LastTID, r.LastCommit = log.Transactions[0].TID, log.Transactions[n-1].TID, log.Transactions[n-1].Commit.Time()
	}
	r.MarkedErrors = k.journal.super.Errno != 0 || log.End == jbd2.EndBadCommit
	return log, nil
}

// superblocks decides both versions of the superblock and checks that they
// still lead to the same journal.
func (k *job) superblocks() error {
	k.disk = k.fs.Raw()
	if err := k.read(k.replay[:], ext4.Offset); err != nil {
		return err
	}
	k.replay.KeepErrors(&k.disk)
	state := k.replay.State() | k.disk.State()&ext4.StateErrors
	if k.rep.MarkedErrors {
		state |= ext4.StateErrors
	}
	if k.rep.Damaged > 0 {
		state &^= ext4.StateValid
	}
	k.replay.SetState(state)
	k.replay.SetIncompat(k.replay.Incompat() | ext4.Recover)
	k.replay.SetChecksum()
	k.view.patches = []patch{{ext4.Offset, k.replay[:]}}
	after, err := ext4.Probe(k.view, 0, k.view.size)
	if err != nil {
		return asRefusal("superblock in the journal", err)
	}
	if err := k.journal.sameIn(after); err != nil {
		return asRefusal("after the replay", err)
	}
	return k.finish(after)
}

// finish decides the last version of the superblock.
func (k *job) finish(after *ext4.FS) error {
	blocks, inodes, err := after.CountFree()
	if err != nil {
		return asRefusal("free counts", err)
	}
	k.final = k.replay
	k.final.SetFree(blocks, inodes, after.Incompat&ext4.Bit64 != 0)
	k.final.SetIncompat(k.final.Incompat() &^ ext4.Recover)
	k.final.SetChecksum()
	k.view.patches[0].data = k.final[:]
	after.FreeBlocks, after.FreeInodes = blocks, inodes
	describe(k.rep, after)
	return nil
}

// emptyJournal decides the journal's superblock.
func (k *job) emptyJournal(log jbd2.Log) {
	k.empty = k.journal.raw
	if log.End == jbd2.EndEmpty {
		// The kernel leaves the sequence of an empty log alone as well, until it commits.
		if k.journal.super.Errno != 0 {
			k.journal.super.ClearErrno(k.empty[:])
		}
	} else {
		k.journal.super.MarkEmpty(k.empty[:], log.Next(k.journal.super.Journal()), log.Head)
	}
	k.view.patches = append(k.view.patches, patch{k.journalAt(), k.empty[:sector]})
}

// journalAt is the offset of the journal's superblock in the file system.
func (k *job) journalAt() int64 {
	at, _ := k.journal.bmap.Physical(0) // mapped: the superblock was read from there
	return int64(at) * int64(k.fs.BlockSize)
}

// checkTorn refuses a superblock with a wrong checksum, unless it is one that a
// recovery was writing when it was interrupted (see the package's doc).
func (k *job) checkTorn() error {
	if k.disk.ChecksumOK() {
		return nil
	}
	if !bytes.Equal(k.disk[sector:], k.replay[sector:]) && !bytes.Equal(k.disk[sector:], k.final[sector:]) {
		return refuse("%w of the superblock", ext4.ErrChecksum)
	}
	k.rep.Resumed = true
	return nil
}

// read fills p from the view.
func (k *job) read(p []byte, off int64) error {
	if n, err := k.view.ReadAt(p, off); n < len(p) {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}
