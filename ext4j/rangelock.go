package ext4j

import "sync"

// rangeLock excludes overlapping writers of one disk. Waiters are few: an NBD
// connection has a bounded number of requests in flight.
type rangeLock struct {
	mu   sync.Mutex
	held []*heldRange
}

type heldRange struct {
	off, end int64
	free     chan struct{} // closed when the range is released
}

// lock waits until no held range overlaps [off, off+n), then holds it.
func (l *rangeLock) lock(off, n int64) *heldRange {
	r := &heldRange{off: off, end: off + n, free: make(chan struct{})}
	for {
		l.mu.Lock()
		blocker := l.overlapping(r)
		if blocker == nil {
			l.held = append(l.held, r)
			l.mu.Unlock()
			return r
		}
		l.mu.Unlock()
		<-blocker.free
	}
}

func (l *rangeLock) overlapping(r *heldRange) *heldRange {
	for _, h := range l.held {
		if h.off < r.end && r.off < h.end {
			return h
		}
	}
	return nil
}

func (l *rangeLock) unlock(r *heldRange) {
	l.mu.Lock()
	for i, h := range l.held {
		if h == r {
			last := len(l.held) - 1
			l.held[i] = l.held[last]
			l.held[last] = nil
			l.held = l.held[:last]
			break
		}
	}
	l.mu.Unlock()
	close(r.free)
}
