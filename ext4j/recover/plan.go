package recover

import (
	"fmt"
	"slices"

	"kagami/ext4j/jbd2"
)

// copyOf is where the content of a block comes from.
type copyOf struct {
	logical uint32 // block of the journal
	escaped bool
}

// collector finds, for every journaled block, the copy to be replayed.
type collector struct {
	j      *journal
	format jbd2.Journal
	limit  uint64 // blocks on the device
	rep    *Report

	revoked map[uint64]jbd2.TID // of blocks that occur in tags only
	copies  map[uint64]copyOf
	buf     []byte
}

// collect applies the kernel's rules: a copy is void if its block was revoked by
// its own or a later transaction; one with a wrong checksum is skipped and
// counted; of the others the newest is replayed.
func collect(j *journal, log jbd2.Log, limit uint64, rep *Report) (map[uint64]copyOf, error) {
	c := &collector{
		j: j, format: j.super.Journal(), limit: limit, rep: rep,
		revoked: map[uint64]jbd2.TID{}, copies: map[uint64]copyOf{}, buf: make([]byte, j.super.BlockSize),
	}
	for _, tr := range log.Transactions {
		for _, e := range tr.Blocks {
			c.copies[e.Block] = copyOf{} // a block that occurs; its copy is found below
		}
	}
	for _, tr := range log.Transactions {
		if err := c.revokes(tr); err != nil {
			return nil, err
		}
	}
	clear(c.copies)
	for _, tr := range log.Transactions {
		for _, e := range tr.Blocks {
			if err := c.entry(tr.TID, e); err != nil {
				return nil, err
			}
		}
	}
	return c.copies, nil
}

// revokes notes the newest revoke of each block, as far as the block occurs in the log.
func (c *collector) revokes(tr jbd2.Transaction) error {
	for _, at := range tr.Revokes {
		if err := c.j.read(at, c.buf); err != nil {
			return fmt.Errorf("read block %d of the journal: %w", at, err)
		}
		r, _, err := c.format.DecodeRevoke(c.buf)
		if err != nil {
			return asRefusal("journal", err)
		}
		c.rep.Revokes += uint64(r.Len())
		for block := range r.All() {
			if _, occurs := c.copies[block]; !occurs {
				continue
			}
			if by, ok := c.revoked[block]; !ok || tr.TID.After(by) {
				c.revoked[block] = tr.TID
			}
		}
	}
	return nil
}

func (c *collector) entry(tid jbd2.TID, e jbd2.Entry) error {
	c.rep.Logged++
	if by, ok := c.revoked[e.Block]; ok && jbd2.Revoked(tid, by) {
		c.rep.Skipped++
		return nil
	}
	if e.Block >= c.limit {
		return refuse("transaction %d writes block %d, outside the device of %d blocks", tid, e.Block, c.limit)
	}
	if c.j.bmap.Contains(e.Block) {
		return refuse("transaction %d writes block %d, which is part of the journal", tid, e.Block)
	}
	if err := c.j.read(e.Logical, c.buf); err != nil {
		return fmt.Errorf("read block %d of the journal: %w", e.Logical, err)
	}
	if !c.format.DataOK(tid, e.Tag, c.buf) {
		c.damaged(BadBlock{TID: tid, Block: e.Block, Logical: e.Logical})
		return nil
	}
	c.copies[e.Block] = copyOf{logical: e.Logical, escaped: e.Escaped()}
	return nil
}

func (c *collector) damaged(b BadBlock) {
	c.rep.Damaged++
	if len(c.rep.BadBlocks) < maxBadBlocks {
		c.rep.BadBlocks = append(c.rep.BadBlocks, b)
	}
}

// sortedBlocks are the keys of copies in rising order.
func sortedBlocks(copies map[uint64]copyOf) []uint64 {
	blocks := make([]uint64, 0, len(copies))
	for b := range copies {
		blocks = append(blocks, b)
	}
	slices.Sort(blocks)
	return blocks
}
