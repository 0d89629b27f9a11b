package raw

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kagami/tests/acked/stamp"
)

const diskSize = 8 << 20

// server is an nbdkit that the test started.
type server struct {
	t      *testing.T
	socket string
	cmd    *exec.Cmd
	out    bytes.Buffer
}

// serve starts nbdkit in the foreground with the given arguments and waits
// until it accepts connections.
func serve(t *testing.T, args ...string) *server {
	t.Helper()
	if _, err := exec.LookPath("nbdkit"); err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal("nbdkit is missing")
		}
		t.Skip("nbdkit is missing")
	}
	s := &server{t: t, socket: filepath.Join(t.TempDir(), "nbd.sock")}
	s.cmd = exec.Command("nbdkit", append([]string{"-f", "--exit-with-parent", "-U", s.socket}, args...)...)
	s.cmd.Stderr = &s.out
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.end(syscall.SIGKILL) })
	for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		if c, err := net.Dial("unix", s.socket); err == nil {
			c.Close()
			return s
		}
	}
	t.Fatalf("nbdkit does not answer: %s", s.out.String())
	return nil
}

// end sends a signal and waits for the end of the process.
func (s *server) end(sig syscall.Signal) {
	if s.cmd.ProcessState != nil {
		return
	}
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Errorf("signal nbdkit: %v", err)
	}
	_ = s.cmd.Wait() // ended by a signal
}

func (s *server) dial() *Client {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	c, err := Dial(ctx, "unix", s.socket, "")
	if err != nil {
		s.t.Fatalf("%v: %s", err, s.out.String())
	}
	s.t.Cleanup(c.Kill)
	return c
}

func newImage(t *testing.T) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(path, diskSize); err != nil {
		t.Fatal(err)
	}
	return path
}

func checkFile(t *testing.T, h *History, o Options, path string) Report {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	r, err := Check(h, o, f)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func wholeDisk(seed uint64) *History { return NewHistory(seed, Disk{Len: diskSize}) }

var mixed = Load{Seed: 5, Workers: 8, Ops: 1500, FUA: 0.1, Zeroes: 0.1, Trims: 0.05, MaxLen: 16 << 10}

// TestHonestServers: memory and file plugin, read back over NBD.
func TestHonestServers(t *testing.T) {
	for name, args := range map[string][]string{
		"memory": {"memory", fmt.Sprint(diskSize)},
		"file":   {"file", newImage(t)},
	} {
		t.Run(name, func(t *testing.T) {
			c := serve(t, args...).dial()
			if want := uint16(FlagFlush | FlagFUA | FlagTrim | FlagZeroes); c.Info.Size != diskSize || c.Info.Flags&want != want {
				t.Fatalf("export is %+v", c.Info)
			}
			h := wholeDisk(1)
			if err := mixed.Run(t.Context(), h, c); err != nil {
				t.Fatal(err)
			}
			r, err := Check(h, Options{Completed: true, TrimIsZero: true}, c)
			if err != nil || r.Err() != nil {
				t.Fatal(err, r.Err())
			}
			t.Logf("%d writes, %d answered, %d durable", r.Writes, r.Acked, r.Durable)
			if r.Durable < r.Writes/2 || r.Acked != r.Writes {
				t.Errorf("%+v", r)
			}
			if err := c.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestKilledServer kills nbdkit under two connections with eight requests in
// flight each. Its page cache survives, so everything answered must be there.
func TestKilledServer(t *testing.T) {
	path := newImage(t)
	s := serve(t, "file", path)
	h := wholeDisk(2)
	var wg sync.WaitGroup
	errs := make([]error, 2)
	for i := range errs {
		load, c := mixed, s.dial()
		load.Seed, load.Ops = uint64(i), 0
		wg.Go(func() { errs[i] = load.Run(t.Context(), h, c) })
	}
	time.Sleep(300 * time.Millisecond)
	s.end(syscall.SIGKILL)
	wg.Wait()
	h.Settle()
	for _, err := range errs {
		if !errors.Is(err, ErrDisconnected) {
			t.Errorf("a load ended with %v", err)
		}
	}
	r := checkFile(t, h, Options{Completed: true, Cut: true, TrimIsZero: true}, path)
	t.Logf("%d writes, %d answered, %d durable", r.Writes, r.Acked, r.Durable)
	if err := r.Err(); err != nil || r.Durable < 10 {
		t.Error(err)
	}
}

// TestKilledServerPrefix: one request at a time, so the image must equal the
// state after exactly some prefix.
func TestKilledServerPrefix(t *testing.T) {
	path := newImage(t)
	s := serve(t, "file", path)
	c, h := s.dial(), wholeDisk(3)
	done := make(chan error, 1)
	go func() {
		done <- Load{Seed: 9, MaxLen: 4096, MaxZero: 4096, Align: 4096, Zeroes: 0.1, Trims: 0.1}.Run(t.Context(), h, c)
	}()
	time.Sleep(200 * time.Millisecond)
	s.end(syscall.SIGKILL)
	if err := <-done; !errors.Is(err, ErrDisconnected) {
		t.Errorf("the load ended with %v", err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	p, err := CheckPrefix(h, f)
	if err != nil || p.Acked < 5 || p.Last < p.Acked {
		t.Errorf("%+v, %v", p, err)
	}
	t.Logf("%d operations, the image equals prefixes %d to %d", len(h.Ops()), p.First, p.Last)
}

// TestLiarsAreCaught: servers that answer well and do something else.
func TestLiarsAreCaught(t *testing.T) {
	image := newImage(t)
	liars := map[string][]string{
		"writes to nowhere":      {"--filter=cow", "file", image},
		"ignores flush and FUA":  {"--filter=cache", "file", image, "cache=unsafe"},
		"serves another offset":  {"--filter=offset", "file", image, "offset=65536"},
		"swaps pairs of bytes":   {"--filter=swab", "file", image},
		"drops one write of two": dropping(t, image),
	}
	for name, args := range liars {
		t.Run(name, func(t *testing.T) {
			if err := errors.Join(os.Truncate(image, 0), os.Truncate(image, diskSize)); err != nil {
				t.Fatal(err)
			}
			s := serve(t, args...)
			c := s.dial()
			h := NewHistory(4, Disk{Len: 1 << 20})
			if err := (Load{Seed: 3, Ops: 60, Flush: 0.3, MaxLen: 8192}).Run(t.Context(), h, c); err != nil {
				t.Fatal(err)
			}
			s.end(syscall.SIGKILL)
			r := checkFile(t, h, Options{}, image)
			if r.LostCount+r.InventedCount == 0 || r.Err() == nil {
				t.Errorf("not caught: %+v", r)
			}
			f, err := os.Open(image)
			if err != nil {
				t.Fatal(err)
			}
			defer f.Close()
			if p, err := CheckPrefix(h, f); err == nil {
				t.Errorf("not caught by CheckPrefix: %+v", p)
			}
		})
	}
}

// dropping is a server that loses every other write.
func dropping(t *testing.T, image string) []string {
	count := filepath.Join(t.TempDir(), "count")
	return []string{"eval", "get_size=echo " + fmt.Sprint(diskSize), "can_write=exit 0", "can_flush=exit 0", "flush=exit 0",
		"pread=dd if=" + image + " iflag=skip_bytes,count_bytes skip=$4 count=$3 status=none",
		"thread_model=echo serialize_all_requests",
		"pwrite=echo >>" + count + "; [ $(($(wc -l <" + count + ") % 2)) = 0 ] && { cat >/dev/null; exit 0; }; " +
			"dd of=" + image + " oflag=seek_bytes seek=$4 conv=notrunc status=none",
	}
}

// TestErrorReplies: a server's error is an errno, leaves the connection
// usable, and makes no promise.
func TestErrorReplies(t *testing.T) {
	trigger := filepath.Join(t.TempDir(), "fail")
	c := serve(t, "--filter=error", "memory", "1M", "error=ENOSPC", "error-pwrite-rate=100%", "error-file="+trigger).dial()
	h := NewHistory(6, Disk{Len: 1 << 20})
	load := Load{Seed: 1, Ops: 20}
	if err := load.Run(t.Context(), h, c); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(trigger, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := load.Run(t.Context(), h, c); !errors.Is(err, syscall.ENOSPC) || errors.Is(err, ErrDisconnected) {
		t.Errorf("write to a full disk: %v", err)
	}
	if err := os.Remove(trigger); err != nil {
		t.Fatal(err)
	}
	load.Seed = 2
	if err := load.Run(t.Context(), h, c); err != nil {
		t.Fatal(err)
	}
	r, err := Check(h, Options{Completed: true}, c)
	if err != nil || r.Err() != nil || r.Acked == r.Writes {
		t.Errorf("%+v, %v", r, err)
	}
	if err := c.Write(make([]byte, stamp.Size), 1<<20, false); err == nil {
		t.Error("a write past the end was answered well")
	}
}

func TestDialRefusals(t *testing.T) {
	if _, err := Dial(t.Context(), "unix", filepath.Join(t.TempDir(), "none"), ""); err == nil {
		t.Error("connected to nothing")
	}
	s := serve(t, "--filter=exportname", "memory", "1M", "exportname=yes", "exportname-strict=true", "exportname-list=explicit")
	if _, err := Dial(t.Context(), "unix", s.socket, "no"); err == nil || !strings.Contains(err.Error(), `"no"`) {
		t.Errorf("an unknown export: %v", err)
	}
}

// TestHostileServer: whatever the other side sends, the client returns an
// error and its reader ends.
func TestHostileServer(t *testing.T) {
	good := append(goodGreeting(), goReply(repInfo, make([]byte, 12))...)
	good = append(good, goReply(repAck, nil)...)
	for name, bytes := range map[string][]byte{
		"nothing":          nil,
		"noise":            []byte(strings.Repeat("x", 100)),
		"no reply":         goodGreeting(),
		"huge reply":       append(goodGreeting(), 0, 3, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9, 0, 0, 0, 7, 0, 0, 0, 3, 0xff, 0xff, 0xff, 0xff),
		"ack without info": append(goodGreeting(), goReply(repAck, nil)...),
		"bad reply magic":  append(good[:len(good):len(good)], make([]byte, 16)...),
		"unknown cookie":   append(good[:len(good):len(good)], 0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0, 9, 9, 9, 9, 9, 9, 9, 9),
	} {
		here, there := net.Pipe()
		go func() {
			_, _ = there.Write(bytes) // the client may hang up first
			there.Close()
		}()
		go func() {
			b := make([]byte, 4096)
			for {
				if _, err := there.Read(b); err != nil {
					return
				}
			}
		}()
		c, err := NewClient(t.Context(), here, "")
		if err != nil {
			continue
		}
		if err := c.Flush(); !errors.Is(err, ErrDisconnected) {
			t.Errorf("%s: flush: %v", name, err)
		}
		c.Kill()
	}
}

func goodGreeting() []byte {
	return append([]byte("NBDMAGICIHAVEOPT"), 0, serverFixed|serverNoZeroes)
}

func goReply(kind byte, data []byte) []byte {
	h := []byte{0, 3, 0xe8, 0x89, 0x04, 0x55, 0x65, 0xa9, 0, 0, 0, optGo, 0, 0, 0, kind, 0, 0, 0, byte(len(data))}
	return append(h, data...)
}
