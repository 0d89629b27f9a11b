package host

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"maps"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/appliance/pki"
	"kagami/ext4j"
	"kagami/qmp"
)

// pair is two sites in one process: two daemons over loopback TCP, each with
// its own folders, certificate and libvirt (a fake one).
type pair struct {
	t        *testing.T
	dir      string
	main, dr *site
}

// site is one of them. Its daemon can be started and stopped many times.
type site struct {
	t          *testing.T
	name, dir  string
	runDir     string // within dir
	address    string
	extra      string                      // of its config file
	backlog    string                      // limits.backlog_bytes; "": 64MiB
	rate       string                      // limits.resync_rate; "": 0
	fail       func(op, path string) error // see mortalFS, from the start of each life on
	file       string                      // in its place
	boot       string                      // "": the machine's own
	host       *fakeHost
	log        *logBuffer
	control    *control.Client
	d          *Daemon
	fs         *mortalFS
	conn       *conn
	cancel     context.CancelFunc
	done       chan error
	libvirtOff bool
	emulation  string // libvirt.emulation; "": qemu
	mu         sync.Mutex
	dialErr    error         // what connecting to libvirt ends with
	dialled    chan struct{} // told of attempts that failed
}

// testLimits make daemons that do everything soon.
const testLimits = `limits:
  queue_bytes: 1MiB
  inflight_bytes: 1MiB
  spool_bytes: 32MiB
  segment_bytes: 1MiB
  active_log_bytes: 16MiB
  epoch_bytes: 256KiB
  apply_bytes: 1MiB
  epoch_age: 50ms
  apply_age: %s
  heartbeat: 100ms
  link_timeout: 2s
  reconnect_delay: 30s
`

// newPair makes the sites; mayTouch are the groups that the certificate of
// main allows.
func newPair(t *testing.T, mayTouch ...string) *pair {
	t.Helper()
	if len(mayTouch) == 0 {
		mayTouch = []string{pki.AllGroups}
	}
	dir, err := os.MkdirTemp("", "kg-") // short: paths of sockets end at 107 bytes
	must(t, err)
	must(t, os.Chmod(dir, 0o755))
	p := &pair{t: t, dir: dir}
	p.main, p.dr = newSite(t, dir, "main"), newSite(t, dir, "dr")
	t.Cleanup(func() {
		p.main.stopIfUp()
		p.dr.stopIfUp()
		if t.Failed() {
			t.Logf("--- main:\n%s\n--- dr:\n%s", p.main.log, p.dr.log)
		}
		must(t, os.RemoveAll(dir))
	})
	must(t, pki.Init(p.dr.path("pki"), "dr", pki.Options{}))
	must(t, pki.Issue(p.dr.path("pki"), "main", mayTouch, p.main.path("pki"), pki.Options{}))
	return p
}

// usedPorts are those that sites of this process have, listened on or not.
var usedPorts sync.Map

// freeAddress picks a port for a site that is up and down in turn: below those that
// the kernel gives to outgoing connections, and no other site's.
func freeAddress(t *testing.T) string {
	t.Helper()
	for range 1000 {
		port := 10000 + rand.IntN(22000)
		if _, used := usedPorts.LoadOrStore(port, true); used {
			continue
		}
		address := fmt.Sprintf("127.0.0.1:%d", port)
		if l, err := net.Listen("tcp", address); err == nil {
			must(t, l.Close())
			return address
		}
	}
	t.Fatal("no free port")
	return ""
}

func newSite(t *testing.T, dir, name string) *site {
	s := &site{t: t, name: name, dir: filepath.Join(dir, name), address: freeAddress(t), host: newFakeHost(), log: &logBuffer{}, dialled: make(chan struct{}, 16)}
	s.setRunDir("run")
	must(t, os.MkdirAll(s.path("disks"), 0o755))
	return s
}

func (s *site) setRunDir(name string) {
	s.runDir, s.control = name, control.NewClient(s.path(name, "control.sock"))
}

func (s *site) path(names ...string) string {
	return filepath.Join(append([]string{s.dir}, names...)...)
}

// up starts both daemons and waits for both links.
func (p *pair) up() *pair {
	p.t.Helper()
	p.start(p.dr, p.main)
	p.start(p.main, p.dr)
	p.awaitLinks()
	return p
}

func (p *pair) awaitLinks() {
	p.t.Helper()
	for _, s := range []*site{p.main, p.dr} {
		await(p.t, "link of "+s.name, func() bool {
			st := s.status()
			return len(st.Peers) > 0 && st.Peers[0].Connected
		})
	}
}

// config writes and loads the site's config file.
func (s *site) config(peer *site) *config.Config {
	s.t.Helper()
	if s.file != "" {
		c, err := config.Load(s.file)
		must(s.t, err)
		return c
	}
	peers := ""
	if peer != nil {
		peers = fmt.Sprintf("peers:\n  - name: %s\n    address: %s\n    connections: 2\n", peer.name, peer.address)
	}
	limits := fmt.Sprintf(testLimits, "50ms") + "  backlog_bytes: " + cmp.Or(s.backlog, "64MiB") + "\n  resync_rate: " + cmp.Or(s.rate, "0") + "\n"
	if strings.Contains(s.extra, "limits:") {
		limits = ""
	}
	text := fmt.Sprintf(`site: %s
state_dir: %s
run_dir: %s
listen: %s
tls: {ca: %s, cert: %s, key: %s}
libvirt:
  enabled: %v
  uri: qemu:///system
  socket_group: ""
  emulation: %s
%s%s%s`, s.name, s.path("state"), s.path(s.runDir), s.address, s.path("pki", "ca.crt"), s.path("pki", "site.crt"), s.path("pki", "site.key"),
		!s.libvirtOff, cmp.Or(s.emulation, "qemu"), limits, peers, s.extra)
	file := s.path("kagami.yaml")
	must(s.t, os.WriteFile(file, []byte(text), 0o600))
	c, err := config.Load(file)
	must(s.t, err)
	return c
}

// daemon makes a daemon that has not been started.
func (s *site) daemon(peer *site) *Daemon {
	s.t.Helper()
	s.fs, s.conn = newMortalFS(), &conn{h: s.host, died: make(chan struct{})}
	s.fs.fail = s.fail
	d := newDaemon(s.config(peer), "test", s.fs, slog.New(slog.NewTextHandler(s.log, nil)))
	if s.boot != "" {
		d.bootID = s.boot
	}
	d.pause = pauses{link: 3 * time.Second, tend: 200 * time.Millisecond, libvirt: 500 * time.Millisecond, resume: 5 * time.Second,
		farewell: 500 * time.Millisecond, beside: 300 * time.Millisecond, apart: 300 * time.Millisecond, stuck: 4 * time.Second, verify: 100 * time.Millisecond, takeBack: 200 * time.Millisecond}
	if d.dial != nil {
		c := s.conn
		d.dial = func(context.Context) (Hypervisor, error) {
			s.mu.Lock()
			defer s.mu.Unlock()
			if s.dialErr != nil {
				select {
				case s.dialled <- struct{}{}:
				default:
				}
				return nil, s.dialErr
			}
			return c, nil
		}
	}
	return d
}

func (s *site) setDialErr(err error) {
	s.mu.Lock()
	s.dialErr = err
	s.mu.Unlock()
}

// start starts the site's daemon and waits until it answers.
func (p *pair) start(s, peer *site) {
	s.t.Helper()
	s.run(s.daemon(peer))
	await(s.t, "daemon of "+s.name, func() bool {
		select {
		case err := <-s.done:
			s.d = nil
			s.t.Fatalf("daemon of %s ended: %v", s.name, err)
		default:
		}
		_, err := s.control.Status(context.Background())
		return err == nil
	})
}

func (s *site) run(d *Daemon) {
	ctx, cancel := context.WithCancel(context.Background())
	s.d, s.cancel, s.done = d, cancel, make(chan error, 1)
	go func() { s.done <- d.run(ctx) }()
}

// stop ends the daemon cleanly.
func (s *site) stop() {
	s.t.Helper()
	s.cancel()
	if err := <-s.done; err != nil {
		s.t.Errorf("daemon of %s: %v", s.name, err)
	}
	s.d = nil
}

func (s *site) stopIfUp() {
	if s.d != nil {
		s.host.setFault(nil)
		s.cancel()
		if err := <-s.done; err != nil {
			s.t.Logf("daemon of site %s: %v", s.name, err)
		}
		s.d = nil
	}
}

// kill ends the daemon as SIGKILL does: from one moment on, it changes no
// file, asks libvirt nothing, and answers nobody.
func (s *site) kill() {
	s.t.Helper()
	s.fs.die()
	s.conn.die()
	for _, g := range s.d.snapshot() {
		g.mu.Lock()
		src := g.src
		g.mu.Unlock()
		if src != nil {
			src.eng.Fail(ext4j.ErrGone)
		}
	}
	s.cancel()
	if err := <-s.done; err != nil {
		s.t.Logf("killed daemon: %v", err) // files that do not change any more
	}
	s.d = nil
}

func (s *site) status() control.Status {
	st, err := s.control.Status(context.Background())
	if err != nil {
		return control.Status{}
	}
	return st
}

// group is a group's status; without one, the zero Group.
func (s *site) group(name string) control.Group {
	for _, g := range s.status().Groups {
		if g.Name == name {
			return g
		}
	}
	return control.Group{}
}

func (s *site) awaitState(group, state string) control.Group {
	s.t.Helper()
	var g control.Group
	awaitFor(s.t, 15*time.Second, fmt.Sprintf("group %s at %s to be %s", group, s.name, state), func() bool {
		g = s.group(group)
		return g.State == state
	})
	return g
}

const (
	testVM   = "vm1"
	testUUID = "6b1d2c9e-0000-4000-8000-000000000001"
	diskSize = 1 << 20
)

// addVM makes a running VM with file disks of random content.
func (s *site) addVM(name string, targets ...string) *fakeVM {
	s.t.Helper()
	content := map[string][]byte{}
	for i, target := range targets {
		content[target] = randomBytes(uint64(i+1), diskSize)
	}
	return s.addVMWith(name, content)
}

// addVMWith makes a running VM with file disks of the content given, by target.
func (s *site) addVMWith(name string, content map[string][]byte) *fakeVM {
	s.t.Helper()
	vm := &fakeVM{name: name, uuid: testUUID}
	for _, target := range slices.Sorted(maps.Keys(content)) {
		file := s.path("disks", name+"-"+target+".raw")
		must(s.t, os.WriteFile(file, content[target], 0o600))
		vm.disks = append(vm.disks, &fakeDisk{def: qmp.Disk{Target: target, Bus: "virtio", Device: "disk", Kind: "file", Source: file,
			Format: "raw", Size: int64(len(content[target]))}})
	}
	must(s.t, vm.start())
	s.host.mu.Lock()
	s.host.vms[name] = vm
	s.host.mu.Unlock()
	s.t.Cleanup(vm.destroy)
	return vm
}

func randomBytes(seed uint64, n int) []byte {
	r := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(r.Uint32())
	}
	return b
}

// commandLimit is how long a command may take before its test has failed.
const commandLimit = 40 * time.Second

// protect protects the VM; its events are logged.
func (s *site) protect(ctx context.Context, req control.ProtectRequest) error {
	ctx, cancel := context.WithTimeout(ctx, commandLimit)
	defer cancel()
	return s.control.Protect(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

func (s *site) mustProtect(vm string) {
	s.t.Helper()
	must(s.t, s.protect(context.Background(), control.ProtectRequest{VM: vm, To: "dr"}))
	if g := s.group(vm); !g.Protected || g.State != "streaming" {
		s.t.Fatalf("after protect: %+v", g)
	}
	await(s.t, "the definition with the exports to be shipped", func() bool {
		b, err := os.ReadFile(s.path("state", "groups", vm, "domain.xml"))
		must(s.t, err)
		return strings.Contains(string(b), ".sock")
	})
}

func (s *site) unprotect(req control.UnprotectRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return s.control.Unprotect(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

func (s *site) failover(req control.FailoverRequest) (control.FailoverReport, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return s.control.Failover(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

// traces lists what of groups there is at the site: files of state and
// images, sockets. The lock files of sockets stay for ever.
func (s *site) traces() []string {
	s.t.Helper()
	var out []string
	for _, dir := range []string{"state/groups", "state/images", s.runDir, "disks"} {
		err := filepath.WalkDir(s.path(dir), func(path string, e fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err == nil && !strings.HasSuffix(path, ".lock") && !strings.HasPrefix(e.Name(), "control.sock") {
				out = append(out, strings.TrimPrefix(path, s.dir+"/"))
			}
			return err
		})
		must(s.t, err)
	}
	return out
}

// untouched checks that a site is as it was.
func (s *site) untouched(before []string) {
	s.t.Helper()
	if now := s.traces(); !slices.Equal(before, now) {
		s.t.Errorf("site %s is not as before:\nwas %v\nis  %v", s.name, before, now)
	}
	if gs := s.status().Groups; s.d != nil && len(gs) > 0 {
		s.t.Errorf("site %s has groups: %+v", s.name, gs)
	}
}

// refusedAs checks the error of a command: one sentence with the words
// wanted, what to do next, the exit code.
func refusedAs(t *testing.T, err error, exit int, words ...string) {
	t.Helper()
	var e *control.Error
	if !errors.As(err, &e) {
		t.Fatalf("not refused, or without a proper error: %v", err)
	}
	t.Logf("exit %d: %s — next: %s", e.Exit, e.Message, e.Hint)
	if e.Exit != exit || exit == control.ExitOK {
		t.Errorf("exit code %d, want %d", e.Exit, exit)
	}
	if e.Hint == "" {
		t.Error("it does not say what to do next")
	}
	if strings.Contains(e.Message, "\n") {
		t.Error("it is more than one line")
	}
	for _, w := range words {
		if !strings.Contains(e.Message+" — "+e.Hint, w) {
			t.Errorf("no %q in it", w)
		}
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func await(t *testing.T, what string, cond func() bool) {
	t.Helper()
	awaitFor(t, 15*time.Second, what, cond)
}

func awaitFor(t *testing.T, limit time.Duration, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(limit); !cond(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited for %s", what)
		}
	}
}

// logBuffer collects a daemon's log and what its commands print.
type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(p)
}

func (l *logBuffer) event(ev control.Event) {
	if ev.Message != "" {
		fmt.Fprintf(l, "  %s: %s\n", ev.Step, ev.Message)
	}
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// sameAtReplica compares what the guest has with what a failover would boot:
// the images of both sites once everything is applied.
func sameAtReplica(t *testing.T, p *pair, vm *fakeVM) {
	t.Helper()
	for _, d := range vm.disks {
		def := d.definition()
		want, err := d.content()
		must(t, err)
		if err := d.write(want[:512], 0); err != nil { // ends with a flush: everything before it is at the replica
			t.Fatal(err)
		}
		image := p.dr.path("state", "images", vm.name, def.Target+".raw")
		awaitFor(t, 10*time.Second, "disk "+def.Target+" to be equal at both sites", func() bool {
			got, err := os.ReadFile(image)
			must(t, err)
			return bytes.Equal(got, want)
		})
	}
}

func readFile(t *testing.T, name string) []byte {
	t.Helper()
	b, err := os.ReadFile(name)
	must(t, err)
	return b
}
