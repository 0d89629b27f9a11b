package qmp

import (
	"context"
	"sync"
)

// EventKind is what happened to a VM.
type EventKind int

// The kinds of events.
const (
	// EventStarted: QEMU runs (or is paused at its start). NBD disks need Treat.
	EventStarted EventKind = iota + 1
	EventResumed
	// EventPaused: State says why; StateIOError needs Resume once the disk is served again.
	EventPaused
	// EventStopped: QEMU is gone; Reason tells how.
	EventStopped
	// EventCrashed: the guest panicked.
	EventCrashed
	// EventIOError: a request of the guest failed; Device and Action tell more.
	EventIOError
	// EventDefined: the stored definition is new or changed.
	EventDefined
	// EventUndefined: the stored definition is gone.
	EventUndefined
	// EventLost: events were lost because they were not read fast enough. The reader
	// must look at all VMs anew.
	EventLost
	// EventDisconnected: the connection to libvirt is lost. It is the last event.
	EventDisconnected
)

var eventNames = map[EventKind]string{
	EventStarted: "started", EventResumed: "resumed", EventPaused: "paused", EventStopped: "stopped", EventCrashed: "crashed",
	EventIOError: "I/O error", EventDefined: "defined", EventUndefined: "undefined", EventLost: "events lost", EventDisconnected: "disconnected",
}

func (k EventKind) String() string { return eventNames[k] }

// Event is one thing that happened.
type Event struct {
	Kind   EventKind
	VM     string
	UUID   string
	State  State  // of EventPaused: StatePaused or StateIOError
	Reason string // libvirt's words: "booted", "shutdown", "destroyed", "crashed", …; of EventIOError QEMU's: "eio", "enospc"
	Device string // of EventIOError: the device's alias, such as virtio-disk1
	Action string // of EventIOError: "none", "pause" or "report"
}

// maxEvents bounds the events that wait to be read.
const maxEvents = 1024

// eventQueue stands between libvirt's event loop, which must not be held up,
// and a reader. When it is full, what waits is replaced by one EventLost.
type eventQueue struct {
	mu     sync.Mutex
	wait   []Event
	wake   chan struct{} // capacity 1
	closed bool
}

func newEventQueue() *eventQueue { return &eventQueue{wake: make(chan struct{}, 1)} }

// push never blocks. After EventDisconnected nothing is taken.
func (q *eventQueue) push(e Event) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.closed {
		return
	}
	if len(q.wait) == maxEvents {
		q.wait = []Event{{Kind: EventLost}}
	}
	q.wait = append(q.wait, e)
	q.closed = e.Kind == EventDisconnected
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// take returns all that waits, and whether more may come.
func (q *eventQueue) take() (es []Event, more bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	es, q.wait = q.wait, nil
	return es, !q.closed
}

// pump moves events to out until ctx ends or the queue is closed and empty.
func (q *eventQueue) pump(ctx context.Context, out chan<- Event) {
	for {
		es, more := q.take()
		for _, e := range es {
			select {
			case out <- e:
			case <-ctx.Done():
				return
			}
		}
		if !more {
			return
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return
		}
	}
}
