package follow

import (
	"crypto/sha256"
	"fmt"

	"kagami/ext4j/epoch"
	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// log is what is known of the journal: its superblock, the transactions between
// tail and head, and the blocks written from head on.
type log struct {
	bmap  *ext4.BlockMap
	bs    int64
	super jbd2.Superblock
	raw   [jbd2.SuperblockSize]byte
	ring  jbd2.Journal
	nodes map[uint64]bool // blocks of the file system that hold the journal's map

	head uint32   // where the next transaction begins
	tid  jbd2.TID // which it is
	txs  []tx     // committed, oldest first, from the tail on

	copies map[uint64]*committed

	// From head on:
	pend      map[uint32]*pending // what was written
	pendBytes int64
	limit     int64
	known     bitset // blocks that are in pend, or hold no block of transaction tid or later
	cur       parser
	uncertain bool // the block where parsing stopped is not known
}

// tx is a committed transaction of the log.
type tx struct {
	tid    jbd2.TID
	first  uint32
	blocks []uint64 // that it holds copies of
}

// committed is the newest committed copy of a block.
type committed struct {
	tid     jbd2.TID
	logical uint32
	escaped bool
	hash    [sha256.Size]byte
	// home: the block was seen to be written with this content; diverged: it
	// was written with another one since, and is not trusted any more.
	home, diverged bool
}

// pending is a block of the log's free part.
type pending struct {
	data []byte
	lsn  epoch.LSN // 0: read from the image
}

// parser is how far the transaction at head is understood.
type parser struct {
	pos     uint32
	used    int64 // blocks gone past
	entries []jbd2.Entry
	revokes []uint64
	err     error // a checksum or length that is wrong, if the transaction commits
}

func (g *log) reset() { *g = log{} }

func (g *log) open(fs *ext4.FS, m *ext4.BlockMap, raw []byte, limit int64) error {
	super, err := checkSuper(fs, m, raw)
	if err != nil {
		return err
	}
	*g = log{bmap: m, bs: int64(fs.BlockSize), super: super, ring: super.Journal(), nodes: map[uint64]bool{}, limit: limit,
		copies: map[uint64]*committed{}, pend: map[uint32]*pending{}, known: newBitset(super.MaxLen)}
	for _, b := range m.Nodes() {
		g.nodes[b] = true
	}
	copy(g.raw[:], raw)
	g.begin()
	return nil
}

func checkSuper(fs *ext4.FS, m *ext4.BlockMap, raw []byte) (jbd2.Superblock, error) {
	super, err := jbd2.DecodeSuperblock(raw)
	if err == nil {
		err = super.Check(fs.BlockSize, m.Len())
	}
	return super, err
}

// begin sets the log to begin at its tail, with nothing known of it.
func (g *log) begin() {
	g.head, g.tid, g.txs = g.super.Start, g.super.Sequence, nil
	clear(g.copies)
	g.forgetPend()
	g.known.clear()
	g.restartParser()
	g.uncertain = false
}

func (g *log) forgetPend() {
	clear(g.pend)
	g.pendBytes = 0
}

func (g *log) restartParser() { g.cur = parser{pos: g.head} }

func (g *log) empty() bool { return g.super.Start == 0 }

func (g *log) size() uint32 { return g.ring.Last - g.ring.First }

// next is the block n after at, round the ring.
func (g *log) next(at uint32, n int64) uint32 {
	return g.ring.First + uint32((int64(at-g.ring.First)+n)%int64(g.size()))
}

// dist is how far b lies behind a in the ring.
func (g *log) dist(a, b uint32) uint32 { return (b - a + g.size()) % g.size() }

// holds tells whether block l lies between tail and head.
func (g *log) holds(l uint32) bool { return g.dist(g.super.Start, l) < g.dist(g.super.Start, g.head) }

// place is the offset of block l of the journal in the part, bytes.
func (g *log) place(l uint32) int64 {
	at, _ := g.bmap.Physical(uint64(l))
	return int64(at) * g.bs
}

// logical tells which block of the journal a block of the file system is.
func (g *log) logical(b uint64) (uint32, bool) {
	if g.bmap == nil {
		return 0, false
	}
	l, ok := g.bmap.Logical(b)
	return uint32(l), ok
}

// keep remembers a block of the free part.
func (g *log) keep(l uint32, data []byte, lsn epoch.LSN) bool {
	if old := g.pend[l]; old != nil {
		old.data, old.lsn = append(old.data[:0], data...), lsn
		return true
	}
	if g.pendBytes+int64(len(data)) > g.limit {
		return false
	}
	g.pend[l] = &pending{clone(data), lsn}
	g.pendBytes += int64(len(data))
	g.known.set(l)
	return true
}

// dull tells whether a block can be no part of transaction tid or a later one.
func (g *log) dull(data []byte) bool {
	h, ok := jbd2.DecodeHeader(data)
	return !ok || g.tid.After(h.Sequence)
}

// loaded takes a block read from the image. all: its content may be needed, whatever it is.
func (g *log) loaded(l uint32, data []byte, all bool) {
	if g.known.has(l) || g.pend[l] != nil {
		return // written since
	}
	if all || !g.dull(data) {
		if g.keep(l, data, 0) {
			return
		}
		g.cur.err = fmt.Errorf("a transaction has more than %d bytes", g.limit)
		return
	}
	g.known.set(l)
}

// learn notes a write to the journal while the log is empty.
func (g *log) learn(l uint32, data []byte) {
	if g.dull(data) {
		g.known.set(l)
	} else {
		g.known.unset(l)
	}
}

// caughtUp drops what was read beyond the log's end and can be no part of it.
func (g *log) caughtUp() {
	for l, e := range g.pend {
		if e.lsn == 0 && g.dull(e.data) {
			g.dropPend(l)
		}
	}
}

func (g *log) dropPend(l uint32) {
	if e := g.pend[l]; e != nil {
		g.pendBytes -= int64(len(e.data))
		delete(g.pend, l)
	}
}

// bitset is a set of the journal's blocks.
type bitset []uint64

func newBitset(n uint32) bitset { return make(bitset, n/64+1) }

func (s bitset) has(i uint32) bool { return int(i/64) < len(s) && s[i/64]>>(i%64)&1 != 0 }
func (s bitset) set(i uint32)      { s[i/64] |= 1 << (i % 64) }
func (s bitset) unset(i uint32)    { s[i/64] &^= 1 << (i % 64) }
func (s bitset) clear()            { clear(s) }
