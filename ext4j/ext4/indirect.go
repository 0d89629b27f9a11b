package ext4

import (
	"encoding/binary"
	"fmt"
)

// indirect walks the block map of ext2 and ext3: twelve blocks, then one
// block of numbers, one of such blocks, and one of those.
func (m *mapper) indirect(i Inode) error {
	for k := 0; k < 15 && !m.full(); k++ {
		depth := max(k-11, 0)
		if err := m.pointer(binary.LittleEndian.Uint32(i.Block[4*k:]), depth); err != nil {
			return err
		}
	}
	return nil
}

// pointer follows one number: of a data block at depth 0, else of a block of numbers.
func (m *mapper) pointer(at uint32, depth int) error {
	switch {
	case at == 0:
		return fmt.Errorf("%w: hole at block %d", ErrCorrupt, m.next)
	case depth == 0:
		return m.add(m.next, uint64(at), 1)
	}
	b := make([]byte, m.fs.BlockSize)
	if err := m.fs.ReadBlock(uint64(at), b); err != nil {
		return err
	}
	m.nodes = append(m.nodes, uint64(at))
	for ; len(b) > 0 && !m.full(); b = b[4:] {
		if err := m.pointer(binary.LittleEndian.Uint32(b), depth-1); err != nil {
			return err
		}
	}
	return nil
}
