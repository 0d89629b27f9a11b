package qmp

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"kagami/tests/guest"
)

// The story of one VM on a real libvirt and QEMU. The steps follow one another.
func TestVM(t *testing.T) {
	notShort(t)
	r := newRig(t)
	s := r.serve("a", diskSize)
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
	r.inactiveNetwork()
}

// inactiveNetwork: a network that was never started is told from one that is
// not there, and from an interface of the host.
func (r *rig) inactiveNetwork() {
	r.t.Helper()
	file := filepath.Join(r.dir, "net.xml")
	if err := os.WriteFile(file, []byte("<network><name>prod</name></network>"), 0o600); err != nil {
		r.t.Fatal(err)
	}
	r.virsh("net-define", file)
	defer r.virsh("net-undefine", "prod")
	states, err := r.l.Networks(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	for name, want := range map[string]NetworkState{"prod": NetworkInactive, "nosuch": NetworkMissing, "lo": NetworkReady} {
		if got := states(name); got != want {
			r.t.Errorf("network %s is in state %d, want %d", name, got, want)
		}
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
	r.stoppedServer(s)
	s.start()
}

// stoppedServer: a server stops answering in the middle of the copy, as an
// export does whose queue is full. The copy ends soon because the server drops
// its writes when it is told that the copy is given up.
func (r *rig) stoppedServer(s *server) {
	r.t.Helper()
	s.run(true)
	ctx, cancel := context.WithCancel(r.t.Context())
	defer cancel()
	var began time.Time
	time.AfterFunc(time.Second, func() {
		if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
			r.t.Error(err)
		}
		time.AfterFunc(time.Second, func() {
			began = time.Now()
			cancel()
		})
	})
	a := s.spec()
	a.BeforeCancel = func(error) { s.kill() }
	err := r.l.Attach(ctx, a, nil)
	if !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), "tidying up") {
		r.t.Fatalf("given up: %v", err)
	}
	if took := time.Since(began); took > 20*time.Second {
		r.t.Errorf("the end of the copy took %v", took)
	}
	r.untouched()
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

// mapReplica makes the replica's definition: another name, its files in dir.
func (r *rig) mapReplica(s *server, dir, doc string) (Mapping, string) {
	r.t.Helper()
	networks, err := r.l.Networks(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	exists := func(p string) bool {
		_, err := os.Stat(p)
		return err == nil
	}
	m := Mapping{
		Name: r.vm + "-dr", UUID: "derive", MAC: "derive", Site: "dr", Exists: exists, Network: networks,
		Disks: map[string]DiskMap{"vda": {Socket: s.socket, Export: "g1-vda", ReconnectDelay: delay}},
		Paths: []Rename{{r.dir + "/", r.dir + "/"}, {r.dir + "/" + guest.ConsoleFile, dir + "/" + guest.ConsoleFile}, {r.dir + "/" + guest.AckFile, dir + "/" + guest.AckFile},
			{r.dir + "/" + guest.ControlSock, dir + "/" + guest.ControlSock}},
	}
	replica, problems, err := MapDomain(doc, m)
	if err != nil || len(problems) > 0 {
		r.t.Fatal(problems, err)
	}
	return m, replica
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
	// nbdkit may end with an assertion of its own when a client dies in mid-reply.
	s.kill()
	s.start()
	doc, err := r.l.DomainXML(r.t.Context(), r.vm)
	if err != nil {
		r.t.Fatal(err)
	}
	dir, err := r.lab.GuestDir("dr")
	if err != nil {
		r.t.Fatal(err)
	}
	m, replica := r.mapReplica(s, dir, doc)
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
