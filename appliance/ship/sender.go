package ship

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// conn is one data connection. broken is guarded by Session.mu.
type conn struct {
	net.Conn
	broken bool
}

// sendLoop keeps one data connection up until the session ends.
func (s *Session) sendLoop() {
	wait := firstRetry
	for !s.ended() {
		began := time.Now()
		err := s.sendOn()
		if s.ended() {
			return
		}
		s.l.o.Event(fmt.Sprintf("data connection to %s: %v", s.l.o.Peer, err))
		if time.Since(began) > lastRetry {
			wait = firstRetry
		}
		select {
		case <-s.ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, lastRetry)
	}
}

// sendOn dials one data connection and sends frames on it until it fails.
func (s *Session) sendOn() error {
	nc, _, err := s.l.hello(s.ctx, s.id, true)
	if err != nil {
		return err
	}
	c := &conn{Conn: nc}
	stop := context.AfterFunc(s.ctx, func() { _ = nc.Close() })
	s.mu.Lock()
	s.up++
	s.mu.Unlock()
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		s.watch(c)
	}()
	err = s.sendFrames(c)
	stop()
	err = errors.Join(err, ignoreClosed(nc.Close()))
	<-watched
	s.mu.Lock()
	s.up--
	s.mu.Unlock()
	s.lost(c)
	return err
}

// watch notices that the peer closed the connection while nothing is being
// sent. The replica never writes to a data connection.
func (s *Session) watch(c *conn) {
	var b [1]byte
	_, _ = c.Read(b[:]) // whatever it returns: the connection is over
	s.mu.Lock()
	c.broken = true
	s.cond.Broadcast()
	s.mu.Unlock()
	_ = c.Close()
}

func (s *Session) sendFrames(c *conn) error {
	var buf []byte
	for {
		b, recs := s.next(c)
		if b == nil {
			return io.ErrUnexpectedEOF
		}
		buf = s.encode(buf[:0], b, recs)
		if err := c.SetWriteDeadline(time.Now().Add(writePatience)); err != nil {
			return fmt.Errorf("set deadline: %w", err)
		}
		if _, err := c.Write(buf); err != nil {
			return fmt.Errorf("send records: %w", err)
		}
		s.mu.Lock()
		s.sent += uint64(len(buf))
		s.mu.Unlock()
	}
}

// writePatience is how long one frame may take to get into a socket. A link
// that is merely full moves a frame within seconds; a dead one is noticed by
// the control connection's heartbeat long before.
const writePatience = 60 * time.Second

// encode builds a record frame.
func (s *Session) encode(dst []byte, b *Binding, recs []epoch.Record) []byte {
	dst = wire.BeginFrame(dst, wire.TypeRecords)
	dst = wire.RecordsHead{Channel: b.channel, Count: uint32(len(recs)), Session: b.session}.Append(dst)
	for i := range recs {
		codec, stored := epoch.CodecRaw, recs[i].Payload
		if s.l.o.Compress {
			codec, stored = s.l.o.Codec.Deflate(stored)
		}
		dst = recs[i].AppendStored(dst, codec, stored, s.seed)
	}
	return wire.EndFrame(dst, 0, s.seed)
}
