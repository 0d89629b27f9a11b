package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"kagami/appliance/control"
	"kagami/appliance/nbd"
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
//  4. libvirt copies each disk into its export; when all copies follow the
//     guest, it pivots to them: that copy, shipped like any guest write, is
//     the first sync
//  5. end the first sync: the replica is complete, the group protected
//
// A failure or interruption before the first pivot takes back everything, at
// both sites; the VM was never touched. After it only a failure does, by
// copying the moved disks back to plain files.
func (d *Daemon) Protect(ctx context.Context, req control.ProtectRequest, emit func(control.Event)) error {
	return explained(d.protect(ctx, req, emit), "put that right, then run kagami protect "+req.VM+" again")
}

func (d *Daemon) protect(ctx context.Context, req control.ProtectRequest, emit func(control.Event)) error {
	if !validName.MatchString(req.VM) {
		return refused(fmt.Sprintf("VM name %q cannot be a group's name", req.VM), "rename the VM (virsh domrename): letters, digits, dot, dash and underscore are allowed")
	}
	if g, err := d.take(req.VM); err != nil {
		return isTaken(req.VM, g)
	}
	defer d.untake(req.VM)
	f, err := d.planProtect(ctx, req, emit)
	if err != nil {
		return err
	}
	if req.DryRun {
		say(emit, "done", "%s can be protected", req.VM)
		return nil
	}
	g := newGroup(d, f)
	g.op.TryLock() // nobody else knows it yet
	defer g.op.Unlock()
	if err := d.runProtect(ctx, g, emit); err != nil {
		return err
	}
	say(emit, "done", "%s is protected: every fsync that returns in it is at site %s too", g.name, f.Peer)
	return nil
}

// isTaken says why a VM cannot be protected (again).
func isTaken(vm string, g *group) error {
	switch {
	case g == nil:
		return refused("another operation is under way on "+vm, "wait for it; see kagami status")
	case g.broken != nil:
		return g.unusable()
	case g.snapshot().Phase == Ending:
		return g.snapshot().leaving()
	case g.snapshot().Fenced != "":
		return refused(fmt.Sprintf("%s is here what a failover to site %s left behind", vm, g.snapshot().Peer),
			fmt.Sprintf("kagami forget %s puts it aside; then try again", vm))
	}
	return refused(fmt.Sprintf("%s is already a group at this site (%s, %s)", vm, g.snapshot().Role, g.current()), "see kagami status "+vm)
}

func say(emit func(control.Event), step, format string, a ...any) {
	emit(control.Event{Step: step, Message: fmt.Sprintf(format, a...)})
}

// planProtect is step 1. It returns the group's file, not yet on disk.
func (d *Daemon) planProtect(ctx context.Context, req control.ProtectRequest, emit func(control.Event)) (*groupFile, error) {
	say(emit, "check", "looking at VM %s and at site %s", req.VM, req.To)
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
	return f, d.checkThere(ctx, f, emit)
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
		f.Disks = append(f.Disks, diskFile{Slot: uint32(i), ID: epoch.NewUUID(), Name: disk.Target, Size: disk.Size, BlockSize: blockSize,
			Image: d.imageDir(req.VM) + "/" + disk.Target + ".raw", Socket: d.socketPath(req.VM, disk.Target), Kept: disk.Source})
	}
	return f
}

// checkHere looks for what stands in the way at this site.
func (d *Daemon) checkHere(f *groupFile) error {
	if err := d.checkCount(""); err != nil {
		return refused(err.Error(), "end one that is of no more use: kagami unprotect")
	}
	var need int64
	for _, disk := range f.Disks {
		need = addBytes(need, disk.Size)
		if disk.Size <= 0 || disk.Size > maxDiskBytes {
			return refused(fmt.Sprintf("disk %s of %s has %d bytes", disk.Name, f.VM, disk.Size), "leave it out: --disk names the disks to protect")
		}
		if len(disk.Socket) > nbd.MaxSocketPath {
			return refused(fmt.Sprintf("the socket's path %s has %d bytes, %d are possible", disk.Socket, len(disk.Socket), nbd.MaxSocketPath), "choose a shorter run_dir in the config file and restart the daemon")
		}
	}
	if err := unix.Access(d.cfg.RunDir, unix.W_OK|unix.X_OK); err != nil {
		return refused(fmt.Sprintf("the folder of the sockets, %s, cannot be written: %v", d.cfg.RunDir, err), "make it writable for the daemon, or choose another run_dir")
	}
	if err := d.checkRoom(need); err != nil {
		return failure("no-space", fmt.Sprintf("no space for the images of %s: %v", f.VM, err), "make room, or move state_dir to a larger file system")
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
	resp, err := d.askPeer(ctx, f, xml)
	if err != nil {
		return err
	}
	for _, w := range resp.Warnings {
		say(emit, "warning", "site %s: %s", f.Peer, w)
	}
	if len(resp.Problems) > 0 {
		return refused(fmt.Sprintf("site %s could not take %s:%s", f.Peer, f.VM, listed(resp.Problems)),
			fmt.Sprintf("put that right at site %s, then try again; names, networks and files of a VM are mapped under groups: … domain: of its config file, which its daemon reads when it starts", f.Peer))
	}
	return nil
}

// askPeer asks the peer whether it could take a group and run a VM so defined.
func (d *Daemon) askPeer(ctx context.Context, f *groupFile, xml string) (resp wire.CheckResponse, err error) {
	m := f.manifest(d.limits(f.Name).QueueBytes)
	m.Session = max(1, m.Session)
	err = d.callPeer(ctx, f.Peer, wire.MethodCheck, wire.CheckRequest{Manifest: m, XML: xml}, &resp)
	return resp, err
}

// callPeer makes one request, waiting a little for the link.
func (d *Daemon) callPeer(ctx context.Context, site, method string, params, result any) error {
	link := d.links[site]
	if link == nil {
		return notFound(fmt.Sprintf("site %q is not among the peers of the config file", site), "known peers: "+d.peerNames())
	}
	if st := link.Status(); !st.Connected && st.Error != nil {
		if err, lasting := fromLink(site, fmt.Errorf("site %s is not connected: %w", site, st.Error)); lasting {
			return err
		}
	}
	wait, cancel := context.WithTimeoutCause(ctx, d.pause.link, fmt.Errorf("no answer within %v", d.pause.link))
	defer cancel()
	sess, err := link.Session(wait)
	switch {
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		err, _ = fromLink(site, err)
		return err
	}
	if err := sess.Call(ctx, method, params, result); err != nil && ctx.Err() == nil {
		return fromPeer(site, err)
	}
	return context.Cause(ctx)
}

// runProtect is steps 2 to 5, and what undoes them.
func (d *Daemon) runProtect(ctx context.Context, g *group, emit func(control.Event)) error {
	f := g.snapshot()
	say(emit, "prepare", "making %d image(s) in %s", len(f.Disks), d.imageDir(g.name))
	src, err := d.makeSource(g)
	if err != nil {
		return d.takeBack(g, nil, err, emit)
	}
	say(emit, "connect", "waiting for site %s to make its replica", f.Peer)
	if err := d.beginFirstSync(ctx, g, src); err != nil {
		return d.takeBack(g, src, err, emit)
	}
	if err := d.attachDisks(ctx, g, src, emit); err != nil {
		return d.takeBack(g, src, err, emit)
	}
	// The VM runs from the exports: from here on nothing undoes it.
	g.keepOld()
	src.allFilled()
	say(emit, "finish", "waiting for site %s to have everything", f.Peer)
	select {
	case <-src.complete:
		return nil
	case <-src.eng.Done():
		return failure("failed", fmt.Sprintf("%s runs from kagami, but is not protected: the first sync was broken off: %v", g.name, src.eng.Err()),
			"put that right and restart the daemon, which takes up the first sync; or move the disks back: kagami unprotect "+g.name)
	case <-ctx.Done():
		return failure("interrupted", fmt.Sprintf("%s runs from kagami and is not protected yet: site %s does not have everything", g.name, f.Peer), "the first sync goes on by itself; kagami status "+g.name+" shows its end")
	}
}

// beginFirstSync is step 3, once the images are served.
func (d *Daemon) beginFirstSync(ctx context.Context, g *group, src *source) error {
	if err := src.ready(ctx); err != nil {
		return err
	}
	if err := d.checkReach(ctx, g.snapshot()); err != nil {
		return err
	}
	return g.shipDomain(ctx)
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
			why, todo := advice(err, "let QEMU's user pass through the folders of run_dir (chmod o+x)")
			return refused("QEMU could not use its socket: "+why, todo+"; libvirt.socket_group in the config file names the group of sockets")
		}
	}
	return nil
}

// makeSource is step 2: images first, the group file, which makes it real,
// last; then they are served.
func (d *Daemon) makeSource(g *group) (*source, error) {
	f := g.snapshot()
	// State without a group file is debris of a removal that was broken off.
	if err := removeTree(d.fs, g.dir); err != nil { // durable with the group file
		return nil, fmt.Errorf("remove what is left of an earlier group %s: %w", g.name, err)
	}
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
	d.add(g)
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
	return g.shipXML(ctx, xml)
}

// shipXML sends a definition to the peer and, once it has it, keeps it here, so
// that it is known what was shipped. A group that ends keeps nothing: its folder
// goes.
func (g *group) shipXML(ctx context.Context, xml string) error {
	f := g.snapshot()
	if err := g.d.callPeer(ctx, f.Peer, wire.MethodDomain, wire.DomainRequest{Group: f.ID, XML: xml}, nil); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone || g.file.Phase == Ending {
		return nil
	}
	return g.storeDomain(xml)
}

// keepOld locks the files that the VM ran from before, so that nobody starts a
// second VM on them unawares. One that cannot be locked is an alarm.
func (g *group) keepOld() {
	for _, disk := range g.snapshot().Disks {
		if !filepath.IsAbs(disk.Kept) || g.keeps(disk.Kept) {
			continue
		}
		if info, err := os.Stat(disk.Kept); err != nil || !info.Mode().IsRegular() {
			continue
		}
		img, err := images.OpenImage(g.d.fs, disk.Kept, images.Want{})
		if err != nil {
			g.alarm(unlocked(disk.Kept), fmt.Sprintf("the old file %s of disk %s cannot be locked (%v): see to it that no VM is started from it", disk.Kept, disk.Name, err))
			continue
		}
		g.alarm(unlocked(disk.Kept), "")
		g.mu.Lock()
		g.kept = append(g.kept, img)
		g.mu.Unlock()
	}
}

// unlocked is the kind of the alarm about a file that must not be used and
// could not be locked.
func unlocked(file string) string { return "unlocked " + file }

// keepSuperseded locks what a fenced source must not be run from: the VM's old
// files and its images, which another site has taken over.
func (g *group) keepSuperseded() {
	g.keepOld()
	for _, disk := range g.snapshot().Disks {
		img, err := images.OpenImage(g.d.fs, disk.Image, images.Want{})
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			g.alarm(unlocked(disk.Image), fmt.Sprintf("the superseded image %s of disk %s cannot be locked (%v): see to it that nothing uses it", disk.Image, disk.Name, err))
			continue
		}
		g.mu.Lock()
		g.images[disk.Slot] = img
		g.mu.Unlock()
	}
}

func (g *group) keeps(file string) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.ContainsFunc(g.kept, func(img *images.Image) bool { return img.Path() == file })
}
