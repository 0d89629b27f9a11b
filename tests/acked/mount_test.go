package acked

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
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
	for _, dev := range []string{"/dev/fuse", "/dev/loop-control"} {
		if _, err := os.Stat(dev); err != nil {
			missing = dev
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

const imageSize = 64 << 20

func newImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, imageSize); err != nil {
		t.Fatal(err)
	}
	return path
}

// server is an nbdkit that the test started.
type server struct {
	t      *testing.T
	socket string
	args   []string
	cmd    *exec.Cmd
}

func serve(t *testing.T, args ...string) *server {
	t.Helper()
	s := &server{t: t, socket: filepath.Join(t.TempDir(), "nbd.sock"), args: args}
	s.start()
	t.Cleanup(s.kill)
	return s
}

func (s *server) start() {
	s.t.Helper()
	if err := os.Remove(s.socket); err != nil && !os.IsNotExist(err) {
		s.t.Fatal(err)
	}
	var out bytes.Buffer
	s.cmd = exec.Command("nbdkit", append([]string{"-f", "--exit-with-parent", "-U", s.socket}, s.args...)...)
	s.cmd.Stderr = &out
	if err := s.cmd.Start(); err != nil {
		s.t.Fatal(err)
	}
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", s.socket); err == nil {
			c.Close()
			return
		}
	}
	s.t.Fatalf("nbdkit does not answer: %s", out.String())
}

func (s *server) kill() {
	if s.cmd.ProcessState == nil {
		_ = s.cmd.Process.Signal(syscall.SIGKILL) // it may have ended
		_ = s.cmd.Wait()
	}
}

func mountNBD(t *testing.T, o NBDOptions) *Mount {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	m, err := MountNBD(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { closeMount(t, m) })
	return m
}

// closeMount also looks whether anything is left.
func closeMount(t *testing.T, m *Mount) {
	t.Helper()
	if err := m.Close(); err != nil {
		t.Error(err)
	}
	mounts, err := os.ReadFile("/proc/self/mounts")
	if err != nil || strings.Contains(string(mounts), m.work) {
		t.Errorf("%s is still mounted (%v)", m.work, err)
	}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		t.Error(err)
	}
	for _, f := range backing {
		// A device that detaches meanwhile is gone, which is what is wanted.
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), m.work) {
			t.Errorf("%s still holds %s", f, b)
		}
	}
	if m.bridge != nil && m.bridge.Process.Signal(syscall.Signal(0)) == nil {
		t.Errorf("%s is still running", m.bridge.Path)
	}
	if exists(m.work) {
		t.Errorf("%s is still there", m.work)
	}
}

func start(t *testing.T, m *Mount, c Config) (*Workload, *Ledger) {
	t.Helper()
	l, err := NewLedger(c, "")
	if err != nil {
		t.Fatal(err)
	}
	w, err := Start(filepath.Join(m.Dir, "w"), l)
	if err != nil {
		t.Fatal(err)
	}
	return w, l
}

// run lets a workload go on until it has enough acknowledgements.
func run(t *testing.T, l *Ledger, acks int) {
	t.Helper()
	from := l.Acked()
	for end := time.Now().Add(20 * time.Second); l.Acked()-from < acks; time.Sleep(2 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d acknowledgements in 20 s", l.Acked()-from)
		}
	}
}

// checkImage mounts a copy of an image, its journal replayed, and checks it.
// A file system that cannot be mounted has lost everything.
func checkImage(t *testing.T, image string, l *Ledger) Report {
	t.Helper()
	dup := filepath.Join(t.TempDir(), "copy.raw")
	copyFile(t, image, dup)
	m, err := MountImage(t.Context(), dup, 0, false)
	if err != nil {
		t.Logf("the image cannot be mounted: %v", err)
		return Report{Acked: l.Acked(), LostCount: l.Acked()}
	}
	defer closeMount(t, m)
	return check(t, filepath.Join(m.Dir, "w"), l)
}

func copyFile(t *testing.T, from, to string) {
	t.Helper()
	src, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	dst, err := os.Create(to)
	if err != nil {
		t.Fatal(err)
	}
	defer dst.Close()
	if _, err := io.Copy(dst, src); err != nil {
		t.Fatal(err)
	}
}

// wantFlushes: the bridge must pass flushes on, or nothing here proves anything.
func wantFlushes(t *testing.T, log string, n int) {
	t.Helper()
	b, err := os.ReadFile(log)
	if got := bytes.Count(b, []byte(" Flush ")); err != nil || got < n {
		t.Errorf("%d flushes reached the server, want %d (%v)", got, n, err)
	}
}

func TestCleanRun(t *testing.T) {
	need(t, "nbdkit", "nbdfuse", "mkfs.ext4")
	image, log := newImage(t), filepath.Join(t.TempDir(), "log")
	s := serve(t, "--filter=log", "file", image, "logfile="+log)
	m := mountNBD(t, NBDOptions{Socket: s.socket, Mkfs: true})
	w, l := start(t, m, Config{Seed: 1})
	run(t, l, 300)
	if err := w.Stop(); err != nil {
		t.Fatal(err)
	}
	if r := check(t, filepath.Join(m.Dir, "w"), l); r.Err() != nil {
		t.Errorf("before unmounting: %v", r.Err())
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	closeMount(t, m)
	wantFlushes(t, log, 50)
	ro, err := MountImage(t.Context(), image, 0, true)
	if err != nil {
		t.Fatal(err)
	}
	defer closeMount(t, ro)
	r := check(t, filepath.Join(ro.Dir, "w"), l)
	if t.Logf("%v", r); r.Err() != nil {
		t.Error(r.Err())
	}
	if err := os.WriteFile(filepath.Join(ro.Dir, "x"), nil, 0o600); err == nil {
		t.Error("a read-only mount was written")
	}
}

// TestServerKilled is the disaster: the server dies under the workload. Its
// page cache survives, so everything acknowledged must be there.
func TestServerKilled(t *testing.T) {
	need(t, "nbdkit", "nbdfuse", "mkfs.ext4")
	image := newImage(t)
	s := serve(t, "file", image)
	m := mountNBD(t, NBDOptions{Socket: s.socket, Mkfs: true})
	w, l := start(t, m, Config{Seed: 2})
	run(t, l, 300)
	l.Freeze()
	s.kill()
	if err := w.Wait(); err == nil {
		t.Error("the workload did not notice that the server died")
	}
	closeMount(t, m)
	r := checkImage(t, image, l)
	if t.Logf("%v", r); r.Err() != nil || r.Acked < 300 {
		t.Error(r.Err())
	}
}

// TestBridgeKilled pulls the cord while the server does not answer.
func TestBridgeKilled(t *testing.T) {
	need(t, "nbdkit", "nbdfuse", "mkfs.ext4")
	image := newImage(t)
	s := serve(t, "file", image)
	m := mountNBD(t, NBDOptions{Socket: s.socket, Mkfs: true})
	w, l := start(t, m, Config{Seed: 3, Writers: []Writer{{Kind: Append, Sync: Fsync}, {Kind: Files}}})
	run(t, l, 50)
	if err := s.cmd.Process.Signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	waitForStall(t, l)
	l.Freeze()
	m.Kill()
	if err := w.Wait(); err == nil {
		t.Error("the workload did not notice that the cord was pulled")
	}
	s.kill()
	if r := checkImage(t, image, l); r.Err() != nil {
		t.Error(r.Err())
	}
}

// waitForStall waits until no acknowledgement comes for 200 ms.
func waitForStall(t *testing.T, l *Ledger) {
	t.Helper()
	last, since := l.Acked(), time.Now()
	for end := time.Now().Add(10 * time.Second); time.Since(since) < 200*time.Millisecond; time.Sleep(5 * time.Millisecond) {
		if n := l.Acked(); n != last {
			last, since = n, time.Now()
		}
		if time.Now().After(end) {
			t.Fatal("acknowledgements went on while the server was stopped")
		}
	}
}

// TestServerRestarts: with QEMU's storage daemon in between, a server that
// dies and comes back is a stall and nothing more.
func TestServerRestarts(t *testing.T) {
	need(t, "nbdkit", "qemu-storage-daemon", "mkfs.ext4")
	image, log := newImage(t), filepath.Join(t.TempDir(), "log")
	s := serve(t, "--filter=log", "file", image, "logfile="+log)
	m := mountNBD(t, NBDOptions{Socket: s.socket, Mkfs: true, Bridge: StorageDaemon})
	w, l := start(t, m, Config{Seed: 4, Writers: []Writer{{Kind: Append, Sync: Fsync}, {Kind: Overwrite, Sync: Fdatasync}, {Kind: Files}}})
	for range 2 {
		run(t, l, 60)
		s.kill()
		time.Sleep(50 * time.Millisecond)
		s.start()
	}
	run(t, l, 60)
	if err := w.Stop(); err != nil {
		t.Fatalf("the restart was more than a stall: %v", err)
	}
	if err := m.Unmount(); err != nil {
		t.Fatal(err)
	}
	closeMount(t, m)
	s.kill()
	wantFlushes(t, log, 20)
	r := checkImage(t, image, l)
	if t.Logf("%v", r); r.Err() != nil {
		t.Error(r.Err())
	}
}

// TestLyingServersAreCaught: servers that lose what they promised.
func TestLyingServersAreCaught(t *testing.T) {
	need(t, "nbdkit", "nbdfuse", "mkfs.ext4")
	for name, filter := range map[string][]string{
		"ignores flushes":   {"--filter=cache", "file", "cache=unsafe"},
		"writes to nowhere": {"--filter=cow", "file"},
	} {
		t.Run(name, func(t *testing.T) {
			image := newImage(t)
			if out, err := exec.Command("mkfs.ext4", "-q", "-F", image).CombinedOutput(); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			s := serve(t, append(filter, image)...)
			m := mountNBD(t, NBDOptions{Socket: s.socket})
			w, l := start(t, m, Config{Seed: 5})
			run(t, l, 100)
			l.Freeze()
			s.kill()
			_ = w.Wait() // the disaster's errors
			closeMount(t, m)
			r := checkImage(t, image, l)
			if t.Logf("%v", r); r.LostCount == 0 || r.Err() == nil {
				t.Error("not caught")
			}
		})
	}
}

// TestStaleReplicaIsCaught: an image that is whole but older than what was
// acknowledged.
func TestStaleReplicaIsCaught(t *testing.T) {
	need(t, "nbdkit", "nbdfuse", "mkfs.ext4")
	image := newImage(t)
	s := serve(t, "file", image)
	m := mountNBD(t, NBDOptions{Socket: s.socket, Mkfs: true})
	w, l := start(t, m, Config{Seed: 6})
	run(t, l, 100)
	w.Pause()
	good := checkImage(t, image, l)
	stale := filepath.Join(t.TempDir(), "stale.raw")
	copyFile(t, image, stale)
	at := l.LastAck()
	w.Resume()
	run(t, l, 30)
	if err := w.Stop(); err != nil {
		t.Fatal(err)
	}
	if good.Err() != nil {
		t.Errorf("when it was made: %v", good.Err())
	}
	r := checkImage(t, stale, l)
	t.Logf("%v; the first lost was acknowledged %v after the copy", r, r.LostSince.Sub(at))
	if r.LostCount == 0 || !r.LostSince.After(at) || r.InventedCount > 0 {
		t.Errorf("the old copy passed, or for the wrong reason: %v", r.Err())
	}
}

// TestMountRefusals: a mount that fails leaves nothing.
func TestMountRefusals(t *testing.T) {
	need(t, "nbdkit", "nbdfuse")
	temp := t.TempDir()
	t.Setenv("TMPDIR", temp)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	if _, err := MountNBD(ctx, NBDOptions{Socket: filepath.Join(temp, "none")}); err == nil {
		t.Error("mounted a server that is not there")
	}
	s := serve(t, "memory", "8M")
	if _, err := MountNBD(ctx, NBDOptions{Socket: s.socket}); err == nil {
		t.Error("mounted an empty disk")
	}
	if _, err := MountImage(ctx, filepath.Join(temp, "none"), 0, true); err == nil {
		t.Error("mounted an image that is not there")
	}
	left, err := filepath.Glob(filepath.Join(temp, "kagami-acked-*"))
	if err != nil || len(left) > 0 {
		t.Errorf("left behind: %q (%v)", left, err)
	}
}

// TestUnmountBesideCopy: a mount namespace that has a copy of the mount does
// not keep the file system from being in good order after Unmount.
func TestUnmountBesideCopy(t *testing.T) {
	need(t, "nbdkit", "unshare", "dumpe2fs")
	image := newImage(t)
	s := serve(t, "file", image)
	m := mountNBD(t, NBDOptions{Socket: s.socket, Bridge: NBDFuse, Mkfs: true})
	holder := exec.Command("unshare", "-m", "--propagation", "private", "sh", "-c", "echo; exec sleep 60")
	out, err := holder.StdoutPipe()
	if err == nil {
		err = holder.Start()
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = holder.Process.Kill() // it may have ended
		_ = holder.Wait()
	})
	if _, err := out.Read(make([]byte, 1)); err != nil { // the copy is there
		t.Fatal(err)
	}
	f, err := os.Create(filepath.Join(m.Dir, "new"))
	if err == nil {
		_, err = f.WriteString("known to the journal alone, until it is emptied")
		err = errors.Join(err, f.Sync(), f.Close())
	}
	if err = errors.Join(err, m.Unmount()); err != nil {
		t.Fatal(err)
	}
	if head, err := exec.Command("dumpe2fs", "-h", image).CombinedOutput(); err != nil || bytes.Contains(head, []byte("needs_recovery")) {
		t.Errorf("%v: %s", err, head)
	}
}
