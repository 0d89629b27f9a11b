package host

import (
	"net"
	"testing"
	"time"
)

// TestNotify: systemd is told when the daemon is ready, not before it answers,
// and when it stops.
func TestNotify(t *testing.T) {
	p := newPair(t)
	socket := p.main.path("notify")
	l, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: socket, Net: "unixgram"})
	must(t, err)
	defer l.Close()
	t.Setenv("NOTIFY_SOCKET", socket)
	told := func() string {
		t.Helper()
		b := make([]byte, 256)
		must(t, l.SetReadDeadline(time.Now().Add(15*time.Second)))
		n, err := l.Read(b)
		must(t, err)
		return string(b[:n])
	}
	p.main.run(p.main.daemon(p.dr))
	if got := told(); got != "READY=1" {
		t.Errorf("at the start: %q", got)
	}
	if st := p.main.status(); st.Site != "main" {
		t.Errorf("it is ready and does not answer: %+v", st)
	}
	p.main.stop()
	if got := told(); got != "STOPPING=1" {
		t.Errorf("at the end: %q", got)
	}
	must(t, l.SetReadDeadline(time.Now().Add(50*time.Millisecond)))
	if n, err := l.Read(make([]byte, 256)); err == nil {
		t.Errorf("and %d bytes more", n)
	}
}
