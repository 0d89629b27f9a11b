package ext4

import (
	"encoding/binary"
	"fmt"
)

// runWalker visits the blocks of a file that hold something, in logical order. Holes and
// unwritten extents are left out. The walk ends: extents must rise, so that no node is passed
// twice, and of a map of block numbers no more nodes are read than the file system has blocks.
type runWalker struct {
	fs    *FS
	yield func(Run) error
	node  func(block uint64) error // a block of the map itself; nil: nobody wants to know
	all   bool                     // unwritten extents count, too
	next  uint64                   // the first logical block that may come
	limit uint64                   // blocks from here on do not count
	nodes uint64
}

// Runs visits the file's blocks, in logical order, as far as they hold data. meta, if not nil, is told
// of the blocks that hold the map. Inline files have none.
func (d *Node) Runs(yield func(Run) error, meta func(block uint64) error) error {
	return d.runs(&runWalker{fs: d.fs, yield: yield, node: meta, limit: 1 << 32})
}

// AllRuns is Runs with the extents that were allocated and not written.
func (d *Node) AllRuns(yield func(Run) error, meta func(block uint64) error) error {
	return d.runs(&runWalker{fs: d.fs, yield: yield, node: meta, limit: 1 << 32, all: true})
}

func (d *Node) runs(w *runWalker) error {
	if d.Inline() || d.fastSymlink() {
		return nil
	}
	var err error
	if d.Flags&flagExtents != 0 {
		var n node
		if n, err = decodeNode(d.Block[:]); err == nil {
			err = w.extents(n, d.seed)
		}
	} else {
		err = w.indirect(d.Block[:])
	}
	if err != nil {
		return fmt.Errorf("blocks of inode %d: %w", d.Number, err)
	}
	return nil
}

func (w *runWalker) visit(block uint64) error {
	if w.nodes++; w.nodes > w.fs.Blocks {
		return fmt.Errorf("%w: its map has more blocks than the file system", ErrCorrupt)
	}
	if w.node != nil {
		return w.node(block)
	}
	return nil
}

func (w *runWalker) run(logical, physical, n uint64) error {
	if physical <= uint64(w.fs.FirstDataBlock) || physical >= w.fs.Blocks || n > w.fs.Blocks-physical {
		return fmt.Errorf("%w: block %d lies at %d (%d blocks), outside the file system", ErrCorrupt, logical, physical, n)
	}
	return w.yield(Run{Logical: logical, Physical: physical, Len: n})
}

func (w *runWalker) extents(n node, seed uint32) error {
	le := binary.LittleEndian
	for e := n.entries; len(e) > 0; e = e[extentEntry:] {
		first := uint64(le.Uint32(e))
		if first < w.next {
			return fmt.Errorf("%w: the extent at block %d comes after block %d", ErrCorrupt, first, w.next)
		}
		if n.depth > 0 {
			if err := w.child(e, n.depth-1, seed); err != nil {
				return err
			}
			continue
		}
		size, written := uint64(le.Uint16(e[4:])), true
		if size > maxInitialized {
			size, written = size-maxInitialized, false
		}
		if size == 0 || first+size > w.limit {
			return fmt.Errorf("%w: extent of %d blocks at block %d", ErrCorrupt, size, first)
		}
		w.next = first + size
		if !written && !w.all {
			continue
		}
		if err := w.run(first, uint64(le.Uint16(e[6:]))<<32|uint64(le.Uint32(e[8:])), size); err != nil {
			return err
		}
	}
	return nil
}

func (w *runWalker) child(e []byte, depth int, seed uint32) error {
	first, at, n, err := w.fs.extentChild(e, depth, seed)
	if err != nil {
		return err
	}
	if uint64(binary.LittleEndian.Uint32(n.entries)) < uint64(first) {
		return fmt.Errorf("%w: extent node at %d does not fit its parent", ErrCorrupt, at)
	}
	if err := w.visit(at); err != nil {
		return err
	}
	return w.extents(n, seed)
}

// extentChild reads the node below an index entry and checks it.
func (fs *FS) extentChild(e []byte, depth int, seed uint32) (first uint32, at uint64, n node, err error) {
	le := binary.LittleEndian
	first, at = le.Uint32(e), uint64(le.Uint16(e[8:]))<<32|uint64(le.Uint32(e[4:]))
	b := make([]byte, fs.BlockSize)
	if err := fs.ReadBlock(at, b); err != nil {
		return 0, 0, node{}, err
	}
	if n, err = decodeNode(b); err != nil {
		return 0, 0, node{}, err
	}
	if n.depth != depth || len(n.entries) == 0 {
		return 0, 0, node{}, fmt.Errorf("%w: extent node at %d does not fit its parent", ErrCorrupt, at)
	}
	if fs.ROCompat&MetadataCsum != 0 {
		end := extentEntry * (int(le.Uint16(b[4:])) + 1)
		if end+4 > len(b) || le.Uint32(b[end:]) != crc32c(seed, b[:end]) {
			return 0, 0, node{}, fmt.Errorf("%w of the extent node at %d", ErrChecksum, at)
		}
	}
	return first, at, n, nil
}

// indirect walks twelve block numbers, one block of numbers, one of such blocks, one of those.
func (w *runWalker) indirect(root []byte) error {
	for k := range 15 {
		if err := w.pointer(binary.LittleEndian.Uint32(root[4*k:]), max(k-11, 0)); err != nil {
			return err
		}
	}
	return nil
}

func (w *runWalker) pointer(at uint32, depth int) error {
	span := uint64(1)
	for range depth {
		span *= uint64(w.fs.BlockSize / 4)
	}
	if at == 0 {
		w.next += span
		return nil
	}
	if depth == 0 {
		w.next++
		return w.run(w.next-1, uint64(at), 1)
	}
	b := make([]byte, w.fs.BlockSize)
	if err := w.fs.ReadBlock(uint64(at), b); err != nil {
		return err
	}
	if err := w.visit(uint64(at)); err != nil {
		return err
	}
	for ; len(b) > 0; b = b[4:] {
		if err := w.pointer(binary.LittleEndian.Uint32(b), depth-1); err != nil {
			return err
		}
	}
	return nil
}
