package replica

import (
	"errors"

	"kagami/replica/wire"
)

// resume stores what waits once the reason why it waits is gone. It is called
// with mu held and gives it up.
func (g *Group) resume(reason *bool) error {
	var err error
	if *reason {
		*reason = false
		err = g.storePending()
	}
	ch := g.channel
	g.ackLocked()
	g.mu.Unlock()
	if errors.Is(err, wire.ErrProtocol) && ch != nil {
		ch.Drop(err)
		return nil
	}
	if err != nil {
		return g.fail(err)
	}
	return nil
}

// retryFull looks whether a spool that was full takes records now. Room does not
// only come from what is applied: the spool's disk has space again, say, and
// until then perhaps nothing could be spooled that could be applied.
func (g *Group) retryFull() error {
	g.mu.Lock()
	if !g.full || g.closing || g.err != nil {
		defer g.mu.Unlock()
		return g.err
	}
	return g.resume(&g.full)
}

// resumeLoop goes on with what waited for a segment of the spool.
func (g *Group) resumeLoop() {
	defer g.wg.Done()
	for range g.ready {
		g.mu.Lock()
		if g.closing || g.err != nil {
			g.mu.Unlock()
			return
		}
		if g.resume(&g.unready) != nil {
			return // it has ended the group
		}
	}
}

// segmentReady wakes resumeLoop. It never blocks.
func (g *Group) segmentReady() {
	select {
	case g.ready <- struct{}{}:
	default:
	}
}
