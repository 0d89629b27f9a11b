package replica

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/spool"
	"kagami/replica/wire"
)

// Image is the replica of one disk; images.Image implements it.
type Image interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	WriteZeroes(off, n int64, noHole bool) error
	Trim(off, n int64) error
	// Allocate reserves space for a range, its content unchanged.
	Allocate(off, n int64) error
	// Settle makes durable what there is, and lets reads see what the disk really has.
	Settle() error
	// NextData finds the next extent that may not read as zeros; io.EOF after the last.
	NextData(off int64) (start, end int64, err error)
	Datasync() error
}

// Limits of a replica group. Sizes are bytes.
type Limits struct {
	SegmentBytes int64
	SpoolBytes   int64
	WindowBytes  int64         // the most a source may have unacknowledged
	ApplyBytes   int64         // apply when this much is spooled
	ApplyAge     time.Duration // or when the oldest unapplied epoch is this old
}

// Options open a group.
type Options struct {
	FS      images.FS
	Dir     string // the group's state folder; the spool is in Dir/spool
	ID      epoch.UUID
	Replica epoch.UUID // this replica's own
	Images  map[uint32]Image
	Limits  Limits
	Codec   *wire.Codec
	// Lineage and Session are the durable ones; Fresh says that the images
	// were made just now and read as zeros.
	Lineage epoch.UUID
	Session uint64
	Fresh   bool
	// Damaged says why the images cannot be trusted ("" when they can).
	Damaged string
	// Opened is called once, when Damaged is durable and before the images are
	// written to: what had told the damage may go now. nil: there is nothing to do.
	Opened func() error
	// Persist makes a new (lineage, session) durable before it returns nil.
	Persist func(lineage epoch.UUID, session uint64) error
	// Event reports what an operator should know. It must not block.
	Event func(text string)
	// Left is called when the attached source's link has ended. It must not block.
	Left func()
	// Failed is called once, when the group has ended for good while it was
	// open. It must not block.
	Failed func(err error)
}

// ErrFenced refuses a source that a promotion has superseded.
var ErrFenced = errors.New("the group was promoted at the replica's site")

// Group is the replica of one group. All methods are safe for concurrent use.
type Group struct {
	o       Options
	spool   *spool.Spool
	mark    *spool.Mark
	redoing *spool.Mark // the file `applying`, see damage.go

	applying   sync.Mutex // one apply, hash or seal at a time
	switching  sync.Mutex // one attach, seal or fall-back at a time
	committing sync.Mutex // one spool commit, drop or reset at a time

	mu        sync.Mutex
	cond      *sync.Cond
	err       error // final
	lineage   epoch.UUID
	session   uint64
	channel   *Channel // the one whose records are taken; nil: none
	expect    epoch.LSN
	pending   map[epoch.LSN][]epoch.Record // by first LSN; all above expect
	waiting   int64                        // bytes in pending
	perRecord time.Duration                // of applying, see measured
	window    int64
	full      bool   // the spool had no room for expect
	short     string // then: its disk has none for another segment, in words
	unready   bool   // the spool's segment for expect is being prepared
	commitAt  epoch.LSN
	unacked   int64 // bytes appended since the last ack
	durable   epoch.Pos
	closedNs  int64 // close time of the durable epoch
	applied   epoch.Pos
	complete  bool        // at durable: a SyncDone record is at or below it
	appliedC  bool        // complete, at applied
	syncDone  epoch.LSN   // spooled, not yet in a durable epoch; 0: none
	closes    []closeMark // spooled, not yet durable
	fresh     bool
	damaged   damage
	sealed    bool
	refused   error  // the present session, for a record that this release does not support
	stalled   string // why apply makes no progress, in words
	since     time.Time
	recovery  string // what is wrong with the spool, in words, until a source has attached
	counters  Counters
	closing   bool
	kick      chan struct{} // one token: look whether to apply
	ready     chan struct{} // one token: the spool has a segment; see resumeLoop
	wg        sync.WaitGroup
}

// closeMark is a Close record and its close time at the source, ns since 1970.
type closeMark struct {
	lsn epoch.LSN
	ns  int64
}

// Counters of a group since the daemon started.
type Counters struct {
	Records, Duplicates, Epochs, Commits, Applies uint64
	Bytes                                         uint64
}

// Open recovers a group from its folder and starts its goroutines.
func Open(o Options) (*Group, error) {
	g := &Group{o: o, lineage: o.Lineage, session: o.Session, fresh: o.Fresh,
		pending: map[epoch.LSN][]epoch.Record{}, kick: make(chan struct{}, 1), ready: make(chan struct{}, 1)}
	g.cond = sync.NewCond(&g.mu)
	if g.o.Event == nil {
		g.o.Event = func(string) {}
	}
	if err := g.recover(); err != nil {
		return nil, err
	}
	g.wg.Add(3)
	go g.commitLoop()
	go g.applyLoop()
	go g.resumeLoop()
	g.nudge()
	return g, nil
}

// recover reads mark and spool: what is durable, what is applied, and whether
// the copy is complete.
func (g *Group) recover() error {
	if err := g.o.FS.MkdirAll(g.o.Dir+"/spool", 0o700); err != nil {
		return fmt.Errorf("make group folder: %w", err)
	}
	owner := spool.Owner{Group: g.o.ID, Replica: g.o.Replica}
	mark, err := spool.OpenMark(g.o.FS, g.o.Dir+"/applied", owner)
	if err != nil {
		return fmt.Errorf("open applied mark: %w", err)
	}
	redoing, err := spool.OpenMark(g.o.FS, g.o.Dir+"/applying", owner)
	if err != nil {
		return errors.Join(fmt.Errorf("open mark of what is being applied: %w", err), mark.Close())
	}
	m := mark.Load()
	sp, rec, err := spool.Open(spool.Options{FS: g.o.FS, Dir: g.o.Dir + "/spool", Group: g.o.ID, Replica: g.o.Replica,
		SegmentBytes: g.o.Limits.SegmentBytes, MaxBytes: g.o.Limits.SpoolBytes, Inflate: g.o.Codec.Inflate, Ready: g.segmentReady}, m.Pos.LSN)
	if err != nil {
		return errors.Join(fmt.Errorf("open spool: %w", err), mark.Close(), redoing.Close())
	}
	g.spool, g.mark, g.redoing = sp, mark, redoing
	g.applied, g.durable, g.closedNs = m.Pos, m.Pos, m.CloseTimeNs
	g.complete, g.appliedC = m.SyncDone, m.SyncDone
	if rec.Closed && rec.Durable.LSN > m.Pos.LSN {
		g.durable, g.closedNs = rec.Durable, rec.LastClose.TimeNs
		if err := g.findSyncDone(); err != nil {
			return errors.Join(err, g.closeFiles())
		}
	}
	if g.applied.LSN > 0 || g.durable.LSN > 0 {
		g.fresh = false
	}
	g.expect = g.durable.LSN + 1
	lost := ""
	if rec.Lost != 0 {
		lost = rec.Note
	}
	err = g.recallDamage(lost)
	if err == nil && g.o.Opened != nil {
		err = g.o.Opened()
	}
	if err != nil {
		return errors.Join(err, g.closeFiles())
	}
	g.recovery = rec.Note
	if rec.Note != "" {
		g.o.Event("spool recovery: " + rec.Note)
	}
	if rec.DroppedRecords > 0 {
		g.o.Event(fmt.Sprintf("dropped of an epoch that had not ended when the daemon did: records %d to %d", g.expect, g.expect+epoch.LSN(rec.DroppedRecords)-1))
	}
	return nil
}

// findSyncDone looks for the end of a first sync in what is spooled.
func (g *Group) findSyncDone() error {
	for r := g.spool.NewReader(g.applied.LSN + 1); ; {
		rec, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read spool: %w", err)
		}
		if rec.Type == epoch.TypeSyncDone {
			g.complete = true
		}
	}
}

func (g *Group) closeFiles() error {
	return errors.Join(g.spool.Close(), g.mark.Close(), g.redoing.Close())
}

// Close stops the goroutines and closes spool and mark. Images are the caller's.
func (g *Group) Close() error {
	g.mu.Lock()
	g.closing, g.channel = true, nil
	g.cond.Broadcast()
	g.mu.Unlock()
	g.nudge()
	g.segmentReady()
	g.wg.Wait()
	return g.closeFiles()
}

// fail ends the group for good; the caller does not hold mu. Its link is
// dropped: what was sent to the group is never acknowledged, and would hold up
// the other groups of the link. The source learns why when it attaches again.
func (g *Group) fail(err error) error {
	g.mu.Lock()
	first, ch := g.err == nil && !g.closing, g.channel
	if g.err == nil {
		g.err, g.channel = err, nil
	}
	g.cond.Broadcast()
	g.mu.Unlock()
	if !first {
		return err
	}
	g.o.Event("failed: " + err.Error())
	if g.o.Failed != nil {
		g.o.Failed(err)
	}
	if ch != nil {
		ch.Drop(err)
	}
	return err
}

// nudge makes the apply loop look again.
func (g *Group) nudge() {
	select {
	case g.kick <- struct{}{}:
	default:
	}
}

// Status is a snapshot of a group.
type Status struct {
	Lineage                    epoch.UUID
	Session                    uint64
	Received, Durable, Applied epoch.LSN
	CloseTime                  time.Time // of the durable epoch, by the source's clock; zero if none
	Complete, Sealed, Attached bool
	ToApply                    time.Duration // what applying all that is durable may take, as measured; 0 before the first
	SpoolUsed, SpoolMax        int64
	SpoolFull                  bool
	SpoolShort                 string // why a spool that is full cannot get as large as it may; "": it is
	Stalled, Damaged, Recovery string
	Err                        error
	Counters                   Counters
}

// Status returns a snapshot.
func (g *Group) Status() Status {
	used, limit := g.spool.Usage()
	g.mu.Lock()
	defer g.mu.Unlock()
	s := Status{Lineage: g.lineage, Session: g.session, Received: g.expect - 1, Durable: g.durable.LSN, Applied: g.applied.LSN,
		Complete: g.complete, Sealed: g.sealed, Attached: g.channel != nil, SpoolUsed: used, SpoolMax: limit, SpoolFull: g.full,
		Stalled: g.stalled, Damaged: g.damaged.Why, Recovery: g.recovery, Err: g.err, Counters: g.counters}
	s.ToApply = g.perRecord * time.Duration(g.durable.LSN-g.applied.LSN)
	if g.full {
		s.SpoolShort = g.short
	}
	if g.closedNs != 0 {
		s.CloseTime = time.Unix(0, g.closedNs)
	}
	return s
}
