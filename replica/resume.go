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
