package ship

import (
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// Binding is a group's stream attached to a session.
type Binding struct {
	s       *Session
	src     Source
	channel uint32
	session uint64
	onAck   func(wire.Ack)
	// guarded by Session.mu
	frames []*sentFrame // sent, not yet received, in the order of sending
	bytes  int64        // in frames
	redo   int64        // bytes that were lost and not yet taken again
	full   bool         // the replica's spool has no room, or it refuses the stream: its bytes do not count as in flight, nothing is sent
	last   wire.Ack
	seen   time.Time
}

// sentFrame is a run of records on its way.
type sentFrame struct {
	first, last epoch.LSN
	bytes       int64
	conn        *conn
}

// Frame sizes. A frame is small enough that a connection is never held for
// long by one group, and large enough that its head costs nothing.
const (
	frameBytes   = 256 << 10 // raw payload
	frameRecords = 1024
)

// Bind starts to ship a group's records over the session, on the channel that
// the replica named at attach. onAck, if not nil, hears every ack after the
// Source did.
func (s *Session) Bind(src Source, channel uint32, session uint64, onAck func(wire.Ack)) *Binding {
	b := &Binding{s: s, src: src, channel: channel, session: session, onAck: onAck}
	s.mu.Lock()
	s.bindings = append(s.bindings, b)
	s.mu.Unlock()
	src.SetWake(s.wake)
	s.wake()
	return b
}

// Unbind stops shipping; frames on their way are forgotten.
func (b *Binding) Unbind() {
	b.src.SetWake(nil)
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	b.s.addLocked(b, -b.bytes)
	b.frames = nil
	for i, o := range b.s.bindings {
		if o == b {
			b.s.bindings = append(b.s.bindings[:i:i], b.s.bindings[i+1:]...)
			break
		}
	}
	b.s.cond.Broadcast()
}

// Last is the newest ack and when it came; zero before the first.
func (b *Binding) Last() (wire.Ack, time.Time) {
	b.s.mu.Lock()
	defer b.s.mu.Unlock()
	return b.last, b.seen
}

// wake is called by sources, possibly with no locks, possibly often.
func (s *Session) wake() {
	s.mu.Lock()
	s.cond.Signal()
	s.mu.Unlock()
}

// next waits for the next frame to send on c: groups take turns, those with a
// waiting FLUSH first. It returns nil when the connection or session ended.
func (s *Session) next(c *conn) (*Binding, []epoch.Record) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for {
		if s.ended() || c.broken {
			return nil, nil
		}
		if b, recs := s.takeLocked(s.inflight >= s.l.o.InflightBytes); b != nil {
			s.noteSent(b, c, recs)
			s.cond.Signal() // there may be more for another connection
			return b, recs
		}
		s.cond.Wait()
	}
}

// urgentRun is how many turns in a row groups with a waiting FLUSH may take
// while others have something to send too.
const urgentRun = 4

// takeLocked takes a run from the group whose turn it is. When the limit is
// reached only what was lost may be sent: all that is in flight may be waiting
// for it at the replica.
func (s *Session) takeLocked(reached bool) (*Binding, []epoch.Record) {
	turn := -1
	for i, b := range s.bindings {
		if b.full || reached && b.redo == 0 {
			continue // full: its records wait in the replica's memory; the other groups go on
		}
		some, urgent := b.src.Unsent()
		if !some {
			continue
		}
		if turn < 0 {
			turn = i
		}
		if urgent && s.urgent < urgentRun {
			turn = i
			break
		}
	}
	if turn >= 0 {
		if _, urgent := s.bindings[turn].src.Unsent(); urgent && s.urgent < urgentRun {
			s.urgent++
		} else {
			s.urgent = 0
		}
	}
	if turn < 0 {
		return nil, nil
	}
	b := s.bindings[turn]
	recs := b.src.Take(frameBytes, frameRecords)
	if len(recs) == 0 || recs[0].Session != b.session {
		return nil, nil // a new session of the group has begun and will bind anew
	}
	s.bindings = append(append(s.bindings[:turn:turn], s.bindings[turn+1:]...), b)
	return b, recs
}

func (s *Session) noteSent(b *Binding, c *conn, recs []epoch.Record) {
	f := &sentFrame{first: recs[0].LSN, last: recs[len(recs)-1].LSN, conn: c}
	for i := range recs {
		f.bytes += int64(len(recs[i].Payload)) + epoch.HeaderSize
	}
	b.frames = append(b.frames, f)
	b.redo = max(0, b.redo-f.bytes)
	s.addLocked(b, f.bytes)
}

// addLocked counts bytes of a binding that were sent, or, negative, that have arrived or are lost.
func (s *Session) addLocked(b *Binding, n int64) {
	b.bytes += n
	if !b.full {
		s.inflight += n
	}
}

// setFullLocked notes whether the replica has room for the group's records.
// What waits there for room takes nothing from the other groups.
func (s *Session) setFullLocked(b *Binding, full bool) {
	switch {
	case full && !b.full:
		s.inflight -= b.bytes
	case !full && b.full:
		s.inflight += b.bytes
	}
	b.full = full
}

// acked takes an ack: frames that arrived leave the count of bytes in flight.
func (s *Session) acked(a wire.Ack) error {
	s.mu.Lock()
	var b *Binding
	for _, o := range s.bindings {
		if o.channel == a.Channel {
			b = o
		}
	}
	if b == nil || a.Session != b.session {
		s.mu.Unlock()
		return nil // of a stream that is no longer attached
	}
	kept := b.frames[:0]
	for _, f := range b.frames {
		if f.last <= a.Received {
			s.addLocked(b, -f.bytes)
		} else {
			kept = append(kept, f)
		}
	}
	clear(b.frames[len(kept):])
	b.frames, b.last, b.seen = kept, a, time.Now()
	s.setFullLocked(b, a.Flags&(wire.AckSpoolFull|wire.AckSpoolWaits|wire.AckRefused) != 0)
	s.cond.Broadcast()
	s.mu.Unlock()
	if err := b.src.Acked(a.Session, a.Received, a.Durable); err != nil {
		return err
	}
	if b.onAck != nil {
		b.onAck(a)
	}
	return nil
}

// lost gives the frames that a dead connection carried back to their sources.
// They are given back before their bytes stop to count as in flight: what
// comes in between must not take their place.
func (s *Session) lost(c *conn) {
	type run struct {
		b           *Binding
		first, last epoch.LSN
	}
	var runs []run
	s.mu.Lock()
	for _, b := range s.bindings {
		for _, f := range b.frames {
			if f.conn == c {
				runs = append(runs, run{b, f.first, f.last})
			}
		}
	}
	s.mu.Unlock()
	for _, r := range runs {
		r.b.src.Requeue(r.b.session, r.first, r.last)
	}
	s.mu.Lock()
	for _, b := range s.bindings {
		s.forgetLocked(b, c)
	}
	s.cond.Broadcast()
	s.mu.Unlock()
}

// forgetLocked takes the frames that c carried out of what is in flight.
func (s *Session) forgetLocked(b *Binding, c *conn) {
	kept := b.frames[:0]
	for _, f := range b.frames {
		if f.conn == c {
			s.addLocked(b, -f.bytes)
			b.redo += f.bytes
		} else {
			kept = append(kept, f)
		}
	}
	clear(b.frames[len(kept):])
	b.frames = kept
}
