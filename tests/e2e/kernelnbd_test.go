package e2e

import (
	"context"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"kagami/tests/e2e/soak/rounds"
	"kagami/tests/guest"
	"kagami/tests/guest/workload"
)

// relay joins a TCP port of this host to a unix socket, for guests: QEMU's
// user-mode network reaches the one, the export is at the other.
type relay struct {
	net.Listener
	wg sync.WaitGroup
}

func newRelay(t *testing.T, socket string) *relay {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	r := &relay{Listener: l}
	r.wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return // closed
			}
			r.wg.Go(func() { join(c, socket) })
		}
	})
	t.Cleanup(func() {
		_ = l.Close()
		r.wg.Wait()
	})
	return r
}

// join passes bytes on until either end is closed.
func join(c net.Conn, socket string) {
	defer c.Close()
	s, err := net.Dial("unix", socket)
	if err != nil {
		return
	}
	defer s.Close()
	var wg sync.WaitGroup
	for _, p := range [][2]net.Conn{{c, s}, {s, c}} {
		wg.Go(func() {
			_, _ = io.Copy(p[0], p[1]) // the end of one is the end of both
			_ = p[0].Close()
			_ = p[1].Close()
		})
	}
	wg.Wait()
}

// kernelGuest boots a guest that can reach the host.
func kernelGuest(ctx context.Context, t *testing.T) (c *guest.Console, dir string) {
	t.Helper()
	dir = t.TempDir()
	kernel, initrd, err := guest.BuildInitrd(dir, "/usr/sbin/nbd-client")
	must(t, err)
	cmd := guest.QEMU(dir, "-kernel", kernel, "-initrd", initrd, "-append", guest.Cmdline,
		"-netdev", "user,id=n", "-device", "virtio-net-pci,netdev=n,romfile=")
	var said strings.Builder
	cmd.Stderr = &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has ended by itself when all went well
		_ = cmd.Wait()
		if b, err := os.ReadFile(filepath.Join(dir, guest.ConsoleFile)); err == nil && t.Failed() {
			t.Logf("console:\n%s%s", b, said.String())
		}
	})
	c, err = guest.Dial(ctx, filepath.Join(dir, guest.ControlSock))
	must(t, err)
	t.Cleanup(c.Close)
	return c, dir
}

// TestKernelNBD: the kernel's own NBD client, in a guest. It is set up once by
// nbd-client and once so that it waits for a server that is gone; an ext4 on it
// lives through the death of the daemon, and is at the other site.
func TestKernelNBD(t *testing.T) {
	t.Parallel()
	r, ctx := newRig(t, 2*time.Minute, rounds.Options{RTT: 5 * time.Millisecond, Limits: rounds.QuickLink(),
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 64 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	_, port, err := net.SplitHostPort(newRelay(t, r.Main.Socket("g", "d")).Addr().String())
	must(t, err)
	c, dir := kernelGuest(ctx, t)
	in := func(format string, a ...any) string {
		t.Helper()
		out, err := c.Run(ctx, format, a...)
		must(t, err)
		return out
	}
	in("nic eth0 10.0.2.15/24")
	in("insmod nbd")

	in("exec /usr/sbin/nbd-client -N d -C 2 10.0.2.2 %s /dev/nbd0", port)
	in("mkfs /dev/nbd0")
	in("mount /dev/nbd0 /mnt opts=discard")
	in("put /mnt/first one two three")
	in("writer start /mnt count=20")
	in("writer wait")
	in("writer stop")
	in("fstrim /mnt")
	in("umount /mnt")
	in("exec /usr/sbin/nbd-client -d /dev/nbd0")

	in("nbd connect 10.0.2.2:%s d 1 conns=4 timeout=5 dead=60", port)
	in("mount /dev/nbd1 /mnt")
	if got := in("cat /mnt/first"); got != "one two three" {
		t.Fatalf("read %q", got)
	}
	in("writer start /mnt every=5")
	acked := func() workload.Acks {
		t.Helper()
		a, err := workload.ReadAcksFile(filepath.Join(dir, guest.AckFile))
		must(t, err)
		if len(a.Errors) > 0 {
			t.Fatalf("the guest saw I/O errors: %v", a.Errors)
		}
		return a
	}
	progress := func() {
		t.Helper()
		for before := acked(); acked().Append < before.Append+5; time.Sleep(20 * time.Millisecond) {
			must(t, ctx.Err())
		}
	}
	progress()
	must(t, r.Main.Kill())
	must(t, r.Main.Start(ctx))
	dial, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	dial.Kill()
	in("nbd reconnect 10.0.2.2:%s d 1 conns=4", port)
	progress()
	in("writer stop")
	in("umount /mnt")
	in("mount /dev/nbd1 /mnt") // what is read comes from the server
	found, err := c.Check(ctx, "/mnt")
	must(t, err)
	if a := acked(); !found.OK() || found.Append.Highest < a.Append || found.Blocks.Highest < a.Blocks {
		t.Errorf("%d appends and %d overwrites were acknowledged; found: %s", a.Append, a.Blocks, found)
	}
	t.Log(found)
	in("umount /mnt")
	in("exec /usr/sbin/nbd-client -d /dev/nbd1")
	stoppedEqual(ctx, t, r, "g")
	must(t, rounds.Fsck(ctx, r.Replica("g", "d")))
}
