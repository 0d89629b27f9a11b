package qmp

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kagami/tests/guest"
	"kagami/tests/guest/workload"
	"kagami/tests/lab"
)

const (
	diskSize = 64 << 20
	delay    = time.Hour
)

// rig is a libvirt with one guest whose data disk, vda, can be attached.
type rig struct {
	root *testing.T // whose end is the rig's
	t    *testing.T // the step's
	lab  *lab.Lab
	l    *Libvirt
	dir  string
	vm   string
	disk string
	con  *guest.Console

	mu     sync.Mutex
	events []Event
}

// newLab is a rig whose VM is not defined yet.
func newLab(t *testing.T) *rig {
	t.Helper()
	needServer(t)
	r := &rig{root: t, t: t, lab: lab.ForTest(t, lab.Options{}), vm: "g1"}
	var err error
	if r.dir, err = r.lab.GuestDir("vm"); err != nil {
		t.Fatal(err)
	}
	r.connect()
	t.Cleanup(func() {
		if err := r.l.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, f := range []string{filepath.Join(r.dir, guest.ConsoleFile), filepath.Join(r.lab.Dir, "log/qemu/g1.log")} {
			b, _ := os.ReadFile(f) // what there is
			t.Logf("%s:\n%s", f, b[max(0, len(b)-2000):])
		}
	})
	return r
}

// newRig has a VM that runs from memory and has one disk.
func newRig(t *testing.T) *rig {
	t.Helper()
	r := newLab(t)
	kernel, initrd, err := guest.BuildInitrd(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	r.disk = filepath.Join(r.dir, "data.raw")
	if err := guest.BuildExt4(r.disk, diskSize); err != nil {
		t.Fatal(err)
	}
	g := guest.Domain{Name: r.vm, UUID: "6b1d2c9e-0000-4000-8000-000000000001", Dir: r.dir, Kernel: kernel, Initrd: initrd,
		Disks: []string{guest.FileDisk(r.disk, "vda")}}
	if err := r.l.Define(t.Context(), g.XML()); err != nil {
		t.Fatal(err)
	}
	return r
}

func (r *rig) connect() {
	r.t.Helper()
	var err error
	if r.l, err = Connect(r.t.Context(), r.lab.URI); err != nil {
		r.t.Fatal(err)
	}
	events, err := r.l.Supervise(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	go func() {
		for e := range events {
			r.mu.Lock()
			r.events = append(r.events, e)
			r.mu.Unlock()
		}
	}()
}

// event waits for one of a kind and forgets what came before it.
func (r *rig) event(kind EventKind) Event {
	r.t.Helper()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		r.mu.Lock()
		i := slices.IndexFunc(r.events, func(e Event) bool { return e.Kind == kind })
		var e Event
		if i >= 0 {
			e, r.events = r.events[i], r.events[i+1:]
		}
		r.mu.Unlock()
		if i >= 0 {
			return e
		}
		if time.Now().After(end) {
			r.t.Fatalf("no event %v; there are %+v", kind, r.events)
		}
	}
}

// notShort skips what needs libvirt under -short, which is not for CI.
func notShort(t *testing.T) {
	t.Helper()
	if testing.Short() && os.Getenv("CI") == "true" {
		t.Fatal("-short leaves out what needs libvirt")
	} else if testing.Short() {
		t.Skip("-short: nothing that needs libvirt")
	}
}

func needServer(t *testing.T) {
	t.Helper()
	if _, err := exec.LookPath("nbdkit"); err == nil {
		return
	} else if os.Getenv("CI") == "true" {
		t.Fatal(err)
	} else {
		t.Skip(err)
	}
}

// server is an NBD server that can be killed.
type server struct {
	r      *rig
	image  string
	socket string
	size   int64
	cmd    *exec.Cmd
}

func (r *rig) serve(name string, size int64) *server {
	r.t.Helper()
	s := &server{r: r, image: filepath.Join(r.dir, name+".img"), socket: filepath.Join(r.dir, name+".sock"), size: size}
	f, err := os.Create(s.image)
	if err == nil {
		err = errors.Join(f.Truncate(size), f.Close())
	}
	if err != nil {
		r.t.Fatal(err)
	}
	s.start()
	r.root.Cleanup(s.kill)
	return s
}

func (s *server) start() {
	s.r.t.Helper()
	s.run(false)
}

// run begins to serve; when it is slow each write takes 3 seconds.
func (s *server) run(slow bool) {
	s.r.t.Helper()
	if err := os.Remove(s.socket); err != nil && !os.IsNotExist(err) {
		s.r.t.Fatal(err)
	}
	// Made under another name, so that nobody connects before QEMU's user may.
	tmp := s.socket + ".new"
	args := []string{"-f", "-U", tmp, "file", s.image}
	if slow {
		args = []string{"-f", "-U", tmp, "--filter=delay", "file", s.image, "delay-write=3", "delay-zero=3"}
	}
	s.cmd = exec.Command("nbdkit", args...)
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		s.r.t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", tmp); err == nil {
			_, err = io.ReadFull(c, make([]byte, 18)) // its greeting, so that it does not complain
			if err = errors.Join(err, c.Close()); err != nil {
				s.r.t.Fatal(err)
			}
			break
		} else if time.Now().After(end) {
			s.r.t.Fatal(err)
		}
	}
	if err := errors.Join(s.r.lab.AllowQEMU(tmp), os.Rename(tmp, s.socket)); err != nil {
		s.r.t.Fatal(err)
	}
}

func (s *server) kill() {
	_ = s.cmd.Process.Kill() // it may have been killed already
	_ = s.cmd.Wait()
}

func (s *server) spec() AttachSpec {
	return AttachSpec{VM: s.r.vm, Target: "vda", Socket: s.socket, Export: "g1-vda", Size: s.size, ReconnectDelay: delay}
}

func (r *rig) dial() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	var err error
	if r.con, err = guest.Dial(ctx, filepath.Join(r.dir, guest.ControlSock)); err != nil {
		r.t.Fatal(err)
	}
	r.root.Cleanup(r.con.Close)
}

func (r *rig) in(format string, a ...any) string {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 30*time.Second)
	defer cancel()
	out, err := r.con.Run(ctx, format, a...)
	if err != nil {
		r.t.Fatal(err)
	}
	return out
}

func (r *rig) acks() workload.Acks {
	r.t.Helper()
	a, err := workload.ReadAcksFile(filepath.Join(r.dir, guest.AckFile))
	if err != nil {
		r.t.Fatal(err)
	}
	return a
}

// progress waits until the guest has written more.
func (r *rig) progress() {
	r.t.Helper()
	was := r.acks()
	for end := time.Now().Add(30 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		if a := r.acks(); a.Append > was.Append+5 && a.Blocks > was.Blocks+5 {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("the guest does not write any more: %+v", r.acks())
		}
	}
}

// noErrors: neither the writer nor the guest's kernel saw an I/O error.
func (r *rig) noErrors() {
	r.t.Helper()
	if a := r.acks(); len(a.Errors) > 0 {
		r.t.Fatalf("the guest's writer saw %v", a.Errors)
	}
	b, err := os.ReadFile(filepath.Join(r.dir, guest.ConsoleFile))
	if err != nil {
		r.t.Fatal(err)
	}
	if s := strings.ToLower(string(b)); strings.Contains(s, "i/o error") || strings.Contains(s, "ext4-fs error") {
		r.t.Fatalf("the guest's kernel saw an I/O error:\n%s", b)
	}
}

func (r *rig) source(inactive bool) Disk {
	r.t.Helper()
	var ds []Disk
	err := r.l.on(r.t.Context(), r.vm, "", func(w *worker) error {
		doc, err := w.d.xml(inactive)
		if err == nil {
			ds, err = parseDisks(doc)
		}
		return err
	})
	if err != nil || len(ds) != 1 {
		r.t.Fatalf("disks %v, %v", ds, err)
	}
	return ds[0]
}

func (r *rig) treated(socket string) bool {
	r.t.Helper()
	var nodes map[string]node
	err := r.l.WithMonitor(r.t.Context(), r.vm, func(m *Monitor) (err error) {
		nodes, err = namedNodes(m)
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	found := false
	for _, n := range nodes {
		if strings.HasPrefix(n.Name, "kagami-") {
			r.t.Fatalf("a temporary node is left: %+v", n)
		}
		found = found || n.Driver == "nbd" && nodeSocket(n.File) == treatedPath(socket)
	}
	return found
}

// stalls makes sure that the guest's writer stands still.
func (r *rig) stalls() {
	r.t.Helper()
	var a workload.Acks
	for end := time.Now().Add(20 * time.Second); ; {
		a = r.acks()
		time.Sleep(1500 * time.Millisecond)
		if b := r.acks(); a.Append == b.Append && a.Blocks == b.Blocks {
			return
		}
		if time.Now().After(end) {
			r.t.Fatal("the guest writes on though its server is gone")
		}
	}
}

// up connects to the booted guest and starts its writer.
func (r *rig) up() {
	r.t.Helper()
	r.dial()
	r.in("mount /dev/vda /mnt")
	r.in("writer start /mnt slots=64")
	r.progress()
}

// down checks the guest's files and shuts it down.
func (r *rig) down() {
	r.t.Helper()
	r.in("writer stop")
	rep, err := r.con.Check(r.t.Context(), "/mnt")
	if err != nil || !rep.OK() {
		r.t.Fatal(rep, err)
	}
	if a, b := r.acks().Lost(rep); a+b > 0 {
		r.t.Fatalf("%d and %d acknowledged records are lost: %v", a, b, rep)
	}
	r.in("stop")
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		st, err := r.l.State(r.t.Context(), r.vm)
		if err != nil {
			r.t.Fatal(err)
		}
		if st == StateShutoff {
			return
		}
		if time.Now().After(end) {
			r.t.Fatalf("the guest does not stop: %v", st)
		}
	}
}

func (r *rig) virsh(args ...string) {
	r.t.Helper()
	if out, err := exec.Command("virsh", append([]string{"-q", "-c", r.lab.URI}, args...)...).CombinedOutput(); err != nil {
		r.t.Fatalf("virsh %v: %v: %s", args, err, out)
	}
}
