package replica

import (
	"context"
	"fmt"
	"net"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// openDoor takes every connection for a peer's once a byte came over it.
type openDoor struct{ Backend }

func (openDoor) Identify(_ context.Context, c net.Conn) (Peer, net.Conn, error) {
	if _, err := c.Read(make([]byte, 1)); err != nil {
		return nil, nil, fmt.Errorf("handshake: %w", err)
	}
	return anyPeer{}, c, nil
}

func serveStrangers(t *testing.T) (*Server, string) {
	t.Helper()
	s := NewServer(ServerOptions{Site: "b", Backend: openDoor{}, Timeout: time.Hour})
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := s.Serve(l); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(func() { _ = l.Close(); s.Close(); wg.Wait() })
	return s, l.Addr().String()
}

// dialFrom connects from an address of the loopback network.
func dialFrom(t *testing.T, ip, to string) net.Conn {
	t.Helper()
	d := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.ParseIP(ip)}, Timeout: 5 * time.Second}
	c, err := d.Dial("tcp", to)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// wantWelcome goes through the handshake and expects to be let in soon.
func wantWelcome(t *testing.T, who string, c net.Conn) {
	t.Helper()
	hello := wire.Hello{MinVersion: 1, MaxVersion: 1, Site: "a", Link: epoch.NewUUID()}
	b, err := wire.AppendJSON([]byte{1}, wire.TypeHello, hello, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Write(b); err != nil {
		t.Fatalf("%s: %v", who, err)
	}
	if _, _, _, err := wire.ReadFrame(c, nil, wire.MaxHello, 0); err != nil {
		t.Fatalf("%s does not get in: %v", who, err)
	}
}

// TestSilentStrangersKeepNobodyOut: one host opens connections without end and
// says nothing. A peer that was half-way through its handshake, one that comes
// then, and one from that very address get in; what waits stays bounded.
func TestSilentStrangersKeepNobodyOut(t *testing.T) {
	s, addr := serveStrangers(t)
	early := dialFrom(t, "127.0.0.2", addr)
	for range 3 * maxHandshakes {
		dialFrom(t, "127.0.0.3", addr)
	}
	wantWelcome(t, "the early peer", early)
	wantWelcome(t, "the late peer", dialFrom(t, "127.0.0.2", addr))
	wantWelcome(t, "the neighbour", dialFrom(t, "127.0.0.3", addr))
	s.mu.Lock()
	defer s.mu.Unlock()
	if n := len(s.unknown); n > maxHandshakes {
		t.Errorf("%d connections are in the handshake", n)
	}
}

// TestSilentStrangersEnd: nobody is in the handshake for longer than
// handshakeTime, however patient the link is.
func TestSilentStrangersEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(ServerOptions{Site: "b", Backend: openDoor{}, Timeout: time.Hour})
		here, there := net.Pipe()
		began := time.Now()
		if err := s.Serve(&fewListener{conns: []net.Conn{there}}); err != nil {
			t.Fatal(err)
		}
		if _, err := here.Read(make([]byte, 1)); err == nil {
			t.Error("a silent connection was answered")
		}
		if d := time.Since(began); d != handshakeTime {
			t.Errorf("a silent connection ended after %v", d)
		}
		s.Close()
		if len(s.unknown) != 0 {
			t.Errorf("%d connections are in the handshake", len(s.unknown))
		}
	})
}

// fakeAddr is a connection from an address.
type fakeAddr struct {
	net.Conn
	addr string
}

func (c fakeAddr) RemoteAddr() net.Addr { return c }
func (fakeAddr) Network() string        { return "tcp" }
func (c fakeAddr) String() string       { return c.addr }

func TestCrowd(t *testing.T) {
	for _, c := range []struct {
		from []string
		want int
	}{
		{[]string{"10.0.0.1:1"}, 0},
		{[]string{"10.0.0.1:1", "10.0.0.2:1", "10.0.0.2:2"}, 1},
		{[]string{"10.0.0.1:1", "[::ffff:10.0.0.2]:1", "10.0.0.2:2"}, 1},
		{[]string{"[2001:db8::1]:1", "[2001:db8:0:1::1]:1", "[2001:db8:0:1::2]:1"}, 1},
		{[]string{"[fe80::1%eth0]:1", "[fe80::2%eth1]:1", "10.0.0.1:1"}, 0},
		{[]string{"10.0.0.1:1", "elsewhere", "pipe"}, 1},
	} {
		var conns []net.Conn
		for _, a := range c.from {
			conns = append(conns, fakeAddr{addr: a})
		}
		if got := crowd(conns); got != c.want {
			t.Errorf("of %v the one at %d goes, want %d", c.from, got, c.want)
		}
	}
}

// fewListener fails to accept so many times, then accepts a few, then is closed.
type fewListener struct {
	net.Listener
	errs  []error
	conns []net.Conn
}

func (l *fewListener) Accept() (net.Conn, error) {
	if len(l.errs) > 0 {
		err := l.errs[0]
		l.errs = l.errs[1:]
		return nil, err
	}
	if len(l.conns) > 0 {
		c := l.conns[0]
		l.conns = l.conns[1:]
		return c, nil
	}
	return nil, net.ErrClosed
}

// TestShortageIsWaitedFor: being short of descriptors does not end the server,
// anything else does.
func TestShortageIsWaitedFor(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(ServerOptions{Site: "b"})
		if err := s.Serve(&fewListener{errs: []error{syscall.EMFILE, syscall.ENOMEM}}); err != nil {
			t.Error(err)
		}
		if err := s.Serve(&fewListener{errs: []error{syscall.EINVAL}}); err == nil {
			t.Error("served on without a listener")
		}
	})
}
