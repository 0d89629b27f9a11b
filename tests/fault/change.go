package fault

import (
	"bytes"
	"math/rand/v2"
)

type kind uint8

const (
	doWrite kind = iota // data nil: zeros
	doPunch
	doZero
	doAllocate
	doTruncate // off is the size
	doXattr
)

// change is one change of a file that is not durable yet.
type change struct {
	kind   kind
	off, n int64
	data   []byte
	name   string
}

func writeChange(p []byte, off int64) change {
	c := change{kind: doWrite, off: off, n: int64(len(p))}
	if bytes.Count(p, []byte{0}) != len(p) {
		c.data = bytes.Clone(p)
	}
	return c
}

// apply makes the part [from, to) of the change.
func (ch *change) apply(c *content, from, to int64) {
	switch ch.kind {
	case doWrite:
		if ch.data == nil {
			c.write(nil, from, to-from)
		} else {
			c.write(ch.data[from-ch.off:to-ch.off], from, to-from)
		}
	case doPunch:
		c.zero(from, to-from, false)
	case doZero:
		c.zero(from, to-from, true)
	case doAllocate:
		c.reserve(from, to-from)
	case doTruncate:
		c.truncate(ch.off)
	case doXattr:
		c.xattr[ch.name] = ch.data
	}
}

func (ch *change) applyAll(c *content) { ch.apply(c, ch.off, ch.off+ch.n) }

// whole changes happen or do not happen; the others are torn.
func (ch *change) whole() bool { return ch.kind == doTruncate || ch.kind == doXattr || ch.n == 0 }

// pieces cuts the change at random multiples of 512 bytes.
func (ch *change) pieces(rng *rand.Rand, f func(from, to int64)) {
	longest := max(1, ch.n/sectorBytes/64)
	if rng.IntN(3) == 0 {
		longest = max(longest, 16)
	}
	for o := ch.off; o < ch.off+ch.n; {
		run := (1 + rng.Int64N(longest)) * sectorBytes
		end := min(ch.off+ch.n, o-o%sectorBytes+run)
		f(o, end)
		o = end
	}
}

// A loss decides which part of a file's pending changes survives.
type loss func(rng *rand.Rand, c *content, pending []change)

// losses are the ways a power loss can leave a file. They are all possible
// under the contract of images; each finds other mistakes.
var losses = []loss{loseNothing, loseAll, losePrefix, loseWhole, loseSectors, loseMixed, loseByPage}

func loseNothing(_ *rand.Rand, c *content, pending []change) {
	for i := range pending {
		pending[i].applyAll(c)
	}
}

func loseAll(*rand.Rand, *content, []change) {}

// losePrefix keeps the first changes and tears the next one.
func losePrefix(rng *rand.Rand, c *content, pending []change) {
	n := rng.IntN(len(pending) + 1)
	loseNothing(rng, c, pending[:n])
	if n < len(pending) {
		tear(rng, c, &pending[n], 0.5)
	}
}

// loseWhole keeps each change or not.
func loseWhole(rng *rand.Rand, c *content, pending []change) {
	for i := range pending {
		if rng.IntN(2) == 0 {
			pending[i].applyAll(c)
		}
	}
}

// loseSectors tears every change.
func loseSectors(rng *rand.Rand, c *content, pending []change) {
	p := rng.Float64()
	for i := range pending {
		tear(rng, c, &pending[i], p)
	}
}

func loseMixed(rng *rand.Rand, c *content, pending []change) {
	for i := range pending {
		switch rng.IntN(4) {
		case 0:
		case 1:
			tear(rng, c, &pending[i], 0.5)
		default:
			pending[i].applyAll(c)
		}
	}
}

// loseByPage writes each page back as it was at some moment, as a kernel does.
func loseByPage(rng *rand.Rand, c *content, pending []change) {
	moment := map[int64]int{}
	for i := range pending {
		ch := &pending[i]
		if ch.whole() || ch.n > 16<<20 {
			if rng.IntN(2) == 0 {
				ch.applyAll(c)
			}
			continue
		}
		for o := ch.off; o < ch.off+ch.n; {
			pg := o / pageBytes
			end := min(ch.off+ch.n, (pg+1)*pageBytes)
			if _, ok := moment[pg]; !ok {
				moment[pg] = rng.IntN(len(pending) + 1)
			}
			if i < moment[pg] {
				ch.apply(c, o, end)
			}
			o = end
		}
	}
}

// tear keeps each piece of a change with probability p.
func tear(rng *rand.Rand, c *content, ch *change, p float64) {
	if ch.whole() {
		if rng.Float64() < p {
			ch.applyAll(c)
		}
		return
	}
	ch.pieces(rng, func(from, to int64) {
		if rng.Float64() < p {
			ch.apply(c, from, to)
		}
	})
	// The size may be written back before the data: then the rest reads as zeros.
	if ch.kind == doWrite && rng.IntN(3) == 0 {
		c.size = max(c.size, ch.off+ch.n)
	}
}
