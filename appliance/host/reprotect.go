package host

import (
	"context"
	"fmt"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j"
	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// Reprotect gives a group that was failed over to this site its replica back: the
// site it came from becomes the replica, by delta.
//
//  1. the other site keeps what it holds beyond the fork under a name, and becomes
//     a replica that has nothing yet (returned.go)
//  2. here, durably: the group is a source, whose first sync covers the records of
//     changes and what the other site named
//  3. the exports are closed and opened again, as at a restart of the daemon:
//     clients wait for a moment and connect again
//
// Broken off after 1, it is taken up again by calling it again. The VM runs
// meanwhile; what it writes counts as protected from the end of that sync on.
func (d *Daemon) Reprotect(ctx context.Context, req control.ReprotectRequest, emit func(control.Event)) error {
	g, err := d.operate(req.Group)
	if err != nil {
		return err
	}
	defer g.op.Unlock()
	again := "put that right, then run kagami reprotect " + g.name + " again"
	if err := d.reprotect(ctx, g, req.DryRun, emit); err != nil || req.DryRun || req.NoWait {
		return explained(err, again)
	}
	return explained(g.awaitProtected(ctx, emit), again)
}

// reprotect is all of it but the wait for the sync's end. The caller holds op.
func (d *Daemon) reprotect(ctx context.Context, g *group, dry bool, emit func(control.Event)) error {
	f := g.snapshot()
	switch {
	case f.Role == RoleSource && f.Failover != nil && f.Fenced == "":
		say(emit, "return", "site %s is the replica already", f.Peer)
		return nil
	case f.Role != RolePromoted:
		return refused(fmt.Sprintf("%s was not failed over to site %s: it is a %s here", g.name, d.cfg.Site, f.Role), "see kagami status "+g.name)
	case f.Phase != "":
		return refused(fmt.Sprintf("an operation on %s was broken off (%s)", g.name, f.Phase), "end it first; see kagami status "+g.name)
	}
	if err := g.served(); err != nil {
		return err
	}
	var resp wire.ReturnResponse
	req := wire.ReturnRequest{Manifest: f.manifest(d.limits(g.name).QueueBytes), DryRun: dry}
	if err := d.callPeer(ctx, f.Peer, wire.MethodReturn, req, &resp); err != nil {
		return err
	}
	g.sayReturn(resp, dry, emit)
	if dry {
		return nil
	}
	return g.mirror()
}

func (g *group) sayReturn(r wire.ReturnResponse, dry bool, emit func(control.Event)) {
	f, verb := g.snapshot(), "becomes"
	if dry {
		verb = "would become"
	}
	if r.Whole != "" {
		say(emit, "return", "site %s %s the replica; everything is compared: %s", f.Peer, verb, r.Whole)
	} else {
		say(emit, "return", "site %s %s the replica; %s may differ there", f.Peer, verb, byteText(r.Bytes))
	}
	if r.Branch != "" {
		say(emit, "branch", "what it holds beyond the failover is kept there as %s", r.Branch)
	}
}

// byteText is an amount of data for people.
func byteText(n int64) string {
	if n < 1<<20 {
		return fmt.Sprintf("%d KiB", n>>10)
	}
	return fmt.Sprintf("%d MiB", n>>20)
}

// mirror is steps 2 and 3.
func (g *group) mirror() error {
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while closing the exports: %v", err))
	}
	err := g.becomeSource()
	if err != nil {
		if aerr := g.startPromoted(); aerr != nil {
			g.fail(aerr)
		}
		return err
	}
	g.alarm(takeBackAlarm, "")
	g.alarm(splitAlarm, "")
	g.input(Mirrored, fmt.Sprintf("site %s is the replica now", g.snapshot().Peer))
	if err := g.startSource(); err != nil {
		g.fail(err) // not as a promoted group: some of it may have been recorded in the active log alone
		return err
	}
	return nil
}

// becomeSource is the durable part, on a stopped group. An active log of an earlier
// life as a source says nothing about this one.
func (g *group) becomeSource() error {
	f, path := g.snapshot(), g.dir+"/active.log"
	if err := ignoreNotExist(g.d.fs.Remove(path)); err != nil {
		return fmt.Errorf("remove old active log: %w", err)
	}
	if err := g.d.fs.SyncDir(g.dir); err != nil {
		return fmt.Errorf("remove old active log: fsync folder: %w", err)
	}
	limits := g.d.limits(g.name)
	log, _, err := activelog.Open(g.d.fs, path, activelog.Options{Group: f.ID, RegionBytes: regionBytes, MaxRegions: int(limits.ActiveLogBytes / regionBytes)})
	if err == nil {
		err = log.Close()
	}
	if err != nil {
		return fmt.Errorf("make active log: %w", err)
	}
	why := ""
	if f.Failover != nil && f.Failover.Lost != "" {
		why = "the failover found less than what had been acknowledged: " + f.Failover.Lost
	}
	return g.update(func(f *groupFile) {
		f.Role, f.Delta, f.Complete, f.Compare, f.TakeBack = RoleSource, true, false, why, false
		f.Replica, f.Begun, f.Clean, f.Boot = epoch.UUID{}, 0, nil, g.d.bootID // the other site has just agreed
	})
}

// deltaRanges are the regions that a first sync to a returned replica has to cover:
// what was changed here since the fork, what may have been there, and what the
// active log has named since. whole says why that is not enough, if it is not.
func (s *source) deltaRanges(f *groupFile, resp wire.AttachResponse) (scan []ext4j.Range, whole string) {
	switch r := resp.Returned; {
	case !f.Delta:
		return nil, "this is no return"
	case f.Compare != "":
		return nil, f.Compare
	case resp.Damaged != "":
		return nil, resp.Damaged
	case r == nil || r.Lineage != f.Lineage:
		return nil, "the replica does not say what it may hold"
	case r.Whole != "":
		return nil, r.Whole
	case r.RegionBytes != regionBytes || !r.Valid(f.manifest(0)):
		return nil, "the replica says nonsense about what it may hold"
	case s.replaced || s.otherFloor(resp) || s.behindFloor(resp.Pos):
		return nil, "the replica is not the one, or not where it was"
	}
	scan, err := s.changedRanges(f)
	if err != nil {
		return nil, err.Error()
	}
	for _, run := range resp.Returned.Runs {
		scan = append(scan, runRange(run))
	}
	return union(scan, union(s.active, ranges(s.log.Regions()))), ""
}

func runRange(run wire.Run) ext4j.Range {
	return ext4j.Range{Slot: run.Disk, Off: int64(run.First) * regionBytes, Len: int64(run.Count) * regionBytes}
}

// changedRanges reads the records of changes, which nobody writes any more.
func (s *source) changedRanges(f *groupFile) ([]ext4j.Range, error) {
	var out []ext4j.Range
	for _, d := range f.Disks {
		regions, err := readMap(s.g.d.fs, s.g.mapPath(&d), f.origin(&d))
		if err != nil {
			return nil, fmt.Errorf("record of changes of disk %s: %w", d.Name, err)
		}
		for _, run := range join(d.Slot, regions, 1) {
			out = append(out, runRange(run))
		}
	}
	return out, nil
}

// dropChanges removes the records of changes of a group whose replica has them. Ones
// that stay are debris: the next promotion makes new ones in their place.
func (g *group) dropChanges(f *groupFile) {
	for _, d := range f.Disks {
		if err := ignoreNotExist(g.d.fs.Remove(g.mapPath(&d))); err != nil {
			g.note(fmt.Sprintf("a record of changes that nobody needs stays: %v", err))
		}
	}
}

// changedRegions are those that a promoted group's open records name.
func (s *source) changedRegions() map[uint32][]uint64 {
	all := map[uint32][]uint64{}
	for slot, m := range s.changes {
		all[slot] = m.Regions()
	}
	return all
}

// awaitProtected waits for the end of the first sync and tells of its progress.
func (g *group) awaitProtected(ctx context.Context, emit func(control.Event)) error {
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	peer, seen := g.snapshot().Peer, time.Now()
	for {
		if g.d.connected(peer) {
			seen = time.Now()
		}
		g.mu.Lock()
		state, p, reason := g.state, g.sync, g.reason
		complete, src := g.file.Complete && g.file.Compare == "", g.src
		g.mu.Unlock()
		err := src.lastRefusal()
		switch {
		case state == Streaming && complete:
			say(emit, "done", "%s is protected: site %s has all of it", g.name, peer)
			return nil
		case time.Since(seen) > awayPatience:
			return failure("unreachable", fmt.Sprintf("site %s has not been connected for %v: it does not have all of %s yet", peer, awayPatience, g.name), "what was begun goes on when it is back; see kagami status "+g.name)
		case state == Failed || state == Fenced:
			return failure("failed", fmt.Sprintf("%s is %s: %s", g.name, state, reason), "see kagami status "+g.name)
		case err != nil:
			return fromPeer(peer, err)
		case p.What != "":
			emit(progressEvent("sync", "", p.Done, p.Total, p.Since))
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
		}
	}
}

// awayPatience is how long a command waits for a site that is not connected.
const awayPatience = time.Minute

// lastRefusal is a refusal by the replica's site since the source began.
func (s *source) lastRefusal() error {
	if s == nil {
		return nil
	}
	select {
	case err := <-s.refused:
		return err
	default:
		return nil
	}
}

// takeBackAlarm is the alarm of a group that waits for the other site to become
// its replica.
const takeBackAlarm = "reprotect"

// tryTakeBack asks the other site once whether it is the replica now: what a
// switchover began is ended, over restarts of either daemon.
func (g *group) tryTakeBack(ctx context.Context) {
	f := g.snapshot()
	if f.Phase != "" || !g.op.TryLock() {
		return
	}
	defer g.op.Unlock()
	err := g.d.reprotect(ctx, g, false, func(ev control.Event) {
		if ev.Message != "" {
			g.note(ev.Message)
		}
	})
	if err != nil && ctx.Err() == nil {
		g.alarm(takeBackAlarm, fmt.Sprintf("not protected: site %s is not the replica yet: %s", f.Peer, text(err)))
	}
}
