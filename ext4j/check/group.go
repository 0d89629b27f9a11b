package check

import (
	"cmp"
	"errors"
	"fmt"

	"kagami/ext4j/ext4"
)

// group looks at a descriptor, its bitmaps and its inodes.
func (c *checker) group(g uint32) error {
	where := fmt.Sprintf("group %d", g)
	d, ok, err := c.fs.Desc(g)
	if err != nil {
		return err
	}
	if !ok {
		c.problem(where, "the descriptor's checksum is wrong")
	}
	table := c.fs.InodeTableBlocks()
	for _, at := range []uint64{d.BlockBitmap, d.InodeBitmap, d.InodeTable, d.InodeTable + table - 1} {
		if at <= uint64(c.fs.FirstDataBlock) || at >= c.fs.Blocks {
			c.problem(where, "its bitmaps or inodes lie outside the file system, at block %d", at)
			return nil
		}
	}
	c.claimEach(where, d.BlockBitmap, 1)
	c.claimEach(where, d.InodeBitmap, 1)
	c.claimEach(where, d.InodeTable, table)
	if err := c.blockBitmap(g, d, where); err != nil {
		return err
	}
	return c.inodeTable(g, d, where)
}

func (c *checker) blockBitmap(g uint32, d ext4.GroupDesc, where string) error {
	start, n := c.fs.GroupStart(g), uint64(c.fs.GroupBlocks(g))
	if d.Flags&ext4.BlockUninit != 0 {
		return nil // what it would hold is what is claimed of it
	}
	b := make([]byte, c.fs.BlockSize)
	if err := c.fs.ReadBlock(d.BlockBitmap, b); err != nil {
		return err
	}
	if c.fs.ROCompat&ext4.MetadataCsum != 0 && !c.fs.BlockBitmapOK(d, b) {
		c.problem(where, "the checksum of its block bitmap is wrong")
	}
	free := uint32(0)
	per := uint64(c.fs.ClusterBlocks)
	for k := uint64(0); k*per < n; k++ {
		if b[k/8]>>(k%8)&1 == 0 {
			free++
			continue
		}
		for i := k * per; i < min(n, (k+1)*per); i++ {
			c.marked.set(start + i)
		}
	}
	if free != d.FreeBlocks {
		c.problem(where, "its block bitmap has %d free, its descriptor says %d", free, d.FreeBlocks)
	}
	return nil
}

func (c *checker) inodeTable(g uint32, d ext4.GroupDesc, where string) error {
	bitmap := make([]byte, c.fs.BlockSize)
	if d.Flags&ext4.InodeUninit == 0 {
		if err := c.fs.ReadBlock(d.InodeBitmap, bitmap); err != nil {
			return err
		}
		if !c.fs.InodeBitmapOK(d, bitmap) {
			c.problem(where, "the checksum of its inode bitmap is wrong")
		}
	}
	free, dirs := uint32(0), uint32(0)
	for k := range c.fs.InodesPerGroup {
		n := g*c.fs.InodesPerGroup + k + 1
		if bitmap[k/8]>>(k%8)&1 == 0 {
			free++
			continue
		}
		dir, err := c.inode(n)
		if err != nil {
			return err
		}
		if dir {
			dirs++
		}
	}
	if free != d.FreeInodes {
		c.problem(where, "its inode bitmap has %d free, its descriptor says %d", free, d.FreeInodes)
	}
	if dirs != d.UsedDirs {
		c.problem(where, "it has %d directories, its descriptor says %d", dirs, d.UsedDirs)
	}
	return nil
}

// reserved inodes have no name; which of them are in use depends on features.
const firstInode = 11

// inode looks at one that is in use, and tells whether it is a directory.
func (c *checker) inode(n uint32) (dir bool, err error) {
	where := fmt.Sprintf("inode %d", n)
	d, err := c.fs.Node(n)
	if err != nil {
		c.rep.Inodes++
		c.found.set(uint64(n))
		c.links[n], c.names[n] = 0, 0
		return false, c.damaged(where, err)
	}
	if n < firstInode && n != ext4.RootInode && d.Mode == 0 && d.Size == 0 && d.Blocks512 == 0 {
		return false, nil // reserved, and nobody uses it
	}
	c.rep.Inodes++
	c.found.set(uint64(n))
	c.links[n] = d.Links
	if d.Dir() {
		c.rep.Directories++
		c.dirs = append(c.dirs, n)
	}
	if k := d.Mode & ext4.ModeKind; n >= firstInode && k == 0 {
		c.problem(where, "it is in use and of no kind")
	}
	return d.Dir(), c.blocks(where, d)
}

// blocks claims what an inode uses.
func (c *checker) blocks(where string, d *ext4.Node) error {
	if b := d.XattrBlock(); b != 0 && !c.xattrs[b] {
		c.xattrs[b] = true
		c.claimEach(where, b, 1)
	}
	if _, err := d.Xattrs(); err != nil {
		if err := c.damaged(where, err); err != nil {
			return err
		}
	}
	switch d.Mode & ext4.ModeKind {
	case ext4.ModeChar, ext4.ModeBlock, ext4.ModeFIFO, ext4.ModeSocket:
		return nil // what would be a map is something else
	}
	if d.Symlink() {
		if _, err := d.Readlink(); err != nil && !errors.Is(err, ext4.ErrUnsupported) {
			if err := c.damaged(where, err); err != nil {
				return err
			}
		}
	}
	if c.claims/4 > c.fs.Blocks {
		return nil // told before
	}
	err := d.AllRuns(func(r ext4.Run) error { return cmp.Or(c.ctx.Err(), c.claim(where, r.Physical, r.Len)) },
		func(block uint64) error { return c.claim(where, block, 1) })
	return c.damaged(where, err)
}
