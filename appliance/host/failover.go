package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/ext4j/ext4"
	"kagami/ext4j/recover"
	"kagami/images"
	"kagami/qmp"
	"kagami/replica"
)

// Failover makes this site serve a group whose source is lost:
//
//  1. refuse what would lose data that could still be saved
//  2. seal: no more records; apply everything up to the last whole epoch
//  3. make the promotion durable, with a new lineage: from now on the old
//     source is fenced, and there is no way back
//  4. serve the images through kagami's own exports, every change recorded
//  5. replay the ext4 journals through those exports
//  6. define and start the VM
//
// Broken off after step 3, it is taken up again by calling it again. It goes
// on when the command that asked for it is interrupted; only the daemon's end
// ends ctx.
func (d *Daemon) Failover(ctx context.Context, req control.FailoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	began := time.Now()
	g, err := d.operate(req.VM)
	if err != nil {
		return control.FailoverReport{}, err
	}
	defer g.op.Unlock()
	if err := d.checkFailover(ctx, g, req); err != nil {
		return control.FailoverReport{}, explained(err, "put that right, then run kagami failover "+g.name+" again")
	}
	if req.DryRun {
		return g.failoverPreview(), nil
	}
	if g.snapshot().Role == RoleReplica {
		if err := d.promote(g, began, nil, emit); err != nil {
			return control.FailoverReport{}, explained(err, "nothing was promoted; put that right, then run kagami failover "+g.name+" again")
		}
	}
	if err := d.bringUp(ctx, g, req, emit); err != nil {
		g.brokenOff(text(err))
		err = because(err, "%s is promoted here, its failover has not ended", g.name)
		return control.FailoverReport{}, explained(err, "put that right, then run kagami failover "+g.name+" again: it goes on where it stopped")
	}
	rep, err := g.finishFailover(req, emit)
	return rep, explained(err, "put that right, then run kagami failover "+g.name+" again")
}

// brokenOff raises the alarm that a failover has not ended.
func (g *group) brokenOff(why string) {
	g.alarm("failover", fmt.Sprintf("the failover was broken off (%s): run kagami failover %s again", why, g.name))
}

// checkFailover is step 1.
func (d *Daemon) checkFailover(ctx context.Context, g *group, req control.FailoverRequest) error {
	f := g.snapshot()
	switch {
	case f.Role == RoleSource && f.Fenced != "":
		return refused(fmt.Sprintf("%s was failed over to site %s; what is here is superseded", g.name, f.Peer), "see kagami status "+g.name+" at site "+f.Peer)
	case f.Role == RoleSource:
		return refused(fmt.Sprintf("site %s is the source of %s", d.cfg.Site, g.name), "run kagami failover at site "+f.Peer)
	case f.Role == RolePromoted && f.Phase != Recovering && f.Phase != Booting:
		return refused(fmt.Sprintf("%s was already failed over to site %s at %s", g.name, d.cfg.Site, f.promotedAt()), "see kagami status "+g.name)
	case f.Role == RoleReplica:
		if err := g.checkReplica(req); err != nil {
			return err
		}
	}
	if f.VM == "" || req.NoStart {
		return nil
	}
	return orNoStart(d.checkBoot(ctx, g)) // before the promotion: after it there is no way back
}

// checkBoot tells what would keep the VM from being started here.
func (d *Daemon) checkBoot(ctx context.Context, g *group) error {
	f := g.snapshot()
	xml, err := d.mapDomain(ctx, g)
	if err != nil {
		return err
	}
	taken, _, err := d.isTakenHere(ctx, xml, f.Disks)
	if err == nil && taken != "" {
		err = refused(fmt.Sprintf("site %s cannot start %s: %s", d.cfg.Site, f.VM, taken), "put that right (after a change of the config file, restart the daemon)")
	}
	return err
}

// orNoStart adds to what to do about an error that the disks can be served
// without libvirt.
func orNoStart(err error) error {
	var e *control.Error
	if err == nil || !errors.As(explained(err, "put that right"), &e) {
		return err
	}
	return &control.Error{Code: e.Code, Message: e.Message, Hint: e.Hint + "; or use --no-start, then define the VM by hand on the exports that status shows", Exit: e.Exit}
}

func (g *group) checkReplica(req control.FailoverRequest) error {
	g.mu.Lock()
	rep := g.rep
	g.mu.Unlock()
	if rep == nil {
		return failure("failed", fmt.Sprintf("the replica of %s is not open: %s", g.name, g.status().Reason), "put that right and restart the daemon")
	}
	st := rep.Status()
	if !st.Complete {
		return refused(fmt.Sprintf("the first sync of %s never ended: there is no complete copy to boot", g.name), "bring the source back and let the first sync end")
	}
	if st.Damaged != "" && !req.Force {
		return refused(fmt.Sprintf("the replica of %s is not what was acknowledged: %s", g.name, st.Damaged),
			"bring the source back, it repairs the replica; or use --force to fail over to what there is")
	}
	if st.Attached && !req.Force {
		return refused(g.sourceLives(st),
			"stop the VM there and wait until status shows everything acknowledged, or use --force to fail over all the same")
	}
	return nil
}

// sourceLives says what a failover beside a live source means.
func (g *group) sourceLives(st replica.Status) string {
	return fmt.Sprintf("the source of %s at site %s is alive and connected: its VM may be running, and %s would be lost", g.name, g.snapshot().Peer, wouldLose(st))
}

// wouldLose says what a failover now would leave behind.
func wouldLose(st replica.Status) string {
	if n := st.Received - st.Durable; n > 0 {
		return fmt.Sprintf("%d records that are no whole epoch yet, and what it writes from now on,", n)
	}
	return "what it writes from now on"
}

// failoverPreview is the report of a dry run.
func (g *group) failoverPreview() control.FailoverReport {
	r := control.FailoverReport{Group: g.name, DryRun: true}
	g.mu.Lock()
	rep := g.rep
	g.mu.Unlock()
	if rep == nil {
		return r
	}
	st := rep.Status()
	r.LSN, r.Lost = uint64(st.Durable), st.Recovery
	if st.Damaged != "" {
		r.Lost = st.Damaged
	}
	if st.Attached {
		r.Notes = append(r.Notes, g.sourceLives(st))
	}
	if !st.CloseTime.IsZero() && !g.lacksNothing(st) {
		r.RPOSeconds = time.Since(st.CloseTime).Seconds()
	}
	return r
}

// promote is steps 2 and 3. at is where the source says that it has stopped, in a
// switchover: a replica that stands elsewhere is not promoted.
func (d *Daemon) promote(g *group, began time.Time, at *epoch.Pos, emit func(control.Event)) error {
	g.input(PromoteBegun, "failover")
	g.mu.Lock()
	rep := g.rep
	g.mu.Unlock()
	complete := g.lacksNothing(rep.Status())
	say(emit, "seal", "sealing the stream and applying the last whole epoch")
	sealed, err := rep.Seal()
	if err == nil && !sealed.Complete {
		err = refused("the first sync never ended: there is no complete copy to boot", "bring the source back and let the first sync end")
	}
	if err == nil && at != nil {
		err = standsAt(sealed, *at)
		complete = true
	}
	if err != nil {
		rep.Unseal()
		g.input(PromoteUndo, err.Error())
		return fmt.Errorf("seal %s: %w", g.name, err)
	}
	if sealed.Lost != "" {
		say(emit, "warning", "%s", sealed.Lost)
	}
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while closing the replica: %v", err))
	}
	rec := &failoverRecord{AtNs: began.UnixNano(), From: sealed.Pos, CloseNs: sealed.CloseNs, Lost: sealed.Lost}
	if sealed.CloseNs != 0 && !complete {
		rec.RPOMs = max(0, began.Sub(time.Unix(0, sealed.CloseNs)).Milliseconds())
	}
	// The promotion. Once this returns, the old source is fenced for good.
	err = g.update(func(f *groupFile) {
		f.Past = append(slices.Clone(f.Past[max(0, len(f.Past)-maxPast+1):]), sealed.Pos)
		f.Role, f.Lineage, f.Session, f.Phase, f.Failover = RolePromoted, epoch.NewUUID(), 0, Recovering, rec
		f.Replica, f.Changes, f.ChangesLost = epoch.UUID{}, false, "" // it has none now, and has changed nothing yet
		f.Returned, f.TakeBack = nil, at != nil
	})
	if err != nil {
		return errors.Join(err, g.notPromoted(err))
	}
	say(emit, "promote", "promoted at record %d; the old source is fenced", sealed.Pos.LSN)
	return nil
}

// maxPast is how many earlier lineages are remembered: as many promotions.
const maxPast = 900

// standsAt refuses a replica that is not exactly where its source has stopped.
func standsAt(s replica.Sealed, at epoch.Pos) error {
	if s.Lost != "" || s.Torn || s.Pos.LSN != at.LSN || s.Pos.LSN > 0 && s.Pos.Lineage != at.Lineage {
		return refused(fmt.Sprintf("the replica stands at record %d, its source stopped at record %d%s", s.Pos.LSN, at.LSN, orLost(s.Lost)), "let the source go on, and try again when it is streaming")
	}
	return nil
}

func orLost(lost string) string {
	if lost == "" {
		return ""
	}
	return "; " + lost
}

// notPromoted goes on as a replica after a promotion that could not be made
// durable. A rename that was done but perhaps not durable is done back first;
// if that fails too, nobody may serve before somebody has looked at it.
func (g *group) notPromoted(cause error) error {
	if err := g.update(func(*groupFile) {}); err != nil {
		g.fail(fmt.Errorf("whether the group was promoted is not known: %w", cause))
		return err
	}
	g.input(PromoteUndo, cause.Error())
	return g.startReplica(false)
}

// bringUp is steps 4 to 6.
func (d *Daemon) bringUp(ctx context.Context, g *group, req control.FailoverRequest, emit func(control.Event)) error {
	g.mu.Lock()
	started := g.src != nil
	g.mu.Unlock()
	if !started {
		if err := g.startPromoted(); err != nil {
			return err
		}
	}
	if g.snapshot().Phase == Recovering {
		if err := g.replayJournals(emit); err != nil {
			return err
		}
		// Durable before anybody writes: a journal must not be replayed under a
		// running guest when the failover is taken up again.
		if err := g.update(func(f *groupFile) { f.Phase = Booting }); err != nil {
			return err
		}
	}
	if g.snapshot().VM == "" || req.NoStart {
		return nil
	}
	return d.bootReplica(ctx, g, emit)
}

// replayJournals is step 5. A journal that cannot be replayed exactly is left
// for the guest's kernel.
func (g *group) replayJournals(emit func(control.Event)) error {
	f := g.snapshot()
	g.mu.Lock()
	src, imgs := g.src, g.images
	g.mu.Unlock()
	for _, df := range f.Disks {
		if n := src.eng.Disk(df.Slot).Clients(); n > 0 {
			return refused(fmt.Sprintf("%d clients are connected to disk %s of %s, whose journal is not replayed yet", n, df.Name, g.name), "stop what uses "+df.Socket)
		}
		img := imgs[df.Slot]
		dev := diskDevice{disk: src.eng.Disk(df.Slot), img: img}
		parts, _, err := images.Partitions(img, img.Size())
		if err != nil {
			g.failoverNote(emit, fmt.Sprintf("disk %s: partition table not readable (%v): its journals are left to the guest", df.Name, err))
			continue
		}
		if len(parts) == 0 {
			parts = []images.Partition{{Start: 0, Length: img.Size()}}
		}
		for _, p := range parts {
			if err := g.replayOne(dev, df, p, emit); err != nil {
				return err
			}
		}
	}
	return nil
}

func (g *group) replayOne(dev diskDevice, df diskFile, p images.Partition, emit func(control.Event)) error {
	what := df.Name
	if p.Number > 0 {
		what = fmt.Sprintf("%s%d", df.Name, p.Number)
	}
	rep, err := recover.Run(dev, p.Start, p.Length, recover.Options{})
	switch {
	case errors.Is(err, ext4.ErrNotExt4):
		return nil
	case errors.Is(err, recover.ErrRefused), errors.Is(err, ext4.ErrUnsupported), errors.Is(err, ext4.ErrCorrupt):
		g.failoverNote(emit, fmt.Sprintf("%s: the journal is left as it is, the guest's kernel will replay it: %v", what, err))
		return nil
	case err != nil:
		return fmt.Errorf("replay the journal of %s: %w", what, err)
	}
	if !rep.Needed {
		say(emit, "replay", "%s: the file system is clean, nothing to replay", what)
		return nil
	}
	say(emit, "replay", "%s: %d journal transactions replayed, %d blocks written (%s)", what, rep.Transactions, rep.Written, rep.EndReason)
	if rep.MarkedErrors || rep.Damaged > 0 {
		g.failoverNote(emit, fmt.Sprintf("%s: the file system is marked as having errors (%d damaged journal blocks): check it", what, rep.Damaged))
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	next := *g.file
	if next.Failover != nil {
		r := *next.Failover
		r.Replayed += rep.Transactions
		next.Failover, g.file = &r, &next
	}
	return nil
}

// failoverNote tells the operator and keeps it for status.
func (g *group) failoverNote(emit func(control.Event), text string) {
	say(emit, "warning", "%s", text)
	g.note(text)
	g.mu.Lock()
	defer g.mu.Unlock()
	next := *g.file
	if next.Failover != nil {
		r := *next.Failover
		r.Notes = append(append([]string(nil), r.Notes...), text)
		next.Failover, g.file = &r, &next
	}
}

// bootReplica is step 6. A VM that an earlier attempt started is left running.
func (d *Daemon) bootReplica(ctx context.Context, g *group, emit func(control.Event)) error {
	xml, err := d.mapDomain(ctx, g)
	if err != nil {
		return orNoStart(err)
	}
	hv, err := d.virt()
	if err != nil {
		return err
	}
	name := d.replicaName(g)
	switch runs, err := d.runsHere(ctx, g, hv, name); {
	case err != nil:
		return err
	case runs:
		say(emit, "start", "VM %s runs already", name)
		return g.nameDomain(name)
	}
	if err := d.defineHere(ctx, g, hv, name, xml, emit); err != nil {
		return err
	}
	if err := g.nameDomain(name); err != nil {
		return err
	}
	if c := d.groupConfig(g.name); c != nil && c.Domain != nil && c.Domain.Autostart {
		if err := hv.Autostart(ctx, name); err != nil {
			return fromHypervisor(err)
		}
	}
	say(emit, "start", "starting VM %s", name)
	return fromHypervisor(hv.Start(ctx, name, g.exportsOf()...))
}

// defineHere defines the VM. One that is of this site, and whose definition has the
// group's disks, is left as it is: it may have been changed since.
func (d *Daemon) defineHere(ctx context.Context, g *group, hv Hypervisor, name, xml string, emit func(control.Event)) error {
	if f := g.snapshot(); f.home() {
		if ours, err := runsFrom(ctx, hv, name, f.Disks); err == nil && ours {
			return nil
		}
	}
	say(emit, "define", "defining VM %s", name)
	return fromHypervisor(hv.Define(ctx, xml))
}

// replicaName is what the VM is called at this site.
func (d *Daemon) replicaName(g *group) string {
	if g.snapshot().home() {
		return g.snapshot().VM
	}
	if c := d.groupConfig(g.name); c != nil && c.Domain != nil && c.Domain.Name != "" {
		return c.Domain.Name
	}
	return g.snapshot().VM
}

// nameDomain remembers what the VM is called.
func (g *group) nameDomain(name string) error {
	return g.update(func(f *groupFile) {
		if f.Failover != nil {
			r := *f.Failover
			r.Domain = name
			f.Failover = &r
		}
	})
}

// runsHere reports whether the replica VM runs already, treated. A VM of that
// name that runs from other disks is in the way.
func (d *Daemon) runsHere(ctx context.Context, g *group, hv Hypervisor, name string) (bool, error) {
	st, err := hv.State(ctx, name)
	if errors.Is(err, qmp.ErrNoDomain) || err == nil && !st.Active() {
		return false, nil
	}
	if err != nil {
		return false, fromHypervisor(err)
	}
	for _, df := range g.snapshot().Disks {
		err := hv.Treat(ctx, name, df.Name, df.Socket, df.Name, d.limits(g.name).ReconnectDelay)
		if errors.Is(err, qmp.ErrNotAttached) || errors.Is(err, qmp.ErrNoDisk) {
			return false, refused(fmt.Sprintf("a VM named %s runs at site %s already, and not from the disks of %s", name, d.cfg.Site, g.name),
				"stop it, or map another name (groups: … domain: name:) and restart the daemon")
		}
		if err != nil {
			return false, fromHypervisor(err)
		}
	}
	if st == qmp.StatePaused { // an earlier attempt did not get as far as letting it run
		return true, fromHypervisor(hv.Resume(ctx, name))
	}
	return true, nil
}

// finishFailover writes down that the group serves, and reports.
// The RTO is counted from the attempt that promoted, however many it took.
func (g *group) finishFailover(req control.FailoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	err := g.update(func(f *groupFile) {
		f.Phase = ""
		if f.Failover != nil {
			r := *f.Failover
			r.RTOMs = max(0, time.Since(time.Unix(0, r.AtNs)).Milliseconds())
			f.Failover = &r
		}
	})
	if err != nil {
		return control.FailoverReport{}, err
	}
	g.alarm("failover", "")
	g.input(Promoted, "failover done")
	switch f := g.snapshot(); {
	case f.VM == "":
		say(emit, "done", "the disks of %s are served at site %s", g.name, g.d.cfg.Site)
	case req.NoStart:
		say(emit, "done", "the disks of %s are served at site %s; its VM was not started", g.name, g.d.cfg.Site)
	default:
		say(emit, "done", "%s runs at site %s", g.name, g.d.cfg.Site)
	}
	return g.snapshot().report(), nil
}

// report is a failover's record for people.
func (f *groupFile) report() control.FailoverReport {
	r := control.FailoverReport{Group: f.Name}
	if f.Failover == nil {
		return r
	}
	rec := f.Failover
	r.At, r.LSN, r.Lineage = time.Unix(0, rec.AtNs), uint64(rec.From.LSN), f.Lineage.String()
	r.RPOSeconds, r.RTOSeconds = float64(rec.RPOMs)/1e3, float64(rec.RTOMs)/1e3
	r.Lost, r.Notes, r.Domain, r.Replayed = rec.Lost, rec.Notes, rec.Domain, rec.Replayed
	return r
}

func (f *groupFile) promotedAt() string {
	if f.Failover == nil {
		return "an unknown time"
	}
	return time.Unix(0, f.Failover.AtNs).UTC().Format(time.RFC3339)
}

// mapDomain makes the replica's definition from the shipped one, or refuses it.
func (d *Daemon) mapDomain(ctx context.Context, g *group) (xml string, err error) {
	if _, err := d.virt(); err != nil {
		return "", err
	}
	b, err := images.ReadFile(d.fs, g.dir+"/domain.xml", maxXML)
	if errors.Is(err, fs.ErrNotExist) {
		return "", failure("failed", fmt.Sprintf("the definition of VM %s never arrived here", g.name), "bring the source back, it ships the definition")
	}
	if err != nil {
		return "", fmt.Errorf("read definition of VM: %w", err)
	}
	if g.snapshot().home() {
		return string(b), nil // it is this site's own
	}
	m, err := d.mapping(ctx, g.name, g.snapshot().Disks)
	if err != nil {
		return "", err
	}
	out, found, err := qmp.MapDomain(string(b), m)
	if err != nil {
		return "", fmt.Errorf("map definition of VM %s: %w", g.name, err)
	}
	var problems []string
	for _, p := range found {
		if p.Fatal {
			problems = append(problems, p.String())
		}
	}
	if len(problems) > 0 {
		return "", refused(fmt.Sprintf("site %s cannot boot %s:%s", d.cfg.Site, g.snapshot().VM, listed(problems)),
			"put the missing mapping under groups: … domain: of the config file and restart the daemon")
	}
	return out, nil
}
