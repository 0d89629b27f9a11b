package wan

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// need skips, or fails under CI, when the machine cannot run the test.
func need(t *testing.T, tools ...string) {
	t.Helper()
	missing := ""
	if os.Geteuid() != 0 {
		missing = "root"
	}
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing = tool
		}
	}
	if missing == "" {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is missing", missing)
	}
	t.Skipf("%s is missing", missing)
}

var linkNumber atomic.Int32

func testConfig(p Params) Config {
	n := linkNumber.Add(1)
	name := func(s string) string { return fmt.Sprintf("kagami-wan-test-%d-%d%s", os.Getpid(), n, s) }
	return Config{Names: [2]string{name("a"), name("b")}, Params: Symmetric(p), Seed: 42}
}

func newLink(t *testing.T, p Params) *Link {
	t.Helper()
	need(t, "nsenter", "ping")
	l, err := New(testConfig(p))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

var wanLine = Params{Delay: 10 * time.Millisecond, Rate: 1e9}

func TestPingSeesTheRoundTrip(t *testing.T) {
	l := newLink(t, wanLine)
	minRTT := ping(t, l, 20)
	t.Logf("RTT at least %.3f ms", minRTT)
	if minRTT < 20 || minRTT > 25 {
		t.Errorf("RTT %.3f ms on a line of 20 ms", minRTT)
	}
	if err := l.Change(func(p *Params) { p.Delay = time.Millisecond }); err != nil {
		t.Fatal(err)
	}
	if minRTT = ping(t, l, 10); minRTT < 2 || minRTT > 6 {
		t.Errorf("RTT %.3f ms after the change to 2 ms", minRTT)
	}
}

// ping returns the smallest round trip in ms; the average is at the mercy of
// whatever else the machine does.
func ping(t *testing.T, l *Link, n int) float64 {
	t.Helper()
	out, err := l.Exec(t.Context(), A, "ping", "-n", "-c", strconv.Itoa(n), "-i", "0.02", "-W", "2", l.Addr(B).String())
	if err != nil {
		t.Fatal(err)
	}
	m := regexp.MustCompile(`rtt min/avg/max/mdev = ([0-9.]+)/`).FindSubmatch(out)
	if m == nil {
		t.Fatalf("ping printed %s", out)
	}
	v, err := strconv.ParseFloat(string(m[1]), 64)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

func TestThroughput(t *testing.T) {
	l := newLink(t, wanLine)
	got := throughput(t, l, 3*time.Second)
	t.Logf("one TCP connection, 3 s from its first byte, slow start included: %.0f Mbit/s", got/1e6)
	if got < 300e6 || got > 1e9 {
		t.Errorf("%.0f Mbit/s on a line of 1 Gbit/s", got/1e6)
	}
}

func TestRateLimits(t *testing.T) {
	l := newLink(t, Params{Delay: 2 * time.Millisecond, Rate: 20e6})
	got := throughput(t, l, time.Second)
	t.Logf("%.1f Mbit/s", got/1e6)
	if got < 10e6 || got > 20e6 {
		t.Errorf("%.1f Mbit/s on a line of 20 Mbit/s", got/1e6)
	}
	s := l.Stats(A)
	if limit := l.Params(A).queueLimit(); s.QueuedMax == 0 || s.QueuedMax > limit {
		t.Errorf("%d bytes waited at most, the queue's limit is %d", s.QueuedMax, limit)
	}
}

// throughput is what one connection from A carries to B in bit/s.
func throughput(t *testing.T, l *Link, d time.Duration) float64 {
	t.Helper()
	src, dst := connect(t, l)
	var wg sync.WaitGroup
	wg.Go(func() {
		b := make([]byte, 256<<10)
		for end := time.Now().Add(d); time.Now().Before(end); {
			if _, err := src.Write(b); err != nil {
				t.Errorf("write: %v", err)
				return
			}
		}
		src.Close()
	})
	start := time.Now()
	n, err := io.Copy(io.Discard, dst)
	if err != nil {
		t.Errorf("read: %v", err)
	}
	took := time.Since(start)
	wg.Wait()
	return float64(n) * 8 / took.Seconds()
}

// connect makes a connection from A to B.
func connect(t *testing.T, l *Link) (src, dst net.Conn) {
	t.Helper()
	ln, err := l.Listen(B, "tcp", net.JoinHostPort(l.Addr(B).String(), "0"))
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	if src, err = l.Dial(ctx, A, "tcp", ln.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if dst, err = ln.Accept(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { src.Close(); dst.Close() })
	for _, c := range []net.Conn{src, dst} {
		if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	return src, dst
}

// TestDataSurvivesLoss sends through a line that loses and jitters: what TCP
// delivers must be what was sent, and the losses as many as asked for.
func TestDataSurvivesLoss(t *testing.T) {
	const size, loss = 24 << 20, 0.02
	l := newLink(t, Params{Delay: time.Millisecond, Jitter: 200 * time.Microsecond, Rate: 1e9, Loss: loss})
	src, dst := connect(t, l)
	want := sha256.New()
	var wg sync.WaitGroup
	wg.Go(func() {
		defer src.Close()
		r := rand.NewChaCha8([32]byte{5})
		if _, err := io.Copy(io.MultiWriter(src, want), io.LimitReader(r, size)); err != nil {
			t.Errorf("send: %v", err)
		}
	})
	got := sha256.New()
	n, err := io.Copy(got, dst)
	wg.Wait()
	if err != nil || n != size || string(got.Sum(nil)) != string(want.Sum(nil)) {
		t.Fatalf("%d of %d bytes arrived, or with other content (%v)", n, size, err)
	}
	s := l.Stats(A)
	rate := float64(s.DropLoss) / float64(s.InPackets)
	t.Logf("%d of %d packets lost (%.4f)", s.DropLoss, s.InPackets, rate)
	if s.InPackets < size/mtu || rate < loss*0.75 || rate > loss*1.25 {
		t.Errorf("%d of %d packets lost (%.4f), asked for %.4f", s.DropLoss, s.InPackets, rate, loss)
	}
}

func TestCutStopsAndRestoreResumes(t *testing.T) {
	l := newLink(t, Params{Delay: time.Millisecond, Rate: 100e6})
	src, dst := connect(t, l)
	var received atomic.Int64
	var wg sync.WaitGroup
	wg.Go(func() { // ends when dst is closed
		b := make([]byte, 64<<10)
		for {
			n, err := dst.Read(b)
			received.Add(int64(n))
			if err != nil {
				return
			}
		}
	})
	wg.Go(func() {
		b := make([]byte, 16<<10)
		for {
			if _, err := src.Write(b); err != nil {
				return
			}
		}
	})
	defer wg.Wait()
	defer func() { src.Close(); dst.Close() }()
	waitFor(t, "data to flow", func() bool { return received.Load() > 1<<20 })
	l.Cut()
	time.Sleep(20 * time.Millisecond) // what had arrived gets read
	before := received.Load()
	time.Sleep(300 * time.Millisecond)
	if d := received.Load() - before; d != 0 {
		t.Errorf("%d bytes passed a cut line", d)
	}
	l.Restore()
	waitFor(t, "TCP to resume", func() bool { return received.Load() > before+1<<20 })
	if s := l.Stats(A); s.DropCut == 0 {
		t.Errorf("nothing was dropped by the cut: %+v", s)
	}
}

func waitFor(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(15 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if ok() {
			return
		}
	}
	t.Fatalf("waited 15 s for %s", what)
}

func TestCloseLeavesNothing(t *testing.T) {
	need(t, "nsenter", "sleep")
	c := testConfig(wanLine)
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := New(c); err == nil || !strings.Contains(err.Error(), c.Names[A]) {
		t.Errorf("a second link of the same names: %v", err)
	}
	cmd, err := l.Command(B, exec.Command("sleep", "60"))
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "nsenter", func() bool { return len(l.space[B].processes()) == 1 })
	pid := strconv.Itoa(cmd.Process.Pid)
	if err := l.Close(); err == nil || !strings.Contains(err.Error(), pid+" (sleep)") {
		t.Errorf("Close with process %s inside: %v", pid, err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Error(err)
	}
	_ = cmd.Wait() // killed
	for _, name := range c.Names {
		if _, err := os.Lstat(filepath.Join(folder, name)); !os.IsNotExist(err) {
			t.Errorf("namespace %s is still there (%v)", name, err)
		}
	}
	if mounts, err := os.ReadFile("/proc/self/mounts"); err != nil || strings.Contains(string(mounts), c.Names[A]) {
		t.Errorf("a namespace is still mounted (%v)", err)
	}
}

func TestReplaceTakesOverAStaleNamespace(t *testing.T) {
	need(t)
	c := testConfig(wanLine)
	stale, err := newSpace(c.Names[B])
	if err != nil {
		t.Fatal(err)
	}
	if err := stale.handle.Close(); err != nil {
		t.Fatal(err)
	}
	if l, err := New(c); err == nil {
		l.Close()
		t.Error("a namespace of another run was taken without Replace")
	}
	c.Replace = true
	l, err := New(c)
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

func TestControlSocket(t *testing.T) {
	l := newLink(t, wanLine)
	path := filepath.Join(t.TempDir(), "wan.sock")
	ln, err := ListenControl(path)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ListenControl(path); err == nil {
		t.Error("a second listener took over a live control socket")
	}
	ctx, cancel := context.WithCancel(t.Context())
	served := make(chan error, 1)
	go func() { served <- l.Serve(ctx, ln) }()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	r := bufio.NewReader(c)
	ask := func(line string) string {
		fmt.Fprintln(c, line)
		answer, err := r.ReadString('\n')
		if err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		return strings.TrimSpace(answer)
	}
	if got := ask("delay 3ms"); got != "ok" || l.Params(B).Delay != 3*time.Millisecond {
		t.Errorf("delay 3ms: %q, %+v", got, l.Params(B))
	}
	if got := ask("delay never"); !strings.HasPrefix(got, "error: ") {
		t.Errorf("delay never: %q", got)
	}
	ping(t, l, 3)
	var stats map[string]Stats
	if err := json.Unmarshal([]byte(ask("stats")), &stats); err != nil || stats["a"].OutPackets != 3 || stats["b"].InPackets != 3 {
		t.Errorf("stats after three pings: %+v (%v)", stats, err)
	}
	cancel()
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := r.ReadString('\n'); err == nil {
		t.Error("the connection outlived the server")
	}
}
