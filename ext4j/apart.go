package ext4j

import (
	"context"
	"errors"
	"sync"
	"time"

	"kagami/ext4j/epoch"
)

// ErrApart: the replica lacks what clients have written since the group goes on
// without it, and what FLUSHes were answered for.
var ErrApart = errors.New("the replica lacks what was written since the group goes on without it")

// GoApart goes on without the replica: what the queue holds is dropped, later
// records are numbered and not kept, nobody waits for room or for an acknowledgement.
// What the replica lacks is in the images, and its regions are in the recorder, which
// from before this call on has to let none go that is not acknowledged. since says
// since when the replica lacks something, if that is before what the queue knows. A group
// that has no session yet gets this one, in which no record is ever sent.
//
// It lasts until Begin, whose resync brings what the replica lacks. FLUSHes are
// answered by the local image alone (see Alone) until Together.
func (g *Group) GoApart(lineage epoch.UUID, session uint64, since time.Time) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.session == 0 {
		g.lineage, g.session = lineage, session
		g.q.reset(1)
	}
	g.alone = true
	g.goApartLocked(since)
}

func (g *Group) goApartLocked(since time.Time) {
	if lag := g.lagLocked(); lag > 0 && (since.IsZero() || time.Since(since) < lag) {
		since = time.Now().Add(-lag)
	}
	if !g.apart {
		close(g.parted)
	}
	g.behind, g.apart = since, true
	next := g.nextLocked()
	g.over = nil // the pump sees it
	g.q.reset(next)
	g.open, g.marks = openEpoch{}, nil
	g.hold, g.floor = false, ^epoch.LSN(0) // a FLUSH that has to wait waits for the end of the resync
	g.stopTimerLocked()
	g.cond.Broadcast()
}

// Alone lets FLUSHes be answered by the local image alone, or makes them wait for the
// replica again. A group that is apart goes on dropping its records.
func (g *Group) Alone(v bool) {
	g.mu.Lock()
	g.alone = v
	g.cond.Broadcast()
	g.mu.Unlock()
}

// Together ends it: the replica has acknowledged the end of the resync. From now on
// FLUSHes wait for it.
func (g *Group) Together() {
	g.mu.Lock()
	g.alone, g.behind = false, time.Time{}
	g.cond.Broadcast()
	g.mu.Unlock()
}

// passLocked numbers a record that is not kept.
func (g *Group) passLocked(r epoch.Record) epoch.LSN {
	if g.behind.IsZero() {
		g.behind = time.Now()
	}
	g.q.push(r)
	g.q.drop(r.LSN)
	g.stats.count(&r)
	return r.LSN
}

// untilApart is ctx until the group goes apart. The caller defers the function.
func (g *Group) untilApart(ctx context.Context) (context.Context, func()) {
	g.mu.Lock()
	parted := g.parted
	g.mu.Unlock()
	ctx, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() {
		select {
		case <-parted:
			cancel(ErrApart)
		case <-ctx.Done():
		}
	})
	return ctx, func() { cancel(nil); wg.Wait() }
}
