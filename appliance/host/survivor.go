package host

import (
	"context"
	"fmt"
	"slices"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/changemap"
	"kagami/ext4j/epoch"
	"kagami/replica"
	"kagami/replica/wire"
)

// Split brain: both sites were promoted, in lineages of which neither comes from the
// other. Nothing is merged and nothing overwritten until an operator says which
// data survives; the other site's is kept there under a name (branch.go).

// lineage serves wire.MethodLineage.
func (a *acceptor) lineage(p replica.Peer, req wire.LineageRequest) (wire.LineageResponse, error) {
	for _, g := range a.d.snapshot() {
		if f := g.snapshot(); f.ID == req.Group && f.Peer == p.Site() && p.May(f.Name) {
			return g.standing(), nil
		}
	}
	return wire.LineageResponse{}, a.unknown(p)
}

// standing is what this site has of a group, for the other site and for people.
func (g *group) standing() wire.LineageResponse {
	g.mu.Lock()
	f, state, src := g.file, g.state, g.src
	g.mu.Unlock()
	r := wire.LineageResponse{Role: string(f.Role), State: string(state), Lineage: f.Lineage, Past: f.Past}
	if f.Failover != nil {
		r.SinceNs = f.Failover.AtNs
	}
	if src == nil {
		return r
	}
	for _, d := range f.Disks {
		r.Clients += src.eng.Disk(d.Slot).Clients()
	}
	for _, m := range src.changes {
		r.Changed += int64(m.Count()) * regionBytes
	}
	return r
}

// has puts what a site has of a group into words.
func has(r wire.LineageResponse) string {
	since := "never promoted"
	if r.SinceNs != 0 {
		since = "promoted at " + time.Unix(0, r.SinceNs).UTC().Format(time.RFC3339)
	}
	return fmt.Sprintf("lineage %s, %s, %s changed since, %d clients", r.Lineage, since, byteText(r.Changed), r.Clients)
}

// splitAlarm is the alarm of a split brain.
const splitAlarm = "split brain"

// beside looks after a promoted group's other site: takes it back as the replica, if
// that was asked for, and else notices when it serves another lineage. It ends with
// the service s, or with ctx.
func (g *group) beside(ctx context.Context, s *source) {
	for ctx.Err() == nil {
		g.mu.Lock()
		f, present := g.file, g.src
		g.mu.Unlock()
		if present != s || f.Role != RolePromoted {
			return
		}
		pause := g.d.pause.beside
		switch {
		case f.TakeBack:
			pause = g.d.pause.takeBack
			g.tryTakeBack(ctx)
		case g.d.connected(f.Peer):
			g.lookBeside(ctx, f)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
	}
}

func (g *group) lookBeside(ctx context.Context, f *groupFile) {
	ctx, cancel := context.WithTimeout(ctx, checkPatience)
	defer cancel()
	var r wire.LineageResponse
	if err := g.d.callPeer(ctx, f.Peer, wire.MethodLineage, wire.LineageRequest{Group: f.ID}, &r); err != nil {
		return // looked at again
	}
	text := ""
	if r.Role == string(RolePromoted) && !hasLineage(f.Past, r.Lineage) && !hasLineage(r.Past, f.Lineage) {
		text = fmt.Sprintf("split brain: this site has %s; site %s has %s; neither comes from the other: kagami survivor %s at the site whose data is to be kept", has(g.standing()), f.Peer, has(r), g.name)
	}
	g.alarm(splitAlarm, text)
}

// Survivor decides in favour of this site: its data is kept, and the other site becomes
// its replica. A source that was superseded serves again, in a lineage of its own.
func (d *Daemon) Survivor(ctx context.Context, req control.SurvivorRequest, emit func(control.Event)) error {
	g, err := d.operate(req.Group)
	if err != nil {
		return err
	}
	defer g.op.Unlock()
	return explained(d.survive(ctx, g, req, emit), "put that right, then run kagami survivor "+g.name+" again")
}

func (d *Daemon) survive(ctx context.Context, g *group, req control.SurvivorRequest, emit func(control.Event)) error {
	f := g.snapshot()
	switch {
	case f.Role == RoleReplica:
		return refused(fmt.Sprintf("site %s holds the replica of %s, which serves nothing", d.cfg.Site, g.name), "kagami failover "+g.name+" makes it serve")
	case f.Role == RoleSource && f.Fenced == "":
		return refused(fmt.Sprintf("%s is served here and was superseded by nobody", g.name), "see kagami status "+g.name)
	case f.Phase != "":
		return refused(fmt.Sprintf("an operation on %s was broken off (%s)", g.name, f.Phase), "end it first; see kagami status "+g.name)
	}
	var other wire.LineageResponse
	if err := d.callPeer(ctx, f.Peer, wire.MethodLineage, wire.LineageRequest{Group: f.ID}, &other); err != nil {
		return err
	}
	say(emit, "lineage", "site %s has %s", f.Peer, has(other))
	say(emit, "lineage", "site %s has %s", d.cfg.Site, has(g.standing()))
	if f.Role == RolePromoted && hasLineage(f.Past, other.Lineage) {
		return refused(fmt.Sprintf("site %s has nothing that this site does not come from: there is nothing to decide", f.Peer), fmt.Sprintf("kagami reprotect %s makes it the replica", g.name))
	}
	next := f.chosen(other.Lineage)
	ask := wire.ReturnRequest{Manifest: next.manifest(d.limits(g.name).QueueBytes), DryRun: true}
	if err := d.callPeer(ctx, f.Peer, wire.MethodReturn, ask, nil); err != nil {
		return err
	}
	if req.DryRun || !req.Yes {
		say(emit, "plan", "what site %s has beyond is kept there as a branch, and it becomes the replica of this site", f.Peer)
	}
	if req.DryRun {
		return nil
	}
	if !req.Yes {
		return refused("what was written at site "+f.Peer+" in its lineage would be served no more", "say --yes if that is meant")
	}
	if err := g.choose(next); err != nil {
		return err
	}
	say(emit, "done", "the data of site %s is kept; site %s becomes its replica (kagami status %s)", d.cfg.Site, f.Peer, g.name)
	return nil
}

// chosen is the group's file after a decision for it and against a lineage. Of a
// superseded source nobody knows where exactly it stood: everything is compared.
func (f *groupFile) chosen(against epoch.UUID) *groupFile {
	next := *f
	next.Discards = append(slices.Clone(f.Discards), against)
	next.TakeBack = true
	if f.Role == RolePromoted {
		return &next
	}
	next.Past = append(slices.Clone(f.Past[max(0, len(f.Past)-maxPast+1):]), epoch.Pos{Lineage: f.Lineage, Session: f.Session})
	next.Role, next.Lineage, next.Session, next.Fenced = RolePromoted, epoch.NewUUID(), 1, ""
	next.Apart, next.Required, next.Boot = nil, f.Required&^featureApart, ""
	next.Replica, next.Begun, next.Clean, next.Compare, next.Changes, next.ChangesLost = epoch.UUID{}, 0, nil, "", true, ""
	next.Failover = &failoverRecord{AtNs: time.Now().UnixNano(), From: next.Past[len(next.Past)-1], Notes: []string{"chosen by an operator over lineage " + against.String()}}
	return &next
}

// choose makes a decision durable and serves by it. The records of changes come
// first: they say that everything may differ.
func (g *group) choose(next *groupFile) error {
	f := g.snapshot()
	if f.Role == RolePromoted {
		return g.update(func(f *groupFile) { f.Discards, f.TakeBack = next.Discards, true }) // beside goes on
	}
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while stopping: %v", err))
	}
	for _, d := range f.Disks {
		m, err := changemap.Create(g.d.fs, g.mapPath(&d), next.origin(&d), true)
		if err == nil {
			err = m.Close()
		}
		if err != nil {
			g.keepSuperseded()
			return fmt.Errorf("make record of changes of disk %s: %w", d.Name, err)
		}
	}
	if err := g.update(func(f *groupFile) { *f = *next }); err != nil {
		g.keepSuperseded()
		return err
	}
	g.removeApart(f)
	g.alarm(fencedAlarm, "")
	g.input(Chosen, "an operator decided for the data of this site")
	if err := g.startPromoted(); err != nil {
		g.fail(err)
		return err
	}
	return nil
}
