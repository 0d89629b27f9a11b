package follow

import (
	"container/list"
	"crypto/sha256"
)

// hashOf is the strong hash that equality is decided by.
func hashOf(b []byte) [sha256.Size]byte { return sha256.Sum256(b) }

// cache holds the content of blocks as the view has them: least recently
// used ones go when it is full.
type cache struct {
	limit, used int64
	m           map[uint64]*list.Element
	order       *list.List // of *cached, newest first
}

type cached struct {
	block uint64
	data  []byte
	copy  bool // a committed copy; else what the image has
}

func (c *cache) reset(limit int64) {
	c.limit, c.used, c.m, c.order = limit, 0, map[uint64]*list.Element{}, list.New()
}

func (c *cache) get(b uint64) []byte {
	e := c.m[b]
	if e == nil {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(*cached).data
}

// put keeps data, which becomes the cache's.
func (c *cache) put(b uint64, data []byte, isCopy bool) {
	c.drop(b)
	c.m[b] = c.order.PushFront(&cached{b, data, isCopy})
	c.used += int64(len(data))
	for c.used > c.limit && c.order.Len() > 1 {
		c.drop(c.order.Back().Value.(*cached).block)
	}
}

func (c *cache) drop(b uint64) {
	if e := c.m[b]; e != nil {
		c.used -= int64(len(e.Value.(*cached).data))
		c.order.Remove(e)
		delete(c.m, b)
	}
}

// settle: the image has what the committed copy had, or not.
func (c *cache) settle(b uint64, home bool) {
	if e := c.m[b]; e != nil && home {
		e.Value.(*cached).copy = false
	} else if e != nil {
		c.drop(b)
	}
}

// written keeps what the cache has of the image true.
func (c *cache) written(b uint64, at int64, data []byte) {
	if e := c.m[b]; e != nil && !e.Value.(*cached).copy {
		copy(e.Value.(*cached).data[at:], data)
	}
}

// content is a block as the view has it; nil: it is wanted now.
func (p *part) content(b uint64) []byte {
	if d := p.cache.get(b); d != nil {
		return d
	}
	if p.log.copies[b] != nil {
		p.want(wantCopy, b)
	} else {
		p.want(wantBlock, b)
	}
	return nil
}
