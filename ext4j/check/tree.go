package check

import (
	"fmt"
	"math"

	"kagami/ext4j/ext4"
)

// directories counts the names of each inode.
func (c *checker) directories() error {
	for _, n := range c.dirs {
		if c.ctx.Err() != nil {
			return c.ctx.Err()
		}
		d, err := c.fs.Node(n)
		if err != nil {
			return c.damaged(fmt.Sprintf("inode %d", n), err)
		}
		where, first, seen := fmt.Sprintf("directory %d", n), 0, map[string]bool{}
		err = d.ReadDir(func(e ext4.Entry) error {
			if first++; first <= 2 && e.Name != [...]string{".", ".."}[first-1] && !d.Encrypted() {
				c.problem(where, "its name number %d is %q", first, e.Name)
			}
			if seen[e.Name] {
				c.problem(where, "%q is there twice", e.Name)
			}
			seen[e.Name] = true
			if e.Name == "." && e.Inode != n {
				c.problem(where, "it is inode %d to itself", e.Inode)
			}
			if !c.found.get(uint64(e.Inode)) {
				c.problem(where, "%q stands for inode %d, which is not in use", e.Name, e.Inode)
				return nil
			}
			if c.names[e.Inode] < math.MaxUint16 {
				c.names[e.Inode]++
			}
			return c.ctx.Err()
		})
		if err := c.damaged(where, err); err != nil {
			return err
		}
	}
	return nil
}

// linkCounts compares the names of each inode with its link count. Of a directory "." counts, and
// the ".." of each directory in it.
func (c *checker) linkCounts() {
	for n := uint32(ext4.RootInode); n <= c.fs.Inodes; n++ {
		if !c.found.get(uint64(n)) || n < firstInode && n != ext4.RootInode {
			continue
		}
		d, err := c.fs.Node(n)
		if err != nil || d.AttributeInode() || d.Number == c.fs.OrphanInum || d.Number == c.fs.JournalInum || d.Number == c.fs.QuotaProject() {
			continue // told before, or without a name
		}
		switch links, names := c.links[n], c.names[n]; {
		case names == 0 && links == 0:
			c.rep.Orphans++
			if c.fs.LastOrphan == 0 && c.fs.ROCompat&ext4.OrphanPresent == 0 {
				c.problem(fmt.Sprintf("inode %d", n), "it is in use, and neither has a name nor is it an orphan")
			}
		case names == 0:
			c.problem(fmt.Sprintf("inode %d", n), "it has no name, and a link count of %d", links)
		case names == math.MaxUint16 || d.Dir() && links == 1:
			// more than can be counted
		case links != names:
			c.problem(fmt.Sprintf("inode %d", n), "it has %d names, and a link count of %d", names, links)
		}
	}
}

// bitmaps compares what is claimed with what the bitmaps say.
func (c *checker) bitmaps() {
	for g := range c.fs.Groups {
		d, _, err := c.fs.Desc(g)
		if err != nil {
			return // told before
		}
		c.compare(g, d)
	}
}

// compare is one group of bitmaps, cluster by cluster.
func (c *checker) compare(g uint32, d ext4.GroupDesc) {
	start, n, per := c.fs.GroupStart(g), uint64(c.fs.GroupBlocks(g)), uint64(c.fs.ClusterBlocks)
	var lost, leaked uint64
	firstLost := uint64(0)
	for k := uint64(0); k < n; k += per {
		used := false
		for i := k; i < min(n, k+per); i++ {
			used = used || c.used.get(start+i)
		}
		marked := c.marked.get(start + k)
		if d.Flags&ext4.BlockUninit != 0 {
			marked = used
		}
		if used {
			c.rep.UsedBlocks += per
		}
		if used && !marked {
			if lost++; lost == 1 {
				firstLost = start + k
			}
		} else if marked && !used {
			leaked++
		}
	}
	where := fmt.Sprintf("group %d", g)
	if lost > 0 {
		c.problem(where, "%d blocks are in use and its bitmap calls them free, the first is %d", lost*per, firstLost)
	}
	if leaked > 0 {
		c.problem(where, "%d blocks are free and its bitmap calls them used", leaked*per)
	}
}
