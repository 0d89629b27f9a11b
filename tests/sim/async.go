package sim

import (
	"sync"
	"time"

	"kagami/ext4j"
)

// mode is that of the source.
func (w *World) mode() ext4j.Mode {
	if w.mutant == NoBound {
		return ext4j.Mode{Async: w.c.AsyncAge > 0}
	}
	return ext4j.Mode{Async: w.c.AsyncAge > 0, Age: w.c.AsyncAge}
}

// earlier remembers what was answered when, as coarsely as the bound of mode async allows.
type earlier struct {
	mu   sync.Mutex
	seen []moment
}

type moment struct {
	at time.Time
	m  marks
}

// remember takes a snapshot, unless there is a recent one.
func (w *World) remember() {
	if w.c.AsyncAge == 0 {
		return
	}
	p := &w.earlier
	p.mu.Lock()
	defer p.mu.Unlock()
	if now := time.Now(); len(p.seen) == 0 || now.Sub(p.seen[len(p.seen)-1].at) > w.c.AsyncAge/4 {
		p.seen = append(p.seen, moment{now, w.history.Answered()})
	}
}

// aged is what had been answered when a request that is issued now must find everything
// at the replica: a bound ago. nil: nothing is known to be that old.
func (w *World) aged() (m marks) {
	if w.c.AsyncAge == 0 || !w.protected.Load() {
		return nil
	}
	p := &w.earlier
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(p.seen) > 1 && time.Since(p.seen[1].at) > w.c.AsyncAge {
		p.seen = p.seen[1:]
	}
	if len(p.seen) > 0 && time.Since(p.seen[0].at) > w.c.AsyncAge {
		return p.seen[0].m
	}
	return nil
}

// within notes that a write was answered which was issued when m was due.
func (w *World) within(m marks) {
	if m != nil {
		w.history.shipped(m, -1)
	}
	w.remember()
}
