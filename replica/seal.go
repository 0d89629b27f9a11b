package replica

import (
	"fmt"

	"kagami/ext4j/epoch"
)

// Sealed is what Seal found.
type Sealed struct {
	Pos      epoch.Pos // the epoch that the images now hold
	CloseNs  int64     // its close time at the source, ns since 1970
	Complete bool      // false: the first sync never ended, there is nothing to boot
	// Lost says in words why the images hold, or may hold, less than what was
	// acknowledged, or what the last recovery found behind the last epoch; ""
	// when there is nothing to say.
	Lost string
	// Torn: the images hold parts of epochs and are not consistent. Only a
	// damaged spool in the middle of an apply leaves them so.
	Torn bool
}

// Seal ends the stream at the last whole epoch and applies all of it. The
// group takes no more records; Unseal undoes that as long as nobody has
// written to the images.
func (g *Group) Seal() (Sealed, error) {
	g.applying.Lock()
	defer g.applying.Unlock()
	g.mu.Lock()
	g.sealed = true
	ch := g.channel
	g.mu.Unlock()
	if ch != nil {
		ch.Drop(ErrFenced) // a source that is still there learns it when it attaches again
	}
	g.switching.Lock()
	err := g.endStream()
	g.switching.Unlock()
	if err != nil {
		return Sealed{}, err
	}
	err = g.applyAll()
	g.mu.Lock()
	defer g.mu.Unlock()
	s := Sealed{Pos: g.applied, CloseNs: g.closedNs, Complete: g.appliedC, Lost: g.recovery}
	if g.damaged.Why != "" {
		s.Lost, s.Torn = g.damaged.Why, g.damaged.Torn
	}
	if err != nil && g.err == nil && isDamage(err) {
		s.Lost = fmt.Sprintf("the spool is damaged after record %d, epochs up to record %d are lost: %v", g.applied.LSN, g.durable.LSN, err)
		if to := g.redoing.Load().Pos.LSN; to > g.applied.LSN {
			s.Lost, s.Torn = fmt.Sprintf("%s: %v", tornText(g.applied.LSN, to), err), true
		}
		m := g.mark.Load()
		s.CloseNs = m.CloseTimeNs
		return s, nil
	}
	return s, err
}

// Unseal lets records in again after the source attached anew.
func (g *Group) Unseal() {
	g.mu.Lock()
	g.sealed = false
	g.mu.Unlock()
}
