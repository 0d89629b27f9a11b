package follow

import (
	"sync"

	"kagami/ext4j/ext4"
)

// tails is where rule 4 may apply: blocks that hold the end of a committed file.
type tails struct {
	mu      sync.RWMutex
	bs      int64
	byBlock map[uint64]tail
	byInode map[uint32]place
	byNode  map[uint64][]uint32 // extent block → inodes whose end it leads to
}

// tail is the end of a file in its block.
type tail struct {
	inode uint32
	used  int // bytes of the block below the committed size
}

type place struct{ block, node uint64 }

// maxTails bounds the table; a full one is emptied.
const maxTails = 1 << 16

func (t *tails) reset(bs int64) {
	t.mu.Lock()
	t.bs, t.byBlock, t.byInode, t.byNode = bs, map[uint64]tail{}, map[uint32]place{}, map[uint64][]uint32{}
	t.mu.Unlock()
}

// forget removes what is known of an inode's end.
func (t *tails) forget(inode uint32) {
	t.mu.Lock()
	defer t.mu.Unlock()
	old, ok := t.byInode[inode]
	if !ok {
		return
	}
	delete(t.byInode, inode)
	if t.byBlock[old.block].inode == inode {
		delete(t.byBlock, old.block)
	}
}

// set notes that inode ends used bytes into block, which node leads to (0: the inode itself).
func (t *tails) set(inode uint32, block, node uint64, used int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if len(t.byInode) >= maxTails || len(t.byNode) >= maxTails {
		clear(t.byBlock)
		clear(t.byInode)
		clear(t.byNode)
	}
	t.byBlock[block], t.byInode[inode] = tail{inode, used}, place{block, node}
	if node != 0 {
		t.byNode[node] = append(t.byNode[node], inode)
	}
}

// takeNode gives the inodes whose end an extent block led to, and forgets that it did.
func (t *tails) takeNode(node uint64) []uint32 {
	t.mu.Lock()
	defer t.mu.Unlock()
	inodes := t.byNode[node]
	delete(t.byNode, node)
	return inodes
}

func (t *tails) at(block uint64) (tail, bool) {
	t.mu.RLock()
	defer t.mu.RUnlock()
	v, ok := t.byBlock[block]
	return v, ok
}

func (t *tails) touches(off, n int64) bool {
	t.mu.RLock()
	defer t.mu.RUnlock()
	if len(t.byBlock) == 0 || t.bs == 0 {
		return false
	}
	for b := off / t.bs; b*t.bs < off+n; b++ {
		if _, ok := t.byBlock[uint64(b)]; ok {
			return true
		}
	}
	return false
}

// forgetTails: the content of block b has changed; ends that were found through it are void.
func (p *part) forgetTails(b uint64) {
	for _, inode := range p.tails.takeNode(b) {
		p.tails.forget(inode)
	}
}

// firstFile is the first inode that is not the file system's own.
const firstFile = 11

// noteInodes looks where the files of a block of an inode table end.
func (p *part) noteInodes(b uint64, data []byte) {
	first, count := p.groups.inodesOf(b)
	for i := range count {
		n := first + i
		p.tails.forget(n)
		in, ok := p.groups.inode(data, n)
		used := int(in.Size % uint64(p.bs))
		if !ok || n < firstFile || used == 0 || !in.Regular() || !in.PlainExtents() {
			continue
		}
		if at, node, ok := p.lookup(&in, in.Size/uint64(p.bs)); ok {
			p.tails.set(n, at, node, used)
		}
	}
}

// lookup finds where a block of a file lies, if a written extent holds it and
// the tree is at most one level deep; node is the extent block in between, or 0.
// A deeper tree, or a block that is not loaded, is not found.
func (p *part) lookup(in *ext4.Inode, logical uint64) (at, node uint64, ok bool) {
	if logical >= 1<<32 {
		return 0, 0, false
	}
	e := ext4.FindExtent(in.Block[:], uint32(logical))
	if e.Child != 0 {
		node = e.Child
		if node >= p.fs.Blocks {
			return 0, 0, false
		}
		data := p.content(node)
		if data == nil {
			return 0, 0, false
		}
		e = ext4.FindExtent(data, uint32(logical))
	}
	if !e.Written || e.Block >= p.fs.Blocks || e.Child != 0 {
		return 0, 0, false
	}
	return e.Block, node, true
}
