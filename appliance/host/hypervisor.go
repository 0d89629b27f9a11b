package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"kagami/appliance/config"
	"kagami/qmp"
	"kagami/replica/wire"
)

// Hypervisor is what the daemon needs of libvirt; qmp.Libvirt implements it.
type Hypervisor interface {
	Disks(ctx context.Context, vm string) ([]qmp.Disk, error)
	DomainXML(ctx context.Context, vm string) (string, error)
	State(ctx context.Context, vm string) (qmp.State, error)
	Attach(ctx context.Context, s qmp.AttachSpec, progress qmp.Progress) error
	Detach(ctx context.Context, s qmp.DetachSpec, progress qmp.Progress) error
	CancelCopy(ctx context.Context, vm, target, socket string) error
	Treat(ctx context.Context, vm, target, socket, export string, delay time.Duration) error
	Define(ctx context.Context, xml string) error
	Start(ctx context.Context, vm string, disks ...qmp.Served) error
	Resume(ctx context.Context, vm string) error
	Shutdown(ctx context.Context, vm string) error
	Autostart(ctx context.Context, vm string) error
	QEMUUser(ctx context.Context) (uid, gid int, err error)
	Networks(ctx context.Context) (func(name string) qmp.NetworkState, error)
	HasKVM(ctx context.Context) (bool, error)
	VMs(ctx context.Context) ([]qmp.VM, error)
	Supervise(ctx context.Context) (<-chan qmp.Event, error)
	Close() error
}

// virt is the present connection to libvirt, or the error that says why
// there is none.
func (d *Daemon) virt() (Hypervisor, error) {
	if d.dial == nil {
		return nil, refused("libvirt is not enabled at site "+d.cfg.Site, "set libvirt.enabled in the config file and restart the daemon")
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.hv == nil {
		return nil, failure("libvirt", fmt.Sprintf("libvirt is not reachable: %v", d.hvErr), "see to it that libvirtd runs (systemctl status libvirtd); the daemon connects by itself")
	}
	return d.hv, nil
}

// setVirt changes the connection and returns the one before.
func (d *Daemon) setVirt(hv Hypervisor, err error) Hypervisor {
	d.mu.Lock()
	defer d.mu.Unlock()
	old := d.hv
	d.hv, d.hvErr = hv, err
	return old
}

func dialLibvirt(ctx context.Context, uri string) (Hypervisor, error) {
	l, err := qmp.Connect(ctx, uri)
	if err != nil {
		return nil, err
	}
	return l, nil
}

// connectHypervisor makes the connection to libvirt anew. Without libvirt the
// daemon runs all the same: exports, replicas and --no-start failovers need none.
func (d *Daemon) connectHypervisor(ctx context.Context) {
	if d.dial == nil {
		return
	}
	hv, err := d.dial(ctx)
	d.mu.Lock()
	known := d.hvErr
	d.mu.Unlock()
	switch { // it is tried again and again; only what is new is said
	case err != nil && (known == nil || known.Error() != err.Error()):
		d.log.Warn("connect to libvirt", "error", err)
	case err == nil && known != nil:
		d.log.Info("libvirt is reachable again")
	}
	if old := d.setVirt(hv, err); old != nil {
		if err := old.Close(); err != nil {
			d.log.Warn("close lost connection to libvirt", "error", err)
		}
	}
}

func (d *Daemon) closeHypervisor() {
	if hv := d.setVirt(nil, errors.New("the daemon is stopping")); hv != nil {
		if err := hv.Close(); err != nil {
			d.log.Warn("close libvirt", "error", err)
		}
	}
}

// watchHypervisor treats the disks of protected VMs that somebody else
// started, resumes VMs that paused on an I/O error of a disk served here, and
// connects again when libvirt was restarted.
func (d *Daemon) watchHypervisor(ctx context.Context) {
	if d.dial == nil {
		return
	}
	d.wg.Go(func() {
		for {
			if hv, err := d.virt(); err == nil {
				err = d.superviseVMs(ctx, hv)
				if ctx.Err() == nil {
					d.log.Warn("libvirt", "error", err)
				}
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(d.pause.libvirt):
			}
			d.connectHypervisor(ctx)
		}
	})
}

// superviseVMs looks at every VM once, since events may have been missed, and
// then at each event until the stream of events ends.
func (d *Daemon) superviseVMs(ctx context.Context, hv Hypervisor) error {
	events, err := hv.Supervise(ctx)
	if err != nil {
		return err
	}
	for _, g := range d.snapshot() {
		d.settle(g)
		d.tendVM(ctx, g)
		if g.current() == Streaming { // else at its attach
			g.reshipDomain()
		}
	}
	again := time.NewTicker(d.pause.tend)
	defer again.Stop()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-again.C:
			for _, g := range d.snapshot() {
				if g.untended() {
					d.tendVM(ctx, g)
				}
				d.reshipChanged(ctx, hv, g)
			}
		case ev, ok := <-events:
			if !ok {
				return errors.New("the connection to libvirt was lost")
			}
			d.onEvent(ctx, ev)
		}
	}
}

func (d *Daemon) onEvent(ctx context.Context, ev qmp.Event) {
	for _, g := range d.snapshot() {
		if ev.Kind == qmp.EventLost {
			d.tendVM(ctx, g)
			g.reshipDomain()
		} else if g.domainName() == ev.VM {
			g.note(eventText(ev))
			d.tendVM(ctx, g)
			if ev.Kind == qmp.EventDefined {
				g.reshipDomain()
			}
		}
	}
}

// eventText puts an event of libvirt into words.
func eventText(ev qmp.Event) string {
	what := ev.Kind.String()
	if ev.Kind == qmp.EventDefined && ev.Reason == "updated" {
		what = "definition changed"
	} else if ev.Reason != "" && ev.Reason != what && ev.Kind != qmp.EventDefined {
		what += " (" + ev.Reason + ")"
	}
	return fmt.Sprintf("VM %s: %s", ev.VM, what)
}

// settle ends a protect that was broken off, now that libvirt answers.
func (d *Daemon) settle(g *group) {
	g.mu.Lock()
	open := g.file.Phase == Protecting && g.src == nil && g.state != Failed
	g.mu.Unlock()
	if !open {
		return
	}
	if err := g.settleProtect(); err != nil {
		g.fail(err)
	}
}

// domainName is the VM's name at this site.
func (g *group) domainName() string {
	f := g.snapshot()
	if f.Role != RoleReplica && f.Failover != nil && f.Failover.Domain != "" {
		return f.Failover.Domain
	}
	return f.VM
}

// tendPatience bounds how long one VM may hold up the others.
const tendPatience = 30 * time.Second

// tendVM brings a VM that runs from this site's exports into order.
func (d *Daemon) tendVM(ctx context.Context, g *group) {
	f := g.snapshot()
	if f.VM == "" || f.Role == RoleReplica || f.Fenced != "" || g.isMoving(f.Phase) {
		return
	}
	hv, err := d.virt()
	if err != nil {
		return // looked at again when libvirt is back
	}
	ctx, cancel := context.WithTimeout(ctx, tendPatience)
	defer cancel()
	vm := g.domainName()
	st, err := hv.State(ctx, vm)
	if err != nil || !st.Active() {
		return // gone or not running: nothing to tend
	}
	for _, df := range f.Disks {
		err := hv.Treat(ctx, vm, df.Name, df.Socket, df.Name, d.limits(g.name).ReconnectDelay)
		if err != nil && !(f.Phase == Unprotecting && errors.Is(err, qmp.ErrNotAttached)) {
			g.alarm(untreated(df.Name), fmt.Sprintf("disk %s of VM %s: %v", df.Name, vm, err))
			continue
		}
		g.alarm(untreated(df.Name), "")
	}
	if st == qmp.StateIOError && g.current() != Failed && g.claimResume() {
		d.wg.Go(func() { d.resumeVM(d.ctx, g, vm) })
	}
}

// isMoving reports whether disks of the group move between files and exports
// just now, or a failover is under way: whoever does that treats them.
func (g *group) isMoving(p Phase) bool {
	switch p {
	case "":
		return false
	case Protecting, Unprotecting:
		return g.op.held.Load()
	}
	return true
}

// untended reports that a disk could not be treated.
func (g *group) untended() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return slices.ContainsFunc(g.file.Disks, func(df diskFile) bool { return g.alarms[untreated(df.Name)] != "" })
}

// claimResume lets one goroutine at a time resume a group's VM.
func (g *group) claimResume() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.resuming {
		return false
	}
	g.resuming = true
	return true
}

// resumeVM lets a VM that paused on an I/O error make its requests again.
func (d *Daemon) resumeVM(ctx context.Context, g *group, vm string) {
	defer func() {
		g.mu.Lock()
		g.resuming = false
		g.mu.Unlock()
	}()
	select {
	case <-ctx.Done():
		return
	case <-time.After(d.pause.resume):
	}
	hv, err := d.virt()
	if err == nil {
		err = hv.Resume(ctx, vm)
	}
	if err != nil {
		g.note(fmt.Sprintf("VM %s paused on an I/O error and could not be resumed: %v", vm, err))
		return
	}
	g.note(fmt.Sprintf("VM %s had paused on an I/O error and was resumed", vm))
}

// mapping is how a VM's definition is changed for this site.
func (d *Daemon) mapping(ctx context.Context, group string, disks []diskFile) (qmp.Mapping, error) {
	hv, err := d.virt()
	if err != nil {
		return qmp.Mapping{}, err
	}
	networks, err := hv.Networks(ctx)
	if err != nil {
		return qmp.Mapping{}, fromHypervisor(err)
	}
	kind, err := domainType(ctx, hv, d.cfg.Libvirt.Emulation)
	if err != nil {
		return qmp.Mapping{}, err
	}
	m := qmp.Mapping{Site: d.cfg.Site, Type: kind, Disks: map[string]qmp.DiskMap{}, Exists: fileExists, Network: networks,
		Closed: []string{d.cfg.StateDir, d.cfg.RunDir}}
	if c := d.groupConfig(group); c != nil && c.Domain != nil {
		mapDomainConfig(&m, c.Domain)
	}
	for _, df := range disks {
		m.Disks[df.Name] = qmp.DiskMap{Socket: df.Socket, Export: df.Name, ReconnectDelay: d.limits(group).ReconnectDelay}
	}
	return m, nil
}

func mapDomainConfig(m *qmp.Mapping, dom *config.Domain) {
	m.Name, m.UUID, m.MAC = dom.Name, dom.UUID, dom.MAC
	m.Networks, m.Paths = mapOf(dom.Networks), mapOf(dom.Paths)
	m.Kernel, m.Initrd, m.Cmdline, m.QEMUArguments = dom.Kernel, dom.Initrd, dom.Cmdline, dom.QEMUArguments
	for _, x := range dom.Disks {
		m.Disks[x.Target] = qmp.DiskMap{File: x.File, Format: x.Format, Drop: x.Drop}
	}
	if dom.Type != "" {
		m.Type = dom.Type
	}
}

func fileExists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// served describes a disk's export to package qmp.
func (d *Daemon) served(group string, df diskFile) qmp.Served {
	return qmp.Served{Target: df.Name, Socket: df.Socket, Export: df.Name, ReconnectDelay: d.limits(group).ReconnectDelay}
}

// domainType is what replicas run as; "" is what they ran as at the source.
// With auto, one that ran under KVM is emulated where libvirt offers none.
func domainType(ctx context.Context, hv Hypervisor, emulation string) (string, error) {
	if emulation != "auto" {
		return emulation, nil
	}
	kvm, err := hv.HasKVM(ctx)
	if err != nil || kvm {
		return "", fromHypervisor(err)
	}
	return "qemu", nil
}

func mapOf(in []config.Map) []qmp.Rename {
	out := make([]qmp.Rename, 0, len(in))
	for _, m := range in {
		out = append(out, qmp.Rename{From: m.From, To: m.To})
	}
	return out
}

// checkDomain tells what would keep a VM with this definition from running here.
func (d *Daemon) checkDomain(ctx context.Context, group, xml string, disks []wire.Disk) (problems, warnings []string) {
	if d.dial == nil {
		return nil, []string{"libvirt is not enabled there: the VM will have to be started by hand"}
	}
	var files []diskFile
	for _, w := range disks {
		files = append(files, diskFile{Slot: w.Slot, Name: w.Name, Socket: d.socketPath(group, w.Name)})
	}
	m, err := d.mapping(ctx, group, files)
	if err != nil {
		return []string{err.Error()}, nil
	}
	out, found, err := qmp.MapDomain(xml, m)
	if err != nil {
		return []string{err.Error()}, nil
	}
	for _, p := range found {
		if p.Fatal {
			problems = append(problems, p.String())
		} else {
			warnings = append(warnings, p.String())
		}
	}
	taken, defined, err := d.isTakenHere(ctx, out, files)
	switch {
	case err != nil:
		problems = append(problems, text(err))
	case taken != "":
		problems = append(problems, taken)
	case defined != "":
		warnings = append(warnings, defined)
	}
	return problems, warnings
}

// isTakenHere tells whether a replica of this definition could be defined and
// started: taken says which VM is in the way, defined that a definition will be
// replaced. A VM that runs from the replica's own exports is the replica.
func (d *Daemon) isTakenHere(ctx context.Context, xml string, disks []diskFile) (taken, defined string, err error) {
	name, uuid, err := qmp.Identity(xml)
	if err != nil {
		return "", "", err
	}
	hv, err := d.virt()
	if err != nil {
		return "", "", err
	}
	vms, err := hv.VMs(ctx)
	if err != nil {
		return "", "", fromHypervisor(err)
	}
	for _, vm := range vms {
		sameUUID := strings.EqualFold(vm.UUID, uuid)
		switch {
		case vm.Name != name && !sameUUID:
			continue
		case vm.Name != name:
			return fmt.Sprintf("VM %s has the UUID %s of %s already: map another one (groups: … domain: uuid: derive)", vm.Name, uuid, name), "", nil
		case !sameUUID:
			return fmt.Sprintf("there is another VM named %s already: map another name (groups: … domain: name:), or rename that VM", name), "", nil
		case !vm.State.Active():
			return "", fmt.Sprintf("a VM named %s with the same UUID is defined already: a failover replaces its definition", name), nil
		}
		ours, err := runsFrom(ctx, hv, name, disks)
		if err != nil || ours {
			return "", "", err
		}
		return fmt.Sprintf("a VM named %s runs already, and not from the replica's disks: stop it, or map another name and UUID (groups: … domain:)", name), "", nil
	}
	return "", "", nil
}

// runsFrom tells whether a VM has all of the disks from this site's exports.
func runsFrom(ctx context.Context, hv Hypervisor, vm string, disks []diskFile) (bool, error) {
	has, err := hv.Disks(ctx, vm)
	if err != nil {
		return false, fromHypervisor(err)
	}
	for _, df := range disks {
		if !slices.ContainsFunc(has, func(q qmp.Disk) bool { return q.Target == df.Name && q.Socket == df.Socket }) {
			return false, nil
		}
	}
	return true, nil
}
