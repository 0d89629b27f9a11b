package host

import (
	"fmt"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// follows makes sure that the source knows whose positions it is told. The
// first replica that takes the stream is written down; another one later has
// not seen what was acknowledged before, whatever it says, so that everything
// is compared. Both are durable before anything is planned on the position.
func (s *source) follows(id epoch.UUID) error {
	f := s.g.snapshot()
	switch {
	case id.IsZero():
		return wire.Errorf(wire.CodeConflict, "the replica of group %s has no UUID", f.Name)
	case f.Replica == id:
		return nil
	}
	why := fmt.Sprintf("the replica was replaced: this source followed %s, now there is %s", f.Replica, id)
	err := s.g.update(func(f *groupFile) {
		if !f.Replica.IsZero() && f.Complete {
			f.Compare = why
		}
		f.Replica = id
	})
	if err != nil {
		s.eng.Fail(err)
		return err
	}
	if !f.Replica.IsZero() {
		s.replaced = true
		s.g.note(why)
	}
	return nil
}
