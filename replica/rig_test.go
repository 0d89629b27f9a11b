package replica

import (
	"bytes"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
	"kagami/tests/fault"
)

// site is the replica's machine: a crashable file system with two images and
// what the daemon would keep in the group's file.
type site struct {
	t       *testing.T
	fs      *fault.FS
	g       *Group
	imgs    []*images.Image
	lineage epoch.UUID
	session uint64
	fresh   bool
	limits  Limits
	events  []string
	failed  []error
	codec   *wire.Codec
	wrap    func(slot uint32, img Image) Image
	persist error // what makes no session durable

	mu    sync.Mutex
	acks  []wire.Ack
	drops []error
	ch    *Channel
}

const (
	siteDir  = "/group"
	diskSize = 1 << 20
)

var (
	groupID = epoch.UUID{1}
	lineage = epoch.UUID{2}
)

func newSite(t *testing.T, seed int64) *site {
	codec, err := wire.NewCodec()
	if err != nil {
		t.Fatal(err)
	}
	s := &site{t: t, fs: fault.NewFS(seed), codec: codec, fresh: true, limits: Limits{SegmentBytes: 1 << 20, SpoolBytes: 8 << 20,
		WindowBytes: 4 << 20, ApplyBytes: 1 << 20, ApplyAge: time.Second}}
	if err := s.fs.MkdirAll(siteDir, 0o700); err != nil {
		t.Fatal(err)
	}
	for slot := range 2 {
		img, err := images.CreateImage(s.fs, s.image(slot), diskSize, "")
		if err != nil {
			t.Fatal(err)
		}
		if err := img.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func (s *site) image(slot int) string { return fmt.Sprintf("%s/%d.raw", siteDir, slot) }

// open starts the group.
func (s *site) open() error {
	imgs := map[uint32]Image{}
	s.imgs = nil
	for slot := range 2 {
		img, err := images.OpenImage(s.fs, s.image(slot), images.Want{Size: diskSize})
		if err != nil {
			return err
		}
		s.imgs = append(s.imgs, img)
		imgs[uint32(slot)] = img
		if s.wrap != nil {
			imgs[uint32(slot)] = s.wrap(uint32(slot), img)
		}
	}
	g, err := Open(Options{FS: s.fs, Dir: siteDir, ID: groupID, Replica: epoch.UUID{3}, Images: imgs, Limits: s.limits, Codec: s.codec,
		Lineage: s.lineage, Session: s.session, Fresh: s.fresh,
		Persist: func(l epoch.UUID, n uint64) error {
			if s.persist == nil {
				s.lineage, s.session, s.fresh = l, n, false
			}
			return s.persist
		},
		Event:  func(text string) { s.mu.Lock(); s.events = append(s.events, text); s.mu.Unlock() },
		Failed: func(err error) { s.mu.Lock(); s.failed = append(s.failed, err); s.mu.Unlock() }})
	if err != nil {
		return err
	}
	s.g = g
	return nil
}

func (s *site) mustOpen() {
	s.t.Helper()
	if err := s.open(); err != nil {
		s.t.Fatal(err)
	}
}

// shut ends the group, whatever its state.
func (s *site) shut() {
	_ = s.g.Close() // after a crash or a failure it reports that
	for _, img := range s.imgs {
		_ = img.Close()
	}
}

// reopen is a restart of the daemon, or of the machine after a power loss.
func (s *site) reopen(crash bool) {
	s.t.Helper()
	if crash {
		s.fs = s.fs.Crash()
	}
	s.shut()
	s.mustOpen()
}

func manifest(session uint64) wire.Manifest {
	return wire.Manifest{Name: "g", ID: groupID, Lineage: lineage, Session: session, Window: 4 << 20}
}

// attach attaches a new channel.
func (s *site) attach(session uint64) (wire.AttachResponse, error) {
	ch := &Channel{
		Ack: func(flags uint32, session uint64, received, durable, applied epoch.LSN) {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.acks = append(s.acks, wire.Ack{Flags: flags, Session: session, Received: received, Durable: durable, Applied: applied})
		},
		Drop: func(err error) { s.mu.Lock(); defer s.mu.Unlock(); s.drops = append(s.drops, err) },
	}
	resp, err := s.g.Attach(manifest(session), false, ch)
	if err == nil {
		s.ch = ch
	}
	return resp, err
}

func (s *site) mustAttach(session uint64) wire.AttachResponse {
	s.t.Helper()
	resp, err := s.attach(session)
	if err != nil {
		s.t.Fatal(err)
	}
	return resp
}

func (s *site) acked() wire.Ack {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.acks) == 0 {
		return wire.Ack{}
	}
	return s.acks[len(s.acks)-1]
}

func (s *site) allAcks() []wire.Ack {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.acks)
}

// stream makes records of one session.
type stream struct {
	session uint64
	next    epoch.LSN
	first   epoch.LSN
	disks   [2][]byte // what the records so far give
	recs    []epoch.Record
}

func newStream(session uint64, next epoch.LSN) *stream {
	return &stream{session: session, next: next, first: next, disks: [2][]byte{make([]byte, diskSize), make([]byte, diskSize)}}
}

func (m *stream) add(r epoch.Record) {
	r.Lineage, r.Session, r.LSN = lineage, m.session, m.next
	r.Seal()
	m.next++
	m.recs = append(m.recs, r)
	switch r.Type {
	case epoch.TypeWrite:
		copy(m.disks[r.Disk][r.Offset:], r.Payload)
	case epoch.TypeZero, epoch.TypeTrim:
		clear(m.disks[r.Disk][r.Offset:r.End()])
	}
}

func (m *stream) write(disk uint32, off int, p []byte) {
	m.add(epoch.Record{Type: epoch.TypeWrite, Disk: disk, Offset: uint64(off), Length: uint64(len(p)), Payload: p})
}

func (m *stream) trim(t epoch.Type, disk uint32, off, n int) {
	m.add(epoch.Record{Type: t, Disk: disk, Offset: uint64(off), Length: uint64(n)})
}

func (m *stream) syncDone() { m.add(epoch.Record{Type: epoch.TypeSyncDone, Disk: epoch.GroupWide}) }

func (m *stream) close() epoch.LSN {
	p := epoch.CloseInfo{TimeNs: int64(m.next) * 1000, Reason: epoch.ByFlush, First: m.first}.Encode()
	m.add(epoch.Record{Type: epoch.TypeClose, Disk: epoch.GroupWide, Length: 32, Payload: p})
	m.first = m.next
	return m.next - 1
}

// take returns the records made since the last take.
func (m *stream) take() []epoch.Record {
	out := m.recs
	m.recs = nil
	return out
}

func (s *site) receive(recs []epoch.Record) {
	s.t.Helper()
	if err := s.g.Receive(s.ch, recs[0].Session, recs); err != nil {
		s.t.Fatal(err)
	}
	for s.unready() {
		time.Sleep(100 * time.Microsecond)
	}
}

// unready tells whether records wait for a segment of the spool.
func (s *site) unready() bool {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	return s.g.unready && s.g.err == nil
}

// holds compares the images with what a stream gives.
func (s *site) holds(m *stream) {
	s.t.Helper()
	for slot, want := range m.disks {
		got := make([]byte, diskSize)
		if _, err := s.imgs[slot].ReadAt(got, 0); err != nil {
			s.t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			s.t.Errorf("disk %d differs from the stream", slot)
		}
	}
}

func pattern(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }
