package ext4

import (
	"fmt"
	"slices"
	"sort"
)

// Run is a stretch of a file's blocks that lie next to each other.
type Run struct {
	Logical  uint64 // block of the file
	Physical uint64 // block of the file system
	Len      uint64 // blocks
}

// BlockMap says where the blocks of a file lie: runs without holes, in
// logical order from 0 on.
type BlockMap struct {
	runs   []Run
	sorted []Run // by Physical
	nodes  []uint64
}

// Runs are the map's runs in logical order. The caller must not change them.
func (m *BlockMap) Runs() []Run { return m.runs }

// Len is the number of blocks mapped.
func (m *BlockMap) Len() uint64 {
	if len(m.runs) == 0 {
		return 0
	}
	r := m.runs[len(m.runs)-1]
	return r.Logical + r.Len
}

// Physical is where a block of the file lies.
func (m *BlockMap) Physical(logical uint64) (uint64, bool) {
	i := sort.Search(len(m.runs), func(i int) bool { return m.runs[i].Logical+m.runs[i].Len > logical })
	if i == len(m.runs) {
		return 0, false
	}
	return m.runs[i].Physical + logical - m.runs[i].Logical, true
}

// Logical is which block of the file a block of the file system is.
func (m *BlockMap) Logical(physical uint64) (uint64, bool) {
	i := sort.Search(len(m.sorted), func(i int) bool { return m.sorted[i].Physical+m.sorted[i].Len > physical })
	if i == len(m.sorted) || m.sorted[i].Physical > physical {
		return 0, false
	}
	return m.sorted[i].Logical + physical - m.sorted[i].Physical, true
}

// Nodes are the blocks that hold the map itself, extents or block numbers,
// as far as it was read.
func (m *BlockMap) Nodes() []uint64 { return m.nodes }

// Contains reports whether a block of the file system belongs to the file.
func (m *BlockMap) Contains(physical uint64) bool {
	_, ok := m.Logical(physical)
	return ok
}

// MapInode makes the map of the first want blocks of a file. A hole, an
// unwritten extent, a block outside the file system and two blocks at one
// place are errors: a journal has none of them. Memory is bounded by want,
// the blocks read by about want and the depth of the tree.
func (fs *FS) MapInode(i Inode, want uint64) (*BlockMap, error) {
	m := &mapper{fs: fs, want: want}
	var err error
	if i.Flags&flagExtents != 0 {
		err = m.extents(i)
	} else {
		err = m.indirect(i)
	}
	if err == nil && m.next < want {
		err = fmt.Errorf("%w: block %d is not mapped", ErrCorrupt, m.next)
	}
	var bm *BlockMap
	if err == nil {
		bm, err = m.finish()
	}
	if err != nil {
		return nil, fmt.Errorf("block map of inode %d: %w", i.Number, err)
	}
	return bm, nil
}

// mapper collects runs; blocks must come in order and without holes.
type mapper struct {
	fs         *FS
	want, next uint64
	runs       []Run
	nodes      []uint64
}

func (m *mapper) full() bool { return m.next >= m.want }

// add maps n blocks from logical on; what exceeds want is dropped.
func (m *mapper) add(logical, physical, n uint64) error {
	if logical != m.next {
		return fmt.Errorf("%w: hole at block %d", ErrCorrupt, m.next)
	}
	if physical <= uint64(m.fs.FirstDataBlock) || physical >= m.fs.Blocks || n > m.fs.Blocks-physical {
		return fmt.Errorf("%w: block %d lies at %d (%d blocks), outside the file system", ErrCorrupt, logical, physical, n)
	}
	n = min(n, m.want-m.next)
	m.next += n
	if k := len(m.runs) - 1; k >= 0 && m.runs[k].Physical+m.runs[k].Len == physical {
		m.runs[k].Len += n
		return nil
	}
	m.runs = append(m.runs, Run{Logical: logical, Physical: physical, Len: n})
	return nil
}

func (m *mapper) finish() (*BlockMap, error) {
	sorted := slices.Clone(m.runs)
	slices.SortFunc(sorted, func(a, b Run) int {
		if a.Physical < b.Physical {
			return -1
		}
		return 1
	})
	for i := 1; i < len(sorted); i++ {
		if p := sorted[i-1]; p.Physical+p.Len > sorted[i].Physical {
			return nil, fmt.Errorf("%w: block %d is mapped twice", ErrCorrupt, sorted[i].Physical)
		}
	}
	return &BlockMap{runs: m.runs, sorted: sorted, nodes: m.nodes}, nil
}
