package ext4j

import (
	"slices"
	"sync"
)

// rangeLock excludes overlapping writers of one disk. Those that overlap get it
// in the order in which they came, so that a large range is not passed by one
// small one after another. Nobody may ask for a second range while holding one.
// Waiters are few: an NBD connection has a bounded number of requests in flight.
type rangeLock struct {
	mu    sync.Mutex
	queue []*heldRange // held or waited for, in order of arrival
}

type heldRange struct {
	off, end int64
	free     chan struct{} // closed when the range is released
}

// lock waits until every range that overlaps [off, off+n) and came before is
// released, then holds it.
func (l *rangeLock) lock(off, n int64) *heldRange {
	r := &heldRange{off: off, end: off + n, free: make(chan struct{})}
	l.mu.Lock()
	var before []*heldRange
	for _, h := range l.queue {
		if h.off < r.end && r.off < h.end {
			before = append(before, h)
		}
	}
	l.queue = append(l.queue, r)
	l.mu.Unlock()
	for _, h := range before {
		<-h.free
	}
	return r
}

func (l *rangeLock) unlock(r *heldRange) {
	l.mu.Lock()
	i := slices.Index(l.queue, r)
	l.queue = slices.Delete(l.queue, i, i+1)
	l.mu.Unlock()
	close(r.free)
}
