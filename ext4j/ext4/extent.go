package ext4

import (
	"encoding/binary"
	"fmt"
)

// An extent tree's node is a header, 12 bytes, and entries of 12 bytes:
//
//	header  0 u16 magic 0xf30a   2 u16 entries   4 u16 room   6 u16 depth   8 u32 generation
//	index   0 u32 first block    4 u32 child lo  8 u16 child hi
//	extent  0 u32 first block    4 u16 length    6 u16 place hi   8 u32 place lo
//
// A node in a block of its own ends in a CRC-32C after the room for entries.
const (
	extentMagic    = 0xf30a
	maxExtentDepth = 5
	extentEntry    = 12
	// maxInitialized is the largest length of a written extent; larger ones are unwritten.
	maxInitialized = 32768
)

// node is one extent node with its entries in range.
type node struct {
	depth   int
	entries []byte
}

func decodeNode(b []byte) (node, error) {
	le := binary.LittleEndian
	entries, room, depth := int(le.Uint16(b[2:])), int(le.Uint16(b[4:])), int(le.Uint16(b[6:]))
	if le.Uint16(b) != extentMagic || entries > room || room > len(b)/extentEntry-1 || depth > maxExtentDepth {
		return node{}, fmt.Errorf("%w: extent node with magic 0x%x, %d of %d entries, depth %d", ErrCorrupt, le.Uint16(b), entries, room, depth)
	}
	return node{depth: depth, entries: b[extentEntry : extentEntry*(entries+1)]}, nil
}

// extents walks the tree of an inode.
func (m *mapper) extents(i Inode) error {
	n, err := decodeNode(i.Block[:])
	if err != nil {
		return err
	}
	return m.node(n, i.seed)
}

// node walks a node and what is below it. Depth falls by one at each level,
// and every leaf must go on where the last one stopped, so the walk ends:
// an empty node below the root is refused.
func (m *mapper) node(n node, seed uint32) error {
	for e := n.entries; len(e) > 0 && !m.full(); e = e[extentEntry:] {
		var err error
		if n.depth == 0 {
			err = m.extent(e)
		} else {
			err = m.child(e, n.depth-1, seed)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (m *mapper) extent(e []byte) error {
	le := binary.LittleEndian
	n := uint64(le.Uint16(e[4:]))
	if n == 0 || n > maxInitialized {
		return fmt.Errorf("%w: extent at block %d is empty or unwritten", ErrCorrupt, le.Uint32(e))
	}
	return m.add(uint64(le.Uint32(e)), uint64(le.Uint16(e[6:]))<<32|uint64(le.Uint32(e[8:])), n)
}

func (m *mapper) child(e []byte, depth int, seed uint32) error {
	first, at, n, err := m.fs.extentChild(e, depth, seed)
	if err != nil {
		return err
	}
	m.nodes = append(m.nodes, at)
	if uint64(first) != m.next {
		return fmt.Errorf("%w: extent node at %d does not fit its parent", ErrCorrupt, at)
	}
	return m.node(n, seed)
}
