package ext4j

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"kagami/ext4j/epoch"
)

// ErrGone is returned by requests that a closing group leaves undone. The
// export must drop the client's connection without an answer.
var ErrGone = errors.New("group is going away")

// Recorder is the durable record of what may differ between the sites:
// activelog.Log while there is a replica, changemap.Map while there is none.
type Recorder interface {
	// Acquire returns when every region in [off, off+n) of the disk is durable in the record, and pins it there.
	Acquire(ctx context.Context, disk uint32, off, n int64) error
	// Release unpins; the pwrite has returned and last is the newest record that touched the range.
	Release(disk uint32, off, n int64, last epoch.LSN)
	// Begin starts a session in which the replica has everything up to acked.
	// The LSNs told here rise across sessions: they are shift above the session's own.
	Begin(session uint64, acked, shift epoch.LSN)
	// Acked tells that the replica has every record up to lsn.
	Acked(lsn epoch.LSN)
	// SyncBegin and SyncEnd bracket an fdatasync of the disk's image that succeeded.
	SyncBegin(disk uint32) uint64
	SyncEnd(disk uint32, token uint64)
	// NeedsRoom receives while Acquire waits for regions to leave. It may be nil.
	NeedsRoom() <-chan struct{}
}

// Limits bound a group. Sizes are bytes.
type Limits struct {
	QueueBytes int64         // unacknowledged records in memory; writes wait beyond it
	EpochBytes int64         // an epoch that nobody flushes is closed at this size
	EpochAge   time.Duration // and at this age
}

// Options make a Group.
type Options struct {
	Recorder Recorder
	Limits   Limits
	// Detached: there is no replica; records are numbered but not kept.
	Detached bool
	// MaxExtent bounds one zero or trim record, bytes; 0 means epoch.MaxExtent.
	// It must fit the recorder.
	MaxExtent int64
	Eyes      Eyes
}

// gate says whether requests may proceed.
type gate uint8

const (
	gateClosed gate = iota // requests wait
	gateOpen
	gateShut // for good: see Drain
)

// Group is the source side of one consistency group: see the package comment.
type Group struct {
	rec      Recorder
	limits   Limits
	detached bool
	extent   int64 // see Options.MaxExtent
	eyes     Eyes
	ctx      context.Context // ends when the group fails or closes
	cancel   context.CancelCauseFunc
	disks    map[uint32]*Disk // fixed after the last AddDisk

	mu      sync.Mutex
	cond    *sync.Cond // gate, queue space, acked, running, err
	gate    gate
	err     error // final: failure or ErrGone
	running int   // requests past the gate
	lineage epoch.UUID
	session uint64
	q       queue
	acked   epoch.LSN // durable at the replica
	closed  epoch.LSN // LSN of the last Close record
	shift   epoch.LSN // see mark
	open    openEpoch
	hold    bool      // a resync: epochs stay open, memory is freed on receipt
	holdMax int64     // see LimitHold
	floor   epoch.LSN // the resync's Close record; unreachable while it is not known
	timer   *time.Timer
	flushes int    // FLUSHes waiting for the replica
	wake    func() // tells the sender that Take has something; may be nil
	stats   Stats  // counters only
	mode    Mode
	bounded int           // clients that wait for the bound of async
	waiting int           // requests and scans that wait for room
	apart   bool          // see GoApart: records are numbered, not kept
	over    *overflow     // see Overflow; nil: the queue has all that is kept
	alone   bool          // FLUSHes wait for the local image only
	parted  chan struct{} // closed by GoApart
	behind  time.Time     // since when the replica lacks something that is not in the queue; zero: it lacks nothing else
	marks   []closeMark   // closed, not acknowledged
	wg      sync.WaitGroup
}

// openEpoch is what has been written since the last Close record.
type openEpoch struct {
	first   epoch.LSN
	n       int
	bytes   int64
	clients int64 // of bytes, those that clients wrote
	since   time.Time
}

// closeMark is an epoch that was closed and is not acknowledged.
type closeMark struct {
	lsn   epoch.LSN
	since time.Time // its first record
}

// NewGroup makes a group with its gate closed and no session.
func NewGroup(o Options) *Group {
	ctx, cancel := context.WithCancelCause(context.Background())
	if o.MaxExtent <= 0 || o.MaxExtent > epoch.MaxExtent {
		o.MaxExtent = epoch.MaxExtent
	}
	g := &Group{rec: o.Recorder, limits: o.Limits, detached: o.Detached, extent: o.MaxExtent, eyes: o.Eyes, ctx: ctx, cancel: cancel,
		disks: map[uint32]*Disk{}, parted: make(chan struct{})}
	g.cond = sync.NewCond(&g.mu)
	g.wg.Add(1)
	go g.relieve()
	return g
}

// Begin starts a session: records are numbered from next on and belong to
// (lineage, session). What the queue still held is dropped: its content is in
// the images and its regions are in the recorder, so with hold (a resync) the
// scan that follows ships it, and FLUSHes that were waiting wait for the end of
// that scan. Without hold they are answered: such a session begins before any
// client was served, or a first sync, until whose end nothing is promised.
func (g *Group) Begin(lineage epoch.UUID, session uint64, next epoch.LSN, hold bool) {
	defer g.resetEyes()
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lineage, g.session = lineage, session
	g.shift = max(g.nextLocked()+g.shift, next) - next
	g.over = nil
	g.rec.Begin(session, g.markLocked(next-1), g.shift)
	g.q.reset(next)
	g.acked, g.closed = next-1, next-1
	g.open, g.marks = openEpoch{}, nil
	if g.apart {
		g.parted = make(chan struct{})
	}
	g.hold, g.apart = hold, false
	if g.floor = next - 1; hold {
		g.floor = ^epoch.LSN(0)
	}
	g.stopTimerLocked()
	g.cond.Broadcast()
}

// SetWake names the function that Group calls, without locks held by the
// caller's side, when Take may have something new. It must not block.
func (g *Group) SetWake(f func()) {
	g.mu.Lock()
	g.wake = f
	g.mu.Unlock()
}

// OpenGate lets requests through.
func (g *Group) OpenGate() { g.setGate(gateOpen) }

// CloseGate makes new requests wait.
func (g *Group) CloseGate() { g.setGate(gateClosed) }

func (g *Group) setGate(v gate) {
	g.mu.Lock()
	if g.gate != gateShut {
		g.gate = v
	}
	g.cond.Broadcast()
	g.mu.Unlock()
}

// Fail ends the group: every request, waiting or new, returns err. The first
// error stays.
func (g *Group) Fail(err error) {
	g.mu.Lock()
	g.failLocked(err)
	g.mu.Unlock()
}

func (g *Group) failLocked(err error) {
	if g.err == nil {
		g.err = err
		g.stopTimerLocked()
		g.cancel(err)
	}
	g.cond.Broadcast()
}

// Err is the group's final error, nil while it lives.
func (g *Group) Err() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.err
}

// Close ends the group and waits for its goroutines. Requests still waiting
// return ErrGone. Images are the caller's to close.
func (g *Group) Close() {
	g.Fail(ErrGone)
	g.mu.Lock()
	for g.running > 0 {
		g.cond.Wait()
	}
	g.mu.Unlock()
	for _, d := range g.disks {
		d.sync.end(ErrGone)
	}
	g.wg.Wait()
}

// enter admits a request, waiting while the gate is closed; leave ends it.
func (g *Group) enter() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.gate != gateOpen && g.err == nil {
		g.cond.Wait()
	}
	if g.err != nil {
		return g.err
	}
	g.running++
	return nil
}

func (g *Group) leave() {
	g.mu.Lock()
	g.running--
	if g.running == 0 {
		g.cond.Broadcast()
	}
	g.mu.Unlock()
}

// LimitHold bounds what clients may add to the epoch of a resync, bytes; 0: no
// bound. Requests that run at the same time exceed it by a record each at most.
// That epoch has to fit the replica's spool as a whole, and does not end
// while a client can keep it from getting there.
func (g *Group) LimitHold(n int64) {
	g.mu.Lock()
	g.holdMax = n
	g.mu.Unlock()
}

// reserve waits until there is room for a client's record with n bytes of
// payload, or the group ends.
func (g *Group) reserve(n int64) error { return g.reserveFor(g.ctx, n, g.clientRoomLocked) }

// reserveScan is reserve for a scan; the end of ctx is an error.
func (g *Group) reserveScan(ctx context.Context, n int64) error {
	return g.reserveFor(ctx, n, g.scanRoomLocked)
}

// scanShare is the part of the queue, 1/scanShare, that a scan fills while a client's FLUSH waits.
const scanShare = 4

// scanRoomLocked is roomLocked for a scan: what it puts into the stream delays every FLUSH
// behind it, unless FLUSHes wait for its end anyway.
func (g *Group) scanRoomLocked(n int64) bool {
	return g.roomLocked(n) && (g.flushes == 0 || g.hold || g.q.bytes == 0 || (g.q.bytes+n+recordOverhead)*scanShare <= g.limits.QueueBytes)
}

func (g *Group) reserveFor(ctx context.Context, n int64, room func(int64) bool) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.detached || g.apart || room(n) {
		return g.err
	}
	g.stats.Stalls++
	g.waiting++
	defer func() { g.waiting-- }()
	if !g.alone && !g.boundLocked(n+recordOverhead) {
		g.bounded++
		defer func() { g.bounded-- }()
	}
	defer g.wakeAtEnd(ctx)()
	for g.err == nil && ctx.Err() == nil && !g.apart && !room(n) {
		if last := g.closed; g.closeLocked(epoch.BySize) != last { // or the acknowledgement that makes room would never come
			g.callWakeLocked()
			continue
		}
		g.cond.Wait()
	}
	if g.err != nil {
		return g.err
	}
	return context.Cause(ctx)
}

// callWakeLocked tells the sender that there is something new. It gives mu up
// meanwhile: the caller looks at everything again.
func (g *Group) callWakeLocked() {
	wake := g.wake
	g.mu.Unlock()
	if wake != nil {
		wake()
	}
	g.mu.Lock()
}

// roomLocked tells whether there is room for a record.
func (g *Group) roomLocked(n int64) bool {
	if g.over != nil {
		return g.overflowRoomLocked(n)
	}
	return g.queueRoomLocked(n)
}

// queueRoomLocked tells whether the queue has room. An empty one always has.
func (g *Group) queueRoomLocked(n int64) bool {
	return g.q.bytes == 0 || g.q.bytes+n+recordOverhead <= g.limits.QueueBytes
}

func (g *Group) clientRoomLocked(n int64) bool {
	if g.hold && g.holdMax > 0 && g.open.clients+n+epoch.HeaderSize > g.holdMax {
		return false
	}
	return g.roomLocked(n) && (g.alone || g.boundLocked(n+recordOverhead))
}

// wakeAtEnd makes waiters on cond look again when ctx ends. The caller defers
// what it returns.
func (g *Group) wakeAtEnd(ctx context.Context) func() bool {
	return context.AfterFunc(ctx, func() {
		g.mu.Lock()
		g.cond.Broadcast()
		g.mu.Unlock()
	})
}

// mark is an LSN of the present session as the recorder knows it: above every
// one of the sessions before, which may have come further than where the
// present one began. Without that, regions of an earlier session would wait for
// acknowledgements that this one does not reach.
func (g *Group) markLocked(l epoch.LSN) epoch.LSN { return l + g.shift }

// CloseMark is the last Close record's LSN as the recorder knows it.
func (g *Group) CloseMark() epoch.LSN {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.markLocked(g.closed)
}

// append gives r the next LSN and queues it. It returns the mark to release
// its region with. The caller holds the range lock and has completed the pwrite.
func (g *Group) append(r epoch.Record) epoch.LSN {
	g.mu.Lock()
	mark := g.markLocked(g.appendLocked(r))
	if g.open.bytes >= g.limits.EpochBytes || g.over != nil && g.open.bytes >= g.limits.QueueBytes/2 {
		g.closeLocked(epoch.BySize)
	}
	wake := g.wake
	g.mu.Unlock()
	if wake != nil {
		wake()
	}
	return mark
}

func (g *Group) appendLocked(r epoch.Record) epoch.LSN {
	r.Lineage, r.Session, r.LSN = g.lineage, g.session, g.nextLocked()
	if g.apart {
		return g.passLocked(r)
	}
	r.Seal()
	g.push(r)
	if g.open.n == 0 {
		g.open = openEpoch{first: r.LSN, since: time.Now()}
		g.startTimerLocked()
	}
	g.open.n++
	size := int64(len(r.Payload)) + epoch.HeaderSize
	g.open.bytes += size
	if r.Flags&epoch.FlagResync == 0 {
		g.open.clients += size
	}
	g.stats.count(&r)
	return r.LSN
}

func (g *Group) push(r epoch.Record) {
	if g.over != nil && (g.over.n > 0 || !g.queueRoomLocked(int64(len(r.Payload)))) {
		g.overflowLocked(r)
		return
	}
	g.q.push(r)
	if g.detached {
		g.q.drop(r.LSN)
	}
}

// closeLocked ends the open epoch and returns the LSN of the last Close
// record. An empty epoch is not closed; a resync's stays open.
func (g *Group) closeLocked(why epoch.Reason) epoch.LSN {
	if g.open.n == 0 || (g.hold && why != epoch.ByResync) {
		return g.closed
	}
	now := time.Now()
	info := epoch.CloseInfo{TimeNs: now.UnixNano(), Reason: why, First: g.open.first, Bytes: uint64(g.open.bytes)}
	payload := info.Encode()
	r := epoch.Record{Type: epoch.TypeClose, Disk: epoch.GroupWide, Length: uint64(len(payload)), Payload: payload,
		Lineage: g.lineage, Session: g.session, LSN: g.nextLocked()}
	r.Seal()
	g.push(r)
	if g.detached {
		g.acked = r.LSN
	} else {
		g.marks = thin(append(g.marks, closeMark{r.LSN, g.open.since}))
	}
	g.closed, g.open = r.LSN, openEpoch{}
	g.stopTimerLocked()
	g.stats.Epochs++
	return r.LSN
}

// maxMarks bounds what is remembered of epochs that are not acknowledged.
const maxMarks = 1 << 16

// thin makes two marks one where there are too many: an epoch then counts as old as the
// one before it.
func thin(marks []closeMark) []closeMark {
	if len(marks) <= maxMarks {
		return marks
	}
	for i := range len(marks) / 2 {
		marks[i] = closeMark{marks[2*i+1].lsn, marks[2*i].since}
	}
	odd := marks[len(marks)/2*2:]
	return append(marks[:len(marks)/2], odd...)
}

func (g *Group) startTimerLocked() {
	if g.limits.EpochAge <= 0 {
		return
	}
	lsn := g.open.first
	g.timer = time.AfterFunc(g.limits.EpochAge, func() { g.closeAged(lsn) })
}

func (g *Group) stopTimerLocked() {
	if g.timer != nil {
		g.timer.Stop()
		g.timer = nil
	}
}

// closeAged closes the open epoch if it is still the one that began with first.
func (g *Group) closeAged(first epoch.LSN) {
	g.mu.Lock()
	if g.err == nil && g.open.n > 0 && g.open.first == first {
		g.closeLocked(epoch.ByTime)
	}
	wake := g.wake
	g.mu.Unlock()
	if wake != nil {
		wake()
	}
}

// barrier is what a FLUSH waits for at the replica: the acknowledgement of lsn
// in its session, or of the end of the resync that it met or that came after.
type barrier struct {
	session uint64
	lsn     epoch.LSN
	resync  bool
	all     bool // whatever the mode: the first client's
}

// closeEpoch ends the open epoch for a FLUSH and returns the barrier that
// covers every record so far.
func (g *Group) closeEpoch(why epoch.Reason) barrier {
	g.mu.Lock()
	b := barrier{session: g.session, lsn: g.closeLocked(why), resync: g.hold || g.apart}
	wake := g.wake
	g.mu.Unlock()
	if wake != nil {
		wake()
	}
	return b
}

// only narrows b to the records up to a mark: what a FLUSH covers above it
// promises nothing. What that leaves nothing to wait for is counted.
func (g *Group) only(b barrier, newest epoch.LSN) barrier {
	g.mu.Lock()
	defer g.mu.Unlock()
	if b.resync || g.session != b.session || g.acked < g.floor || newest >= g.markLocked(b.lsn) {
		return b
	}
	if b.lsn = 0; newest > g.shift {
		b.lsn = newest - g.shift
	}
	if g.acked >= b.lsn {
		g.stats.LocalFlushes++
	}
	return b
}

// waitAcked returns when the replica has everything that b covers.
func (g *Group) waitAcked(b barrier) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.flushes++
	defer func() { g.flushes-- }()
	for g.err == nil && !g.alone {
		target, async := b.lsn, g.mode.Async && !b.all
		if async || b.resync || g.session != b.session {
			target = g.floor // of a resync, set when its end is known; unreachable until then
		}
		if g.acked >= target && (!async || g.boundLocked(0)) {
			return nil
		}
		bound := btoi(async && g.acked >= target)
		g.bounded += bound
		g.cond.Wait()
		g.bounded -= bound
	}
	return g.err
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

// Acked brings the replica's acknowledgement: received records are in its
// spool, durable ones survive its crash. Acks of another session are ignored.
func (g *Group) Acked(session uint64, received, durable epoch.LSN) error {
	g.mu.Lock()
	live := session == g.session && g.err == nil && !g.apart
	if !live {
		g.mu.Unlock()
		return nil
	}
	if received >= g.q.next() || durable > received {
		next := g.q.next()
		g.mu.Unlock()
		return fmt.Errorf("the replica acknowledged record %d (durable %d), but the last one is %d", received, durable, next-1)
	}
	if g.hold {
		g.q.drop(received) // the images still have it; a broken resync starts anew
	}
	if durable > g.acked {
		g.acked = durable
		g.q.drop(durable)
		for len(g.marks) > 0 && g.marks[0].lsn <= durable {
			g.marks = g.marks[1:]
		}
	}
	mark := g.markLocked(g.acked)
	// Until a resync is acknowledged, what earlier sessions left unacknowledged
	// is not at the replica, whatever the numbers say.
	behind := g.hold || g.floor != ^epoch.LSN(0) && g.acked < g.floor
	g.cond.Broadcast()
	g.mu.Unlock()
	if !behind {
		g.rec.Acked(mark)
	}
	return nil
}

// Resume continues the session after its link was lost: the replica has
// everything up to durable, the rest is sent again. It returns false when the
// replica has less than it had acknowledged, or more than was ever sent, or
// when a resync was under way, or the group has gone on apart: a new session with a resync is needed.
func (g *Group) Resume(durable epoch.LSN) bool {
	g.mu.Lock()
	if g.hold || g.apart || durable < g.acked || durable >= g.q.next() || durable+1 < g.q.base {
		g.mu.Unlock()
		return false
	}
	session := g.session
	g.q.rewind()
	g.mu.Unlock()
	return g.Acked(session, durable, durable) == nil
}

// Take hands out the next run of consecutive records to ship: at most limit,
// and no more payload than budget bytes unless a single record is larger.
// Records stay queued until they are acknowledged.
func (g *Group) Take(budget, limit int) []epoch.Record {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.q.take(budget, limit)
}

// Requeue gives back records of a session that were lost with a connection.
func (g *Group) Requeue(session uint64, first, last epoch.LSN) {
	g.mu.Lock()
	if session == g.session {
		g.q.requeue(first, last)
	}
	wake := g.wake
	g.mu.Unlock()
	if wake != nil {
		wake()
	}
}

// Unsent reports whether Take has something, and whether a FLUSH waits for it.
func (g *Group) Unsent() (any, urgent bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.q.unsent(), g.flushes > 0
}

// Done is closed when the group has failed or is closed; Err says why.
func (g *Group) Done() <-chan struct{} { return g.ctx.Done() }
