package ext4j

import (
	"context"
	"errors"

	"kagami/ext4j/epoch"
)

// Drain stops taking requests (new ones wait), lets the running ones end,
// makes the images durable and waits until the replica has everything. It
// returns the position reached; the caller writes the clean mark with it. When
// ctx ends first, or the group goes on apart from its replica, it is not drained and the error says so. The gate
// stays closed either way, and for good: a link that comes back meanwhile opens it
// no more, or writes would follow a position that counts as the last.
//
// Running requests are waited for only as long as they can end: with the link
// lost a FLUSH may wait for ever, hence ctx.
func (g *Group) Drain(ctx context.Context) (epoch.Pos, error) {
	defer g.wakeAtEnd(ctx)()
	g.setGate(gateShut)
	g.mu.Lock()
	for g.running > 0 && g.err == nil && ctx.Err() == nil {
		g.cond.Wait()
	}
	begun := g.session != 0
	g.mu.Unlock()
	switch {
	case ctx.Err() != nil:
		return epoch.Pos{}, context.Cause(ctx)
	case !begun:
		return epoch.Pos{}, errors.New("the replica was never attached in this life of the daemon")
	}
	g.closeEpoch(epoch.ByStop)
	if err := g.SyncImages(); err != nil {
		return epoch.Pos{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err == nil && (g.alone || g.apart) {
		return epoch.Pos{}, ErrApart
	}
	for g.err == nil && ctx.Err() == nil && (g.hold || g.acked+1 < g.nextLocked()) {
		g.cond.Wait()
	}
	switch {
	case g.err != nil:
		return epoch.Pos{}, g.err
	case ctx.Err() != nil:
		return epoch.Pos{}, context.Cause(ctx)
	}
	return epoch.Pos{Lineage: g.lineage, Session: g.session, LSN: g.acked}, nil
}

// Shut tells whether a Drain has begun: no request is served any more.
func (g *Group) Shut() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.gate == gateShut
}

// relieve makes regions leave a full recorder: it closes the epoch, so that
// the replica can acknowledge it, and makes the images durable.
func (g *Group) relieve() {
	defer g.wg.Done()
	for {
		select {
		case <-g.ctx.Done():
			return
		case <-g.rec.NeedsRoom():
		}
		g.closeEpoch(epoch.BySize)
		_ = g.SyncImages() // its failure ends the group, and with it this loop
	}
}
