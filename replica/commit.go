package replica

import "fmt"

// commitLoop makes closed epochs durable and acknowledges them. While one
// fdatasync runs, further epochs are appended; the next one covers them all.
func (g *Group) commitLoop() {
	defer g.wg.Done()
	for {
		g.mu.Lock()
		for !g.closing && g.err == nil && g.commitAt <= g.durable.LSN {
			g.cond.Wait()
		}
		stop := g.closing || g.err != nil
		g.mu.Unlock()
		if stop {
			return
		}
		if g.commit() != nil {
			return // commit has ended the group
		}
	}
}

// commit is the order that an acknowledgement hangs on: every record of the
// closed epochs was appended to the spool (receive.go), Commit fdatasyncs the
// segments they are in, older first, and only then durable moves and the
// acknowledgement leaves.
func (g *Group) commit() error {
	g.committing.Lock()
	defer g.committing.Unlock()
	return g.commitHeld()
}

func (g *Group) commitHeld() error {
	pos, err := g.spool.Commit()
	if err != nil {
		return g.fail(fmt.Errorf("make spooled epochs durable: %w", err))
	}
	healed := false
	g.mu.Lock()
	if pos.LSN > g.durable.LSN {
		g.durable = pos
		g.counters.Commits++
		for len(g.closes) > 0 && g.closes[0].lsn <= pos.LSN {
			g.closedNs, g.closes = g.closes[0].ns, g.closes[1:]
		}
		if g.syncDone != 0 && g.syncDone < pos.LSN {
			healed = g.damaged.Why != ""
			g.complete, g.syncDone, g.damaged = true, 0, damage{}
		}
	}
	g.ackLocked()
	g.mu.Unlock()
	g.nudge()
	if healed {
		if err := g.forgetDamage(); err != nil {
			return g.fail(err)
		}
	}
	return nil
}
