package jbd2

import "fmt"

// ReadBlock fills p, one block long, with a block of the journal, numbered
// within the journal.
type ReadBlock func(logical uint32, p []byte) error

// Journal is where a log lies and what it should start with.
type Journal struct {
	Format
	First, Last uint32 // the ring [First, Last)
	Start       uint32 // first block of the log in use; 0: empty
	Sequence    TID    // of the transaction expected there
}

// next is the block after n, n blocks being counted round the ring.
func (j Journal) next(at, n uint32) uint32 {
	size := uint64(j.Last - j.First)
	return j.First + uint32((uint64(at-j.First)+uint64(n))%size)
}

// size is the number of blocks in the ring.
func (j Journal) size() int64 { return int64(j.Last) - int64(j.First) }

func (j Journal) check() error {
	switch {
	case j.BlockSize < SuperblockSize || j.BlockSize > 1<<16 || j.BlockSize&(j.BlockSize-1) != 0:
		return fmt.Errorf("%w: block size %d", ErrCorrupt, j.BlockSize)
	case j.First == 0 || j.First >= j.Last:
		return fmt.Errorf("%w: log of blocks %d to %d", ErrCorrupt, j.First, j.Last)
	case j.Start != 0 && (j.Start < j.First || j.Start >= j.Last):
		return fmt.Errorf("%w: log starts at block %d, outside %d to %d", ErrCorrupt, j.Start, j.First, j.Last)
	}
	return nil
}

// Entry is one data block of a transaction: its tag and where it lies in the journal.
type Entry struct {
	Tag
	Logical uint32
}

// Transaction is one committed transaction.
type Transaction struct {
	TID    TID
	Commit CommitBlock
	Sum    SumState
	// First and Last are the journal blocks of its first block and of its commit block.
	First, Last uint32
	Blocks      []Entry  // in log order
	Revokes     []uint32 // journal blocks that are its revoke blocks
	Revoked     uint64   // entries in them
}

// Reason says why the log ended where it did.
type Reason uint8

// The reasons.
const (
	EndEmpty       Reason = iota // the superblock says that the log is empty
	EndMagic                     // the next block is no log block
	EndSequence                  // the next block is of another transaction
	EndType                      // the next block is of unknown type
	EndStale                     // wrong checksums in blocks that an older use of the log left behind
	EndInterrupted               // async_commit: the commit block's checksum is wrong, the commit was interrupted
	EndBadCommit                 // the commit block's checksum is wrong: the journal is damaged there
)

func (r Reason) String() string {
	names := [...]string{
		EndEmpty: "the log is empty", EndMagic: "no further log block", EndSequence: "blocks of another transaction",
		EndType: "block of unknown type", EndStale: "stale blocks of an earlier use",
		EndInterrupted: "interrupted commit", EndBadCommit: "damaged commit block",
	}
	if int(r) < len(names) {
		return names[r]
	}
	return fmt.Sprintf("reason %d", uint8(r))
}

// Log is a log read to its end.
type Log struct {
	Transactions []Transaction
	End          Reason
	// EndTID is the first transaction that is not in the log, EndAt the
	// journal block at which that was decided.
	EndTID TID
	EndAt  uint32
	// Head is the journal block after the last commit block, or the log's start when it
	// holds no whole transaction; 0 for an empty log.
	Head uint32
}

// Next is the sequence for a log that is emptied after its recovery: one more than
// EndTID, as in the kernel and e2fsck, so that what an interrupted transaction
// left behind is never read as part of a new one. After a damaged commit whole
// transactions with valid checksums may follow in the ring; Next is then past all of them.
func (l Log) Next(j Journal) TID {
	if l.End == EndBadCommit {
		return l.EndTID + 1 + TID(j.Last-j.First)
	}
	return l.EndTID + 1
}
