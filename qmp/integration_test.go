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
	"syscall"
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

// The story of one VM on a real libvirt and QEMU. The steps follow one another.

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

func newRig(t *testing.T) *rig {
	t.Helper()
	needServer(t)
	r := &rig{root: t, t: t, lab: lab.ForTest(t, lab.Options{}), vm: "g1"}
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
	r.connect()
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
			t.Logf("%s:\n%s", f, b[max(0, len(b)-2000):])
		}
	})
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

func TestVM(t *testing.T) {
	if testing.Short() {
		t.Skip("-short: no guests")
	}
	r := newRig(t)
	s := r.serve("a")
	for _, step := range []struct {
		name string
		f    func(*rig, *server)
	}{
		{"boots", stepBoot},
		{"refuses what it must", stepRefusals},
		{"a failed attach leaves nothing", stepFailedAttach},
		{"attaches live", stepAttach},
		{"outlives the server", stepServerDies},
		{"outlives libvirtd", stepLibvirtdDies},
		{"detaches live", stepDetach},
		{"attaches offline", stepOffline},
		{"is treated after virsh start", stepVirshStart},
		{"is healed after an I/O error", stepHeal},
		{"its replica runs", stepReplica},
	} {
		ok := t.Run(step.name, func(t *testing.T) {
			r.t = t
			defer func() { r.t = r.root }()
			step.f(r, s)
		})
		if !ok {
			return
		}
	}
}

func stepBoot(r *rig, _ *server) {
	if err := r.l.Start(r.t.Context(), r.vm); err != nil {
		r.t.Fatal(err)
	}
	r.event(EventStarted)
	r.up()
	// The agent comes up some time after the guest's init.
	err := r.l.Freeze(r.t.Context(), r.vm)
	for end := time.Now().Add(30 * time.Second); err != nil && time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		err = r.l.Freeze(r.t.Context(), r.vm)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.stalls()
	if err := r.l.Thaw(r.t.Context(), r.vm); err != nil {
		r.t.Fatal(err)
	}
	r.progress()
}

func stepRefusals(r *rig, s *server) {
	for want, change := range map[error]func(*AttachSpec){
		ErrNoDomain: func(a *AttachSpec) { a.VM = "nobody" },
		ErrNoDisk:   func(a *AttachSpec) { a.Target = "vdz" },
		ErrSize:     func(a *AttachSpec) { a.Size++ },
	} {
		a := s.spec()
		change(&a)
		if err := r.l.Attach(r.t.Context(), a, nil); !errors.Is(err, want) {
			r.t.Errorf("%v, want %v", err, want)
		}
	}
	if err := r.l.AttachOffline(r.t.Context(), s.spec()); !errors.Is(err, ErrRunning) {
		r.t.Error(err)
	}
	if _, err := r.l.Disks(r.t.Context(), "nobody"); !errors.Is(err, ErrNoDomain) {
		r.t.Error(err)
	}
	ds, err := r.l.Disks(r.t.Context(), r.vm)
	if err != nil || len(ds) != 1 || ds[0].Size != diskSize || ds[0].Source != r.disk || !ds[0].Running {
		r.t.Error(ds, err)
	}
	uid, gid, err := r.l.QEMUUser(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	if err := Reachable(s.socket, uid, gid); err != nil {
		r.t.Error(err)
	}
}

// untouched: the VM uses its file, and QEMU has no node or job of ours.
func (r *rig) untouched() {
	r.t.Helper()
	if l, st := r.source(false), r.source(true); l.Source != r.disk || st.Source != r.disk || l.Job {
		r.t.Fatalf("live %+v, stored %+v", l, st)
	}
	err := r.l.WithMonitor(r.t.Context(), r.vm, func(m *Monitor) error {
		nodes, err := namedNodes(m)
		for _, n := range nodes {
			if n.Driver == "nbd" {
				r.t.Errorf("node %+v is left", n)
			}
		}
		return err
	})
	if err != nil {
		r.t.Fatal(err)
	}
	r.progress()
	r.noErrors()
}

func stepFailedAttach(r *rig, s *server) {
	boom := errors.New("the first sync failed")
	a := s.spec()
	a.BeforePivot = func(context.Context) error { return boom }
	if err := r.l.Attach(r.t.Context(), a, nil); !errors.Is(err, boom) {
		r.t.Fatal(err)
	}
	r.untouched()

	// The server dies in the middle of the copy, and the caller gives up.
	s.kill()
	s.run(true)
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	time.AfterFunc(time.Second, func() {
		s.kill()
		cancel()
	})
	if err := r.l.Attach(ctx, s.spec(), nil); err == nil {
		r.t.Fatal("attached to a server that died")
	} else {
		r.t.Logf("%v", err)
	}
	r.untouched()
	s.start()
}

func stepAttach(r *rig, s *server) {
	var phases []string
	began := time.Now()
	err := r.l.Attach(r.t.Context(), s.spec(), func(_, _ int64, p string) { phases = append(phases, p) })
	if err != nil {
		r.t.Fatal(err)
	}
	r.t.Logf("attached in %v", time.Since(began))
	if want := []string{PhaseCopy, PhasePivot, PhaseTreat}; !slices.Equal(slices.Compact(phases), want) {
		r.t.Errorf("phases %v", phases)
	}
	r.isAttached(s)
	if err := r.l.Attach(r.t.Context(), s.spec(), nil); !errors.Is(err, ErrAlreadyAttached) {
		r.t.Error(err)
	}
	if err := r.l.Treat(r.t.Context(), r.vm, "vda", s.socket, "g1-vda", delay); err != nil {
		r.t.Error(err)
	}
	r.isAttached(s)
}

func (r *rig) isAttached(s *server) {
	r.t.Helper()
	if l, st := r.source(false), r.source(true); l.Socket != s.socket || st.Socket != s.socket {
		r.t.Fatalf("live %+v, stored %+v", l, st)
	}
	if !r.treated(s.socket) {
		r.t.Fatal("not treated")
	}
	r.progress()
	r.noErrors()
}

func stepServerDies(r *rig, s *server) {
	for range 2 {
		s.kill()
		r.stalls()
		s.start()
		r.progress()
		r.noErrors()
	}
}

func stepLibvirtdDies(r *rig, s *server) {
	if err := r.lab.KillLibvirtd(); err != nil {
		r.t.Fatal(err)
	}
	select {
	case <-r.l.Lost():
	case <-time.After(20 * time.Second):
		r.t.Fatal("the loss of libvirtd went unnoticed")
	}
	r.event(EventDisconnected)
	if _, err := r.l.State(r.t.Context(), r.vm); err == nil {
		r.t.Error("a dead libvirtd answered")
	}
	if err := r.l.Close(); err != nil {
		r.t.Error(err)
	}
	if err := r.lab.StartLibvirtd(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	r.connect()
	if err := r.l.Treat(r.t.Context(), r.vm, "vda", s.socket, "g1-vda", delay); err != nil {
		r.t.Fatal(err)
	}
	r.isAttached(s)
}

func stepDetach(r *rig, s *server) {
	file := filepath.Join(r.dir, "back.raw")
	d := DetachSpec{VM: r.vm, Target: "vda", Socket: s.socket, File: file}
	if err := r.l.Detach(r.t.Context(), d, nil); err != nil {
		r.t.Fatal(err)
	}
	l, st := r.source(false), r.source(true)
	if l.Source != file || st.Source != file || st.Cache != "none" || st.Format != "raw" {
		r.t.Fatalf("live %+v, stored %+v", l, st)
	}
	s.kill() // nobody misses it
	r.progress()
	r.noErrors()
	r.disk = file
	r.down()
	s.start()
}

func stepOffline(r *rig, s *server) {
	if err := r.l.Attach(r.t.Context(), s.spec(), nil); !errors.Is(err, ErrNotRunning) {
		r.t.Error(err)
	}
	if out, err := exec.Command("cp", "--sparse=always", r.disk, s.image).CombinedOutput(); err != nil {
		r.t.Fatal(err, string(out))
	}
	if err := r.l.AttachOffline(r.t.Context(), s.spec()); err != nil {
		r.t.Fatal(err)
	}
	if err := r.l.DetachOffline(r.t.Context(), DetachSpec{VM: r.vm, Target: "vda", Socket: s.socket, File: r.disk}); err != nil {
		r.t.Fatal(err)
	}
	if st := r.source(true); st.Source != r.disk {
		r.t.Fatalf("%+v", st)
	}
	if err := r.l.AttachOffline(r.t.Context(), s.spec()); err != nil {
		r.t.Fatal(err)
	}
	if err := r.l.Start(r.t.Context(), r.vm, r.served(s)); err != nil {
		r.t.Fatal(err)
	}
	r.up()
	r.isAttached(s)
	s.kill()
	r.stalls()
	s.start()
	r.progress()
	r.down()
}

func (r *rig) served(s *server) Served {
	return Served{Target: "vda", Socket: s.socket, Export: "g1-vda", ReconnectDelay: delay}
}

func stepVirshStart(r *rig, s *server) {
	r.virsh("start", r.vm)
	if e := r.event(EventStarted); e.VM != r.vm {
		r.t.Fatalf("%+v", e)
	}
	if err := r.l.Treat(r.t.Context(), r.vm, "vda", s.socket, "g1-vda", delay); err != nil {
		r.t.Fatal(err)
	}
	r.up()
	r.isAttached(s)
	s.kill()
	r.stalls()
	s.start()
	r.progress()
	r.down()
}

// stepHeal: the server dies before a plain start was treated.
func stepHeal(r *rig, s *server) {
	r.virsh("start", r.vm)
	r.up()
	s.kill()
	if e := r.event(EventIOError); e.Device != "virtio-disk0" || e.Action != "pause" {
		r.t.Errorf("%+v", e)
	}
	if e := r.event(EventPaused); e.State != StateIOError {
		r.t.Errorf("%+v", e)
	}
	if st, err := r.l.State(r.t.Context(), r.vm); err != nil || st != StateIOError {
		r.t.Fatal(st, err)
	}
	s.start()
	if err := r.l.Treat(r.t.Context(), r.vm, "vda", s.socket, "g1-vda", delay); err != nil {
		r.t.Fatal(err)
	}
	if err := r.l.Resume(r.t.Context(), r.vm); err != nil {
		r.t.Fatal(err)
	}
	r.isAttached(s)
	s.kill()
	r.stalls()
	s.start()
	r.isAttached(s)
	// libvirt's own block jobs still work on it.
	file := filepath.Join(r.dir, "healed.raw")
	if err := r.l.Detach(r.t.Context(), DetachSpec{VM: r.vm, Target: "vda", Socket: s.socket, File: file}, nil); err != nil {
		r.t.Fatal(err)
	}
	r.disk = file
	if err := r.l.Attach(r.t.Context(), s.spec(), nil); err != nil {
		r.t.Fatal(err)
	}
	r.isAttached(s)
}

// stepReplica: the source's QEMU is killed, and a replica of another name runs from its disk.
func stepReplica(r *rig, s *server) {
	pid, err := r.lab.GuestPID(r.vm)
	if err != nil {
		r.t.Fatal(err)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	if e := r.event(EventStopped); e.Reason != "crashed" && e.Reason != "failed" {
		r.t.Errorf("%+v", e)
	}
	doc, err := r.l.DomainXML(r.t.Context(), r.vm)
	if err != nil {
		r.t.Fatal(err)
	}
	dir, err := r.lab.GuestDir("dr")
	if err != nil {
		r.t.Fatal(err)
	}
	has, err := r.l.HasNetwork(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	exists := func(p string) bool {
		_, err := os.Stat(p)
		return err == nil
	}
	m := Mapping{
		Name: r.vm + "-dr", UUID: "derive", MAC: "derive", Site: "dr", Exists: exists, HasNetwork: has,
		Disks: map[string]DiskMap{"vda": {Socket: s.socket, Export: "g1-vda", ReconnectDelay: delay}},
		Paths: []Rename{{r.dir + "/" + guest.ConsoleFile, dir + "/" + guest.ConsoleFile}, {r.dir + "/" + guest.AckFile, dir + "/" + guest.AckFile},
			{r.dir + "/" + guest.ControlSock, dir + "/" + guest.ControlSock}},
	}
	replica, problems, err := MapDomain(doc, m)
	if err != nil || len(problems) > 0 {
		r.t.Fatal(problems, err)
	}
	acked := r.acks()
	if err := r.l.Define(r.t.Context(), replica); err != nil {
		r.t.Fatal(err)
	}
	r.vm, r.dir = m.Name, dir
	if err := r.l.Start(r.t.Context(), r.vm, r.served(s)); err != nil {
		r.t.Fatal(err)
	}
	r.dial()
	r.in("mount /dev/vda /mnt")
	rep, err := r.con.Check(r.t.Context(), "/mnt")
	if err != nil || !rep.OK() {
		r.t.Fatal(rep, err)
	}
	if a, b := acked.Lost(rep); a+b > 0 {
		r.t.Fatalf("%d and %d acknowledged records are lost: %v of %+v", a, b, rep, acked)
	}
	if err := r.l.Destroy(r.t.Context(), r.vm); err != nil {
		r.t.Fatal(err)
	}
	if err := r.l.Undefine(r.t.Context(), r.vm); err != nil {
		r.t.Fatal(err)
	}
	if _, err := r.l.State(r.t.Context(), r.vm); !errors.Is(err, ErrNoDomain) {
		r.t.Fatal(err)
	}
}
