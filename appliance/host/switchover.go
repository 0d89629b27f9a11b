package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/qmp"
	"kagami/replica"
	"kagami/replica/wire"
)

// A switchover moves a VM to the replica's site on purpose, without losing anything,
// and turns the replication round:
//
//  1. both sites look whether the replica could take over; nothing was changed
//  2. here: the VM is shut down; everything is shipped and acknowledged; the exports
//     close. From now on this site serves nothing unless the replica attaches again
//  3. there: the replica is promoted, if it stands exactly where this source stopped,
//     and the VM is started
//  4. here: the group is fenced, as after any promotion
//  5. there: this site is made the replica (Reprotect), as soon as it can be
//
// If 3 is refused, the source serves again and the VM is started here. If its answer
// is lost, the source attaches again: the other site then either takes it, or says
// that it was promoted.

// Switchover moves a group to its replica's site.
func (d *Daemon) Switchover(ctx context.Context, req control.SwitchoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	g, err := d.operate(req.VM)
	if err != nil {
		return control.FailoverReport{}, err
	}
	defer g.op.Unlock()
	rep, err := d.switchover(ctx, g, req, emit)
	return rep, explained(err, "put that right, then run kagami switchover "+g.name+" again")
}

// Failback brings a VM back to the site that it was failed over from: that site
// becomes the replica by delta, then both change places.
func (d *Daemon) Failback(ctx context.Context, req control.SwitchoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	var none control.FailoverReport
	g, err := d.operate(req.VM)
	if err != nil {
		return none, err
	}
	defer g.op.Unlock()
	again := "put that right, then run kagami failback " + g.name + " again: it goes on where it stopped"
	f := g.snapshot()
	if f.home() || f.Disks[0].Declared {
		return none, refused(fmt.Sprintf("site %s is where %s was protected: it is at home", d.cfg.Site, g.name), "kagami switchover "+g.name+" moves it to its replica's site")
	}
	if f.Role == RoleReplica || f.Failover == nil {
		return none, refused(fmt.Sprintf("%s was not failed over to site %s", g.name, d.cfg.Site), "run kagami failback at the site that it was failed over to, where it runs now; to move it for the first time: kagami switchover "+g.name)
	}
	if f.Role == RolePromoted {
		if err := d.reprotect(ctx, g, req.DryRun, emit); err != nil {
			return none, explained(err, again)
		}
		if req.DryRun {
			say(emit, "plan", "then both sites change places, as kagami switchover %s does", g.name)
			return control.FailoverReport{Group: g.name, DryRun: true}, nil
		}
	}
	if !req.DryRun {
		if err := g.awaitProtected(ctx, emit); err != nil {
			return none, explained(err, again)
		}
	}
	rep, err := d.switchover(ctx, g, req, emit)
	return rep, explained(err, again)
}

// switchover is Switchover for a caller that holds op.
func (d *Daemon) switchover(ctx context.Context, g *group, req control.SwitchoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	began, f := time.Now(), g.snapshot()
	report := control.FailoverReport{Group: g.name, DryRun: req.DryRun, At: began}
	src, err := g.movable()
	if err != nil {
		return report, err
	}
	ask := wire.TakeoverRequest{Group: f.ID, DryRun: true, NoStart: req.NoStart}
	if err := d.callPeer(ctx, f.Peer, wire.MethodTakeover, ask, nil); err != nil {
		return report, err
	}
	ran, err := d.mayShutDown(ctx, g)
	if err != nil || req.DryRun {
		return report, err
	}
	if err := d.shutDown(ctx, g, ran, req, emit); err != nil {
		return report, err
	}
	say(emit, "drain", "shipping what site %s lacks", f.Peer)
	pos, err := d.handOver(ctx, g, src)
	if err != nil {
		return report, d.goOn(g, ran, because(err, "nothing was moved"), emit)
	}
	say(emit, "takeover", "site %s takes over at record %d", f.Peer, pos.LSN)
	ask.Pos, ask.DryRun = pos, false
	var resp wire.TakeoverResponse
	err = d.callPeer(context.WithoutCancel(ctx), f.Peer, wire.MethodTakeover, ask, &resp)
	if err != nil && isAnswer(err) {
		return report, d.goOn(g, ran, err, emit)
	} else if err != nil {
		return report, d.inDoubt(g, err)
	}
	return d.handedOver(g, report, resp, pos, began, emit)
}

// movable returns the source of a group that nothing is missing of.
func (g *group) movable() (*source, error) {
	f := g.snapshot()
	if f.Role == RoleReplica {
		return nil, refused(fmt.Sprintf("site %s holds the replica of %s", g.d.cfg.Site, g.name), fmt.Sprintf("at site %s: kagami switchover %s; if that site is lost: kagami failover %s here", f.Peer, g.name, g.name))
	}
	if f.Fenced != "" {
		return nil, refused(fmt.Sprintf("%s was promoted at site %s; what is here is superseded", g.name, f.Peer), "see kagami status "+g.name+" at site "+f.Peer)
	}
	if f.Role == RolePromoted {
		return nil, refused(fmt.Sprintf("%s has no replica", g.name), fmt.Sprintf("kagami reprotect %s gives it one; kagami failback %s does both", g.name, g.name))
	}
	src, err := g.verifiable()
	if err != nil {
		return nil, err
	}
	if f.Compare != "" || f.Phase != "" {
		return nil, refused(fmt.Sprintf("%s is not protected yet", g.name), "see kagami status "+g.name)
	}
	return src, nil
}

// mayShutDown tells whether a VM runs from the group here. What belongs to no VM has
// to be let go of first.
func (d *Daemon) mayShutDown(ctx context.Context, g *group) (runs bool, err error) {
	f := g.snapshot()
	if f.VM == "" {
		for _, disk := range g.status().Disks {
			if disk.Clients > 0 {
				return false, refused(fmt.Sprintf("%d clients are connected to disk %s of %s", disk.Clients, disk.Name, g.name), "stop what uses it first")
			}
		}
		return false, nil
	}
	hv, err := d.virt()
	if err != nil {
		return false, err
	}
	st, err := hv.State(ctx, g.domainName())
	if errors.Is(err, qmp.ErrNoDomain) {
		return false, nil
	}
	return err == nil && st.Active(), fromHypervisor(err)
}

// shutdownPatience is how long a guest may take to shut down, unless asked otherwise.
const (
	shutdownPatience = 3 * time.Minute
	maxShutdown      = 24 * time.Hour
)

func (d *Daemon) shutDown(ctx context.Context, g *group, runs bool, req control.SwitchoverRequest, emit func(control.Event)) error {
	if !runs {
		return nil
	}
	hv, err := d.virt()
	if err != nil {
		return err
	}
	patience := shutdownPatience
	if req.ShutdownSeconds > 0 {
		patience = time.Duration(min(req.ShutdownSeconds, maxShutdown.Seconds()) * float64(time.Second))
	}
	vm := g.domainName()
	say(emit, "shutdown", "shutting VM %s down, for at most %v", vm, patience)
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	err = hv.Shutdown(ctx, vm)
	if errors.Is(err, context.DeadlineExceeded) {
		return failure("timeout", fmt.Sprintf("VM %s did not shut down within %v; nothing was moved", vm, patience),
			"shut it down from inside, or virsh destroy "+vm+", then run the command again; --shutdown-timeout waits longer")
	}
	return fromHypervisor(err)
}

// drainLimit is how long the last records of a switchover may take.
const drainLimit = 5 * time.Minute

// handOver ends the service with everything acknowledged, and returns the position.
func (d *Daemon) handOver(ctx context.Context, g *group, src *source) (epoch.Pos, error) {
	ctx, cancel := context.WithTimeout(ctx, drainLimit)
	defer cancel()
	err := src.drain(ctx)
	clean := g.snapshot().Clean
	if serr := g.stop(); serr != nil {
		g.note(fmt.Sprintf("while closing the exports: %v", serr))
	}
	g.input(LinkLost, "switchover: nothing is served here until site "+g.snapshot().Peer+" answers")
	if err == nil && clean == nil {
		err = errors.New("not everything could be acknowledged")
	}
	if err == nil {
		// From here on the other site may have taken over: nothing is served here before it answers.
		err = g.update(func(f *groupFile) { f.Boot = "" })
	}
	if err != nil {
		return epoch.Pos{}, fmt.Errorf("ship what is left: %w", err)
	}
	return clean.Pos, nil
}

// isAnswer tells whether an error is the peer's answer: it did nothing.
func isAnswer(err error) bool {
	var e *control.Error
	return errors.As(err, &e) && e.Code != "unreachable" && e.Code != "cancelled"
}

// goOn serves again here, after the other site has not taken over.
func (d *Daemon) goOn(g *group, ran bool, cause error, emit func(control.Event)) error {
	say(emit, "undo", "site %s goes on serving %s: %s", d.cfg.Site, g.name, text(cause))
	if err := g.startSource(); err != nil {
		g.fail(err)
		return because(cause, "and the disks of %s cannot be served again: %s", g.name, text(err))
	}
	if !ran {
		return cause
	}
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	hv, err := d.virt()
	if err == nil {
		err = hv.Start(ctx, g.domainName(), g.exportsOf()...)
	}
	if err != nil {
		return because(cause, "and VM %s could not be started again: %s", g.domainName(), text(err))
	}
	return because(cause, "VM %s was started again here", g.domainName())
}

func (g *group) exportsOf() (out []qmp.Served) {
	for _, df := range g.snapshot().Disks {
		out = append(out, g.d.served(g.name, df))
	}
	return out
}

// inDoubt lets the other site say, at the next attach, whether it was promoted.
func (d *Daemon) inDoubt(g *group, cause error) error {
	if err := g.startSource(); err != nil {
		g.fail(err)
	}
	return failure("unreachable", fmt.Sprintf("whether site %s has taken %s over is not known: %s", g.snapshot().Peer, g.name, text(cause)),
		fmt.Sprintf("kagami status %s: when it is fenced here, the VM runs there; when it is streaming again, nothing was moved, and virsh start %s goes on here", g.name, g.domainName()))
}

// handedOver is step 4.
func (d *Daemon) handedOver(g *group, report control.FailoverReport, resp wire.TakeoverResponse, pos epoch.Pos, began time.Time, emit func(control.Event)) (control.FailoverReport, error) {
	peer := g.snapshot().Peer
	why := fmt.Sprintf("switched over to site %s at %s", peer, time.Now().UTC().Format(time.RFC3339))
	if err := g.update(func(f *groupFile) { f.Fenced = why }); err != nil {
		// At the next start the other site says so.
		g.fail(err)
		return report, because(err, "site %s has taken %s over", peer, g.name)
	}
	g.keepSuperseded()
	g.alarm(fencedAlarm, why)
	g.input(Superseded, why)
	report.LSN, report.Lineage, report.Domain, report.Notes, report.Replayed = uint64(pos.LSN), resp.Lineage.String(), resp.Domain, resp.Notes, resp.Replayed
	report.RTOSeconds = time.Since(began).Seconds()
	if resp.Problem != "" {
		return report, failure("half-done", fmt.Sprintf("site %s was promoted, and then: %s", peer, resp.Problem), fmt.Sprintf("put that right, then run kagami failover %s at site %s: it goes on where it stopped", g.name, peer))
	}
	say(emit, "done", "%s is served at site %s; this site becomes its replica", g.name, peer)
	return report, nil
}

// takeover serves wire.MethodTakeover: step 3.
func (a *acceptor) takeover(p replica.Peer, req wire.TakeoverRequest) (wire.TakeoverResponse, error) {
	var none wire.TakeoverResponse
	began := time.Now()
	g, err := a.owned(p, req.Group)
	if err != nil {
		return none, err
	}
	if !g.op.TryLock() {
		return none, wire.Errorf(wire.CodeBusy, "another operation is under way on group %s at site %s", g.name, a.d.cfg.Site)
	}
	defer g.op.Unlock()
	if a.d.find(g.name) != g || g.snapshot().Role != RoleReplica {
		return none, a.unknown(p)
	}
	d, boot := a.d, control.FailoverRequest{VM: g.name, Force: true, NoStart: req.NoStart}
	if d.links[p.Site()] == nil {
		return none, wire.Errorf(wire.CodeConflict, "site %s is not among the peers of site %s: nothing could be replicated back", p.Site(), d.cfg.Site)
	}
	if err := d.checkTakeover(g, boot); err != nil || req.DryRun {
		return none, toPeer(err)
	}
	g.mu.Lock()
	rep := g.rep
	g.mu.Unlock()
	rep.LetGo() // the link has this answer to carry, and other groups
	say := func(ev control.Event) {
		if ev.Message != "" {
			g.note(ev.Message)
		}
	}
	if err := d.promote(g, began, &req.Pos, say); err != nil {
		return none, toPeer(err)
	}
	return d.takenOver(g, boot, say), nil
}

func (d *Daemon) checkTakeover(g *group, req control.FailoverRequest) error {
	if err := g.checkReplica(req); err != nil {
		return err
	}
	g.mu.Lock()
	rep := g.rep
	g.mu.Unlock()
	if why := rep.Status().Damaged; why != "" { // checkReplica lets it pass for a failover by force
		return refused(fmt.Sprintf("the replica of %s is not what was acknowledged: %s", g.name, why), "wait until it is repaired")
	}
	if g.snapshot().VM == "" || req.NoStart {
		return nil
	}
	ctx, cancel := context.WithTimeout(d.ctx, checkPatience)
	defer cancel()
	return d.checkBoot(ctx, g)
}

// takenOver brings a promoted group up and lets the other site become its replica.
func (d *Daemon) takenOver(g *group, req control.FailoverRequest, say func(control.Event)) wire.TakeoverResponse {
	var rep control.FailoverReport
	err := d.bringUp(d.ctx, g, req, say)
	if err == nil {
		rep, err = g.finishFailover(req, say)
	}
	f := g.snapshot()
	resp := wire.TakeoverResponse{Lineage: f.Lineage, Domain: rep.Domain, RTOMs: int64(rep.RTOSeconds * 1e3), Notes: rep.Notes, Replayed: rep.Replayed}
	if err != nil {
		g.brokenOff(text(err))
		resp.Problem = text(err)
		return resp
	}
	return resp
}

// toPeer makes an error of a command here the answer to a peer.
func toPeer(err error) error {
	var werr *wire.Error
	if err == nil || errors.As(err, &werr) {
		return err
	}
	return wire.Errorf(wire.CodeConflict, "%s", text(err))
}
