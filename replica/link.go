package replica

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// link is one peer's control connection with its data connections.
type link struct {
	s    *Server
	peer Peer
	id   epoch.UUID
	seed uint32
	data map[net.Conn]struct{} // guarded by Server.mu

	ctx    context.Context // ends with the link
	cancel context.CancelFunc
	calls  chan struct{} // one token per running request
	wg     sync.WaitGroup

	mu       sync.Mutex
	control  net.Conn
	channels map[uint32]*bound
	lastChan uint32
	acks     map[uint32]wire.Ack // newest per channel, not yet sent
	out      [][]byte            // other frames to send, bounded by maxOut
	ready    chan struct{}       // one token: there is something to send
}

// bound is a group attached over this link.
type bound struct {
	g  *Group
	ch *Channel
}

// maxOut bounds responses and pongs that wait to be sent. A peer that asks
// faster than it reads is cut off.
const maxOut = 64

func newLink(s *Server, peer Peer, id epoch.UUID) *link {
	ctx, cancel := context.WithCancel(context.Background())
	return &link{s: s, peer: peer, id: id, seed: newSeed(), data: map[net.Conn]struct{}{}, ctx: ctx, cancel: cancel,
		calls: make(chan struct{}, wire.MaxCalls), channels: map[uint32]*bound{}, acks: map[uint32]wire.Ack{}, ready: make(chan struct{}, 1)}
}

func (l *link) ended() bool { return l.ctx.Err() != nil }

// close ends the link: its connections are closed, which ends their readers.
func (l *link) close() {
	l.cancel()
	l.mu.Lock()
	if l.control != nil {
		_ = l.control.Close()
	}
	gone := l.channels
	l.channels = map[uint32]*bound{}
	l.mu.Unlock()
	for _, b := range gone {
		b.g.Detach(b.ch)
	}
	l.s.mu.Lock()
	for c := range l.data {
		_ = c.Close()
	}
	l.s.mu.Unlock()
}

// readData takes record frames until the connection ends.
func (l *link) readData(r *bufio.Reader) error {
	for {
		// The group keeps the payloads, so each frame gets a buffer of its own.
		t, body, _, err := wire.ReadFrame(r, nil, wire.MaxBody, l.seed)
		if err != nil {
			return fmt.Errorf("read record frame: %w", err)
		}
		if t != wire.TypeRecords {
			return fmt.Errorf("%w: frame of type %d on a data connection", wire.ErrProtocol, t)
		}
		h, recs, err := wire.DecodeRecords(body, l.seed, l.s.o.Codec.Inflate)
		unsupported := errors.Is(err, epoch.ErrUnsupported)
		if err != nil && !unsupported {
			return fmt.Errorf("decode record frame: %w", err)
		}
		l.mu.Lock()
		b, last := l.channels[h.Channel], l.lastChan
		l.mu.Unlock()
		if b == nil && h.Channel <= last {
			continue // of an attach that a newer one has replaced
		}
		if b == nil {
			return fmt.Errorf("%w: records for channel %d, which is not attached", wire.ErrProtocol, h.Channel)
		}
		if unsupported {
			b.g.Refuse(b.ch, h.Session, err) // this group's stream ends here, the others go on
			continue
		}
		if err := b.g.Receive(b.ch, h.Session, recs); err != nil {
			return err
		}
	}
}

// runControl serves the control connection: requests and pings in, responses,
// pongs and acks out. A peer that is silent for Timeout is gone.
func (l *link) runControl(c net.Conn, r *bufio.Reader) error {
	l.mu.Lock()
	l.control = c
	l.mu.Unlock()
	l.wg.Add(1)
	go l.sendLoop(c)
	err := l.readControl(c, r)
	l.close()
	l.wg.Wait()
	return err
}

func (l *link) readControl(c net.Conn, r *bufio.Reader) error {
	var buf []byte
	for {
		if err := c.SetReadDeadline(time.Now().Add(l.s.o.Timeout)); err != nil {
			return fmt.Errorf("set deadline: %w", err)
		}
		t, body, grown, err := wire.ReadFrame(r, buf, wire.MaxBody, l.seed)
		if err != nil {
			return fmt.Errorf("read control frame: %w", err)
		}
		buf = grown
		if err := l.handle(t, body); err != nil {
			return err
		}
	}
}

func (l *link) handle(t wire.Type, body []byte) error {
	switch t {
	case wire.TypePing:
		if _, err := wire.DecodePing(body); err != nil {
			return err
		}
		return l.send(wire.AppendFrame(nil, wire.TypePong, body, l.seed))
	case wire.TypeRequest:
		var req wire.Request
		if err := wire.DecodeJSON(body, &req); err != nil {
			return err
		}
		select {
		case l.calls <- struct{}{}:
		default:
			return l.respond(req.ID, nil, wire.Errorf(wire.CodeBusy, "more than %d requests at a time", wire.MaxCalls))
		}
		l.wg.Add(1)
		go func() {
			defer l.wg.Done()
			res, err := l.call(req)
			<-l.calls
			if err := l.respond(req.ID, res, err); err != nil {
				l.close()
			}
		}()
		return nil
	default:
		return fmt.Errorf("%w: frame of type %d on the control connection", wire.ErrProtocol, t)
	}
}

// call runs one request.
func (l *link) call(req wire.Request) (any, error) {
	switch req.Method {
	case wire.MethodAttach:
		var p wire.AttachRequest
		if err := wire.DecodeJSON(req.Params, &p); err != nil {
			return nil, err
		}
		return l.attach(p)
	case wire.MethodHash:
		var p wire.HashRequest
		if err := wire.DecodeJSON(req.Params, &p); err != nil {
			return nil, err
		}
		g, err := l.s.o.Backend.Find(l.peer, p.Group)
		if err != nil {
			return nil, err
		}
		sums, err := g.Hash(l.ctx, p.Disk, p.Chunk, p.Offsets)
		return wire.HashResponse{Sums: sums}, err
	default:
		return l.s.o.Backend.Call(l.ctx, l.peer, req.Method, req.Params)
	}
}

// attach binds a group to a new channel of this link.
func (l *link) attach(req wire.AttachRequest) (any, error) {
	l.mu.Lock()
	l.lastChan++
	id := l.lastChan
	l.mu.Unlock()
	ch := &Channel{
		Ack: func(flags uint32, session uint64, received, durable, applied epoch.LSN) {
			l.ack(wire.Ack{Channel: id, Flags: flags, Session: session, Received: received, Durable: durable, Applied: applied})
		},
		Drop: func(error) { l.close() },
	}
	g, resp, err := l.s.o.Backend.Attach(l.ctx, l.peer, req, ch)
	if err != nil {
		return nil, err
	}
	resp.Channel = id
	l.mu.Lock()
	if l.ended() {
		l.mu.Unlock()
		g.Detach(ch)
		return nil, fmt.Errorf("link has ended")
	}
	for old, b := range l.channels { // one channel per group: an earlier one is void
		if b.g == g {
			delete(l.channels, old)
		}
	}
	l.channels[id] = &bound{g, ch}
	l.mu.Unlock()
	return resp, nil
}

func (l *link) respond(id uint64, result any, err error) error {
	resp := wire.Response{ID: id}
	var werr *wire.Error
	switch {
	case errors.As(err, &werr):
		resp.Error = werr
	case err != nil:
		resp.Error = wire.Errorf(wire.CodeFailed, "%v", err)
	case result != nil:
		b, merr := json.Marshal(result)
		if merr != nil {
			return fmt.Errorf("encode response: %w", merr)
		}
		resp.Result = b
	}
	b, err := wire.AppendJSON(nil, wire.TypeResponse, resp, l.seed)
	if err != nil {
		return err
	}
	return l.send(b)
}

// ack leaves the newest position of a channel for the sender; it never blocks.
func (l *link) ack(a wire.Ack) {
	l.mu.Lock()
	l.acks[a.Channel] = a
	l.mu.Unlock()
	l.signal()
}

func (l *link) send(frame []byte) error {
	l.mu.Lock()
	full := len(l.out) >= maxOut
	if !full {
		l.out = append(l.out, frame)
	}
	l.mu.Unlock()
	if full {
		return fmt.Errorf("%w: the peer does not read its responses", wire.ErrProtocol)
	}
	l.signal()
	return nil
}

func (l *link) signal() {
	select {
	case l.ready <- struct{}{}:
	default:
	}
}

// sendLoop writes what waits, acks first.
func (l *link) sendLoop(c net.Conn) {
	defer l.wg.Done()
	for {
		select {
		case <-l.ctx.Done():
			return
		case <-l.ready:
		}
		b := l.outgoing()
		if len(b) == 0 {
			continue
		}
		if err := c.SetWriteDeadline(time.Now().Add(l.s.o.Timeout)); err != nil {
			l.close()
			return
		}
		if _, err := c.Write(b); err != nil {
			l.close() // the reader reports the end of the link
			return
		}
	}
}

func (l *link) outgoing() []byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	var b []byte
	for id, a := range l.acks {
		b = wire.AppendFrame(b, wire.TypeAck, a.Append(nil), l.seed)
		delete(l.acks, id)
	}
	for _, f := range l.out {
		b = append(b, f...)
	}
	l.out = nil
	return b
}
