package follow

import (
	"time"

	"kagami/ext4j/epoch"
)

// Range is a stretch of the disk, bytes.
type Range struct{ Off, Len int64 }

func (r Range) end() int64 { return r.Off + r.Len }

// Kind says what a record does to its range.
type Kind uint8

// The kinds.
const (
	Data   Kind = iota // Write.Data replaces the range
	Zeroes             // the range reads as zeros (zero and trim alike)
)

// Write is one record as the follower sees it.
type Write struct {
	LSN  epoch.LSN
	Kind Kind
	Range
	Data []byte // of kind Data, Len bytes; not kept
	// Before is what the range held just before, if the caller has read it
	// (NeedsBefore asks for it); nil otherwise. It must be exact.
	Before []byte
}

// Class is what the rules of package doc say of a record.
type Class uint8

// The classes. All but MustWait can show nothing after recovery.
const (
	MustWait      Class = iota
	LogFree             // rule 1: in the log's free part, no commit is completed
	LogSuper            // rule 1: moves the log's tail
	FreeBlocks          // rule 2
	CommittedCopy       // rule 3
	TailAppend          // rule 4
	Classes             // their number
)

func (c Class) String() string {
	return [...]string{"must wait", "log, free part", "log superblock", "free blocks", "committed copy", "tail append"}[c%Classes]
}

// Options of a Follower.
type Options struct {
	Size int64 // of the disk, bytes
	// Parts are where file systems may lie; nil: one takes the whole disk.
	// A write outside of all of them is of a partition table: see Follower.TableChanged.
	Parts []Range
	// CacheBytes bounds the content of blocks kept for each part (default 16 MiB), and
	// PendBytes that of the transaction being written (default 64 MiB). See package doc.
	CacheBytes, PendBytes int64
	// Mutant breaks one rule; only tests set it.
	Mutant Mutant
}

// Follower follows the file systems of one disk. But for NeedsBefore it is not
// safe for concurrent use: records come in the order of their LSNs.
type Follower struct {
	o       Options
	parts   []*part
	must    epoch.LSN // newest record that has to be waited for
	last    epoch.LSN // newest record seen
	flushed epoch.LSN // of mutant SinceFlush
	table   bool
	counts  [Classes]uint64
	commits []Commit
	dropped uint64
}

// Commit is a transaction that was seen to commit: a label for the epoch that holds it.
type Commit struct {
	Part        int
	TID         uint32
	Time        time.Time // by the guest's clock; zero if it wrote none
	Blocks      int       // journaled blocks
	First, Last epoch.LSN // of the records that hold it, as far as they were seen
}

// maxCommits bounds the labels kept for Commits.
const maxCommits = 256

// New makes a follower that knows nothing yet: see Wants.
func New(o Options) *Follower {
	if o.CacheBytes <= 0 {
		o.CacheBytes = 16 << 20
	}
	if o.PendBytes <= 0 {
		o.PendBytes = 64 << 20
	}
	f := &Follower{o: o}
	parts := o.Parts
	if parts == nil {
		parts = []Range{{0, o.Size}}
	}
	for i, r := range parts {
		if r.Off >= 0 && r.Len > 0 && r.Off <= o.Size && r.Len <= o.Size-r.Off {
			f.parts = append(f.parts, newPart(f, i, r))
		}
	}
	return f
}

// Reset begins the chain of commits that LIVE asks for anew, because of a new client,
// session or attachment; everything up to lsn has to be waited for.
func (f *Follower) Reset(lsn epoch.LSN) {
	f.MustWait(lsn)
	for _, p := range f.parts {
		p.damaged = 0
		if p.ph == off {
			p.restart("looked at again")
		}
		p.chain = 0
	}
}

// Observe judges one record under what was known before it, and learns from it.
func (f *Follower) Observe(w Write) Class {
	f.last = max(f.last, w.LSN)
	class, left := Classes, w.Len
	for _, p := range f.parts {
		lo, hi := max(w.Off, p.at.Off), min(w.end(), p.at.end())
		if lo >= hi {
			continue
		}
		left -= hi - lo
		if c := p.observe(cut(&w, lo, hi, p.at.Off)); c < class || class == Classes {
			if class != MustWait {
				class = c
			}
		}
	}
	if left > 0 { // outside of all parts
		f.table = f.table || f.o.Parts != nil
		class = MustWait
	}
	if class == Classes {
		class = MustWait
	}
	if class == MustWait {
		f.must = max(f.must, w.LSN)
	}
	f.counts[class]++
	return class
}

// cut is the piece [lo, hi) of w, counted from base.
func cut(w *Write, lo, hi, base int64) *Write {
	p := *w
	p.Off, p.Len = lo-base, hi-lo
	if w.Kind == Data {
		p.Data = w.Data[lo-w.Off : hi-w.Off]
	}
	if w.Before != nil {
		p.Before = w.Before[lo-w.Off : hi-w.Off]
	}
	return &p
}

// MustWait declares that everything up to lsn has to be waited for.
func (f *Follower) MustWait(lsn epoch.LSN) { f.must, f.last = max(f.must, lsn), max(f.last, lsn) }

// mustWait declares that everything seen so far has to be waited for.
func (f *Follower) mustWait() { f.must = max(f.must, f.last) }

// Newest is the newest record that has to be waited for. A FLUSH that covers
// every record seen so far promises nothing beyond it: those above were
// judged harmless while their file systems were LIVE, and none has stopped being so
// since (that makes all before it records to wait for).
func (f *Follower) Newest() epoch.LSN {
	must := f.must
	if f.o.Mutant == SinceFlush {
		f.must = 0
	}
	return must
}

// Wanting tells whether Wants has something.
func (f *Follower) Wanting() bool {
	for _, p := range f.parts {
		if len(p.wants.queue) > 0 {
			return true
		}
	}
	return false
}

// Local tells whether a FLUSH that covers every record seen so far promises
// nothing that acked, the newest record durable at the replica, does not hold:
// every record above it was judged harmless while its file system was LIVE, and
// none has stopped being so (that makes all before it records to wait for).
func (f *Follower) Local(acked epoch.LSN) bool {
	must := f.must
	if f.o.Mutant == AnyFlush || f.o.Mutant == SinceFlush && f.flushed >= must {
		must = 0
	}
	return must <= acked
}

// Flushed tells that a FLUSH has been answered. Only a mutant listens.
func (f *Follower) Flushed() { f.flushed = f.last }

// NeedsBefore tells whether rule 4 could apply to a write of the range, so that
// its previous content is wanted. It is safe for concurrent use.
func (f *Follower) NeedsBefore(off, n int64) bool {
	for _, p := range f.parts {
		if off < p.at.end() && off+n > p.at.Off && p.tails.touches(off-p.at.Off, n) {
			return true
		}
	}
	return false
}

// TableChanged reports that something outside of Options.Parts was written since New:
// the parts may lie elsewhere now, and a new Follower is needed to know.
func (f *Follower) TableChanged() bool { return f.table }

// Commits returns the transactions committed since the last call, at most
// the newest 256, and how many labels were dropped in all.
func (f *Follower) Commits() ([]Commit, uint64) {
	c := f.commits
	f.commits = nil
	return c, f.dropped
}

func (f *Follower) label(c Commit) {
	if len(f.commits) >= maxCommits {
		f.commits = append(f.commits[:0], f.commits[1:]...)
		f.dropped++
	}
	f.commits = append(f.commits, c)
}

// Want is a range that the follower has to know. The caller reads it while no
// write to it is under way, and hands it to Loaded at that place in the order of records.
type Want struct {
	Range
	part *part
	kind wantKind
	key  uint64
	gen  uint64
}

// Wants returns what is wanted and was not returned before: at most limit ranges, of at
// most 256 KiB each.
func (f *Follower) Wants(limit int) []Want {
	var out []Want
	for _, p := range f.parts {
		out = p.takeWants(out, limit)
	}
	return out
}

// Loaded brings what a Want asked for; data has its length, and is not kept.
// nil: it could not be read.
func (f *Follower) Loaded(w Want, data []byte) {
	if w.part != nil && w.gen == w.part.gen {
		w.part.loaded(w, data)
	}
}

// PartStatus is what is known of one file system.
type PartStatus struct {
	Range
	State  string // in words
	Live   bool
	UUID   [16]byte
	Blocks uint32 // in the journal; 0: none is followed
	TID    uint32 // of the last transaction seen
}

// Status is a snapshot.
type Status struct {
	Parts  []PartStatus
	Counts [Classes]uint64 // records, by Class
	// Settled: nothing is wanted that has not been loaded.
	Settled bool
}

// Status returns a snapshot.
func (f *Follower) Status() Status {
	s := Status{Counts: f.counts, Settled: true}
	for _, p := range f.parts {
		s.Settled = s.Settled && len(p.wants.asked) == 0
		s.Parts = append(s.Parts, p.status())
	}
	return s
}
