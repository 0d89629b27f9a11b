package nbd

import (
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// TestCloseIsHard: running requests stay unanswered, everything has ended
// when Close returns, and that is not before the device's calls return.
func TestCloseIsHard(t *testing.T) {
	d := newRAM(t, 1<<20)
	release := make(chan struct{})
	d.hook = func(op string, _, _ int64) error {
		<-release
		return nil
	}
	s, path := serve(t, Options{}, Export{Device: d})
	open := opener(t, release)
	var clients []*client
	for i, r := range []request{{cmd: cmdFlush}, {cmd: cmdRead, length: 512}, {cmd: cmdWrite, length: 512}, {cmd: cmdWrite, length: 512, flags: cmdFUA}} {
		c := attach(t, path, "", i%2 == 0)
		c.send(r, payloadFor(r))
		clients = append(clients, c)
	}
	idle, half := attach(t, path, "", true), dial(t, path)
	eventually(t, "all running", func() bool { return len(d.callsNow()) == len(clients) })
	closed := make(chan struct{})
	go func() { s.Close(); close(closed) }()
	for _, c := range append(clients, idle, half) {
		c.wantEnd() // at once, long before the device answers
	}
	if _, err := net.Dial("unix", path); err == nil {
		t.Error("still listening")
	}
	select {
	case <-closed:
		t.Fatal("Close returned while requests were running")
	case <-time.After(20 * time.Millisecond):
	}
	open()
	<-closed
	if n := d.clients(); n != 0 {
		t.Errorf("%d clients after Close", n)
	}
	if err := s.Serve(context.Background(), newPipeListener()); err != nil {
		t.Error(err)
	}
	s.Close()
}

func (d *ramDevice) callsNow() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	return append([]string(nil), d.calls...)
}

// TestListenAgain: when Close has returned, the path is free.
func TestListenAgain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	for range 100 {
		l, err := ListenUnix(path, -1, 0o600)
		must(t, err)
		s := NewServer(Options{})
		go func() { _ = s.Serve(context.Background(), l) }()
		nc, err := net.Dial("unix", path) // not before Serve runs, or Close comes first
		must(t, err)
		_, err = nc.Read(make([]byte, 18))
		must(t, err)
		s.Close()
		must(t, nc.Close())
	}
}

func TestServeContext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l := NewServer(Options{}), newPipeListener()
		d := newRAM(t, 4096)
		must(t, s.Add(Export{Device: d}))
		ctx, cancel := context.WithCancel(context.Background())
		served := make(chan error)
		go func() { served <- s.Serve(ctx, l) }()
		c := &client{t: t, nc: l.dial()}
		c.read(18)
		c.write(be32(3))
		c.enter("")
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
		c.wantEnd()
		if d.clients() != 0 {
			t.Error("client left over")
		}
		s.Close()
	})
}

type failingListener struct {
	*pipeListener
	errs chan error
}

func (l *failingListener) Accept() (net.Conn, error) { return nil, <-l.errs }

func TestAcceptErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(Options{})
		l := &failingListener{newPipeListener(), make(chan error, 10)}
		for range 5 {
			l.errs <- &net.OpError{Op: "accept", Err: syscall.EMFILE}
		}
		l.errs <- errors.New("broken")
		start := time.Now()
		if err := s.Serve(context.Background(), l); err == nil || err.Error() != "accept: broken" {
			t.Error(err)
		}
		if d := time.Since(start); d != 155*time.Millisecond { // 5+10+20+40+80
			t.Errorf("paused for %v", d)
		}
		s.Close()
	})
}

func TestRemove(t *testing.T) {
	a, b := newRAM(t, 4096), newRAM(t, 4096)
	s, path := serve(t, Options{}, Export{Name: "a", Device: a}, Export{Name: "b", Device: b})
	ca, cb := attach(t, path, "a", true), attach(t, path, "b", true)
	haggling := dial(t, path)
	s.Remove("a")
	if a.clients() != 0 {
		t.Fatal("Remove returned with a client attached")
	}
	ca.wantEnd()
	cb.ok(read(0, 10))
	haggling.want(haggling.option(optGo, infoData("a")), repErrUnknown)
	haggling.enter("") // b is the only one now
	must(t, s.Add(Export{Name: "a", Device: a}))
	attach(t, path, "a", true).ok(read(0, 10))
}

func TestClients(t *testing.T) {
	d := newRAM(t, 1<<20)
	s, path := serve(t, Options{}, Export{Name: "a", Device: d})
	if got := s.Clients("zzz"); got != nil {
		t.Fatal(got)
	}
	c := attach(t, path, "a", true)
	c.ok(write(0, make([]byte, 1000), 0))
	c.readAll(request{cmd: cmdRead, length: 5000})
	got := s.Clients("a")
	if len(got) != 1 || got[0].PID != os.Getpid() || got[0].Written != 1000 || got[0].Requests != 2 || time.Since(got[0].Since) > time.Minute {
		t.Fatalf("%+v", got)
	}
	eventually(t, "bytes read", func() bool { return s.Clients("a")[0].Read == 5000 })
}

func TestMaxClients(t *testing.T) {
	d := newRAM(t, 4096)
	_, path := serve(t, Options{MaxClients: 2}, Export{Device: d})
	a, b := attach(t, path, "", true), attach(t, path, "", true)
	c := dial(t, path)
	c.want(c.option(optGo, infoData("")), repErrPolicy)
	old := dial(t, path)
	old.write(optionBytes(optExportName, nil))
	old.wantEnd()
	a.send(request{cmd: cmdDisc}, nil)
	a.wantEnd()
	eventually(t, "gone", func() bool { return d.clients() == 1 })
	eventually(t, "room again", func() bool { return c.option(optGo, infoData(""))[0].code == repInfo })
	c.ok(read(0, 1))
	b.ok(read(0, 1))
}

// TestResizedMeanwhile: the size must not change between GO and Opened.
func TestResizedMeanwhile(t *testing.T) {
	d := &resizing{ramDevice: newRAM(t, 4096)}
	_, path := serve(t, Options{}, Export{Device: d})
	c := dial(t, path)
	c.want(c.option(optGo, infoData("")), repInfo, repAck)
	c.wantEnd()
	eventually(t, "Closed", func() bool { return d.clients() == 0 })
	if d.opened != 1 {
		t.Fatalf("opened %d times", d.opened)
	}
}

type resizing struct {
	*ramDevice
	asked atomic.Int32
}

func (d *resizing) Size() int64 { return 4096 + int64(d.asked.Add(1)/3) }

func TestNegativeSize(t *testing.T) {
	d := newRAM(t, 0)
	d.size = -5
	_, path := serve(t, Options{}, Export{Device: d})
	c := dial(t, path)
	c.write(optionBytes(optGo, infoData("")))
	c.wantEnd()
}

func TestListenUnix(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "s")
	l, err := ListenUnix(path, 4, 0o660)
	must(t, err)
	st, err := os.Stat(path)
	must(t, err)
	if sys := st.Sys().(*syscall.Stat_t); sys.Gid != 4 || st.Mode().Perm() != 0o660 {
		t.Errorf("group %d, mode %v", sys.Gid, st.Mode())
	}
	if l.Addr().String() != path {
		t.Error(l.Addr())
	}
	if _, err := ListenUnix(path, -1, 0o600); !errors.Is(err, ErrInUse) {
		t.Error(err)
	}
	if nc, err := net.Dial("unix", path); err != nil {
		t.Error("the second try took the socket away")
	} else {
		must(t, nc.Close())
	}
	must(t, l.Close())
	must(t, l.Close())
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Error("socket file left over")
	}
}

func TestListenUnixStale(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	stale, err := net.ListenUnix("unix", &net.UnixAddr{Name: path})
	must(t, err)
	stale.SetUnlinkOnClose(false)
	if _, err := ListenUnix(path, -1, 0o600); !errors.Is(err, ErrInUse) { // alive, but holds no lock
		t.Fatal(err)
	}
	must(t, stale.Close())
	l, err := ListenUnix(path, -1, 0o600)
	must(t, err)
	nc, err := net.Dial("unix", path)
	must(t, err)
	must(t, nc.Close())

	// Somebody puts another socket there: it is not ours to remove.
	must(t, os.Remove(path))
	other, err := net.Listen("unix", path)
	must(t, err)
	must(t, l.Close())
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
	must(t, other.Close())
}

func TestListenUnixRefusals(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	must(t, os.WriteFile(file, []byte("data"), 0o600))
	if _, err := ListenUnix(file, -1, 0o600); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	if b, _ := os.ReadFile(file); string(b) != "data" {
		t.Error("file replaced")
	}
	link := filepath.Join(dir, "l")
	must(t, os.Symlink(file, link))
	if _, err := ListenUnix(link, -1, 0o600); !errors.Is(err, os.ErrExist) {
		t.Error(err)
	}
	if _, err := ListenUnix(filepath.Join(dir, "none", "s"), -1, 0o600); !errors.Is(err, os.ErrNotExist) {
		t.Error(err)
	}
	long := filepath.Join(dir, string(make([]byte, MaxSocketPath)))
	if _, err := ListenUnix(long, -1, 0o600); err == nil {
		t.Error("path too long accepted")
	}
	fits := dir + "/" + "0123456789012345678901234567890123456789012345678901234567890123456789012345678901234567890123456789"
	l, err := ListenUnix(fits[:MaxSocketPath], -1, 0o600)
	must(t, err)
	nc, err := net.Dial("unix", fits[:MaxSocketPath])
	must(t, err)
	must(t, nc.Close())
	must(t, l.Close())
}

// settle waits for goroutines to be as few as before.
func settle(t *testing.T, before int) {
	t.Helper()
	eventually(t, "goroutines ended", func() bool { return runtime.NumGoroutine() <= before })
}
