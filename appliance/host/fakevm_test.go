package host

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"kagami/qmp"
	"kagami/tests/acked/raw"
)

// fakeVM is a VM of fakeHost: a name, a state, disks.
type fakeVM struct {
	name, uuid string
	disks      []*fakeDisk

	mu      sync.Mutex
	st      qmp.State
	kind    string // domain type; "": qemu
	devices string // of its definition, beyond the disks
}

func (vm *fakeVM) state() qmp.State {
	vm.mu.Lock()
	defer vm.mu.Unlock()
	return vm.st
}

func (vm *fakeVM) setState(s qmp.State) {
	vm.mu.Lock()
	vm.st = s
	vm.mu.Unlock()
}

// fakeDisk is a disk with QEMU's behaviour: what the guest writes goes to the
// file or export that it runs from; a copy follows it and holds up nobody.
type fakeDisk struct {
	mu      sync.Mutex // what libvirt tells; never held across I/O
	def     qmp.Disk
	treated bool

	io     sync.Mutex   // requests; taken before mu
	from   medium       // while the VM runs
	mirror medium       // while a copy is under way
	flight atomic.Int32 // writes of the copy
	dirty  []span       // what the guest wrote since the copy had it
}

// span is a part of a disk, bytes.
type span struct{ off, n int64 }

// medium is what a disk runs from.
type medium interface {
	ReadAt(p []byte, off int64) (int, error)
	WriteAt(p []byte, off int64) (int, error)
	Flush() error
	Close() error
}

// fileMedium is a file.
type fileMedium struct{ *os.File }

func (f fileMedium) Flush() error { return f.Sync() }

// exportMedium is an NBD export. As a treated node does, it connects again and
// makes requests again that got no answer; the target of a copy does not.
type exportMedium struct {
	socket, export string
	c              *raw.Client
	impatient      atomic.Bool
}

// reconnectLimit is how long an export may be away in a test.
const reconnectLimit = 30 * time.Second

func openExport(socket, export string) (*exportMedium, error) {
	m := &exportMedium{socket: socket, export: export}
	return m, m.connect()
}

func (m *exportMedium) connect() error {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := raw.Dial(ctx, "unix", m.socket, m.export)
	if err != nil {
		return err
	}
	m.c = c
	return nil
}

func (m *exportMedium) do(request func(*raw.Client) error) error {
	for end := time.Now().Add(reconnectLimit); ; {
		err := errors.New("not connected")
		if m.c != nil {
			if err = request(m.c); err == nil || !errors.Is(err, raw.ErrDisconnected) {
				return err
			}
			m.c.Kill()
			m.c = nil
		}
		if m.impatient.Load() || time.Now().After(end) {
			return fmt.Errorf("the export did not come back: %w", err)
		}
		time.Sleep(20 * time.Millisecond)
		_ = m.connect() // tried again
	}
}

func (m *exportMedium) ReadAt(p []byte, off int64) (int, error) {
	return len(p), m.do(func(c *raw.Client) error { _, err := c.ReadAt(p, off); return err })
}

func (m *exportMedium) WriteAt(p []byte, off int64) (int, error) {
	return len(p), m.do(func(c *raw.Client) error { return c.Write(p, off, false) })
}

func (m *exportMedium) Flush() error { return m.do((*raw.Client).Flush) }

func (m *exportMedium) Close() error {
	if m.c != nil {
		m.c.Kill()
	}
	return nil
}

func (d *fakeDisk) open() (medium, error) {
	if d.def.Socket != "" {
		return openExport(d.def.Socket, d.def.Export)
	}
	f, err := os.OpenFile(d.def.Source, os.O_RDWR, 0)
	return fileMedium{f}, err
}

// definition is the disk as libvirt shows it.
func (d *fakeDisk) definition() qmp.Disk {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.def
}

func (d *fakeDisk) setTreated(v bool) {
	d.mu.Lock()
	d.treated = v
	d.mu.Unlock()
}

func (d *fakeDisk) isTreated() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.treated
}

// follow begins, or with nil ends, a copy.
func (d *fakeDisk) follow(to medium) {
	d.mu.Lock()
	d.def.Job = to != nil
	d.mu.Unlock()
	d.io.Lock()
	defer d.io.Unlock()
	if d.mirror != nil {
		_ = d.mirror.Close()
	}
	d.mirror, d.dirty = to, nil
}

// write is a guest's write, with a flush after it.
func (d *fakeDisk) write(p []byte, off int64) error {
	d.io.Lock()
	defer d.io.Unlock()
	if d.from == nil {
		return errors.New("the VM does not run")
	}
	if _, err := d.from.WriteAt(p, off); err != nil {
		return err
	}
	if d.mirror != nil {
		d.dirty = append(d.dirty, span{off, int64(len(p))})
	}
	return d.from.Flush()
}

// piece copies one part to the mirror; the guest does not wait for it. Whoever
// asked for the copy may give up, the write goes on.
func (d *fakeDisk) piece(ctx context.Context, to medium, s span) error {
	p, err := d.read(s.off, s.n)
	if err != nil {
		return err
	}
	done := make(chan error, 1)
	d.flight.Add(1)
	go func() {
		defer d.flight.Add(-1)
		_, err := to.WriteAt(p, s.off)
		done <- err
	}()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// landed waits until the copy has no write in flight: QEMU ends no job before.
func (d *fakeDisk) landed(limit time.Duration) bool {
	for end := time.Now().Add(limit); d.flight.Load() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			return false
		}
	}
	return true
}

// takeDirty is what the copy lacks.
func (d *fakeDisk) takeDirty() []span {
	d.io.Lock()
	defer d.io.Unlock()
	out := d.dirty
	d.dirty = nil
	return out
}

func (d *fakeDisk) read(off, n int64) ([]byte, error) {
	d.io.Lock()
	defer d.io.Unlock()
	p := make([]byte, n)
	_, err := d.from.ReadAt(p, off)
	return p, err
}

// content is all that the guest would read.
func (d *fakeDisk) content() (all []byte, err error) {
	const piece = 4 << 20
	for size := d.definition().Size; int64(len(all)) < size; {
		p, err := d.read(int64(len(all)), min(piece, size-int64(len(all))))
		if err != nil {
			return nil, err
		}
		all = append(all, p...)
	}
	return all, nil
}

func (vm *fakeVM) disk(target string) *fakeDisk {
	for _, d := range vm.disks {
		if d.def.Target == target {
			return d
		}
	}
	return nil
}

// start opens the disks; the VM reads from each.
func (vm *fakeVM) start() error {
	for _, d := range vm.disks {
		m, err := d.open()
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.def.Target, err)
		}
		d.io.Lock()
		d.from = m
		d.io.Unlock()
		if _, err := d.read(0, 512); err != nil {
			return fmt.Errorf("disk %s: %w", d.def.Target, err)
		}
	}
	vm.setState(qmp.StateRunning)
	return nil
}

// destroy stops the VM hard.
func (vm *fakeVM) destroy() {
	vm.setState(qmp.StateShutoff)
	for _, d := range vm.disks {
		d.io.Lock()
		if d.from != nil {
			_ = d.from.Close()
		}
		d.from = nil
		d.io.Unlock()
		d.setTreated(false)
	}
}

// xml is a definition that MapDomain takes.
func (vm *fakeVM) xml() string {
	vm.mu.Lock()
	kind, devices := cmp.Or(vm.kind, "qemu"), vm.devices
	vm.mu.Unlock()
	var b bytes.Buffer
	fmt.Fprintf(&b, "<domain type='%s'><name>%s</name><uuid>%s</uuid><memory>65536</memory><vcpu>1</vcpu>", kind, vm.name, vm.uuid)
	b.WriteString("<os><type arch='x86_64' machine='pc'>hvm</type><boot dev='hd'/></os><devices>")
	for _, d := range vm.disks {
		def := d.definition()
		if def.Socket != "" {
			fmt.Fprintf(&b, "<disk type='network' device='disk'><driver name='qemu' type='raw'/><source protocol='nbd' name='%s'><host transport='unix' socket='%s'/></source><target dev='%s' bus='virtio'/></disk>",
				def.Export, def.Socket, def.Target)
			continue
		}
		fmt.Fprintf(&b, "<disk type='file' device='disk'><driver name='qemu' type='raw'/><source file='%s'/><target dev='%s' bus='virtio'/></disk>", def.Source, def.Target)
	}
	b.WriteString(devices + "</devices></domain>")
	return b.String()
}
