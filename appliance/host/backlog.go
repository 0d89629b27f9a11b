package host

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"kagami/ext4j/backlog"
)

// errBacklogLost ends an attachment whose stream has a gap.
var errBacklogLost = errors.New("the backlog was lost: what was written meanwhile has to be compared")

// backlogKeep is what a backlog leaves free on its file system: images grow there.
const backlogKeep = 1 << 30

// keepBacklog lets a group that goes on without its replica keep what is written, so that
// it can be sent in order. Only a group whose replica lacks nothing but what is in the
// queue can do so. It returns false when there is no backlog, or no use in it any more.
func (s *source) keepBacklog(f *groupFile) bool {
	if st := s.eng.Stats(); st.Overflow {
		return !st.BacklogFull
	}
	if s.limits.BacklogBytes == 0 || !f.Complete || f.Compare != "" || f.Phase != "" || !s.begun || s.replaced || s.unfinished != nil {
		return false
	}
	store, err := backlog.Create(s.g.d.fs, backlog.Options{Path: filepath.Join(s.g.dir, "backlog"), Limit: s.limits.BacklogBytes, Keep: backlogKeep})
	if err != nil {
		s.g.note(fmt.Sprintf("there is no backlog, what is written will be compared: %v", err))
		return false
	}
	if !s.eng.Overflow(store, s.backlogEvent) {
		_ = store.Close() // it is empty
		return false
	}
	return true
}

// backlogEvent hears that the backlog is full, or lost.
func (s *source) backlogEvent(err error) {
	what := "what is written from now on is compared when site %s is back"
	if errors.Is(err, backlog.ErrFull) {
		what = "clients wait until site %s has taken some of it; if that is away, what is written is compared when it is back"
	}
	s.g.note(fmt.Sprintf("%v: "+what, err, s.g.snapshot().Peer))
	s.signal()
}

// catchUpBacklog sends what was kept, and ends the time apart.
func (s *source) catchUpBacklog(ctx context.Context, p plan) error {
	s.g.input(CatchUpBegun, p.why)
	s.markSynced()
	defer s.g.setProgress("", 0, 0)
	var total int64
	err := s.eng.CatchUp(ctx, func(left int64) {
		total = max(total, left)
		s.g.setProgress("catching up", total-left, total)
	})
	if err != nil {
		return err
	}
	s.rec.Together()
	if err := s.equal(ctx); err != nil {
		return err
	}
	s.g.input(CaughtUp, "the replica has all that was written while it was away")
	return nil
}
