// Package check looks whether an ext4 file system contradicts itself: what a read-only e2fsck would find in
// superblocks, descriptors, bitmaps, inodes, block maps, directories and link counts, and every checksum of metadata. It
// changes nothing.
//
// It is for file systems that need no recovery, or a view of them as recovered. Memory: two bits
// for each block, five bytes for each inode, the names of one directory.
package check

import (
	"context"
	"errors"
	"fmt"

	"kagami/ext4j/ext4"
)

// Problem is a contradiction, and where it was found.
type Problem struct {
	Where string `json:"where"`
	What  string `json:"what"`
}

// Report is what Run found.
type Report struct {
	Inodes      uint32 `json:"inodes"` // in use
	Directories uint32 `json:"directories"`
	UsedBlocks  uint64 `json:"used_blocks"`
	// Orphans are files without a name that the next mount takes away.
	Orphans  uint32    `json:"orphans,omitempty"`
	Problems []Problem `json:"problems"`
	// More counts further ones.
	More int `json:"more,omitempty"`
}

// maxProblems bounds Report.Problems.
const maxProblems = 1000

// Clean tells whether nothing was found.
func (r *Report) Clean() bool { return len(r.Problems) == 0 }

// Run checks a file system. progress, if not nil, is told of groups that were looked at. An error means that
// the check could not be made; damage is in the report.
func Run(ctx context.Context, fs *ext4.FS, progress func(done, total int)) (Report, error) {
	if uint64(fs.Inodes)*uint64(fs.InodeSize) > fs.Blocks*uint64(fs.BlockSize) { // also bounds the memory below by the image's size
		return Report{Problems: []Problem{{"superblock", fmt.Sprintf("%d inodes of %d bytes do not fit %d blocks", fs.Inodes, fs.InodeSize, fs.Blocks)}}}, nil
	}
	c := &checker{ctx: ctx, fs: fs, used: newBits(fs.Blocks), marked: newBits(fs.Blocks),
		found: newBits(uint64(fs.Inodes) + 1), links: make([]uint16, uint64(fs.Inodes)+1), names: make([]uint16, uint64(fs.Inodes)+1), xattrs: map[uint64]bool{}}
	c.rep.Problems = []Problem{}
	if err := c.run(progress); err != nil {
		return c.rep, err
	}
	return c.rep, nil
}

// bits is a set of small numbers.
type bits []uint64

func newBits(n uint64) bits { return make(bits, (n+63)/64) }

func (b bits) get(i uint64) bool { return b[i/64]>>(i%64)&1 != 0 }
func (b bits) set(i uint64)      { b[i/64] |= 1 << (i % 64) }

type checker struct {
	ctx    context.Context
	fs     *ext4.FS
	rep    Report
	used   bits            // blocks that something claims
	claims uint64          // so many in all
	marked bits            // blocks that a bitmap calls used
	found  bits            // inodes that are in use
	links  []uint16        // of each inode: its link count
	names  []uint16        // how many names it has, at most 65535
	dirs   []uint32        // directories
	xattrs map[uint64]bool // blocks of attributes, which files share
}

func (c *checker) problem(where, what string, args ...any) {
	if len(c.rep.Problems) == maxProblems {
		c.rep.More++
		return
	}
	c.rep.Problems = append(c.rep.Problems, Problem{where, fmt.Sprintf(what, args...)})
}

// damaged notes an error that says the file system is at fault; any other is returned.
func (c *checker) damaged(where string, err error) error {
	if err == nil || errors.Is(err, ext4.ErrCorrupt) || errors.Is(err, ext4.ErrChecksum) || errors.Is(err, ext4.ErrUnsupported) {
		if err != nil {
			c.problem(where, "%v", err)
		}
		return nil
	}
	return err
}

func (c *checker) run(progress func(done, total int)) error {
	raw := c.fs.Raw()
	if !raw.ChecksumOK() {
		c.problem("superblock", "its checksum is wrong")
	}
	if c.fs.State&ext4.StateErrors != 0 {
		c.problem("superblock", "the kernel has found errors before")
	}
	c.supers()
	for g := range c.fs.Groups {
		if c.ctx.Err() != nil {
			return context.Cause(c.ctx)
		}
		if err := c.group(g); err != nil {
			return err
		}
		if progress != nil {
			progress(int(g)+1, int(c.fs.Groups))
		}
	}
	if err := c.directories(); err != nil {
		return err
	}
	c.linkCounts()
	c.bitmaps()
	return nil
}

// errTooMuch ends the look at a map: what is claimed so far is more than there is, several times.
var errTooMuch = fmt.Errorf("%w: its blocks are not counted any more: too many are used more than once", ext4.ErrCorrupt)

// claim notes that something uses blocks.
func (c *checker) claim(where string, first, n uint64) error {
	if c.claims += n; c.claims/4 > c.fs.Blocks {
		return errTooMuch
	}
	c.claimEach(where, first, n)
	return nil
}

func (c *checker) claimEach(where string, first, n uint64) {
	for b := first; b < first+n; b++ {
		if b >= c.fs.Blocks {
			c.problem(where, "block %d is outside the file system", b)
			return
		}
		if c.used.get(b) {
			c.problem(where, "block %d is used by something else, too", b)
		}
		c.used.set(b)
	}
}

// supers claims superblocks and descriptors, and looks at the copies of the former.
func (c *checker) supers() {
	here := c.fs.Raw()
	c.fs.Supers(func(block uint64, super bool) {
		c.claimEach("superblocks and descriptors", block, 1)
		if !super || block <= 1 {
			return
		}
		b := make([]byte, c.fs.BlockSize)
		if err := c.fs.ReadBlock(block, b); err != nil {
			c.problem(fmt.Sprintf("copy of the superblock in block %d", block), "%v", err)
			return
		}
		var copyOf ext4.Raw
		copy(copyOf[:], b)
		if !copyOf.Same(&here) {
			c.problem(fmt.Sprintf("copy of the superblock in block %d", block), "it is of another file system, or damaged")
		}
	})
}
