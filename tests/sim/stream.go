package sim

import (
	"bytes"
	"fmt"
	"sync"

	"kagami/ext4j"
	"kagami/ext4j/epoch"
)

// Stream remembers every record that ever left the source.
type Stream struct {
	mu       sync.Mutex
	sessions map[uint64]*session
	disks    int
	size     int64
	issued   map[version]bounds // of guest writes
}

// session is one session's records.
type session struct {
	base epoch.Pos // where it began
	recs map[epoch.LSN]epoch.Record
	from [][]byte // the state in which it began; nil: not yet worked out
}

// bounds are the LSNs between which a guest's write must be: above what had
// been given when it was issued, not above when it was answered.
type bounds struct {
	session     uint64
	above, most epoch.LSN
}

// NewStream begins with empty disks.
func NewStream(disks int, size int64) *Stream {
	return &Stream{sessions: map[uint64]*session{}, disks: disks, size: size, issued: map[version]bounds{}}
}

// Begin notes where a session begins. source is what the source's images held
// then, when it begins with a resync; nil when the replica is known to hold the same.
func (t *Stream) Begin(number uint64, base epoch.Pos, source [][]byte) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s := t.sessions[number]; s != nil {
		return fmt.Errorf("session %d begins at %v and had begun at %v", number, base, s.base)
	}
	t.sessions[number] = &session{base: base, recs: map[epoch.LSN]epoch.Record{}, from: source}
	return nil
}

// Answered notes that a guest's write was answered.
func (t *Stream) Answered(v version, b bounds) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.issued[v] = b
	s := t.sessions[b.session]
	if s == nil {
		return nil
	}
	for l := b.most + 1; ; l++ {
		r, ok := s.recs[l]
		if !ok {
			return nil
		}
		if err := t.inBounds(&r); err != nil {
			return err
		}
	}
}

// Add notes records on their way out.
func (t *Stream) Add(recs []epoch.Record) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for i := range recs {
		r := &recs[i]
		s := t.sessions[r.Session]
		if s == nil {
			return fmt.Errorf("record %d of session %d, which did not begin", r.LSN, r.Session)
		}
		old, ok := s.recs[r.LSN]
		if ok && (old.Sum != r.Sum || old.Type != r.Type || !bytes.Equal(old.Payload, r.Payload)) {
			return fmt.Errorf("record %d of session %d had another content before: %s of %d bytes at %d, now %s of %d at %d",
				r.LSN, r.Session, old.Type, old.Length, old.Offset, r.Type, r.Length, r.Offset)
		}
		if r.LSN <= s.base.LSN {
			return fmt.Errorf("record %d of session %d, which began after %d", r.LSN, r.Session, s.base.LSN)
		}
		s.recs[r.LSN] = *r
		if err := t.inBounds(r); err != nil {
			return err
		}
	}
	return nil
}

// inBounds checks that the stream's order is one that the guest can have seen.
func (t *Stream) inBounds(r *epoch.Record) error {
	if r.Type != epoch.TypeWrite || r.Flags&epoch.FlagResync != 0 || len(r.Payload) < Sector {
		return nil
	}
	v := readStamp(r.Payload[:Sector])
	b, ok := t.issued[v]
	if !ok || b.session != r.Session {
		return nil
	}
	if r.LSN <= b.above || r.LSN > b.most {
		return fmt.Errorf("write %d is record %d; when it was issued %d had been given, when it was answered %d", v, r.LSN, b.above, b.most)
	}
	return nil
}

// At is the state of the disks at a Close record.
func (t *Stream) At(p epoch.Pos) ([][]byte, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if p.LSN == 0 {
		return t.empty(), nil
	}
	s := t.sessions[p.Session]
	if s == nil {
		return nil, fmt.Errorf("no session %d", p.Session)
	}
	if r, ok := s.recs[p.LSN]; !ok || r.Type != epoch.TypeClose {
		return nil, fmt.Errorf("%v is no Close record", p)
	}
	return t.state(p)
}

func (t *Stream) empty() [][]byte {
	out := make([][]byte, t.disks)
	for d := range out {
		out[d] = make([]byte, t.size)
	}
	return out
}

func (t *Stream) state(p epoch.Pos) ([][]byte, error) {
	if p.LSN == 0 {
		return t.empty(), nil
	}
	s := t.sessions[p.Session]
	if s == nil {
		return nil, fmt.Errorf("no session %d", p.Session)
	}
	disks, err := t.begin(s)
	if err != nil {
		return nil, err
	}
	for l := s.base.LSN + 1; l <= p.LSN; l++ {
		r, ok := s.recs[l]
		if !ok {
			return nil, fmt.Errorf("record %d of session %d never left the source", l, p.Session)
		}
		redo(disks, &r)
	}
	return disks, nil
}

// begin is a copy of the state in which a session began.
func (t *Stream) begin(s *session) ([][]byte, error) {
	if s.from == nil {
		st, err := t.state(s.base)
		if err != nil {
			return nil, err
		}
		s.from = st
	}
	out := make([][]byte, t.disks)
	for d := range out {
		out[d] = bytes.Clone(s.from[d])
	}
	return out, nil
}

func redo(disks [][]byte, r *epoch.Record) {
	switch r.Type {
	case epoch.TypeWrite:
		copy(disks[r.Disk][r.Offset:], r.Payload)
	case epoch.TypeZero, epoch.TypeTrim:
		clear(disks[r.Disk][r.Offset:r.End()])
	}
}

// tap is a ship.Source that shows the oracle what is shipped.
type tap struct {
	*ext4j.Group
	stream *Stream
	fail   func(error)
	mutant Mutant
}

// Take hands out records of the group.
func (t *tap) Take(budget, limit int) []epoch.Record {
	recs := t.Group.Take(budget, limit)
	if err := t.stream.Add(recs); err != nil {
		t.fail(err)
	}
	return recs
}

// Requeue gives back what a connection lost.
func (t *tap) Requeue(session uint64, first, last epoch.LSN) {
	if t.mutant != DropRequeue {
		t.Group.Requeue(session, first, last)
	}
}
