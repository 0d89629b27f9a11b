package follow

import (
	"errors"
	"fmt"

	"kagami/ext4j/epoch"
	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// logBlock judges a write to block l of the journal: rule 1.
func (p *part) logBlock(l uint32, data []byte, at int64, lsn epoch.LSN) Class {
	g := &p.log
	switch {
	case l == 0:
		return p.logSuper(data, at)
	case at != 0 || int64(len(data)) != p.bs:
		p.restart("a block of its journal was written in part")
		return MustWait
	case (l < g.ring.First || l >= g.ring.Last) && p.f.o.Mutant == FastLog:
		return LogFree
	case l < g.ring.First || l >= g.ring.Last:
		return MustWait // fast commits
	case g.empty():
		g.learn(l, data)
		return MustWait
	case g.holds(l):
		if p.f.o.Mutant == IgnoreJournal {
			return LogFree
		}
		p.restart("the log was overwritten")
		return MustWait
	}
	if !g.keep(l, data, lsn) {
		p.restart(fmt.Sprintf("a transaction has more than %d bytes", g.limit))
		return MustWait
	}
	if g.dist(g.head, l) < g.dist(g.head, g.cur.pos) {
		g.restartParser()
	}
	before := g.tid
	if err := p.parse(); err != nil {
		p.unreadable(err)
		return MustWait
	}
	if g.uncertain || g.tid != before && p.f.o.Mutant != IgnoreCommit {
		return MustWait
	}
	return LogFree
}

// unreadable: a transaction committed that cannot be understood. It is read
// again from the image once; if that does not help, the log is left alone.
func (p *part) unreadable(err error) {
	if errors.Is(err, errGeometry) {
		p.restart(err.Error())
		return
	}
	if p.damaged++; p.damaged > maxDamaged {
		p.giveUp("its log cannot be read: " + err.Error())
		return
	}
	p.restart(err.Error())
}

// maxDamaged bounds how often a log is read again before its superblock changes.
const maxDamaged = 3

// parse goes on at the parser's position as far as the log is known.
func (p *part) parse() error {
	g := &p.log
	for {
		e := g.pend[g.cur.pos]
		if e == nil {
			if g.uncertain = !g.known.has(g.cur.pos); g.uncertain {
				p.prefetch()
			}
			return nil
		}
		g.uncertain = false
		h, ok := jbd2.DecodeHeader(e.data)
		if !ok || h.Sequence != g.tid {
			return nil
		}
		switch h.Type {
		case jbd2.TypeDescriptor:
			g.descriptor(e.data)
		case jbd2.TypeRevoke:
			g.revoke(e.data)
		case jbd2.TypeCommit:
			if done, err := p.commit(e.data); !done {
				return err
			}
		default:
			return nil
		}
		if g.cur.used > int64(g.size()) {
			return fmt.Errorf("transaction %d has no end", g.tid)
		}
	}
}

func (g *log) descriptor(block []byte) {
	c := &g.cur
	tags, ok := g.ring.Tags(nil, block)
	if !ok {
		c.err = fmt.Errorf("transaction %d has a descriptor with a wrong checksum", g.tid)
	}
	for i, t := range tags {
		c.entries = append(c.entries, jbd2.Entry{Tag: t, Logical: g.next(c.pos, 1+int64(i))})
	}
	g.pass(1 + int64(len(tags)))
}

func (g *log) pass(n int64) {
	g.cur.pos = g.next(g.cur.pos, n)
	g.cur.used += n
}

func (g *log) revoke(block []byte) {
	r, ok, err := g.ring.DecodeRevoke(block)
	if err == nil && !ok {
		err = fmt.Errorf("transaction %d has a revoke block with a wrong checksum", g.tid)
	}
	if err != nil {
		g.cur.err = err
	}
	for b := range r.All() {
		g.cur.revokes = append(g.cur.revokes, b)
	}
	g.pass(1)
}

// commit takes the transaction whose commit block the parser has reached.
func (p *part) commit(block []byte) (done bool, err error) {
	g := &p.log
	c, err := jbd2.DecodeCommit(block)
	switch sum := g.ring.CommitSum(c, block, 0); {
	case err != nil:
		return false, err
	case g.cur.err != nil:
		return false, g.cur.err
	case g.ring.Features.SumV2or3() && sum != jbd2.SumGood:
		return false, fmt.Errorf("the commit block of transaction %d has a wrong checksum", g.tid)
	}
	datas, err := p.contents()
	if err != nil || datas == nil {
		return false, err
	}
	if err := p.take(c, datas); err != nil {
		return false, err
	}
	return true, nil
}

// contents are the blocks of the transaction, unescaped; nil: some are not known yet.
func (p *part) contents() ([][]byte, error) {
	g := &p.log
	out := make([][]byte, 0, len(g.cur.entries))
	for _, e := range g.cur.entries {
		b := g.pend[e.Logical]
		switch {
		case b == nil && !g.known.has(e.Logical):
			g.uncertain = true
			p.want(wantLog, uint64(e.Logical))
			continue
		case b == nil:
			return nil, fmt.Errorf("transaction %d was committed before block %d of the journal was seen", g.tid, e.Logical)
		case !g.ring.DataOK(g.tid, e.Tag, b.data):
			return nil, fmt.Errorf("block %d in transaction %d has a wrong checksum", e.Block, g.tid)
		case e.Block >= p.fs.Blocks:
			return nil, fmt.Errorf("transaction %d writes block %d, outside the file system", g.tid, e.Block)
		}
		data := clone(b.data)
		if e.Escaped() {
			be.PutUint32(data, jbd2.Magic)
		}
		out = append(out, data)
	}
	if len(out) < len(g.cur.entries) {
		return nil, nil
	}
	return out, nil
}

// take makes the transaction part of the log.
func (p *part) take(c jbd2.CommitBlock, datas [][]byte) error {
	g := &p.log
	revoked := map[uint64]bool{}
	for _, b := range g.cur.revokes {
		revoked[b] = true
		if g.copies[b] != nil && p.f.o.Mutant != IgnoreRevoke {
			delete(g.copies, b)
			p.cache.drop(b)
		}
	}
	t := tx{tid: g.tid, first: g.head}
	for i, e := range g.cur.entries {
		if revoked[e.Block] {
			continue
		}
		if _, ok := g.logical(e.Block); ok {
			return fmt.Errorf("transaction %d writes block %d, which is part of the journal", g.tid, e.Block)
		}
		g.copies[e.Block] = &committed{tid: g.tid, logical: e.Logical, escaped: e.Escaped(), hash: hashOf(datas[i])}
		t.blocks = append(t.blocks, e.Block)
		if p.f.o.Mutant != StaleView {
			p.cache.put(e.Block, datas[i], true)
		}
	}
	g.tid = t.tid + 1
	first, last, end := g.consume()
	g.head, g.txs = end, append(g.txs, t)
	g.restartParser()
	p.f.label(Commit{Part: p.n, TID: uint32(t.tid), Time: c.Time(), Blocks: len(t.blocks), First: first, Last: last})
	if p.ph != following {
		return nil
	}
	p.chain++
	err := p.changed(t.blocks)
	p.prefetch()
	return err
}

// consume drops the blocks of the transaction that has committed from what is
// pending: none of them can be part of a later one, unless it says otherwise.
func (g *log) consume() (first, last epoch.LSN, end uint32) {
	end = g.next(g.cur.pos, 1)
	for l := g.head; l != end; l = g.next(l, 1) {
		e := g.pend[l]
		if e == nil {
			continue
		}
		if e.lsn != 0 && (first == 0 || e.lsn < first) {
			first = e.lsn
		}
		last = max(last, e.lsn)
		if !g.dull(e.data) {
			g.known.unset(l)
		}
		g.dropPend(l)
	}
	return first, last, end
}

// changed looks at what a committed transaction means for the view.
func (p *part) changed(blocks []uint64) error {
	if p.f.o.Mutant == StaleView {
		return nil
	}
	for _, b := range blocks {
		p.forgetTails(b)
	}
	for _, b := range blocks {
		data := p.cache.get(b)
		if data == nil {
			data = p.content(b) // a transaction larger than the cache: it is wanted now
		}
		if err := p.changedBlock(b, data); err != nil {
			return err
		}
	}
	return nil
}

var errGeometry = errors.New("the file system was resized or otherwise made anew")

func (p *part) changedBlock(b uint64, data []byte) error {
	switch {
	case b == p.superBlock(), p.groups.isDesc(b), b == p.groups.journalInode:
		if data == nil {
			return fmt.Errorf("block %d of a large transaction is to be read again", b)
		}
	}
	switch {
	case b == p.superBlock():
		raw := p.fs.Raw()
		if !sameGeometry(raw[:], data[int64(ext4.Offset)%p.bs:][:ext4.Size]) {
			return errGeometry
		}
	case p.groups.isDesc(b):
		return p.groups.update(b, data)
	case b == p.groups.journalInode:
		if in, ok := p.groups.inode(data, p.fs.JournalInum); !ok || in.Block != p.journal.Block || in.Size != p.journal.Size {
			return fmt.Errorf("%w: the journal has moved", errGeometry)
		}
	}
	delete(p.groups.verified, b)
	if data != nil {
		p.noteInodes(b, data)
	}
	return nil
}

// sameGeometry compares what of two superblocks decides where things lie and
// which features there are.
func sameGeometry(a, b []byte) bool {
	same := func(from, to int) bool { return string(a[from:to]) == string(b[from:to]) }
	return same(0x00, 0x08) && same(0x14, 0x2c) && same(0x4c, 0x50) && same(0x54, 0x5a) && same(0x5c, 0x78) &&
		same(0xd0, 0xe8) && same(0xfe, 0x108) && same(0x150, 0x154) && same(0x160, 0x164) && same(0x24c, 0x254) && same(0x270, 0x274)
}

// logSuper judges a write of the journal's superblock.
func (p *part) logSuper(data []byte, at int64) Class {
	g := &p.log
	if at != 0 || len(data) < jbd2.SuperblockSize {
		p.restart("the journal's superblock was written in part")
		return MustWait
	}
	data = data[:jbd2.SuperblockSize]
	super, err := checkSuper(p.fs, g.bmap, data)
	if err != nil || !sameLog(g.raw[:], data) {
		p.restart("the journal's superblock was written anew")
		return MustWait
	}
	old := g.super
	g.super = super
	copy(g.raw[:], data)
	switch {
	case p.ph != following:
		if super.Start != old.Start || super.Sequence != old.Sequence {
			p.restart("the log's tail moved while it was read")
		}
		return MustWait
	case super.Start == 0 || old.Start == 0:
		p.emptied()
		return MustWait
	case super.Start == old.Start && super.Sequence == old.Sequence:
		return LogSuper
	}
	return p.tailMoved(super)
}

// sameLog tells whether two superblocks differ only in what changes while the log is in use.
func sameLog(a, b []byte) bool {
	same := func(from, to int) bool { return string(a[from:to]) == string(b[from:to]) }
	return same(0, 0x18) && same(0x20, 0x58) && same(0x5c, 0xfc) && same(0x100, jbd2.SuperblockSize)
}

// emptied: the log has become empty, or begins. The chain of LIVE ends with it.
func (p *part) emptied() {
	p.f.mustWait()
	if p.f.o.Mutant != KeepView {
		p.chain = 0
	}
	for b, c := range p.log.copies {
		p.cache.settle(b, c.home)
	}
	p.log.begin()
	p.prefetch()
}

// tailMoved drops the transactions before the new tail. It can show nothing if
// every copy that goes is home.
func (p *part) tailMoved(super jbd2.Superblock) Class {
	g := &p.log
	n := 0
	for n < len(g.txs) && !(g.txs[n].tid == super.Sequence && g.txs[n].first == super.Start) {
		n++
	}
	if n == len(g.txs) && (super.Sequence != g.tid || super.Start != g.head) {
		p.restart("the log's tail moved to where no transaction begins")
		return MustWait
	}
	class := LogSuper
	for _, t := range g.txs[:n] {
		for _, b := range t.blocks {
			c := g.copies[b]
			if c == nil || c.tid != t.tid {
				continue
			}
			if !c.home && p.f.o.Mutant != TrustTail {
				class = MustWait
			}
			if p.f.o.Mutant == KeepCopies {
				continue
			}
			delete(g.copies, b)
			p.cache.settle(b, c.home)
			if !c.home {
				delete(p.groups.verified, b)
			}
		}
	}
	g.txs = append([]tx(nil), g.txs[n:]...)
	p.prefetch()
	return class
}

// prefetch wants the blocks that the next transactions will be written to, as
// far as they are not known: only what is known not to go on the log ends it.
func (p *part) prefetch() {
	g := &p.log
	if g.empty() {
		return
	}
	free := int64(g.size()) - int64(g.dist(g.super.Start, g.head))
	for n, l := int64(0), g.cur.pos; n < min(prefetchBlocks, free); n, l = n+1, g.next(l, 1) {
		if !g.known.has(l) {
			p.want(wantLog, uint64(l))
		}
	}
}

// prefetchBlocks is how far prefetch looks ahead, blocks.
const prefetchBlocks = 2048
