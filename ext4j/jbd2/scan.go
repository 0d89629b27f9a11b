package jbd2

import (
	"fmt"
)

// Scan follows a log from its start to its end, by the rules of the kernel's
// recovery (PASS_SCAN of Linux 6.18):
//
//   - The log ends at a block without the magic, of another sequence than
//     expected, or of unknown type.
//   - A descriptor or revoke block with a wrong checksum is judged at the
//     commit block of its transaction: commit time before that of the previous one
//     means that the blocks are stale (the log ends); else the journal is corrupt.
//   - A commit block with a wrong checksum ends the log: stale if its commit
//     time is before the previous one; interrupted with async_commit; else damaged.
//     With async_commit and checksum v1, another commit block after it also
//     means damage. (The kernel's end then moves to a second bad commit of v2/v3; here
//     the first one stays the end.)
//
// Corruption that makes the kernel give up before it replays anything is an error that wraps
// ErrCorrupt; errors of read are returned wrapped. The blocks read are at
// most twice those of the ring (data blocks only with checksum v1), and the
// result holds at most as many entries.
func Scan(j Journal, read ReadBlock) (Log, error) {
	if err := j.check(); err != nil {
		return Log{}, err
	}
	if j.Start == 0 {
		return Log{End: EndEmpty, EndTID: j.Sequence}, nil
	}
	s := scanner{j: j, read: read, at: j.Start, tid: j.Sequence, buf: make([]byte, j.BlockSize), log: Log{Head: j.Start}}
	s.begin()
	for {
		done, err := s.step()
		if err != nil {
			return Log{}, err
		}
		if done {
			return s.log, nil
		}
	}
}

// scanner is the state of one Scan.
type scanner struct {
	j    Journal
	read ReadBlock
	buf  []byte
	tags []Tag
	log  Log

	at       uint32 // next block to look at
	used     int64  // blocks gone past so far
	tid      TID    // transaction expected
	cur      Transaction
	crc      uint32 // checksum v1 of the current transaction
	suspect  bool   // a descriptor or revoke block of it has a wrong checksum
	badEntry error  // a revoke block of it cannot be read; matters if it commits
	lastSec  uint64 // previous commit time
	ended    bool   // the end is found; reading on to see what follows an interrupted commit
}

// begin starts a transaction at the current block.
func (s *scanner) begin() {
	s.cur = Transaction{TID: s.tid, First: s.at}
	s.crc, s.suspect, s.badEntry = ^uint32(0), false, nil
}

// pass moves on by n blocks.
func (s *scanner) pass(n uint32) {
	s.at = s.j.next(s.at, n)
	s.used += int64(n)
}

// step looks at one log block.
func (s *scanner) step() (done bool, err error) {
	if s.used > 2*s.j.size() {
		return false, fmt.Errorf("%w: transaction %d has no end", ErrCorrupt, s.tid)
	}
	at := s.at
	if err := s.read(at, s.buf); err != nil {
		return false, fmt.Errorf("read block %d of the journal: %w", at, err)
	}
	h, ok := DecodeHeader(s.buf)
	switch {
	case !ok:
		return s.end(EndMagic, at), nil
	case h.Sequence != s.tid:
		return s.end(EndSequence, at), nil
	}
	s.pass(1)
	switch h.Type {
	case TypeDescriptor:
		return false, s.descriptor()
	case TypeRevoke:
		s.revoke(at)
		return false, nil
	case TypeCommit:
		return s.commit(at)
	}
	return s.end(EndType, at), nil
}

// end notes why and where the log ends, unless that is known already.
func (s *scanner) end(r Reason, at uint32) bool {
	if !s.ended {
		s.log.End, s.log.EndTID, s.log.EndAt = r, s.tid, at
	}
	return true
}

func (s *scanner) descriptor() error {
	tags, ok := s.j.Tags(s.tags[:0], s.buf)
	s.tags = tags
	if !ok {
		s.suspect = true
	}
	sum := s.j.Features.Has(SumV1) && !s.ended
	if sum {
		s.crc = crc32be(s.crc, s.buf)
	}
	for _, t := range tags {
		if !s.ended && s.used < 2*s.j.size() {
			s.cur.Blocks = append(s.cur.Blocks, Entry{Tag: t, Logical: s.at})
		}
		if sum {
			if err := s.read(s.at, s.buf); err != nil {
				return fmt.Errorf("read block %d of the journal: %w", s.at, err)
			}
			s.crc = crc32be(s.crc, s.buf)
		}
		s.pass(1)
	}
	return nil
}

func (s *scanner) revoke(at uint32) {
	r, ok, err := s.j.DecodeRevoke(s.buf)
	switch {
	case err != nil && s.badEntry == nil:
		s.badEntry = fmt.Errorf("block %d of the journal, transaction %d: %w", at, s.tid, err)
	case err == nil && !s.ended:
		s.cur.Revokes = append(s.cur.Revokes, at)
		s.cur.Revoked += uint64(r.Len())
	}
	if !ok {
		s.suspect = true
	}
}

func (s *scanner) commit(at uint32) (done bool, err error) {
	c, err := DecodeCommit(s.buf)
	if err != nil {
		return false, err
	}
	if s.suspect {
		if c.Sec >= s.lastSec {
			return false, fmt.Errorf("%w: wrong checksum of a descriptor or revoke block of transaction %d, committed at block %d", ErrCorrupt, s.tid, at)
		}
		return s.end(EndStale, at), nil
	}
	if s.ended && s.j.Features.Has(SumV1) {
		// The commit before this one was not merely interrupted.
		s.log.End = EndBadCommit
		return true, nil
	}
	sum := s.j.CommitSum(c, s.buf, s.crc)
	if sum == SumBad {
		if c.Sec < s.lastSec {
			return s.end(EndStale, at), nil
		}
		if !s.j.Features.Has(AsyncCommit) {
			return s.end(EndBadCommit, at), nil
		}
		s.end(EndInterrupted, at)
		s.ended = true
	}
	if !s.ended {
		if err := s.keep(c, sum, at); err != nil {
			return false, err
		}
	}
	s.lastSec = c.Sec
	s.tid++
	s.begin()
	return false, nil
}

// keep adds the current transaction, now committed at block at, to the log.
func (s *scanner) keep(c CommitBlock, sum SumState, at uint32) error {
	if s.badEntry != nil {
		return s.badEntry
	}
	if s.used > s.j.size() {
		return fmt.Errorf("%w: transaction %d runs into the log's start", ErrCorrupt, s.tid)
	}
	s.cur.Commit, s.cur.Sum, s.cur.Last = c, sum, at
	s.log.Transactions = append(s.log.Transactions, s.cur)
	s.log.Head = s.at
	return nil
}
