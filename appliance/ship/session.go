package ship

import (
	"bufio"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// Session is one life of a link, from its control connection's welcome to its end.
type Session struct {
	l       *Link
	id      epoch.UUID
	seed    uint32
	control net.Conn
	release string
	ctx     context.Context // ends with the session; its cause says why
	cancel  context.CancelCauseFunc
	done    chan struct{} // closed when every goroutine has ended
	writes  sync.Mutex    // one frame at a time on the control connection
	asking  chan struct{} // one token per request without a response, even if its caller has given up

	mu       sync.Mutex
	cond     *sync.Cond // there may be something to send, or the session ended
	calls    map[uint64]chan wire.Response
	nextCall uint64
	bindings []*Binding // in turn
	urgent   int        // turns in a row that groups with a waiting FLUSH took
	up       int        // data connections up
	rtt      time.Duration
	inflight int64
	sent     uint64
}

func newSession(l *Link, c net.Conn, id epoch.UUID, w wire.Welcome) *Session {
	ctx, cancel := context.WithCancelCause(context.Background())
	s := &Session{l: l, id: id, seed: w.Seed, control: c, release: w.Release, ctx: ctx, cancel: cancel,
		done: make(chan struct{}), asking: make(chan struct{}, wire.MaxCalls), calls: map[uint64]chan wire.Response{}}
	s.cond = sync.NewCond(&s.mu)
	return s
}

func (s *Session) ended() bool { return s.ctx.Err() != nil }

// Done is closed when the session is over and nothing of it runs any more.
func (s *Session) Done() <-chan struct{} { return s.done }

// End ends the session; the link dials anew.
func (s *Session) End(reason error) {
	s.cancel(reason)
	_ = s.control.Close() // ends the reader
	s.mu.Lock()
	s.cond.Broadcast()
	s.mu.Unlock()
}

// run carries the session to its end and returns why it ended.
func (s *Session) run(ctx context.Context) error {
	stop := context.AfterFunc(ctx, func() { s.End(context.Cause(ctx)) })
	defer stop()
	var wg sync.WaitGroup
	for range s.l.o.Connections {
		wg.Go(s.sendLoop)
	}
	wg.Go(s.heartbeat)
	s.End(s.readControl())
	wg.Wait()
	s.dismiss()
	close(s.done)
	return context.Cause(s.ctx)
}

// dismiss lets go of what waits for the session.
func (s *Session) dismiss() {
	s.mu.Lock()
	bindings := s.bindings
	s.bindings = nil
	clear(s.calls) // their callers see the session's context end
	s.mu.Unlock()
	for _, b := range bindings {
		b.src.SetWake(nil)
	}
}

func (s *Session) readControl() error {
	r := bufio.NewReaderSize(s.control, 64<<10)
	var buf []byte
	for {
		if err := s.control.SetReadDeadline(time.Now().Add(s.l.o.Timeout)); err != nil {
			return fmt.Errorf("set deadline: %w", err)
		}
		t, body, grown, err := wire.ReadFrame(r, buf, wire.MaxBody, s.seed)
		if err != nil {
			var ne net.Error
			if errors.As(err, &ne) && ne.Timeout() {
				return fmt.Errorf("%s was silent for %v", s.l.o.Peer, s.l.o.Timeout)
			}
			return fmt.Errorf("control connection to %s: %w", s.l.o.Peer, err)
		}
		buf = grown
		if err := s.handle(t, body); err != nil {
			return err
		}
	}
}

func (s *Session) handle(t wire.Type, body []byte) error {
	switch t {
	case wire.TypeAck:
		a, err := wire.DecodeAck(body)
		if err != nil {
			return err
		}
		return s.acked(a)
	case wire.TypePong:
		v, err := wire.DecodePing(body)
		if err != nil {
			return err
		}
		s.mu.Lock()
		s.rtt = time.Duration(uint64(time.Now().UnixNano()) - v)
		s.mu.Unlock()
		return nil
	case wire.TypeResponse:
		var resp wire.Response
		if err := wire.DecodeJSON(body, &resp); err != nil {
			return err
		}
		if ch := s.takeCall(resp.ID); ch != nil {
			ch <- resp // has room: one response per call
		}
		return nil
	default:
		return fmt.Errorf("%w: frame of type %d from %s", wire.ErrProtocol, t, s.l.o.Peer)
	}
}

// heartbeat pings the peer; its pongs keep the reader's deadline from passing.
func (s *Session) heartbeat() {
	tick := time.NewTicker(s.l.o.Heartbeat)
	defer tick.Stop()
	for {
		now := binary.LittleEndian.AppendUint64(nil, uint64(time.Now().UnixNano()))
		if err := s.write(wire.AppendFrame(nil, wire.TypePing, now, s.seed)); err != nil {
			s.End(err)
			return
		}
		select {
		case <-s.ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *Session) write(frame []byte) error {
	s.writes.Lock()
	defer s.writes.Unlock()
	if err := s.control.SetWriteDeadline(time.Now().Add(s.l.o.Timeout)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	if _, err := s.control.Write(frame); err != nil {
		return fmt.Errorf("control connection to %s: %w", s.l.o.Peer, err)
	}
	return nil
}

// Call sends a request, when it is one of at most wire.MaxCalls, and waits for
// its response. result may be nil. An error of the peer is a *wire.Error.
func (s *Session) Call(ctx context.Context, method string, params, result any) error {
	p, err := json.Marshal(params)
	if err != nil {
		return fmt.Errorf("encode %s request: %w", method, err)
	}
	select {
	case s.asking <- struct{}{}:
	case <-ctx.Done():
		return fmt.Errorf("%s: %s is busy with other requests: %w", method, s.l.o.Peer, context.Cause(ctx))
	case <-s.ctx.Done(): // the same as below
	}
	ch := make(chan wire.Response, 1)
	s.mu.Lock()
	if s.ended() {
		s.mu.Unlock()
		return fmt.Errorf("%s: link to %s is down: %w", method, s.l.o.Peer, context.Cause(s.ctx))
	}
	s.nextCall++
	id := s.nextCall
	s.calls[id] = ch
	s.mu.Unlock()
	b, err := wire.AppendJSON(nil, wire.TypeRequest, wire.Request{ID: id, Method: method, Params: p}, s.seed)
	if err != nil {
		s.takeCall(id)
		return err
	}
	if err := s.write(b); err != nil {
		s.End(err)
		return err
	}
	return s.await(ctx, method, ch, result)
}

// takeCall ends a call that has its response and makes room for another; nil
// says that there is none.
func (s *Session) takeCall(id uint64) chan<- wire.Response {
	s.mu.Lock()
	defer s.mu.Unlock()
	ch := s.calls[id]
	if ch == nil {
		return nil
	}
	delete(s.calls, id)
	<-s.asking // its own
	return ch
}

func (s *Session) await(ctx context.Context, method string, ch <-chan wire.Response, result any) error {
	select {
	case <-ctx.Done():
		return fmt.Errorf("%s at %s: %w", method, s.l.o.Peer, context.Cause(ctx))
	case <-s.ctx.Done():
		return fmt.Errorf("%s at %s: link is down: %w", method, s.l.o.Peer, context.Cause(s.ctx))
	case resp := <-ch:
		if resp.Error != nil {
			return fmt.Errorf("%s at %s: %w", method, s.l.o.Peer, resp.Error)
		}
		if result == nil {
			return nil
		}
		if err := json.Unmarshal(resp.Result, result); err != nil {
			return fmt.Errorf("%s at %s: undecodable response: %w", method, s.l.o.Peer, err)
		}
		return nil
	}
}
