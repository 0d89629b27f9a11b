package control

import (
	"context"
	"encoding/json"
	"net"
	"net/http"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxPending bounds the events a slow client has not read.
const maxPending = 256

// lastLinePatience bounds how long the end of an operation waits for a client
// that does not read.
const lastLinePatience = 5 * time.Second

// line is one line of a stream.
type line struct {
	*Event
	Result any    `json:"result,omitempty"`
	Error  *Error `json:"error,omitempty"`
}

// job is one long operation.
type job struct {
	op, vm string
	goesOn bool // when the client goes away
	run    func(ctx context.Context, emit func(Event)) (any, error)
}

// stream runs a job and tells the client how it goes.
func (s *Server) stream(w http.ResponseWriter, r *http.Request, j job) {
	ctx, cancel := s.jobContext(r, j)
	defer cancel()
	log := s.opts.Log.With("operation", j.op, "vm", j.vm)
	log.Info("begin", "caller", r.Context().Value(callerKey{}))
	began := time.Now()

	w.Header().Set("Content-Type", "application/x-ndjson")
	out := newOutbox()
	written := make(chan struct{})
	go func() {
		defer close(written)
		out.write(w)
	}()
	result, err := j.run(ctx, out.event)
	if err != nil {
		e := asError(err)
		out.last(line{Error: e})
		log.Warn("failed", "seconds", time.Since(began).Seconds(), "code", e.Code, "error", e.Error())
	} else {
		if result == nil {
			result = struct{}{}
		}
		out.last(line{Result: result})
		log.Info("done", "seconds", time.Since(began).Seconds())
	}
	// A client that does not read is cut off, so that the writer ends.
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(lastLinePatience))
	<-written
}

// jobContext ends when the server is closed and, unless the job goes on, when
// the client goes away.
func (s *Server) jobContext(r *http.Request, j job) (context.Context, context.CancelFunc) {
	if j.goesOn {
		return context.WithCancel(s.life)
	}
	ctx, cancel := context.WithCancel(r.Context())
	stop := context.AfterFunc(s.life, cancel)
	return ctx, func() { stop(); cancel() }
}

// outbox holds what a client is to be told. Its lock is never held across I/O.
type outbox struct {
	mu      sync.Mutex
	more    *sync.Cond
	pending []line
	done    bool
}

func newOutbox() *outbox {
	o := &outbox{}
	o.more = sync.NewCond(&o.mu)
	return o
}

// event adds an event; it never blocks. Progress of a step replaces unread
// progress of the same step; in a full box the oldest event gives way.
func (o *outbox) event(e Event) {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.done {
		return
	}
	n := len(o.pending)
	if n > 0 && progress(e) && progress(*o.pending[n-1].Event) && o.pending[n-1].Step == e.Step {
		o.pending[n-1] = line{Event: &e}
		return
	}
	if n == maxPending {
		o.pending = append(o.pending[:0], o.pending[1:]...)
	}
	o.pending = append(o.pending, line{Event: &e})
	o.more.Signal()
}

func progress(e Event) bool { return e.Total > 0 && e.Done < e.Total }

// last adds the last line and ends write once everything is written.
func (o *outbox) last(l line) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.pending = append(o.pending, l)
	o.done = true
	o.more.Signal()
}

// take waits for lines; more is false with the last of them.
func (o *outbox) take() (lines []line, more bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	for len(o.pending) == 0 && !o.done {
		o.more.Wait()
	}
	lines, o.pending = o.pending, nil
	return lines, !o.done
}

// write sends lines until the last one. After an error it goes on taking them.
func (o *outbox) write(w http.ResponseWriter) {
	enc := json.NewEncoder(w)
	flush := http.NewResponseController(w)
	var failed error
	for more := true; more; {
		var lines []line
		lines, more = o.take()
		for _, l := range lines {
			if failed == nil {
				failed = enc.Encode(l)
			}
		}
		if failed == nil {
			failed = flush.Flush()
		}
	}
}

// callerKey is the context key of who opened the connection.
type callerKey struct{}

// caller is the process at the other end of a unix socket.
type caller struct {
	PID int32
	UID uint32
}

// callerOf asks the kernel; without an answer it is the zero caller.
func callerOf(c net.Conn) caller {
	if s, ok := c.(*slotConn); ok {
		c = s.Conn
	}
	u, ok := c.(*net.UnixConn)
	if !ok {
		return caller{}
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return caller{}
	}
	var out caller
	_ = raw.Control(func(fd uintptr) {
		if cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			out = caller{PID: cred.Pid, UID: cred.Uid}
		}
	})
	return out
}
