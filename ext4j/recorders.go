package ext4j

import (
	"context"
	"errors"
	"sync"
	"time"

	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
)

// Recorders is the Recorder of a group that can go on apart from its replica: the
// active log, which is bounded, and while the group is apart one that only grows. What
// may differ is what either of them names.
//
// Every range is released where it was acquired: a switch waits until nothing is
// held, and what waits for room in the log is acquired in the other one instead.
type Recorders struct {
	log *activelog.Log

	mu    sync.RWMutex // held for reading from Acquire to Release
	apart Recorder     // nil: the log records
}

// NewRecorders records in the log; or, if apart is not nil, in that first.
func NewRecorders(log *activelog.Log, apart Recorder) *Recorders {
	return &Recorders{log: log, apart: apart}
}

// interruptAgain is how often a switch looks for waits in the log.
const interruptAgain = time.Millisecond

// GoApart records in rec from now on. The group must be apart already, or requests
// that hold a range might wait for what the switch is to bring about.
func (r *Recorders) GoApart(rec Recorder) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		for {
			r.log.Interrupt()
			select {
			case <-done:
				return
			case <-time.After(interruptAgain):
			}
		}
	}()
	r.mu.Lock()
	r.apart = rec
	r.mu.Unlock()
	close(done)
	<-ended
}

// Together records in the log again. What the other recorder names by the time it
// returns, and the log, is all that may differ. Where the log records already it does
// nothing: what waits for room there holds on to it.
func (r *Recorders) Together() {
	if r.Apart() == nil {
		return
	}
	r.mu.Lock()
	r.apart = nil
	r.mu.Unlock()
}

// Apart is what records instead of the log, or nil.
func (r *Recorders) Apart() Recorder {
	r.mu.RLock()
	defer r.mu.RUnlock()
	return r.apart
}

// Acquire implements Recorder.
func (r *Recorders) Acquire(ctx context.Context, disk uint32, off, n int64) error {
	for {
		r.mu.RLock()
		rec := Recorder(r.log)
		if r.apart != nil {
			rec = r.apart
		}
		err := rec.Acquire(ctx, disk, off, n)
		if err == nil {
			return nil // Release unlocks
		}
		r.mu.RUnlock()
		if !errors.Is(err, activelog.ErrInterrupted) {
			return err
		}
	}
}

// Release implements Recorder.
func (r *Recorders) Release(disk uint32, off, n int64, last epoch.LSN) {
	if r.apart != nil { // does not change while the range is held
		r.apart.Release(disk, off, n, last)
	} else {
		r.log.Release(disk, off, n, last)
	}
	r.mu.RUnlock()
}

// Begin implements Recorder.
func (r *Recorders) Begin(session uint64, acked, shift epoch.LSN) { r.log.Begin(session, acked, shift) }

// Acked implements Recorder.
func (r *Recorders) Acked(lsn epoch.LSN) { r.log.Acked(lsn) }

// SyncBegin implements Recorder.
func (r *Recorders) SyncBegin(disk uint32) uint64 { return r.log.SyncBegin(disk) }

// SyncEnd implements Recorder.
func (r *Recorders) SyncEnd(disk uint32, token uint64) { r.log.SyncEnd(disk, token) }

// NeedsRoom implements Recorder. The other recorder always has room.
func (r *Recorders) NeedsRoom() <-chan struct{} { return r.log.NeedsRoom() }
