package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"kagami/appliance/ship"
	"kagami/ext4j"
	"kagami/ext4j/backlog"
	"kagami/ext4j/changemap"
	"kagami/ext4j/epoch"
	"kagami/images"
)

// A source whose policy is to continue: what appliance/host/apart.go does, in the same order.
// Its FLUSHes promise nothing about the replica from the link's loss until the two are
// together again; then all that had been answered is there.

const (
	apartGrace = 2 * time.Second
	stuckGrace = 5 * time.Second
)

// apartMaps are the records of changes, by disk (ext4j.Recorder).
type apartMaps []*changemap.Map

func (a apartMaps) Acquire(_ context.Context, disk uint32, off, n int64) error {
	return a[disk].Mark(off, n)
}
func (apartMaps) Release(uint32, int64, int64, epoch.LSN) {}
func (apartMaps) Begin(uint64, epoch.LSN, epoch.LSN)      {}
func (apartMaps) Acked(epoch.LSN)                         {}
func (apartMaps) SyncBegin(uint32) uint64                 { return 0 }
func (apartMaps) SyncEnd(uint32, uint64)                  {}
func (apartMaps) NeedsRoom() <-chan struct{}              { return nil }

func (a apartMaps) close() {
	for _, m := range a {
		_ = m.Close()
	}
}

func apartPath(slot int) string { return fmt.Sprintf("%s/apart-%d.map", sourceDir, slot) }

func (s *source) apartOrigin(slot int, session uint64) changemap.Origin {
	return changemap.Origin{Group: groupID, Disk: epoch.UUID{20, byte(slot)}, DiskBytes: s.w.c.DiskBytes, RegionBytes: regionBytes, Lineage: lineage,
		Fork: epoch.Pos{Lineage: lineage, Session: session}}
}

// openApart opens the maps of a source that is apart, and tells the oracle whether it is.
func (s *source) openApart() error {
	apart := s.snapshot().Apart
	s.w.setAlone(apart != 0)
	if apart == 0 {
		s.rec = ext4j.NewRecorders(s.log, nil)
		return nil
	}
	for slot := range s.w.c.Disks {
		m, err := changemap.Open(s.fs, apartPath(slot), s.apartOrigin(slot, apart))
		if err != nil {
			return err
		}
		s.maps = append(s.maps, m)
	}
	s.rec = ext4j.NewRecorders(s.log, s.maps)
	return nil
}

// awaitLink waits for a session, and goes apart when that takes too long.
func (s *source) awaitLink(ctx context.Context) (*ship.Session, error) {
	if !s.w.c.Continue {
		return s.link.Session(ctx)
	}
	for {
		grace := apartGrace
		st := s.eng.Stats()
		if st.Apart {
			grace = time.Hour
		} else if st.Overflow {
			grace = apartGrace / 10
		}
		wait, cancel := context.WithTimeout(ctx, grace)
		sess, err := s.link.Session(wait)
		cancel()
		if err == nil || ctx.Err() != nil {
			return sess, err
		}
		if st = s.eng.Stats(); st.Overflow && !st.BacklogFull {
			continue
		}
		if err := s.goApart(); err != nil {
			return nil, err
		}
	}
}

// keepBacklog lets the source keep what is written from now on.
func (s *source) keepBacklog() bool {
	if st := s.eng.Stats(); st.Overflow {
		return !st.BacklogFull
	}
	if f := s.snapshot(); s.w.c.BacklogBytes == 0 || !f.Complete || f.Compare != "" || s.forgetful != "" || !s.begun || s.unfinished != nil {
		return false
	}
	store, err := backlog.Create(s.fs, backlog.Options{Path: sourceDir + "/backlog", Limit: s.w.c.BacklogBytes})
	if err != nil {
		s.w.note("source: no backlog: %v", err)
		return false
	}
	if !s.eng.Overflow(store, func(err error) { s.w.note("source: the backlog: %v", err) }) {
		_ = store.Close()
		return false
	}
	s.w.note("source: keeps a backlog")
	return true
}

// catchUpBacklog sends what was kept, and ends the time apart.
func (s *source) catchUpBacklog(ctx context.Context) error {
	if err := s.eng.CatchUp(ctx, func(int64) {}); err != nil {
		return err
	}
	if s.w.mutant != LateLog {
		s.rec.Together()
	}
	if err := s.equal(ctx); err != nil {
		return err
	}
	if s.w.mutant == LateLog {
		s.rec.Together()
	}
	s.w.note("source: has caught up")
	return nil
}

func (s *source) goApart() error {
	err := s.part()
	if images.NoSpace(err) {
		s.w.note("source: cannot go on alone: %v", err)
		return nil
	}
	if err != nil {
		s.eng.Fail(err) // its machine has stopped
		return err
	}
	s.w.setAlone(true)
	f := s.snapshot()
	if !s.keepBacklog() {
		s.eng.GoApart(lineage, f.Session, time.Now())
	}
	s.rec.GoApart(s.apartRecorder())
	s.eng.OpenGate()
	s.w.note("source: goes on alone")
	return nil
}

func (s *source) apartRecorder() ext4j.Recorder {
	if s.w.mutant == NoMaps {
		return blindRecorder{s.maps}
	}
	return s.maps
}

func (s *source) part() error {
	f := s.snapshot()
	if f.Apart != 0 {
		return nil
	}
	var maps apartMaps
	for slot := range s.w.c.Disks {
		m, err := changemap.Create(s.fs, apartPath(slot), s.apartOrigin(slot, f.Session), false)
		if err != nil {
			maps.close()
			return err
		}
		maps = append(maps, m)
	}
	s.maps = maps
	if s.w.mutant == ForgetApart {
		s.mu.Lock()
		s.state.Apart = f.Session // not durable
		s.mu.Unlock()
		return nil
	}
	return s.update(func(f *sourceState) { f.Apart = f.Session })
}

func (s *source) rejoin() []ext4j.Range {
	s.rec.Together()
	var out []ext4j.Range
	for slot, m := range s.maps {
		for _, i := range m.Regions() {
			out = append(out, ext4j.Range{Slot: uint32(slot), Off: int64(i) * regionBytes, Len: regionBytes})
		}
	}
	return out
}

func planApart(p plan) plan {
	if p.what == "" {
		p.what, p.hold, p.hashes = "resync", true, true
	}
	p.why += "; the source went on without the replica"
	p.begin, p.raise, p.active = true, true, true
	return p
}

// together: FLUSHes wait for the replica again, and it has what was answered by now.
func (s *source) together(ctx context.Context) error {
	if s.snapshot().Apart == 0 {
		return nil
	}
	whole := s.w.history.Answered()
	if s.w.mutant == EarlyRejoin {
		s.eng.Together()
	} else if err := s.eng.Rejoin(ctx); err != nil {
		return err
	}
	s.eng.Alone(s.w.mutant == KeepAlone)
	s.w.setAlone(false)
	for d := range s.w.c.Disks {
		if s.w.player == nil || d > 0 {
			s.w.history.shipped(whole, d)
		}
	}
	return nil
}

func (s *source) dropApart() {
	s.maps.close()
	s.maps = nil
	for slot := range s.w.c.Disks {
		if err := s.fs.Remove(apartPath(slot)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.w.note("source: a map stays: %v", err)
		}
	}
}

// watchProgress ends an attachment that keeps clients waiting without progress.
func (s *source) watchProgress(ctx context.Context, cancel context.CancelCauseFunc) {
	var was [3]uint64
	for since := time.Now(); s.w.c.Continue && sleep(ctx, stuckGrace/8) == nil; {
		e := s.eng.Stats()
		if e.Apart {
			cancel(errors.New("the backlog was lost"))
			return
		}
		if now := [3]uint64{e.Session, e.ResyncBytes, uint64(e.Ack)}; now != was || e.UnackedFlushes == 0 && e.Waiting == 0 {
			was, since = now, time.Now()
		} else if time.Since(since) > stuckGrace {
			s.w.note("source: the replica makes no progress")
			cancel(errStuck)
			return
		}
	}
}

var errStuck = errors.New("the replica does not take what it is sent")

// setAlone tells the oracle whether FLUSHes may be answered by the source alone. Before
// the first of them may be, and after the last.
func (w *World) setAlone(v bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if v != (w.alone.Load()%2 == 1) {
		w.alone.Add(1)
	}
}

// waited tells whether a FLUSH that arrived when w.alone was so, and was answered now,
// can only have been answered by both sites.
func (w *World) waited(alone int64) bool { return alone%2 == 0 && w.alone.Load() == alone }
