package host

import (
	"fmt"

	"kagami/ext4j/activelog"
	"kagami/replica/wire"
)

// follows makes sure that the source knows whose positions it is told. The
// first replica that takes the stream is written down; another one later has
// not seen what was acknowledged before, whatever it says, so that everything
// is compared. It is durable before anything is planned on the position: that
// everything must be compared, then whose floor the active log has.
func (s *source) follows(who activelog.Follower) error {
	f, id := s.g.snapshot(), who.Replica
	if id.IsZero() {
		return wire.Errorf(wire.CodeConflict, "the replica of group %s has no UUID", f.Name)
	}
	if f.Replica != id {
		if err := s.followsNew(f, who); err != nil {
			return s.unwritten(err)
		}
	}
	if err := s.log.Follow(who); err != nil {
		s.eng.Fail(err)
		return err
	}
	return nil
}

func (s *source) followsNew(f *groupFile, who activelog.Follower) error {
	why := fmt.Sprintf("the replica was replaced: this source followed %s, now there is %s", f.Replica, who.Replica)
	err := s.g.update(func(f *groupFile) {
		if !f.Replica.IsZero() && f.Complete {
			f.Compare = why
		}
		f.Replica = who.Replica
	})
	if err == nil && !f.Replica.IsZero() {
		s.replaced = true
		s.g.note(why)
	}
	return err
}

// otherFloor tells whether regions have left the active log for what another
// replica than this one had acknowledged.
func (s *source) otherFloor(resp wire.AttachResponse) bool {
	return s.floor != activelog.Floor{} && s.follower != activelog.Follower{Lineage: resp.Pos.Lineage, Replica: resp.Replica}
}
