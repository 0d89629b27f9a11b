package spool

import (
	"fmt"
	"sort"

	"kagami/ext4j/epoch"
)

// Trim gives back segments all of whose records are at or below applied, which
// must be durable in the image and in the Mark by now. The segment that takes
// the next record stays.
func (sp *Spool) Trim(applied epoch.LSN) error {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if err := sp.usable(); err != nil {
		return err
	}
	if applied > max(sp.durable.LSN, sp.base) {
		return fmt.Errorf("trim spool to LSN %d: only %d is durable", applied, sp.durable.LSN)
	}
	n := 0
	for n < len(sp.live) && sp.live[n] != sp.cur && sp.live[n].last <= applied {
		sp.giveBack(sp.live[n])
		n++
	}
	sp.live = append([]*segment(nil), sp.live[n:]...)
	sp.tidy()
	return nil
}

// Reset discards everything; the next record may have any LSN above applied.
// No Append, Commit or Reader may run at the same time. Readers made before
// return ErrTrimmed.
//
// Durability: segments are made void one after the other, the newest first,
// each durably before the next. A crash in between leaves a whole older part
// of the log, never one with a hole.
func (sp *Spool) Reset(applied epoch.LSN) error {
	sp.appendMu.Lock()
	defer sp.appendMu.Unlock()
	used, err := sp.detach()
	if err != nil {
		return err
	}
	for _, s := range used {
		if err := sp.void(s); err != nil {
			return sp.fail(err)
		}
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.restart(used, applied)
	return sp.usable()
}

// detach takes every slot that may hold a valid header out of the spool, the newest first.
func (sp *Spool) detach() ([]*slot, error) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	for sp.busy && sp.usable() == nil {
		sp.cond.Wait()
	}
	if err := sp.usable(); err != nil {
		return nil, err
	}
	var used, free []*slot
	for _, s := range sp.free {
		if s.stale {
			used = append(used, s)
		} else {
			free = append(free, s)
		}
	}
	for _, g := range sp.live {
		g.freed = true
		used = append(used, g.slot)
	}
	sort.Slice(used, func(a, b int) bool { return used[a].number > used[b].number })
	sp.free, sp.live, sp.cur = free, nil, nil
	return used, nil
}

// restart makes the spool empty, with used as free slots. Called with mu held.
func (sp *Spool) restart(used []*slot, applied epoch.LSN) {
	for _, s := range used {
		sp.release(s)
	}
	sp.appended, sp.closed, sp.durable = epoch.Pos{}, epoch.Pos{}, epoch.Pos{}
	sp.base, sp.fresh = applied, true
	sp.tidy()
}
