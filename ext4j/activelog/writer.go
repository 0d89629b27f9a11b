package activelog

import (
	"errors"
	"fmt"
)

// writer is the log's goroutine. It ends when the log has failed or was closed.
func (l *Log) writer() {
	defer close(l.ended)
	for range l.kick {
		for l.round() {
		}
		if l.Err() != nil {
			l.mu.Lock()
			l.refuse(l.queue)
			l.queue, l.starved = nil, false
			l.mu.Unlock()
			return
		}
	}
}

// round serves the requests that can be served now, with at most one
// fdatasync. It reports false when there was nothing to do.
func (l *Log) round() bool {
	l.ioMu.Lock()
	defer l.ioMu.Unlock()
	l.mu.Lock()
	if l.err != nil {
		l.mu.Unlock()
		return false
	}
	served, added := l.admitAll()
	removed := l.removed
	if len(added) == 0 {
		l.finish(served, nil)
		l.mu.Unlock()
		return false
	}
	l.removed = nil
	l.file.follower, l.file.floor = l.replica, l.floor()
	l.mu.Unlock()
	// Durability: the additions are durable before any of their requests returns.
	err := l.file.append(l.o, removed, added, l.keys)
	l.mu.Lock()
	defer l.mu.Unlock()
	l.finish(served, err)
	l.harden(added, err)
	return true
}

// keys is the set for a snapshot. Nothing enters or leaves it during a round
// but by the round itself.
func (l *Log) keys() []key {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.set.keys()
}

// admitAll admits requests from the front of the queue until one must wait.
// Called with mu held.
func (l *Log) admitAll() (served []*request, added []key) {
	was := l.starved
	l.starved = false
	for len(l.queue) > 0 && !l.starved {
		r := l.queue[0]
		if !r.cancelled {
			out, in, ok := l.set.admit(r.span)
			l.removed = append(l.removed, out...)
			added = append(added, in...)
			if !ok {
				l.starved = true
				break
			}
			served = append(served, r)
		}
		l.queue[0] = nil
		l.queue = l.queue[1:]
	}
	if l.starved && (!was || len(served) > 0) {
		l.signal()
	}
	return served, added
}

// finish lets served requests return. Called with mu held.
func (l *Log) finish(served []*request, err error) {
	if err != nil {
		l.fail(fmt.Errorf("active log has failed: %w", err))
		l.refuse(served)
		return
	}
	for _, r := range served {
		if r.cancelled {
			l.set.unpin(r.span, false, 0)
		}
		close(r.done)
	}
}

// harden marks what a batch added as durable. Called with mu held.
func (l *Log) harden(added []key, err error) {
	for _, k := range added {
		if e := l.set.entries[k]; e != nil && err == nil {
			e.durable = true
		}
	}
}

func (l *Log) refuse(list []*request) {
	for _, r := range list {
		r.err = l.err
		close(r.done)
	}
}

// Follow says who acknowledges from now on, and makes it durable if that is
// another one than before. The floor of the one before is void: the caller has
// everything compared.
func (l *Log) Follow(f Follower) error {
	l.ioMu.Lock()
	defer l.ioMu.Unlock()
	l.mu.Lock()
	if l.err != nil || f == l.replica {
		defer l.mu.Unlock()
		return l.err
	}
	l.replica, l.prior, l.base = f, Floor{}, max(l.base, l.set.acked)
	l.file.follower, l.file.floor = f, Floor{}
	l.removed = nil // the snapshot is without them
	keys := l.set.keys()
	l.mu.Unlock()
	// Durability: until this returns, the old half counts.
	err := l.file.begin(l.o, keys)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.fail(fmt.Errorf("active log has failed: %w", err))
	}
	return l.err
}

// Clear makes the empty set durable: both sites are known to be alike. It
// returns ErrPinned when a region is in use.
func (l *Log) Clear() error {
	l.ioMu.Lock()
	defer l.ioMu.Unlock()
	l.mu.Lock()
	if l.err != nil || l.set.pinned() {
		defer l.mu.Unlock()
		if l.err != nil {
			return l.err
		}
		return fmt.Errorf("clear active log: %w", ErrPinned)
	}
	clear(l.set.entries)
	l.removed = nil
	l.file.follower, l.file.floor = l.replica, l.floor()
	l.mu.Unlock()
	// Durability: until this returns, the old half counts.
	err := l.file.begin(l.o, nil)
	l.mu.Lock()
	defer l.mu.Unlock()
	if err != nil {
		l.fail(fmt.Errorf("active log has failed: %w", err))
		return l.err
	}
	l.wake()
	return nil
}

// Close fails the waiting acquirers with ErrClosed, waits for the writer and
// closes the file. It makes nothing durable.
func (l *Log) Close() error {
	l.mu.Lock()
	if errors.Is(l.err, ErrClosed) {
		l.mu.Unlock()
		return ErrClosed
	}
	failed := l.err != nil
	l.err = errors.Join(ErrClosed, l.err)
	l.mu.Unlock()
	l.wake()
	<-l.ended
	l.ioMu.Lock()
	defer l.ioMu.Unlock()
	if err := l.file.f.Close(); err != nil && !failed {
		return fmt.Errorf("close active log: %w", err)
	}
	return nil
}
