package host

import (
	"context"
	"fmt"
	"path/filepath"
	"time"

	"kagami/appliance/control"
	"kagami/replica"
	"kagami/replica/wire"
)

// Forget gives up what this site has of a group: one that the config file does
// not declare any more, a fenced source, a replica that nobody wants. Images
// that kagami made and the group's state are renamed aside and declared images
// stay where they are: nothing is deleted. Of a source the replica's site is
// told, if it is connected.
func (d *Daemon) Forget(ctx context.Context, req control.ForgetRequest, emit func(control.Event)) error {
	return explained(d.giveUp(ctx, req, emit), "put that right, then run kagami forget "+req.Group+" again")
}

func (d *Daemon) giveUp(ctx context.Context, req control.ForgetRequest, emit func(control.Event)) error {
	g := d.find(req.Group)
	if g == nil {
		return notFound(fmt.Sprintf("site %s has no group %s", d.cfg.Site, req.Group), "kagami status lists the groups of this site")
	}
	if !g.op.TryLock() {
		return refused("another operation is under way on "+g.name, "wait for it; see kagami status "+g.name)
	}
	defer g.op.Unlock()
	if d.find(g.name) != g {
		return notFound(fmt.Sprintf("site %s has no group %s any more", d.cfg.Site, g.name), "kagami status lists the groups of this site")
	}
	if err := d.inUse(g); err != nil {
		return err
	}
	risk := d.risk(g)
	if risk != "" && !req.Force {
		return refused(fmt.Sprintf("%s is not forgotten: %s", g.name, risk), "kagami forget "+g.name+" --force gives it up all the same; what it has here is kept under other names")
	}
	if req.DryRun {
		d.sayForget(g, risk, emit)
		return nil
	}
	if err := d.putAside(ctx, g, emit); err != nil {
		g.fail(err)
		return err
	}
	d.forget(g)
	g.note("forgotten")
	g.sayRemains(emit)
	say(emit, "done", "site %s knows no group %s any more", d.cfg.Site, g.name)
	return nil
}

// inUse refuses to give up a group that something uses.
func (d *Daemon) inUse(g *group) error {
	f, st := g.snapshot(), g.status()
	clients := 0
	for _, disk := range st.Disks {
		clients += disk.Clients
	}
	switch c := d.groupConfig(g.name); {
	case c != nil && len(c.Disks) > 0 && f.Role == RoleSource:
		return refused("the config file declares "+g.name, fmt.Sprintf("take %s out of groups there, restart the daemon, then run kagami forget %s", g.name, g.name))
	case clients > 0 && f.VM != "" && f.Fenced != "":
		return refused(fmt.Sprintf("the superseded VM %s runs here, from the disks of %s", f.VM, g.name), fmt.Sprintf("virsh destroy %s ends it; then run kagami forget %s", f.VM, g.name))
	case clients > 0 && f.VM != "":
		return refused(fmt.Sprintf("a VM runs from the disks of %s", g.name), fmt.Sprintf("kagami unprotect %s moves them back to plain files, live", g.name))
	case clients > 0:
		return refused(fmt.Sprintf("the disks of %s are in use", g.name), "stop what is connected to their sockets first")
	case f.Role == RoleReplica && st.PeerUp:
		return refused(fmt.Sprintf("site %s replicates %s to this site just now", f.Peer, g.name), fmt.Sprintf("end it at site %s: kagami unprotect %s, or kagami forget %s for a declared group", f.Peer, g.name, g.name))
	}
	return nil
}

// risk says what may be lost with a group, for which --force is wanted; "" when
// that is nothing.
func (d *Daemon) risk(g *group) string {
	f := g.snapshot()
	switch {
	case g.broken != nil:
		return "what its state was cannot be told"
	case f.Phase == Ending:
		return "" // it has no data here
	case f.Role == RoleReplica:
		return fmt.Sprintf("it is the copy of what site %s has, and may be the only one", f.Peer)
	case f.Role == RolePromoted:
		return "it was promoted here and is the only copy"
	case f.Fenced != "" && !d.connected(f.Peer):
		return fmt.Sprintf("site %s, where it was promoted, is not connected, and this may be the only copy", f.Peer)
	case f.Fenced != "":
		return ""
	case f.VM != "":
		return fmt.Sprintf("it protects VM %s, whose disks kagami unprotect would move back to plain files", f.VM)
	case f.Complete:
		return fmt.Sprintf("site %s has a replica of it, which ends too", f.Peer)
	}
	return ""
}

func (d *Daemon) connected(site string) bool {
	link := d.links[site]
	return link != nil && link.Status().Connected
}

// sayRemains names what a VM leaves that kagami does not touch.
func (g *group) sayRemains(emit func(control.Event)) {
	f, vm := g.snapshot(), g.domainName()
	if vm == "" || f.Role == RoleReplica || f.Phase == Ending {
		return
	}
	for _, disk := range f.Disks {
		if disk.Kept != "" {
			say(emit, "forget", "old file of disk %s: %s", disk.Name, disk.Kept)
		}
	}
	say(emit, "warning", "if VM %s is still defined here, its disks are kagami's sockets, which are gone: virsh undefine it, or virsh edit it to run from files", vm)
}

func (d *Daemon) sayForget(g *group, risk string, emit func(control.Event)) {
	if risk != "" {
		say(emit, "plan", "%s", risk)
	}
	for _, disk := range g.snapshot().Disks {
		if disk.Declared {
			say(emit, "plan", "image %s stays as it is", disk.Image)
		} else {
			say(emit, "plan", "image %s is renamed", disk.Image)
		}
	}
	say(emit, "plan", "the state in %s moves to %s", g.dir, d.forgottenDir())
}

func (d *Daemon) forgottenDir() string { return d.cfg.StateDir + "/forgotten" }

// putAside ends a group's service and takes it out of the state folder. Order:
// the images get their new names, durably, then the group's folder goes, in one
// durable rename. Broken off before that, the group is still there, failed, and
// can be forgotten again.
func (d *Daemon) putAside(ctx context.Context, g *group, emit func(control.Event)) error {
	f := g.snapshot()
	g.applySpool(emit)
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while stopping: %v", err))
	}
	d.tellForgotten(ctx, f, emit)
	for _, disk := range f.Disks {
		if disk.Declared {
			continue
		}
		aside, err := d.moveAside(disk.Image)
		if err != nil {
			return err
		}
		if aside == "" {
			continue
		}
		if err := d.fs.SyncDir(filepath.Dir(aside)); err != nil {
			return fmt.Errorf("put image aside: %w", err)
		}
		say(emit, "forget", "image of disk %s: %s", disk.Name, aside)
	}
	return d.moveState(g, emit)
}

// applySpool brings a replica's images up to the last epoch it has.
func (g *group) applySpool(emit func(control.Event)) {
	g.mu.Lock()
	rep := g.rep
	g.mu.Unlock()
	if rep == nil {
		return
	}
	s, err := rep.Seal()
	if err != nil {
		s = replica.Sealed{Lost: err.Error()}
	}
	if s.Lost != "" {
		say(emit, "warning", "the images of %s are not up to its last epoch: %s", g.name, s.Lost)
	}
}

// moveState renames the group's folder aside and fsyncs both folders.
func (d *Daemon) moveState(g *group, emit func(control.Event)) error {
	if err := d.fs.MkdirAll(d.forgottenDir(), 0o700); err != nil {
		return fmt.Errorf("make folder of forgotten groups: %w", err)
	}
	aside := fmt.Sprintf("%s/%s.old-%s", d.forgottenDir(), g.name, time.Now().UTC().Format(asideTime))
	if err := d.fs.Rename(g.dir, aside); err != nil {
		return fmt.Errorf("put state of group aside: %w", err)
	}
	for _, dir := range []string{d.forgottenDir(), filepath.Dir(g.dir)} {
		if err := d.fs.SyncDir(dir); err != nil {
			return fmt.Errorf("put state of group aside: %w", err)
		}
	}
	say(emit, "forget", "state: %s", aside)
	return nil
}

// tellForgotten lets the replica's site give its replica up, if it can be told.
func (d *Daemon) tellForgotten(ctx context.Context, f *groupFile, emit func(control.Event)) {
	if f.Role != RoleSource || f.Fenced != "" {
		return
	}
	err := d.callPeer(ctx, f.Peer, wire.MethodRemove, wire.RemoveRequest{Group: f.ID, Purge: f.Purge}, nil)
	switch {
	case err == nil:
		say(emit, "forget", "site %s gave its replica up; its images stay there", f.Peer)
	case !isCode(err, string(wire.CodeNotFound)):
		say(emit, "warning", "site %s could not be told (%s): run kagami forget %s there, too", f.Peer, text(err), f.Name)
	}
}
