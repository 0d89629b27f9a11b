package follow

import (
	"encoding/binary"
	"errors"
	"fmt"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// phase of a part.
type phase uint8

const (
	off        phase = iota // nothing to follow, for the reason in why; a write of the superblock begins anew
	loadSuper               // the superblock, the journal's inode and map, its superblock
	loadLog                 // the log from its tail to its end
	loadGroups              // the group descriptors
	following
)

// part follows one file system. Offsets are counted from its beginning.
type part struct {
	f   *Follower
	n   int
	at  Range
	ph  phase
	why string
	gen uint64 // of wants: those of an earlier one are void

	pages   pages
	wants   wants
	fs      *ext4.FS // while loading as the image has it, then as recovery would leave it
	raw     ext4.Raw // the superblock, as the image has it
	journal ext4.Inode
	bs      int64
	log     log
	groups  groups
	cache   cache
	tails   tails
	chain   int // commits seen since LIVE's chain began
	damaged int // times that the log could not be read, since the last superblock
}

func newPart(f *Follower, n int, at Range) *part {
	p := &part{f: f, n: n, at: at}
	p.restart("not read yet")
	return p
}

// restart forgets everything: what is on the disk is read again. All that was
// seen so far has to be waited for.
func (p *part) restart(why string) {
	p.forget(loadSuper, why)
	p.load()
}

// giveUp does nothing more until the superblock is written or a client comes.
func (p *part) giveUp(why string) { p.forget(off, why) }

func (p *part) forget(ph phase, why string) {
	p.f.mustWait()
	p.gen++
	p.ph, p.why, p.chain = ph, why, 0
	p.fs, p.bs = nil, 0
	p.pages.reset()
	p.wants.reset()
	p.log.reset()
	p.groups.reset()
	p.cache.reset(p.f.o.CacheBytes)
	p.tails.reset(0)
}

// errMissing: something has to be loaded first; it is wanted already.
var errMissing = errors.New("not loaded yet")

// load goes on with what has been loaded, until something is missing.
func (p *part) load() {
	var err error
	for p.ph != off && p.ph != following && err == nil {
		switch p.ph {
		case loadSuper:
			err = p.loadSuper()
		case loadLog:
			err = p.loadLog()
		case loadGroups:
			err = p.loadGroups()
		}
	}
	if err != nil && !errors.Is(err, errMissing) {
		p.giveUp(err.Error())
	}
}

// maxJournal bounds the journals that are followed, in blocks, and with that the table of copies.
const maxJournal = 1 << 18

// maxGroups bounds the file systems that are followed.
const maxGroups = 1 << 16

// loadSuper finds the journal, through the image as it is: so does recovery.
func (p *part) loadSuper() error {
	fs, err := ext4.Probe(&p.pages, 0, p.at.Len)
	if p.pages.missing() {
		return p.wantPages()
	}
	if err != nil {
		return err
	}
	if why := unfollowed(fs); why != "" {
		return errors.New(why)
	}
	in, err := fs.Inode(fs.JournalInum)
	var m *ext4.BlockMap
	n := in.Size / uint64(fs.BlockSize)
	if err == nil && n > maxJournal {
		err = fmt.Errorf("its journal has %d blocks, at most %d are followed", n, maxJournal)
	}
	if err == nil {
		m, err = fs.MapInode(in, n)
	}
	if p.pages.missing() {
		return p.wantPages()
	}
	if err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	at, _ := m.Physical(0)
	raw := make([]byte, jbd2.SuperblockSize)
	if err := fs.ReadBlock(at, raw); p.pages.missing() {
		return p.wantPages()
	} else if err != nil {
		return err
	}
	p.fs, p.raw, p.journal, p.bs = fs, fs.Raw(), in, int64(fs.BlockSize)
	if err := p.log.open(fs, m, raw, p.f.o.PendBytes); err != nil {
		return fmt.Errorf("journal: %w", err)
	}
	p.ph = loadLog
	return nil
}

// unfollowed says why a file system is not followed.
func unfollowed(fs *ext4.FS) string {
	switch {
	case fs.Compat&ext4.HasJournal == 0:
		return "it has no journal"
	case fs.JournalInum == 0 || fs.JournalDev != 0:
		return "its journal is on another device"
	case fs.ROCompat&ext4.Bigalloc != 0:
		return "bigalloc: its clusters are not followed"
	case fs.ROCompat.Unknown() != 0:
		return fmt.Sprintf("unknown features: %v", fs.ROCompat.Unknown())
	case fs.Groups > maxGroups:
		return fmt.Sprintf("it has %d block groups, at most %d are followed", fs.Groups, maxGroups)
	}
	return ""
}

// wantPages wants what the last reading lacked.
func (p *part) wantPages() error {
	for _, n := range p.pages.lacking() {
		if n >= 0 {
			p.want(wantPage, uint64(n))
		}
	}
	return errMissing
}

// loadLog parses the log up to its end.
func (p *part) loadLog() error {
	if p.log.empty() {
		p.ph = loadGroups
		return nil
	}
	if err := p.parse(); err != nil {
		return err
	}
	if p.log.uncertain {
		return errMissing
	}
	p.log.caughtUp()
	p.ph = loadGroups
	return nil
}

// loadGroups reads superblock and descriptors as recovery would leave them.
func (p *part) loadGroups() error {
	fs, err := ext4.Probe(view{p}, 0, p.at.Len)
	if p.pages.missing() {
		return p.wantPages()
	}
	if err != nil {
		return fmt.Errorf("superblock in the journal: %w", err)
	}
	if why := unfollowed(fs); why != "" {
		return errors.New(why)
	}
	if fs.BlockSize != p.fs.BlockSize || fs.JournalInum != p.fs.JournalInum {
		return errors.New("the journal's copy of the superblock is of another file system")
	}
	in, err := fs.Inode(fs.JournalInum)
	if p.pages.missing() {
		return p.wantPages()
	}
	if err != nil {
		return fmt.Errorf("journal inode in the journal: %w", err)
	}
	if in.Block != p.journal.Block || in.Size != p.journal.Size {
		return errors.New("the journal's copy of its inode differs")
	}
	if err := p.groups.load(fs); p.pages.missing() {
		return p.wantPages()
	} else if err != nil {
		return err
	}
	p.fs = fs
	p.ph, p.why = following, ""
	p.pages.reset()
	p.tails.reset(p.bs)
	p.prefetch()
	return nil
}

// live is LIVE of the package doc.
func (p *part) live() bool {
	if p.ph != following {
		return false
	}
	if m := p.f.o.Mutant; m == AlwaysLive || m == FastLog {
		return true
	}
	return p.chain > 0 && p.notLive() == ""
}

// notLive says in words why a followed part is not LIVE, but for the chain.
func (p *part) notLive() string {
	f := p.log.super.Features
	switch {
	case p.log.empty():
		return "its log is empty: not mounted, or idle since"
	case p.raw.Incompat()&ext4.Recover == 0:
		return "its superblock does not ask for recovery"
	case p.raw.State()&ext4.StateErrors != 0 || p.log.super.Errno != 0:
		return "it is marked with errors"
	case p.fs.ROCompat&ext4.MetadataCsum == 0 || !f.SumV2or3():
		return "it has no metadata checksums"
	case f.Has(jbd2.AsyncCommit):
		return "journal_async_commit is on"
	case f.Has(jbd2.FastCommit) || p.fs.Compat&ext4.CompatFastC != 0:
		return "fast_commit is on"
	case p.log.uncertain:
		return "a part of its log is being read"
	}
	return ""
}

func (p *part) status() PartStatus {
	s := PartStatus{Range: p.at, Live: p.live(), State: p.why}
	if p.ph == off && s.State == "" {
		s.State = "off"
	}
	if p.ph != off && p.ph != following {
		s.State = "being read: " + p.why
	}
	if p.ph == following {
		s.UUID, s.Blocks, s.TID = p.fs.UUID, p.log.super.MaxLen, uint32(p.log.tid-1)
		switch why := p.notLive(); {
		case why != "":
			s.State = "followed; " + why
		case p.chain == 0:
			s.State = "followed; waits for the next commit"
		default:
			s.State = "followed"
		}
	}
	return s
}

// superAt is where the superblock lies, bytes.
var superAt = Range{ext4.Offset, ext4.Size}

func overlap(a, b Range) bool { return a.Off < b.end() && b.Off < a.end() }

// observe judges a piece of a record that lies in the part, and learns from it.
func (p *part) observe(w *Write) Class {
	if p.ph != following {
		p.learnLoading(w)
		return MustWait
	}
	gen, live, class := p.gen, p.live(), Classes
	for o := w.Off; o < w.end(); {
		n := min(p.bs-o%p.bs, w.end()-o)
		c := p.block(w, o, n)
		if p.gen != gen { // it began anew; what is left of w is learned from as such
			rest := *cut(w, o+n, w.end(), 0)
			if rest.Len > 0 {
				p.learnLoading(&rest)
			}
			return MustWait
		}
		if c < class {
			class = c
		}
		o += n
	}
	if !live {
		return MustWait
	}
	return class
}

// block judges the part of a write that lies in one block.
func (p *part) block(w *Write, o, n int64) Class {
	b := uint64(o / p.bs)
	whole := n == p.bs
	var data, before []byte
	if w.Kind == Data {
		data = w.Data[o-w.Off:][:n]
	} else {
		data = zeros[:n]
	}
	if w.Before != nil {
		before = w.Before[o-w.Off:][:n]
	}
	if l, ok := p.log.logical(b); ok {
		return p.logBlock(l, data, o%p.bs, w.LSN)
	}
	return p.homeBlock(b, o%p.bs, data, before, whole)
}

var zeros [1 << 16]byte

// homeBlock judges a write to a block outside the journal.
func (p *part) homeBlock(b uint64, at int64, data, before []byte, whole bool) Class {
	if c := p.log.copies[b]; c != nil {
		if same := whole && hashOf(data) == c.hash; same && (!c.diverged || p.f.o.Mutant == KeepCopies || p.f.o.Mutant == IgnoreRevoke) {
			c.home = true
			p.homeSuper(b, at, data)
			return CommittedCopy
		} else if !same {
			c.home, c.diverged = false, true
		}
	}
	if p.special(b) {
		p.touched(b, at, data)
		return MustWait
	}
	free := whole && p.free(b)
	p.cache.written(b, at, data)
	if free {
		return FreeBlocks
	}
	if t, ok := p.tails.at(b); ok && p.appends(t, at, data, before) {
		return TailAppend
	}
	return MustWait
}

// appends is rule 4: the bytes below the committed size stay as they were.
func (p *part) appends(t tail, at int64, data, before []byte) bool {
	if p.f.o.Mutant == NoBefore {
		return true
	}
	kept := min(int64(t.used)-at, int64(len(data)))
	if kept <= 0 {
		return true
	}
	return len(before) == len(data) && string(before[:kept]) == string(data[:kept])
}

// special tells whether the view or the way to the journal hangs on a home
// block: superblock, group descriptors, bitmaps, the journal's inode and map.
func (p *part) special(b uint64) bool {
	return b == p.superBlock() || p.groups.special(b) || b == p.groups.journalInode || p.log.nodes[b]
}

func (p *part) superBlock() uint64 { return uint64(ext4.Offset / p.bs) }

// touched: a home block that the view hangs on was written with something that
// the journal does not hold.
func (p *part) touched(b uint64, at int64, data []byte) {
	if p.f.o.Mutant == KeepView {
		p.homeSuper(b, at, data)
		return
	}
	p.damaged = 0
	p.restart(fmt.Sprintf("block %d was written outside the journal", b))
}

// homeSuper keeps the superblock as the image has it.
func (p *part) homeSuper(b uint64, at int64, data []byte) {
	if b != p.superBlock() {
		return
	}
	from := int64(b)*p.bs + at
	if lo, hi := max(from, ext4.Offset), min(from+int64(len(data)), ext4.Offset+ext4.Size); lo < hi {
		copy(p.raw[lo-ext4.Offset:], data[lo-from:hi-from])
	}
}

// learnLoading keeps what is loaded so far true.
func (p *part) learnLoading(w *Write) {
	if p.ph == off {
		if overlap(w.Range, superAt) {
			p.damaged = 0
			p.restart("its superblock was written")
		}
		return
	}
	if p.pages.write(w) && p.ph != loadSuper {
		p.restart("it was written while it was read")
		return
	}
	if p.ph == loadSuper {
		p.load()
		return
	}
	for o := w.Off; o < w.end(); {
		n := min(p.bs-o%p.bs, w.end()-o)
		gen := p.gen
		p.learnBlock(w, o, n)
		if p.gen != gen {
			if p.ph != off {
				return // the pages are read again
			}
			return
		}
		o += n
	}
	p.load()
}

func (p *part) learnBlock(w *Write, o, n int64) {
	b := uint64(o / p.bs)
	data := zeros[:n]
	if w.Kind == Data {
		data = w.Data[o-w.Off:][:n]
	}
	if l, ok := p.log.logical(b); ok {
		p.logBlock(l, data, o%p.bs, w.LSN)
		return
	}
	if c := p.log.copies[b]; c != nil {
		if n == p.bs && hashOf(data) == c.hash {
			c.home = !c.diverged
		} else {
			c.home, c.diverged = false, true
		}
	}
}

var be = binary.BigEndian
