package ext4j

import "time"

// Mode says when a FLUSH is answered, and what the replica may lack.
type Mode struct {
	// Async answers a FLUSH when the local image is durable, as long as the replica
	// lacks no more than the bound. Past it, FLUSHes and writes wait: a loss of this
	// site never costs more. The end of a resync is waited for as in sync.
	Async bool
	Bytes int64         // unacknowledged, as they are counted for Limits.QueueBytes; 0: that limit alone
	Age   time.Duration // of the oldest unacknowledged record; 0: no bound
}

// SetMode changes the mode. To sync: FLUSHes that arrive from now on, and those that
// still wait, wait for the replica.
func (g *Group) SetMode(m Mode) {
	g.mu.Lock()
	g.mode = m
	g.cond.Broadcast()
	g.mu.Unlock()
}

// boundLocked tells whether n more bytes of records keep the replica within what it
// may lack. In sync mode there is no bound but the queue.
func (g *Group) boundLocked(n int64) bool {
	if !g.mode.Async {
		return true
	}
	if g.mode.Bytes > 0 && g.q.bytes > 0 && g.q.bytes+n > g.mode.Bytes {
		return false
	}
	return g.mode.Age <= 0 || g.lagLocked() <= g.mode.Age
}

// lagLocked is the age of the oldest record that the replica lacks: what a loss of this
// site would cost. 0 when it lacks nothing.
func (g *Group) lagLocked() time.Duration {
	switch {
	case !g.behind.IsZero():
		return max(0, time.Since(g.behind)) // the time may be from before a restart
	case len(g.marks) > 0:
		return time.Since(g.marks[0].since)
	case g.open.n > 0:
		return time.Since(g.open.since)
	}
	return 0
}
