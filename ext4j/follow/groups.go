package follow

import (
	"cmp"
	"fmt"
	"slices"

	"kagami/ext4j/ext4"
)

// groups are the block groups' descriptors as the view has them.
type groups struct {
	fs           *ext4.FS
	descs        []ext4.GroupDesc
	desc         map[uint64]uint32 // block of descriptors → which
	bitmaps      map[uint64]bool   // blocks that are bitmaps
	tables       []table           // inode tables, by place
	journalInode uint64            // block of the journal's inode
	verified     map[uint64]bool   // block bitmaps whose checksum was found right
}

type table struct {
	at    uint64
	group uint32
}

func (g *groups) reset() { *g = groups{} }

// load reads all descriptors of fs.
func (g *groups) load(fs *ext4.FS) error {
	*g = groups{fs: fs, descs: make([]ext4.GroupDesc, fs.Groups), desc: map[uint64]uint32{}, verified: map[uint64]bool{}}
	b := make([]byte, fs.BlockSize)
	var missing error
	for n := range (fs.Groups + fs.DescsPerBlock() - 1) / fs.DescsPerBlock() {
		at := fs.DescBlock(n)
		g.desc[at] = n
		if err := fs.ReadBlock(at, b); err != nil {
			missing = err // read on: all that is missing is wanted at once
			continue
		}
		if err := g.decode(n, b); err != nil {
			return err
		}
	}
	if missing != nil {
		return missing
	}
	g.index()
	return nil
}

func (g *groups) decode(n uint32, b []byte) error {
	per := g.fs.DescsPerBlock()
	for i := n * per; i < min((n+1)*per, g.fs.Groups); i++ {
		d, ok := g.fs.DecodeGroupDesc(i, b[(i-n*per)*g.fs.DescSize:])
		if !ok {
			return fmt.Errorf("the descriptor of group %d has a wrong checksum", i)
		}
		g.descs[i] = d
	}
	return nil
}

// index makes the lookups from a block's place to what it is.
func (g *groups) index() {
	g.bitmaps, g.tables = map[uint64]bool{}, g.tables[:0]
	for i, d := range g.descs {
		g.bitmaps[d.BlockBitmap], g.bitmaps[d.InodeBitmap] = true, true
		g.tables = append(g.tables, table{d.InodeTable, uint32(i)})
	}
	slices.SortFunc(g.tables, func(a, b table) int { return cmp.Compare(a.at, b.at) })
	n := g.fs.JournalInum - 1
	g.journalInode = g.descs[n/g.fs.InodesPerGroup].InodeTable + uint64(n%g.fs.InodesPerGroup)*uint64(g.fs.InodeSize)/uint64(g.fs.BlockSize)
}

// update takes a new copy of a block of descriptors.
func (g *groups) update(b uint64, data []byte) error {
	n := g.desc[b]
	per := g.fs.DescsPerBlock()
	before := slices.Clone(g.descs[n*per : min((n+1)*per, g.fs.Groups)])
	if err := g.decode(n, data); err != nil {
		return err
	}
	moved := false
	for i, old := range before {
		now := g.descs[int(n*per)+i]
		moved = moved || old.BlockBitmap != now.BlockBitmap || old.InodeBitmap != now.InodeBitmap || old.InodeTable != now.InodeTable
		delete(g.verified, now.BlockBitmap)
	}
	if moved {
		return fmt.Errorf("%w: bitmaps have moved", errGeometry)
	}
	return nil
}

func (g *groups) isDesc(b uint64) bool {
	_, ok := g.desc[b]
	return ok
}

func (g *groups) special(b uint64) bool { return g.bitmaps[b] || g.isDesc(b) }

// free is rule 2: the view's bitmap has the block as free. Where there is no
// bitmap yet (BLOCK_UNINIT), or it is not loaded, the answer is no.
func (p *part) free(b uint64) bool {
	fs, g := p.fs, &p.groups
	if b < uint64(fs.FirstDataBlock) || b >= fs.Blocks {
		return false
	}
	n := b - uint64(fs.FirstDataBlock)
	group, bit := n/uint64(fs.BlocksPerGroup), n%uint64(fs.BlocksPerGroup)
	d := g.descs[group]
	if d.Flags&ext4.BlockUninit != 0 {
		return false
	}
	bitmap := p.content(d.BlockBitmap)
	if bitmap == nil {
		return false
	}
	if !g.verified[d.BlockBitmap] && p.f.o.Mutant != StaleView {
		if !fs.BlockBitmapOK(d, bitmap) {
			return false
		}
		g.verified[d.BlockBitmap] = true
	}
	return bitmap[bit>>3]>>(bit&7)&1 == 0
}

// inode decodes inode n from the block of its table.
func (g *groups) inode(data []byte, n uint32) (ext4.Inode, bool) {
	at := uint64((n-1)%g.fs.InodesPerGroup) * uint64(g.fs.InodeSize) % uint64(g.fs.BlockSize)
	return g.fs.DecodeInode(n, data[at:])
}

// inodesOf gives the first inode of a block of an inode table, and how many it holds.
func (g *groups) inodesOf(b uint64) (first, count uint32) {
	i, found := slices.BinarySearchFunc(g.tables, b, func(t table, b uint64) int { return cmp.Compare(t.at, b) })
	if !found {
		i--
	}
	if i < 0 || b-g.tables[i].at >= g.fs.InodeTableBlocks() {
		return 0, 0
	}
	per := g.fs.BlockSize / g.fs.InodeSize
	index := uint32(b-g.tables[i].at) * per
	return g.tables[i].group*g.fs.InodesPerGroup + index + 1, min(per, g.fs.InodesPerGroup-index)
}
