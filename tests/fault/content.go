package fault

import "maps"

const (
	pageBytes   = 4096
	sectorBytes = 512
	// chunkPages is how many pages one word array of the allocation map covers.
	chunkPages = 4096
)

type page [pageBytes]byte

// zeroPage stands for every page that was written full of zeros; it is never written to.
var zeroPage page

// content is a sparse file: pages that were written, and which pages have
// space reserved. Every page in pages is allocated too.
type content struct {
	size  int64
	pages map[int64]*page
	alloc map[int64]*[chunkPages / 64]uint64
	count int64 // pages allocated
	xattr map[string][]byte
}

func newContent() *content {
	return &content{pages: map[int64]*page{}, alloc: map[int64]*[chunkPages / 64]uint64{}, xattr: map[string][]byte{}}
}

func (c *content) clone() *content {
	n := &content{size: c.size, count: c.count, pages: make(map[int64]*page, len(c.pages)),
		alloc: make(map[int64]*[chunkPages / 64]uint64, len(c.alloc)), xattr: maps.Clone(c.xattr)}
	for i, p := range c.pages {
		if p != &zeroPage {
			q := *p
			p = &q
		}
		n.pages[i] = p
	}
	for i, w := range c.alloc {
		v := *w
		n.alloc[i] = &v
	}
	return n
}

func (c *content) allocated(pg int64) bool {
	w := c.alloc[pg/chunkPages]
	return w != nil && w[pg%chunkPages/64]&(1<<(pg%64)) != 0
}

func (c *content) setAllocated(pg int64, on bool) {
	if c.allocated(pg) == on {
		return
	}
	w := c.alloc[pg/chunkPages]
	if w == nil {
		w = new([chunkPages / 64]uint64)
		c.alloc[pg/chunkPages] = w
	}
	w[pg%chunkPages/64] ^= 1 << (pg % 64)
	if on {
		c.count++
	} else {
		c.count--
	}
}

// missing counts the pages of [off, off+n) that have no space, up to limit.
func (c *content) missing(off, n, limit int64) int64 {
	var m int64
	for pg := off / pageBytes; pg*pageBytes < off+n && m < limit; pg++ {
		if !c.allocated(pg) {
			m++
		}
	}
	return m
}

func (c *content) read(p []byte, off int64) {
	for len(p) > 0 {
		in := off % pageBytes
		n := min(int64(len(p)), pageBytes-in)
		if pg := c.pages[off/pageBytes]; pg != nil {
			copy(p[:n], pg[in:])
		} else {
			clear(p[:n])
		}
		p, off = p[n:], off+n
	}
}

// write stores p, or n zeros when p is nil.
func (c *content) write(p []byte, off, n int64) {
	c.size = max(c.size, off+n)
	for n > 0 {
		pg, in := off/pageBytes, off%pageBytes
		k := min(n, pageBytes-in)
		if p == nil && k == pageBytes {
			c.pages[pg] = &zeroPage
		} else if q := c.own(pg); p == nil {
			clear(q[in : in+k])
		} else {
			copy(q[in:in+k], p)
		}
		c.setAllocated(pg, true)
		if p != nil {
			p = p[k:]
		}
		off, n = off+k, n-k
	}
}

// own returns a page that may be written to.
func (c *content) own(pg int64) *page {
	q := c.pages[pg]
	if q == nil || q == &zeroPage {
		q = new(page)
		c.pages[pg] = q
	}
	return q
}

// zero makes [off, off+n) read as zeros within the size; the space of whole pages
// is given back, or reserved when keep is set.
func (c *content) zero(off, n int64, keep bool) {
	if keep {
		c.reserve(off, n)
	}
	if n > int64(len(c.pages))*pageBytes { // a long range over few pages
		for pg := range c.pages {
			lo, hi := max(off, pg*pageBytes), min(off+n, (pg+1)*pageBytes)
			if lo < hi {
				c.zeroInPage(pg, lo-pg*pageBytes, hi-pg*pageBytes)
			}
		}
	} else {
		for o := off; o < off+n; {
			pg, in := o/pageBytes, o%pageBytes
			k := min(off+n-o, pageBytes-in)
			c.zeroInPage(pg, in, in+k)
			o += k
		}
	}
	if !keep {
		c.free((off+pageBytes-1)/pageBytes, (off+n)/pageBytes)
	}
}

func (c *content) zeroInPage(pg, lo, hi int64) {
	switch {
	case c.pages[pg] == nil:
	case hi-lo == pageBytes:
		delete(c.pages, pg)
	default:
		clear(c.own(pg)[lo:hi])
	}
}

func (c *content) reserve(off, n int64) {
	for pg := off / pageBytes; pg*pageBytes < off+n; pg++ {
		c.setAllocated(pg, true)
	}
}

// free gives back the pages [from, to).
func (c *content) free(from, to int64) {
	for ch := range c.alloc {
		for pg := max(from, ch*chunkPages); pg < min(to, (ch+1)*chunkPages); pg++ {
			c.setAllocated(pg, false)
		}
	}
}

func (c *content) truncate(size int64) {
	if size < c.size {
		c.zero(size, c.size-size, false)
		const end = 1 << 50
		for pg := range c.pages {
			if pg*pageBytes >= size {
				delete(c.pages, pg)
			}
		}
		c.free((size+pageBytes-1)/pageBytes, end)
	}
	c.size = size
}

// nextData finds the next run of written pages, or ok false.
func (c *content) nextData(off int64) (start, end int64, ok bool) {
	first := int64(-1)
	for pg := range c.pages {
		if (pg+1)*pageBytes > off && (first < 0 || pg < first) {
			first = pg
		}
	}
	if first < 0 || first*pageBytes >= c.size || off >= c.size {
		return 0, 0, false
	}
	last := first
	for c.pages[last+1] != nil {
		last++
	}
	return max(off, first*pageBytes), min((last+1)*pageBytes, c.size), true
}
