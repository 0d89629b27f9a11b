package activelog

import (
	"context"
	"errors"
	"fmt"
	"sync"

	"kagami/ext4j/epoch"
	"kagami/images"
)

// Errors a caller may test for.
var (
	// ErrCorrupt: the set cannot be known; every region must be taken as active,
	// and the file removed before the log is opened again.
	ErrCorrupt = errors.New("active log is damaged")
	// ErrTooLarge: one Acquire touches more regions than MaxRegions.
	ErrTooLarge = errors.New("request touches more regions than the active log holds")
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("active log is closed")
	// ErrInterrupted: Interrupt ended the wait.
	ErrInterrupted = errors.New("wait for active log was interrupted")
	// ErrPinned: Clear while a region is in use.
	ErrPinned = errors.New("regions are in use")
)

// maxRegions bounds Options.MaxRegions.
const maxRegions = 1 << 20

// Options of an active log.
type Options struct {
	Group       epoch.UUID
	RegionBytes int64 // 0 means 1 MiB; a power of two, at least 4096; fixed when the file is made
	MaxRegions  int   // bound of the set, 1 to 1<<20; may change between runs
}

func (o *Options) check() error {
	if o.RegionBytes == 0 {
		o.RegionBytes = 1 << 20
	}
	switch {
	case o.RegionBytes < 4096 || o.RegionBytes&(o.RegionBytes-1) != 0:
		return fmt.Errorf("regions of %d bytes: want a power of two, at least 4096", o.RegionBytes)
	case o.MaxRegions < 1 || o.MaxRegions > maxRegions:
		return fmt.Errorf("active log of %d regions: want 1 to %d", o.MaxRegions, maxRegions)
	}
	return nil
}

// Region is one region of one disk.
type Region struct {
	Disk  uint32 // slot in the group, below 65536
	Index uint64 // offset / RegionBytes
}

// Floor is a position that the replica had acknowledged and that regions have
// left the log for. A replica that is before it, by session and then by LSN, has
// lost what it acknowledged: the log does not name all that may differ from it.
type Floor struct {
	Session uint64
	LSN     epoch.LSN
}

// Follower is whose position the floor is: a replica, and the lineage that it
// follows. What another one acknowledged says nothing about it.
type Follower struct {
	Lineage epoch.UUID
	Replica epoch.UUID
}

// Log is an open active log. All methods are safe for concurrent use.
type Log struct {
	o     Options
	room  chan struct{} // NeedsRoom
	kick  chan struct{} // there may be work for the writer
	ended chan struct{} // the writer has returned

	ioMu sync.Mutex
	file *file

	mu      sync.Mutex
	set     *set
	session uint64    // of set.acked; 0: none has begun
	base    epoch.LSN // what had been acknowledged when it began
	shift   epoch.LSN // see Begin
	prior   Floor     // the floor until more is
	replica Follower  // whose floor it is
	queue   []*request
	removed []key // left the set; not written yet
	starved bool  // the first in the queue waits for regions to leave
	err     error // final
}

// request is an Acquire that waits.
type request struct {
	span      span
	done      chan struct{} // closed when err is set
	err       error
	cancelled bool // nobody waits any more
}

// Open opens the log, making it when the file is missing, and returns the
// recovered set, sorted. Recovered regions stay until Adopt or Clear. When Open returns,
// the set is durable.
func Open(fsys images.FS, path string, o Options) (*Log, []Region, error) {
	if err := o.check(); err != nil {
		return nil, nil, fmt.Errorf("open active log: %w", err)
	}
	f, kept, err := openFile(fsys, path, o)
	if err != nil {
		return nil, nil, fmt.Errorf("open active log %s: %w", path, err)
	}
	l := &Log{o: o, file: f, prior: f.floor, replica: f.follower, set: newSet(o.MaxRegions, kept), room: make(chan struct{}, 1), kick: make(chan struct{}, 1), ended: make(chan struct{})}
	go l.writer()
	return l, regions(kept), nil
}

func regions(keys []key) []Region {
	out := make([]Region, len(keys))
	for i, k := range keys {
		out[i] = k.region()
	}
	return out
}

// span checks a range and turns it into regions.
func (l *Log) span(disk uint32, off, n int64) (span, error) {
	if disk > 0xffff || off < 0 || n < 0 || off+n < 0 {
		return span{}, fmt.Errorf("active log: no such range: disk %d, %d bytes at %d", disk, n, off)
	}
	if n == 0 {
		return span{}, nil
	}
	first, last := off/l.o.RegionBytes, (off+n-1)/l.o.RegionBytes
	if last >= 1<<indexBits {
		return span{}, fmt.Errorf("active log: offset %d is out of range", off)
	}
	if last-first >= int64(l.o.MaxRegions) {
		return span{}, fmt.Errorf("%w: %d of %d", ErrTooLarge, last-first+1, l.o.MaxRegions)
	}
	return span{makeKey(disk, uint64(first)), int(last - first + 1)}, nil
}

// Acquire returns when every region of [off, off+n) is durable in the log and
// pinned; Release undoes it. When all of them are in the log already it does
// no I/O and does not wait, unless others wait for room. A goroutine must not
// call it while it holds a pin.
//
// Errors: ErrTooLarge, ErrInterrupted, the context's, and those that ended the log; then
// nothing is pinned.
func (l *Log) Acquire(ctx context.Context, disk uint32, off, n int64) error {
	sp, err := l.span(disk, off, n)
	if err != nil {
		return err
	}
	l.mu.Lock()
	if l.err != nil {
		defer l.mu.Unlock()
		return l.err
	}
	if !l.starved && l.set.pin(sp) {
		l.mu.Unlock()
		return nil
	}
	r := &request{span: sp, done: make(chan struct{})}
	l.queue = append(l.queue, r)
	l.mu.Unlock()
	l.wake()
	select {
	case <-r.done:
		return r.err
	case <-ctx.Done():
		return l.cancel(r, ctx)
	}
}

// cancel gives up a request. The regions it may have added stay; they may leave at once.
func (l *Log) cancel(r *request, ctx context.Context) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	r.cancelled = true
	select {
	case <-r.done: // too late: it has its pins, or an error
		if r.err == nil {
			l.set.unpin(r.span, false, 0)
		}
	default:
	}
	l.wake() // the others may go on without it
	return fmt.Errorf("wait for active log: %w", context.Cause(ctx))
}

// Interrupt makes the acquirers that wait in the queue return ErrInterrupted. Those
// whose additions are being written return with their pins.
func (l *Log) Interrupt() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, r := range l.queue {
		r.err = ErrInterrupted
		close(r.done)
	}
	l.queue, l.starved = nil, false
}

// Release undoes one Acquire of the same range: the pwrites have returned,
// and last is the newest record that touches it (0: none, nothing was written
// or sent; the range then counts as written all the same).
func (l *Log) Release(disk uint32, off, n int64, last epoch.LSN) {
	sp, err := l.span(disk, off, n)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil && !l.set.unpin(sp, true, last) {
		err = fmt.Errorf("active log: release of disk %d, %d bytes at %d, which nobody holds", disk, n, off)
	}
	if err != nil {
		l.fail(err)
	}
	l.ask()
}

// Floor is the newest one: recovered, or of the present session.
func (l *Log) Floor() Floor {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.floor()
}

// floor is Floor with mu held.
func (l *Log) floor() Floor {
	if l.set.acked <= l.base {
		return l.prior
	}
	return Floor{l.session, l.set.acked - l.shift}
}

// Follower is whose position Floor is; zero before the first Follow.
func (l *Log) Follower() Follower {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.replica
}

// Begin starts a session in which the replica has acknowledged everything up
// to acked. The LSNs told to the log rise across sessions; shift is what they
// are above the session's own, which may have begun lower than where the one
// before had come to.
func (l *Log) Begin(session uint64, acked, shift epoch.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.prior = l.floor(); l.prior.LSN > acked-shift {
		l.prior = Floor{} // the replica fell back, and is compared as a whole
	}
	l.session, l.base, l.shift = session, max(acked, l.set.acked), shift
	l.progress()
}

// Reached says where the replica stood when the session began, and that it holds
// all that the log does not name. What leaves the log from now on relies on that.
func (l *Log) Reached(f Floor) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if p := l.prior; f.Session > p.Session || f.Session == p.Session && f.LSN > p.LSN {
		l.prior = f
	}
}

// Adopt lets recovered regions leave in the usual way: what they hold was
// shipped by records up to last.
func (l *Log) Adopt(last epoch.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.set.adopt(last)
	l.progress()
	l.ask()
}

// Limit bounds the set to so many regions, at most MaxRegions, from now on.
// While it holds more, none is added. The largest range that is acquired must fit.
func (l *Log) Limit(regions int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.set.max = max(1, min(regions, l.o.MaxRegions))
	l.progress()
	l.ask()
}

// Acked says that the replica acknowledged everything at or below lsn.
func (l *Log) Acked(lsn epoch.LSN) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.set.acked = max(l.set.acked, lsn)
	l.progress()
}

// SyncBegin is called before an fdatasync of the disk's image starts. The
// fdatasync covers what was released before.
func (l *Log) SyncBegin(disk uint32) (token uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.set.disk(disk)
	d.begun = l.set.clock
	return l.set.clock
}

// SyncEnd is called after that fdatasync returned without error; after an error
// it must not be.
func (l *Log) SyncEnd(disk uint32, token uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	d := l.set.disk(disk)
	d.synced = max(d.synced, token)
	l.progress()
	l.ask()
}

// NeedsRoom receives when acquirers wait for regions to leave. The owner then
// closes the open epoch and runs an fdatasync, with SyncBegin and SyncEnd, of every
// disk.
//
// No call is lost and none is idle: it receives once when the wait begins, and
// again after each Release and SyncEnd during the wait as long as some disk was
// written after its newest SyncBegin. The last write released during the wait
// is thus followed by a receive.
func (l *Log) NeedsRoom() <-chan struct{} { return l.room }

// Pressure reports that acquirers wait for regions to leave.
func (l *Log) Pressure() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.starved
}

// Regions is a snapshot of the set, sorted. It includes regions whose
// addition is not durable yet.
func (l *Log) Regions() []Region {
	l.mu.Lock()
	defer l.mu.Unlock()
	return regions(l.set.keys())
}

// Count is the number of regions in the set.
func (l *Log) Count() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.set.entries)
}

// Err is the error that ended the log, or nil.
func (l *Log) Err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.err
}

// progress wakes the writer when somebody waits for it. Called with mu held.
func (l *Log) progress() {
	if l.starved {
		l.wake()
	}
}

// ask asks the owner for an fdatasync if that can help. Called with mu held.
func (l *Log) ask() {
	if l.starved && l.set.unsynced() {
		l.signal()
	}
}

func (l *Log) signal() {
	select {
	case l.room <- struct{}{}:
	default:
	}
}

func (l *Log) wake() {
	select {
	case l.kick <- struct{}{}:
	default:
	}
}

// fail makes an error final. Called with mu held.
func (l *Log) fail(err error) {
	if l.err == nil {
		l.err = err
	}
	l.wake()
}
