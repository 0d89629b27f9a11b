package ext4j

import (
	"context"
	"errors"
	"time"

	"kagami/ext4j/backlog"
	"kagami/ext4j/epoch"
)

// Store keeps, in order, records for which the queue has no room. backlog.Backlog
// implements it. One goroutine uses it.
type Store interface {
	// Append puts records behind the others: all, or with backlog.ErrFull none.
	Append(recs []epoch.Record) error
	// Next takes some from the front, of about so many bytes; none when it is empty.
	Next(bytes int64) ([]epoch.Record, error)
	// Bytes is what the records in it take.
	Bytes() int64
	Close() error
}

// overflow is what of the unacknowledged records is not in the queue: the oldest of
// them in the store, the newest on their way there. The queue has those before them. It
// is guarded by Group.mu; the store is the goroutine's that moves them (Group.pump).
type overflow struct {
	store  Store
	event  func(error)    // told by pump
	wait   []epoch.Record // for the store
	bytes  int64          // of wait, see cost
	stored int64          // Store.Bytes after the last move
	n      int            // records: of wait, of the store, and those that are being moved
	next   epoch.LSN      // the LSN after the newest of them, while there are any
	full   bool           // the store refused some
	told   bool           // of that
	drain  bool           // CatchUp: more may leave than comes
	came   int64          // since then, by clients, bytes
	left   int64          // to the queue
}

// overflowBatch is what is moved at once, bytes.
const overflowBatch = 1 << 20

// Overflow goes on without the replica, as GoApart does, but keeps the records: those
// that the queue has no room for go to the store, which the group closes. When the link
// is back, Resume goes on with the session, in order, and CatchUp waits until the queue
// has all of them.
//
// While the store is full, clients wait; event hears of that (backlog.ErrFull), and of
// any other error of the store, with which the group has gone apart. It must not block.
//
// It returns false, and has done nothing, where there is no stream to go on with: before the
// first session, until a resync or first sync is acknowledged, and when the group is apart.
func (g *Group) Overflow(store Store, event func(error)) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil || g.session == 0 || g.detached || g.hold || g.apart || g.over != nil || g.acked < g.floor {
		return false
	}
	g.over, g.alone = &overflow{store: store, event: event}, true
	g.wg.Add(1)
	go g.pump(g.over)
	g.cond.Broadcast()
	return true
}

// nextLocked is the LSN of the next record.
func (g *Group) nextLocked() epoch.LSN {
	if g.over != nil && g.over.n > 0 {
		return g.over.next
	}
	return g.q.next()
}

// overflowRoomLocked is roomLocked while there is an overflow.
func (g *Group) overflowRoomLocked(n int64) bool {
	o := g.over
	if o.n == 0 && g.queueRoomLocked(n) {
		return true
	}
	if o.drain && o.n > 0 && o.came+n > o.left/2+g.limits.QueueBytes/4 {
		return false
	}
	return o.bytes == 0 || o.bytes+n+recordOverhead <= max(overflowBatch, g.limits.QueueBytes/4)
}

// overflowLocked takes a record that must not overtake others, or for which the queue has no room.
func (g *Group) overflowLocked(r epoch.Record) {
	o := g.over
	if len(o.wait) == 0 {
		g.cond.Broadcast() // the pump may be waiting
	}
	o.wait = append(o.wait, r)
	o.bytes += cost(&r)
	o.came += cost(&r)
	o.n, o.next = o.n+1, r.LSN+1
}

// pump moves records to the store and from there to the queue, until the overflow
// ends.
func (g *Group) pump(o *overflow) {
	defer g.wg.Done()
	defer func() { _ = o.store.Close() }() // nobody needs what it may still hold
	for {
		var err error
		switch batch, from := g.nextMove(o); {
		case from:
			var recs []epoch.Record
			recs, err = o.store.Next(min(overflowBatch, g.limits.QueueBytes/2))
			g.moved(o, recs, err)
		case len(batch) > 0:
			err = o.store.Append(batch)
			g.kept(o, batch, err)
		default:
			return
		}
		if err == nil {
			continue
		}
		full := errors.Is(err, backlog.ErrFull)
		if !full {
			g.loseOverflow(o)
		}
		if !full || !o.told {
			o.event(err)
		}
		o.told = full
	}
}

// nextMove waits until there is something to move: from the store, or to it. Neither:
// the overflow has ended.
func (g *Group) nextMove(o *overflow) (batch []epoch.Record, from bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for g.over == o && g.err == nil {
		switch {
		case o.stored > 0 && (g.q.bytes <= g.limits.QueueBytes/2 || g.q.closes == 0):
			return nil, true
		case o.stored == 0 && len(o.wait) > 0 && g.passesLocked(&o.wait[0]):
			g.passOnLocked(o)
			g.callWakeLocked()
			continue
		case len(o.wait) > 0 && !o.full:
			return o.batch(), false
		}
		g.cond.Wait()
	}
	return nil, false
}

// passesLocked tells whether a record may go on to the queue: there is room, or no epoch ends in
// the queue, so that no acknowledgement would ever make any.
func (g *Group) passesLocked(r *epoch.Record) bool {
	return g.queueRoomLocked(int64(len(r.Payload))) || g.q.closes == 0
}

// batch is the front of wait.
func (o *overflow) batch() []epoch.Record {
	n, size := 0, 0
	for n < len(o.wait) && size < overflowBatch {
		size += len(o.wait[n].Payload) + epoch.HeaderSize
		n++
	}
	return o.wait[:n:n]
}

// passOnLocked moves what waits for the store to the queue, as far as there is room.
func (g *Group) passOnLocked(o *overflow) {
	n := 0
	for ; n < len(o.wait) && g.passesLocked(&o.wait[n]); n++ {
		g.q.push(o.wait[n])
	}
	was := o.bytes
	o.leave(n)
	o.n, o.left = o.n-n, o.left+was-o.bytes
	g.endOverflowLocked(o)
	g.cond.Broadcast()
}

// endOverflowLocked ends an overflow that CatchUp waits for, in the moment in which the queue has everything: a
// moment later clients may have filled the queue again.
func (g *Group) endOverflowLocked(o *overflow) {
	if o.drain && o.n == 0 {
		g.over = nil // the pump sees it
	}
}

// leave drops the front of wait.
func (o *overflow) leave(n int) {
	for i := range n {
		o.bytes -= cost(&o.wait[i])
		o.wait[i] = epoch.Record{}
	}
	if o.wait = o.wait[n:]; len(o.wait) == 0 {
		o.wait = nil
	}
}

// moved brings what the store gave to the queue.
func (g *Group) moved(o *overflow, recs []epoch.Record, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over != o || err != nil {
		return
	}
	for _, r := range recs {
		g.q.push(r)
		o.left += cost(&r)
	}
	o.n, o.stored, o.full = o.n-len(recs), o.store.Bytes(), false
	g.endOverflowLocked(o)
	g.cond.Broadcast()
	g.callWakeLocked()
}

// kept notes what the store did with a batch.
func (g *Group) kept(o *overflow, batch []epoch.Record, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over != o {
		return
	}
	if o.full = err != nil; err == nil {
		o.leave(len(batch))
		o.stored = o.store.Bytes()
	}
	g.cond.Broadcast()
}

// loseOverflow: what the store holds is lost, so the group goes apart.
func (g *Group) loseOverflow(o *overflow) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.over == o && g.err == nil {
		g.goApartLocked(time.Time{})
	}
}

// catchUpTick is how often CatchUp looks.
const catchUpTick = 20 * time.Millisecond

// CatchUp waits until the queue has every record again, and ends the overflow then: clients
// wait for room in the queue as usual. left is told how many bytes are not in the
// queue yet. It is an error when the group goes apart meanwhile.
//
// So that it ends, clients may add no more than half of what leaves for the queue.
func (g *Group) CatchUp(ctx context.Context, left func(int64)) error {
	g.setDrain(true)
	defer g.setDrain(false)
	tick := time.NewTicker(catchUpTick)
	defer tick.Stop()
	for {
		n, done, err := g.caughtUp()
		if done || err != nil {
			return err
		}
		left(n)
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

func (g *Group) setDrain(v bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if o := g.over; o != nil {
		o.drain, o.came, o.left = v, 0, 0
		g.cond.Broadcast()
	}
}

func (g *Group) caughtUp() (left int64, done bool, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	switch {
	case g.err != nil:
		return 0, false, g.err
	case g.apart:
		return 0, false, ErrApart
	case g.over == nil:
		return 0, true, nil
	case g.over.n > 0:
		return g.over.stored + g.over.bytes, false, nil
	}
	g.over = nil // the pump sees it
	g.cond.Broadcast()
	return 0, true, nil
}

// Rejoin ends the time without the replica: FLUSHes wait for it from now on, and when
// Rejoin returns nil, the replica has all that others were answered for. The images
// are durable then, so that nothing differs but what the recorder names since before the call.
func (g *Group) Rejoin(ctx context.Context) error {
	g.Together()
	if err := g.SyncImages(); err != nil {
		return err
	}
	g.closeEpoch(epoch.ByTime)
	return g.AwaitAcked(ctx)
}
