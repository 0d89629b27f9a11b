package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/qmp"
	"kagami/replica/wire"
)

// Protect puts disks of a running VM behind the appliance and copies them to
// the peer:
//
//  1. look at everything that could stand in the way, here and at the peer
//  2. make group and empty images, here; the peer makes its own at attach
//  3. serve them, attach to the peer, ship the VM's definition
//  4. libvirt copies each disk into its export and pivots: that copy, shipped
//     like any guest write, is the first sync
//  5. end the first sync: the replica is complete, the group protected
//
// A failure before the first pivot takes back everything; the VM was never
// touched. If ctx ends (the command was interrupted), that is such a failure.
func (d *Daemon) Protect(ctx context.Context, req control.ProtectRequest, emit func(control.Event)) error {
	g, err := d.planProtect(ctx, req, emit)
	if err != nil || req.DryRun {
		return err
	}
	defer g.op.Unlock()
	if err := d.runProtect(ctx, g, emit); err != nil {
		return d.rollBack(g, err)
	}
	say(emit, "done", "%s is protected: every fsync that returns in it is at site %s too", g.name, g.snapshot().Peer)
	return nil
}

func say(emit func(control.Event), step, format string, a ...any) {
	emit(control.Event{Step: step, Message: fmt.Sprintf(format, a...)})
}

// planProtect is step 1. It returns the new group with op held, not yet on disk.
func (d *Daemon) planProtect(ctx context.Context, req control.ProtectRequest, emit func(control.Event)) (*group, error) {
	say(emit, "check", "looking at VM %s and at site %s", req.VM, req.To)
	if _, err := d.virt(); err != nil {
		return nil, err
	}
	if !validName.MatchString(req.VM) {
		return nil, refused(fmt.Sprintf("VM name %q cannot be a group's name", req.VM), "rename the VM (virsh domrename): letters, digits, dot, dash and underscore are allowed")
	}
	if g := d.find(req.VM); g != nil {
		return nil, refused(fmt.Sprintf("%s is already a group at this site (%s, %s)", req.VM, g.snapshot().Role, g.current()), "see kagami status "+req.VM)
	}
	if d.links[req.To] == nil {
		return nil, notFound(fmt.Sprintf("site %q is not among the peers of the config file", req.To), "known peers: "+d.peerNames())
	}
	chosen, err := d.chooseDisks(ctx, req)
	if err != nil {
		return nil, err
	}
	f := d.describe(req, chosen)
	if err := d.checkHere(f); err != nil {
		return nil, err
	}
	if err := d.checkThere(ctx, f, emit); err != nil {
		return nil, err
	}
	g := newGroup(d, f)
	g.op.Lock()
	return g, nil
}

func (d *Daemon) peerNames() string {
	var names []string
	for n := range d.links {
		names = append(names, n)
	}
	slices.Sort(names)
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// chooseDisks picks the disks asked for, or all writable ones.
func (d *Daemon) chooseDisks(ctx context.Context, req control.ProtectRequest) ([]qmp.Disk, error) {
	hv, err := d.virt()
	if err != nil {
		return nil, err
	}
	all, err := hv.Disks(ctx, req.VM)
	if err != nil {
		return nil, fromHypervisor(err)
	}
	if len(all) > 0 && !all[0].Running {
		return nil, refused(fmt.Sprintf("VM %s is not running", req.VM), "start it (virsh start "+req.VM+"), then protect it: the disks are moved while it runs")
	}
	var chosen []qmp.Disk
	for _, disk := range all {
		named := slices.Contains(req.Disks, disk.Target)
		if len(req.Disks) > 0 && !named {
			continue
		}
		if len(req.Disks) == 0 && (disk.Device != "disk" || disk.ReadOnly || disk.Kind == "") {
			continue // a CD-ROM, a floppy or a read-only disk takes no writes
		}
		if err := disk.Unsuited(); err != nil {
			return nil, fromHypervisor(err)
		}
		chosen = append(chosen, disk)
	}
	for _, name := range req.Disks {
		if !slices.ContainsFunc(chosen, func(q qmp.Disk) bool { return q.Target == name }) {
			return nil, notFound(fmt.Sprintf("VM %s has no disk %s", req.VM, name), "virsh domblklist "+req.VM+" lists its disks")
		}
	}
	if len(chosen) == 0 {
		return nil, refused(fmt.Sprintf("VM %s has no writable disk", req.VM), "virsh domblklist "+req.VM+" lists its disks")
	}
	return chosen, nil
}

// describe makes the group file of a group that does not exist yet.
func (d *Daemon) describe(req control.ProtectRequest, chosen []qmp.Disk) *groupFile {
	f := &groupFile{Version: groupFileVersion, Name: req.VM, VM: req.VM, ID: epoch.NewUUID(), Role: RoleSource, Peer: req.To,
		Lineage: epoch.NewUUID(), Phase: "protecting"}
	for i, disk := range chosen {
		f.Disks = append(f.Disks, diskFile{Slot: uint32(i), ID: epoch.NewUUID(), Name: disk.Target, Size: disk.Size,
			Image: d.imageDir(req.VM) + "/" + disk.Target + ".raw", Socket: d.socketPath(req.VM, disk.Target), Kept: disk.Source})
	}
	return f
}

// checkHere looks for what stands in the way at this site.
func (d *Daemon) checkHere(f *groupFile) error {
	var need int64
	for _, disk := range f.Disks {
		need += disk.Size
		if len(disk.Socket) > 107 {
			return refused(fmt.Sprintf("socket path %s is longer than 107 bytes", disk.Socket), "choose a shorter run_dir")
		}
	}
	if err := images.CheckSpace(d.fs, d.cfg.StateDir, need); err != nil {
		return failure("no-space", fmt.Sprintf("no space for the images: %v", err), "make room, or move state_dir to a larger file system")
	}
	return nil
}

// checkThere asks the peer.
func (d *Daemon) checkThere(ctx context.Context, f *groupFile, emit func(control.Event)) error {
	hv, err := d.virt()
	if err != nil {
		return err
	}
	xml, err := hv.DomainXML(ctx, f.VM)
	if err != nil {
		return fromHypervisor(err)
	}
	m := f.manifest(d.limits(f.Name).QueueBytes)
	m.Session = 1
	var resp wire.CheckResponse
	if err := d.callPeer(ctx, f.Peer, wire.MethodCheck, wire.CheckRequest{Manifest: m, XML: xml}, &resp); err != nil {
		return err
	}
	for _, w := range resp.Warnings {
		say(emit, "warning", "site %s: %s", f.Peer, w)
	}
	if len(resp.Problems) > 0 {
		return refused(fmt.Sprintf("site %s could not run %s: %s", f.Peer, f.VM, strings.Join(resp.Problems, "; ")),
			"put the missing mapping under groups: … domain: of that site's config file and restart its daemon")
	}
	return nil
}

// callPeer makes one request, waiting a little for the link.
func (d *Daemon) callPeer(ctx context.Context, site, method string, params, result any) error {
	wait, cancel := context.WithTimeout(ctx, linkPatience)
	defer cancel()
	sess, err := d.links[site].Session(wait)
	if err != nil {
		return failure("unreachable", err.Error(), "check that the daemon runs there and that its address and certificates are right")
	}
	err = sess.Call(ctx, method, params, result)
	var werr *wire.Error
	if errors.As(err, &werr) {
		return failure(string(werr.Code), err.Error(), "see the log of the daemon at site "+site)
	}
	return err
}

// runProtect is steps 2 to 5.
func (d *Daemon) runProtect(ctx context.Context, g *group, emit func(control.Event)) error {
	f := g.snapshot()
	say(emit, "prepare", "making %d image(s) in %s", len(f.Disks), d.imageDir(g.name))
	src, err := d.makeSource(g)
	if err != nil {
		return err
	}
	say(emit, "connect", "waiting for site %s to make its replica", f.Peer)
	wait, cancel := context.WithTimeout(ctx, 2*linkPatience)
	defer cancel()
	if err := src.ready(wait); err != nil {
		return err
	}
	if err := d.checkReach(ctx, f); err != nil {
		return err
	}
	if err := g.shipDomain(ctx); err != nil {
		return err
	}
	for _, disk := range f.Disks {
		if err := d.attachDisk(ctx, g, disk, emit); err != nil {
			return err
		}
	}
	say(emit, "finish", "waiting for site %s to have everything", f.Peer)
	// From here the VM runs from the exports: an interruption must not undo it.
	if err := src.finishFirstSync(context.WithoutCancel(ctx)); err != nil {
		return err
	}
	g.keepOld()
	return nil
}

// checkReach makes sure that QEMU may use the sockets, now that they are there.
func (d *Daemon) checkReach(ctx context.Context, f *groupFile) error {
	hv, err := d.virt()
	if err != nil {
		return err
	}
	uid, gid, err := hv.QEMUUser(ctx)
	if err != nil {
		return fromHypervisor(err)
	}
	for _, disk := range f.Disks {
		if err := qmp.Reachable(disk.Socket, uid, gid); err != nil {
			return refused(fmt.Sprintf("QEMU could not use its socket: %v", err),
				"let QEMU's user pass through the folders of run_dir (chmod o+x), and set libvirt.socket_group to its group")
		}
	}
	return nil
}

// makeSource is step 2: images first, the group file, which makes it real, last.
func (d *Daemon) makeSource(g *group) (*source, error) {
	f := g.snapshot()
	for _, dir := range []string{g.dir, d.imageDir(g.name)} {
		if err := d.fs.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("make folder: %w", err)
		}
	}
	for _, disk := range f.Disks {
		if err := d.makeImage(disk); err != nil {
			return nil, err
		}
	}
	if err := f.save(d.fs, g.dir); err != nil {
		return nil, err
	}
	d.mu.Lock()
	d.groups[g.name] = g
	d.mu.Unlock()
	src, err := g.openSource(true)
	if err != nil {
		return nil, err
	}
	return src, src.begin()
}

// shipDomain sends the VM's definition to the peer.
func (g *group) shipDomain(ctx context.Context) error {
	f := g.snapshot()
	hv, err := g.d.virt()
	if err != nil {
		return err
	}
	xml, err := hv.DomainXML(ctx, f.VM)
	if err != nil {
		return fromHypervisor(err)
	}
	if err := images.WriteFileAtomic(g.d.fs, g.dir+"/domain.xml", []byte(xml), 0o600); err != nil {
		return fmt.Errorf("store definition of VM: %w", err)
	}
	return g.d.callPeer(ctx, f.Peer, wire.MethodDomain, wire.DomainRequest{Group: f.ID, XML: xml}, nil)
}

// attachDisk is step 4 for one disk.
func (d *Daemon) attachDisk(ctx context.Context, g *group, disk diskFile, emit func(control.Event)) error {
	began := time.Now()
	g.setProgress("first sync of "+disk.Name, 0, disk.Size)
	defer g.setProgress("", 0, 0)
	progress := func(done, total int64, phase string) {
		g.setProgress("first sync of "+disk.Name, done, total)
		emit(progressEvent("sync "+disk.Name, phase, done, total, began))
	}
	hv, err := d.virt()
	if err != nil {
		return err
	}
	err = hv.Attach(ctx, qmp.AttachSpec{VM: g.snapshot().VM, Target: disk.Name, Socket: disk.Socket, Export: disk.Name,
		Size: disk.Size, ReconnectDelay: d.limits(g.name).ReconnectDelay}, progress)
	if err != nil {
		return fromHypervisor(err)
	}
	return nil
}

func progressEvent(step, message string, done, total int64, began time.Time) control.Event {
	ev := control.Event{Step: step, Message: message, Done: done, Total: total}
	if spent := time.Since(began).Seconds(); spent > 0.1 && done > 0 {
		ev.Rate = int64(float64(done) / spent)
		if ev.Rate > 0 && total > done {
			ev.ETASeconds = float64(total-done) / float64(ev.Rate)
		}
	}
	return ev
}

// rollBack undoes a protect that failed. Disks that were pivoted already keep
// running from their exports: the group stays, unprotected, and says so.
func (d *Daemon) rollBack(g *group, cause error) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	moved, err := d.attachedDisks(ctx, g)
	if err != nil || len(moved) > 0 {
		g.alarm("protect", fmt.Sprintf("protect was broken off (%v): disks %s run from kagami, unprotected", cause, strings.Join(moved, ", ")))
		return failure("half-done", fmt.Sprintf("%v; disks %s of %s already run from kagami and go on doing so, unprotected", cause, strings.Join(moved, ", "), g.name),
			"kagami unprotect "+g.name+" moves them back to plain files")
	}
	f := g.snapshot()
	errs := []error{g.stop()}
	if err := d.callPeer(ctx, f.Peer, wire.MethodRemove, wire.RemoveRequest{Group: f.ID, Purge: true}, nil); err != nil && !isCode(err, string(wire.CodeNotFound)) {
		g.note(fmt.Sprintf("the replica's images at site %s were not removed: %v", f.Peer, err))
	}
	errs = append(errs, g.removeState(true))
	d.forget(g)
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("%w (and while taking it back: %w)", cause, err)
	}
	return cause
}

// attachedDisks names the disks of a group that its VM uses through kagami.
func (d *Daemon) attachedDisks(ctx context.Context, g *group) ([]string, error) {
	f := g.snapshot()
	hv, err := d.virt()
	if err != nil {
		return nil, err
	}
	disks, err := hv.Disks(ctx, f.VM)
	if err != nil {
		return nil, fromHypervisor(err)
	}
	var names []string
	for _, disk := range disks {
		if slices.ContainsFunc(f.Disks, func(df diskFile) bool { return df.Name == disk.Target && df.Socket == disk.Socket }) {
			names = append(names, disk.Target)
		}
	}
	return names, nil
}

// abandonProtect looks at a protect that the daemon's end broke off. If the VM
// already runs from the exports, the group goes on and compares; else it is
// taken back.
func (g *group) abandonProtect() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	names, err := g.d.attachedDisks(ctx, g)
	moved := err != nil || len(names) > 0
	if moved {
		g.alarm("protect", "protect was broken off by the daemon's end; the first sync is taken up again")
		return g.startSource()
	}
	if err := g.cancelCopies(); err != nil {
		return err
	}
	g.note("protect was broken off before the VM was moved: taken back")
	if err := g.removeState(true); err != nil {
		return err
	}
	g.d.forget(g)
	return nil
}

// cancelCopies ends block jobs that an earlier life of the daemon began.
func (g *group) cancelCopies() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	hv, err := g.d.virt()
	if err != nil {
		return err
	}
	f := g.snapshot()
	for _, disk := range f.Disks {
		if err := hv.CancelCopy(ctx, f.VM, disk.Name, disk.Socket); err != nil {
			return fromHypervisor(err)
		}
	}
	return nil
}

// keepOld locks the files that the VM ran from before, so that nobody starts a
// second VM on them unawares.
func (g *group) keepOld() {
	for _, disk := range g.snapshot().Disks {
		if !filepath.IsAbs(disk.Kept) {
			continue
		}
		if info, err := os.Stat(disk.Kept); err != nil || !info.Mode().IsRegular() {
			continue
		}
		img, err := images.OpenImage(g.d.fs, disk.Kept, images.Want{})
		if err != nil {
			g.note(fmt.Sprintf("old file %s cannot be locked: %v", disk.Kept, err))
			continue
		}
		g.mu.Lock()
		g.kept = append(g.kept, img)
		g.mu.Unlock()
	}
}
