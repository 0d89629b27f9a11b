package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"libvirt.org/go/libvirtxml"

	"kagami/qmp"
)

// fakeHost is a libvirt with its VMs. It outlives the daemons of its site.
type fakeHost struct {
	mu       sync.Mutex
	vms      map[string]*fakeVM
	uid, gid int
	noKVM    bool
	networks map[string]qmp.NetworkState // those that are not ready
	// fault is asked at each step of an operation; it may wait, and fail it.
	fault func(ctx context.Context, step string) error
	subs  map[chan qmp.Event]bool
}

func newFakeHost() *fakeHost {
	return &fakeHost{vms: map[string]*fakeVM{}, subs: map[chan qmp.Event]bool{}}
}

// conn is one daemon's connection.
type conn struct {
	h    *fakeHost
	dead atomic.Bool   // the daemon was killed: nothing it still asks happens
	died chan struct{} // closed then
}

func (c *conn) die() {
	c.dead.Store(true)
	close(c.died)
}

func (h *fakeHost) setFault(f func(ctx context.Context, step string) error) {
	h.mu.Lock()
	h.fault = f
	h.mu.Unlock()
}

// at is a step: "attach vda copy", "start vm1", ….
func (c *conn) at(ctx context.Context, format string, a ...any) error {
	c.h.mu.Lock()
	f := c.h.fault
	c.h.mu.Unlock()
	if f != nil {
		if err := f(ctx, fmt.Sprintf(format, a...)); err != nil {
			return err
		}
	}
	if c.dead.Load() {
		return errDead
	}
	return context.Cause(ctx)
}

func (h *fakeHost) vm(name string) *fakeVM {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.vms[name]
}

// send tells every daemon of an event.
func (h *fakeHost) send(ev qmp.Event) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for ch := range h.subs {
		ch <- ev
	}
}

func (c *conn) find(name string) (*fakeVM, error) {
	if c.dead.Load() {
		return nil, errDead
	}
	if vm := c.h.vm(name); vm != nil {
		return vm, nil
	}
	return nil, fmt.Errorf("%w: libvirt knows no VM %q: see virsh list --all", qmp.ErrNoDomain, name)
}

func (c *conn) findDisk(name, target string) (*fakeVM, *fakeDisk, error) {
	vm, err := c.find(name)
	if err != nil {
		return nil, nil, err
	}
	if d := vm.disk(target); d != nil {
		return vm, d, nil
	}
	return nil, nil, fmt.Errorf("%w: %s has no disk %q", qmp.ErrNoDisk, name, target)
}

func (c *conn) Disks(_ context.Context, name string) ([]qmp.Disk, error) {
	vm, err := c.find(name)
	if err != nil {
		return nil, err
	}
	var out []qmp.Disk
	for _, d := range vm.disks {
		def := d.definition()
		def.Running = vm.state().Active()
		out = append(out, def)
	}
	return out, nil
}

func (c *conn) DomainXML(_ context.Context, name string) (string, error) {
	vm, err := c.find(name)
	if err != nil {
		return "", err
	}
	return vm.xml(), nil
}

func (c *conn) State(_ context.Context, name string) (qmp.State, error) {
	vm, err := c.find(name)
	if err != nil {
		return qmp.StateUnknown, err
	}
	return vm.state(), nil
}

// Attach copies in pieces; each is a step at which a test can interfere.
func (c *conn) Attach(ctx context.Context, s qmp.AttachSpec, progress qmp.Progress) error {
	vm, d, err := c.findDisk(s.VM, s.Target)
	switch {
	case err != nil:
		return err
	case !vm.state().Active():
		return fmt.Errorf("%w: %s", qmp.ErrNotRunning, s.VM)
	case d.definition().Size != s.Size:
		return fmt.Errorf("%w: disk %s of %s has %d bytes, the export %d: make the export exactly as large as the disk", qmp.ErrSize, s.Target, s.VM, d.definition().Size, s.Size)
	}
	to, err := openExport(s.Socket, s.Export)
	if err != nil {
		return err
	}
	to.impatient.Store(true)
	err = c.copy(ctx, "attach "+s.Target, d, to, progress)
	if err == nil && s.BeforePivot != nil {
		err = s.BeforePivot(ctx)
	}
	if err == nil {
		err = c.at(ctx, "attach %s pivot", s.Target)
	}
	if err != nil {
		if s.BeforeCancel != nil {
			s.BeforeCancel(err)
		}
		return c.cancelled(d, err)
	}
	to.impatient.Store(false)
	d.pivot(func(def *qmp.Disk) {
		def.Kind, def.Source, def.Socket, def.Export = "network", "nbd "+s.Export, s.Socket, s.Export
	})
	if err := c.at(context.WithoutCancel(ctx), "attach %s moved", s.Target); err != nil {
		return err
	}
	d.setTreated(true)
	return nil
}

// copy is a block job up to the moment when it follows the guest.
func (c *conn) copy(ctx context.Context, op string, d *fakeDisk, to medium, progress qmp.Progress) error {
	d.follow(to)
	const piece = 64 << 10
	size := d.definition().Size
	for off := int64(0); off < size; off += piece {
		if err := c.at(ctx, "%s copy %d", op, off*100/size); err != nil {
			return err
		}
		part := span{off, min(piece, size-off)}
		err := d.piece(ctx, to, part)
		for _, again := range d.takeDirty() {
			err = errors.Join(err, d.piece(ctx, to, again))
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("%w: the copy of disk %s failed, the VM goes on as before: %w", qmp.ErrCopyFailed, d.def.Target, err)
		}
		progress(off+part.n, size, qmp.PhaseCopy)
	}
	return c.at(ctx, "%s ready", op)
}

// jobEnd is how long a cancelled job may take to go away.
const jobEnd = 10 * time.Second

// cancelJob ends a job, which waits for the job's writes; a killed daemon does
// not get to that.
func (c *conn) cancelJob(d *fakeDisk) error {
	if c.dead.Load() {
		return nil
	}
	if !d.landed(jobEnd) {
		return fmt.Errorf("the copy of disk %s does not end", d.definition().Target)
	}
	d.follow(nil)
	return nil
}

// cancelled ends a job after an error.
func (c *conn) cancelled(d *fakeDisk, why error) error {
	if err := c.cancelJob(d); err != nil {
		return fmt.Errorf("%w (and tidying up failed: %w)", why, err)
	}
	return why
}

func (d *fakeDisk) pivot(change func(*qmp.Disk)) {
	d.io.Lock()
	defer d.io.Unlock()
	for _, s := range d.dirty {
		p := make([]byte, s.n)
		_, _ = d.from.ReadAt(p, s.off) // what went wrong shows in the content
		_, _ = d.mirror.WriteAt(p, s.off)
	}
	_ = d.mirror.Flush()
	_ = d.from.Close()
	d.from, d.mirror, d.dirty = d.mirror, nil, nil
	d.mu.Lock()
	defer d.mu.Unlock()
	d.treated, d.def.Job = false, false
	change(&d.def)
}

func (c *conn) Detach(ctx context.Context, s qmp.DetachSpec, progress qmp.Progress) error {
	vm, d, err := c.findDisk(s.VM, s.Target)
	switch {
	case err != nil:
		return err
	case !vm.state().Active():
		return fmt.Errorf("%w: %s", qmp.ErrNotRunning, s.VM)
	case d.definition().Socket != s.Socket:
		return fmt.Errorf("%w: disk %s of %s uses %s", qmp.ErrNotAttached, s.Target, s.VM, d.definition().Source)
	}
	f, err := os.OpenFile(s.File, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	err = f.Truncate(d.definition().Size)
	if err == nil {
		err = c.copy(ctx, "detach "+s.Target, d, fileMedium{f}, progress)
	}
	if err == nil {
		err = c.at(ctx, "detach %s pivot", s.Target)
	}
	if err != nil {
		err = c.cancelled(d, err)
		if !c.dead.Load() {
			err = errors.Join(err, os.Remove(s.File))
		}
		return err
	}
	d.pivot(func(def *qmp.Disk) { def.Kind, def.Source, def.Socket, def.Export = "file", s.File, "", "" })
	return c.at(context.WithoutCancel(ctx), "detach %s moved", s.Target)
}

func (c *conn) CancelCopy(_ context.Context, name, target, socket string) error {
	_, d, err := c.findDisk(name, target)
	if err != nil {
		return err
	}
	d.io.Lock()
	x, ok := d.mirror.(*exportMedium)
	d.io.Unlock()
	if ok && x.socket != socket {
		return fmt.Errorf("%w: not kagami's", qmp.ErrJobRunning)
	}
	return c.cancelJob(d)
}

func (c *conn) Treat(ctx context.Context, name, target, socket, export string, _ time.Duration) error {
	_, d, err := c.findDisk(name, target)
	if err != nil {
		return err
	}
	if def := d.definition(); def.Socket != socket || def.Export != export {
		return fmt.Errorf("%w: disk %s of %s uses %s: attach it first", qmp.ErrNotAttached, target, name, def.Source)
	}
	if err := c.at(ctx, "treat %s", target); err != nil {
		return err
	}
	d.setTreated(true)
	return nil
}

func (c *conn) Define(ctx context.Context, doc string) error {
	var x libvirtxml.Domain
	if err := x.Unmarshal(doc); err != nil {
		return err
	}
	if err := c.at(ctx, "define %s", x.Name); err != nil {
		return err
	}
	vm := &fakeVM{name: x.Name, uuid: x.UUID, st: qmp.StateShutoff, kind: x.Type}
	for _, d := range x.Devices.Disks {
		def := qmp.Disk{Target: d.Target.Dev, Device: "disk"}
		if n := d.Source.Network; n != nil {
			def.Kind, def.Source, def.Socket, def.Export = "network", "nbd "+n.Name, n.Hosts[0].Socket, n.Name
		} else {
			def.Kind, def.Source = "file", d.Source.File.File
		}
		vm.disks = append(vm.disks, &fakeDisk{def: def})
	}
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	if old := c.h.vms[vm.name]; old != nil && old.uuid != vm.uuid {
		return fmt.Errorf("libvirt: domain '%s' already exists with uuid %s", vm.name, old.uuid)
	}
	c.h.vms[vm.name] = vm
	return nil
}

func (c *conn) Start(ctx context.Context, name string, disks ...qmp.Served) error {
	vm, err := c.find(name)
	if err != nil {
		return err
	}
	if vm.state().Active() {
		return errors.New("libvirt: Requested operation is not valid: domain is already running")
	}
	if err := c.at(ctx, "start %s", name); err != nil {
		return err
	}
	if err := vm.start(); err != nil {
		vm.destroy()
		return err
	}
	for _, s := range disks {
		d := vm.disk(s.Target)
		d.io.Lock()
		d.mu.Lock()
		d.def.Size, d.treated = d.from.(*exportMedium).c.Info.Size, true
		d.mu.Unlock()
		d.io.Unlock()
	}
	return c.at(context.WithoutCancel(ctx), "started %s", name)
}

// Shutdown waits for as long as the guest does not hear.
func (c *conn) Shutdown(ctx context.Context, name string) error {
	vm, err := c.find(name)
	if err != nil {
		return err
	}
	if err := c.at(ctx, "shutdown %s", name); err != nil {
		return err
	}
	vm.destroy() // a fake guest has written everything back
	return nil
}

func (c *conn) Resume(context.Context, string) error    { return nil }
func (c *conn) Autostart(context.Context, string) error { return nil }

func (c *conn) QEMUUser(context.Context) (uid, gid int, err error) { return c.h.uid, c.h.gid, nil }

func (c *conn) Networks(context.Context) (func(string) qmp.NetworkState, error) {
	return func(name string) qmp.NetworkState {
		c.h.mu.Lock()
		defer c.h.mu.Unlock()
		if st, ok := c.h.networks[name]; ok {
			return st
		}
		return qmp.NetworkReady
	}, nil
}

func (c *conn) HasKVM(context.Context) (bool, error) {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	return !c.h.noKVM, nil
}

func (c *conn) VMs(context.Context) ([]qmp.VM, error) {
	c.h.mu.Lock()
	defer c.h.mu.Unlock()
	var out []qmp.VM
	for _, vm := range c.h.vms {
		out = append(out, qmp.VM{Name: vm.name, UUID: vm.uuid, State: vm.state()})
	}
	return out, nil
}

func (c *conn) Supervise(ctx context.Context) (<-chan qmp.Event, error) {
	ch := make(chan qmp.Event, 64)
	c.h.mu.Lock()
	c.h.subs[ch] = true
	c.h.mu.Unlock()
	context.AfterFunc(ctx, func() {
		c.h.mu.Lock()
		delete(c.h.subs, ch)
		close(ch)
		c.h.mu.Unlock()
	})
	return ch, nil
}

func (c *conn) Close() error { return nil }
