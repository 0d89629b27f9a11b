package ext4

import "encoding/binary"

// Found is what FindExtent found: the block itself, if a written extent holds
// it, or the child that leads on to it. All zero: a hole, an unwritten extent, or a damaged node.
type Found struct {
	Written bool
	Block   uint64 // if Written
	Child   uint64 // block of the next node; 0: there is none
}

// FindExtent looks up a block of a file in one node of its extent tree, root or not.
// Nothing is read: the caller goes on in Child, at most five times.
func FindExtent(b []byte, logical uint32) Found {
	n, err := decodeNode(b)
	if err != nil {
		return Found{}
	}
	le := binary.LittleEndian
	var last []byte
	for e := n.entries; len(e) > 0 && le.Uint32(e) <= logical; e = e[extentEntry:] {
		last = e[:extentEntry]
	}
	switch {
	case last == nil:
		return Found{}
	case n.depth > 0:
		return Found{Child: uint64(le.Uint16(last[8:]))<<32 | uint64(le.Uint32(last[4:]))}
	}
	length, first := uint32(le.Uint16(last[4:])), le.Uint32(last)
	if length > maxInitialized || logical-first >= length {
		return Found{}
	}
	return Found{Written: true, Block: uint64(le.Uint16(last[6:]))<<32 | uint64(le.Uint32(last[8:])) + uint64(logical-first)}
}

// PlainExtents reports that the file's blocks are mapped by extents and are
// what a reader sees: not verity.
func (i Inode) PlainExtents() bool {
	const verity = 0x100000
	return i.Flags&(flagExtents|verity) == flagExtents
}
