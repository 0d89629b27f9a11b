package sim

import (
	"bytes"
	"errors"
	"fmt"
	"time"

	"kagami/ext4j"
	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// A failover as the end of a run: the replica is promoted from whatever state the misfortunes have
// left, while its source may be anywhere, and both go on to die and come back. From the
// promotion on the old source must not get anything into the promoted images, nor
// have a FLUSH answered that they lack (what appliance/host does in failover.go and, at
// the source, fence).

// promoted is the lineage of the promotion.
var promoted = epoch.UUID{3}

// failover ends a run.
func (w *World) failover() error {
	for w.rep == nil || w.repFS.Stopped() {
		w.bury()
		if w.rep == nil {
			if err := w.startUp(w.replicaUp, w.dyingReplica); err != nil {
				return err
			}
		}
	}
	w.repFS.StopAfter(never)
	w.makeRoom()
	w.repFS.Forgive()
	if w.rep.group.Status().Err != nil {
		w.replicaDown(false)
		if err := w.replicaUp(); err != nil {
			return err
		}
	}
	if !w.rep.group.Status().Complete || w.rotten {
		return nil // there is nothing to promote, or less than was promised
	}
	if cut := w.net.isCut(); w.rng.IntN(2) == 0 {
		w.net.Cut(!cut)
		w.rest(time.Second)
	}
	want, err := w.rep.promote()
	if err != nil {
		return fmt.Errorf("promote: %w", err)
	}
	for range 4 {
		if err := w.afterPromotion(); err != nil {
			return err
		}
	}
	got, err := readImages(w.repFS, replicaImage, w.c)
	if err != nil {
		return err
	}
	promise := w.history.Remote()
	for d := range got {
		if !bytes.Equal(got[d], want[d]) {
			return fmt.Errorf("disk %d was changed after the promotion, which nobody serves: %s", d, difference(got[d], want[d]))
		}
		if err := w.history.check(d, got[d], promise[d], false); err != nil {
			return fmt.Errorf("the promoted site: %w", err)
		}
	}
	if err := w.player.check(got[0], w.player.promised()); err != nil {
		return fmt.Errorf("the promoted site: %w", err)
	}
	if s := w.src; s != nil && !w.srcFS.Stopped() && !s.snapshot().Fenced {
		return errors.New("the old source still does not know that it was superseded")
	}
	return nil
}

// afterPromotion lets either site die and come back, and the line be up for long enough.
func (w *World) afterPromotion() error {
	if w.rng.IntN(2) == 0 {
		w.dieReplica(w.rng.IntN(2) == 0)
	}
	if w.rng.IntN(3) == 0 {
		w.dieSource(w.rng.IntN(2) == 0)
	}
	w.bury()
	w.repFS.StopAfter(never)
	w.srcFS.StopAfter(never)
	w.makeRoomHere()
	w.srcFS.Forgive()
	if w.rep == nil {
		if err := w.replicaUp(); err != nil {
			return err
		}
	}
	if w.src == nil {
		if err := w.sourceUp(w.killed); err != nil {
			return err
		}
	}
	w.net.Cut(w.rng.IntN(3) == 0)
	time.Sleep(10 * time.Second)
	w.net.Cut(false)
	time.Sleep(20 * time.Second)
	return nil
}

// promote seals the group and makes its new lineage durable. It returns what the images hold.
func (r *replicaSite) promote() ([][]byte, error) {
	sealed, err := r.group.Seal()
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	next := r.state
	next.Promoted = promoted
	if r.w.mutant != ForgetLineage {
		if err := saveJSON(r.fs, replicaDir+"/group.json", next); err != nil {
			return nil, err
		}
	}
	r.state = next
	r.w.note("replica: promoted at %v", sealed.Pos)
	return content(r.imgs)
}

// superseded refuses every source of the lineage that was left.
func (r *replicaSite) superseded() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.state.Promoted.IsZero() {
		return nil
	}
	return wire.Errorf(wire.CodeFenced, "promoted to lineage %s", r.state.Promoted)
}

// fence stops a source that was superseded, for good.
func (s *source) fence() {
	s.w.note("source: fenced")
	if err := s.update(func(f *sourceState) { f.Fenced, f.Clean = true, nil }); err != nil {
		s.w.note("source: cannot note it: %v", err)
	}
	s.eng.Fail(ext4j.ErrGone)
}

func fenced(err error) bool {
	var werr *wire.Error
	return errors.As(err, &werr) && werr.Code == wire.CodeFenced
}
