package qmp

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
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
	t    *testing.T
	lab  *lab.Lab
	l    *Libvirt
	dir  string
	vm   string
	disk string
	con  *guest.Console
}

func newRig(t *testing.T) *rig {
	t.Helper()
	needServer(t)
	r := &rig{t: t, lab: lab.ForTest(t, lab.Options{}), vm: "g1"}
	var err error
	if r.dir, err = r.lab.GuestDir("vm"); err != nil {
		t.Fatal(err)
	}
	kernel, initrd, err := guest.BuildInitrd(r.dir)
	if err != nil {
		t.Fatal(err)
	}
	r.disk = filepath.Join(r.dir, "data.raw")
	if err := guest.BuildExt4(r.disk, diskSize); err != nil {
		t.Fatal(err)
	}
	if r.l, err = Connect(t.Context(), r.lab.URI); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.l.Close(); err != nil {
			t.Error(err)
		}
	})
	g := guest.Domain{Name: r.vm, UUID: "6b1d2c9e-0000-4000-8000-000000000001", Dir: r.dir, Kernel: kernel, Initrd: initrd,
		Disks: []string{guest.FileDisk(r.disk, "vda")}}
	if err := r.l.Define(t.Context(), g.XML()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if !t.Failed() {
			return
		}
		for _, f := range []string{filepath.Join(r.dir, guest.ConsoleFile), filepath.Join(r.lab.Dir, "log/qemu/g1.log")} {
			b, _ := os.ReadFile(f) // what there is
			t.Logf("%s:\n%s", f, b)
		}
	})
	return r
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
	cmd    *exec.Cmd
}

func (r *rig) serve(name string) *server {
	r.t.Helper()
	s := &server{r: r, image: filepath.Join(r.dir, name+".img"), socket: filepath.Join(r.dir, name+".sock")}
	f, err := os.Create(s.image)
	if err == nil {
		err = errors.Join(f.Truncate(diskSize), f.Close())
	}
	if err != nil {
		r.t.Fatal(err)
	}
	s.start()
	r.t.Cleanup(s.kill)
	return s
}

func (s *server) start(args ...string) {
	s.r.t.Helper()
	if err := os.Remove(s.socket); err != nil && !os.IsNotExist(err) {
		s.r.t.Fatal(err)
	}
	// Made under another name, so that nobody connects before QEMU's user may.
	tmp := s.socket + ".new"
	args = append([]string{"-f", "-U", tmp}, args...)
	s.cmd = exec.Command("nbdkit", append(args, "file", s.image)...)
	s.cmd.Stderr = os.Stderr
	if err := s.cmd.Start(); err != nil {
		s.r.t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if c, err := net.Dial("unix", tmp); err == nil {
			c.Close()
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
	return AttachSpec{VM: s.r.vm, Target: "vda", Socket: s.socket, Export: "g1-vda", Size: diskSize, ReconnectDelay: delay}
}

func (r *rig) dial() {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	var err error
	if r.con, err = guest.Dial(ctx, filepath.Join(r.dir, guest.ControlSock)); err != nil {
		r.t.Fatal(err)
	}
	r.t.Cleanup(r.con.Close)
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
	err := r.l.on(r.t.Context(), r.vm, false, func(w *worker) error {
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

func TestVM(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: no guests")
	}
	r := newRig(t)
	ctx := t.Context()
	if err := r.l.Start(ctx, r.vm); err != nil {
		t.Fatal(err)
	}
	r.dial()
	r.in("mount /dev/vda /mnt")
	r.in("writer start /mnt slots=64")
	r.progress()
	s := r.serve("a")
	began := time.Now()
	if err := r.l.Attach(ctx, s.spec(), func(d, n int64, p string) { t.Logf("%v %s %d/%d", time.Since(began), p, d, n) }); err != nil {
		t.Fatal(err)
	}
	t.Logf("attached in %v", time.Since(began))
	fmt.Println(r.l.DomainXML(ctx, r.vm))
	r.progress()
	if !r.treated(s.socket) { t.Fatal("not treated") }
	s.kill()
	time.Sleep(2*time.Second)
	a := r.acks()
	time.Sleep(2*time.Second)
	if b := r.acks(); b.Append != a.Append { t.Fatal("no stall") }
	s.start()
	r.progress()
	r.noErrors()
	ev, err := r.l.Supervise(ctx)
	if err != nil { t.Fatal(err) }
	go func() { for e := range ev { fmt.Printf("%+v\n", e) } }()
	r.in("stop")
	time.Sleep(2*time.Second)
	out, err := exec.Command("virsh", "-c", r.lab.URI, "start", "g1").CombinedOutput()
	t.Logf("%s %v", out, err)
	r.dial()
	r.in("mount /dev/vda /mnt")
	r.in("writer start /mnt slots=64")
	r.progress()
	s.kill()
	time.Sleep(2*time.Second)
	fmt.Println(r.l.State(ctx, "g1"))
	s.start()
	fmt.Println("treat", r.l.Treat(ctx, "g1", "vda", s.socket, "g1-vda", delay))
	fmt.Println("resume", r.l.Resume(ctx, "g1"))
	time.Sleep(2*time.Second)
	fmt.Println(r.l.State(ctx, "g1"))
	r.progress()
}
