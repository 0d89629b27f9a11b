package guest

import (
	"bytes"
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kagami/tests/guest/workload"
)

// need skips a test for want of a program, which fails where everything must run.
func need(t *testing.T, programs ...string) {
	t.Helper()
	for _, p := range programs {
		if _, err := exec.LookPath(p); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is missing", p)
		}
		t.Skipf("%s is missing", p)
	}
}

func TestNewestVersion(t *testing.T) {
	order := []string{"6.1.0-9-cloud-amd64", "6.1.0-18-cloud-amd64", "6.1.0-56-cloud-amd64", "6.12.3+deb13-cloud-amd64"}
	for i := range order[1:] {
		if !newer(order[i+1], order[i]) || newer(order[i], order[i+1]) {
			t.Errorf("%s must be newer than %s", order[i+1], order[i])
		}
	}
}

func TestLoadOrder(t *testing.T) {
	dep := "kernel/a/virtio_ring.ko.xz: kernel/a/virtio.ko.xz\nkernel/a/virtio.ko.xz:\n" +
		"kernel/b/virtio_blk.ko.xz: kernel/a/virtio_ring.ko.xz kernel/a/virtio.ko.xz\nkernel/b/other.ko.xz: kernel/b/virtio_blk.ko.xz\n"
	got := loadOrder(dep, []string{"virtio_blk", "built_in", "virtio_blk"})
	want := []string{"kernel/a/virtio.ko.xz", "kernel/a/virtio_ring.ko.xz", "kernel/b/virtio_blk.ko.xz"}
	if !slices.Equal(got, want) {
		t.Fatalf("got %v, want %v", got, want)
	}
}

func TestCPIOIsReadByCPIO(t *testing.T) {
	need(t, "busybox")
	es := []entry{{"b/c/odd", modeFile, []byte("12345")}, {"init", modeExec, bytes.Repeat([]byte("x"), 4096)}, {"empty", modeDir, nil}}
	var b bytes.Buffer
	if err := writeCPIO(&b, es); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	c := exec.Command("busybox", "cpio", "-i", "-d")
	c.Dir, c.Stdin = dir, &b
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, e := range es {
		i, err := os.Stat(filepath.Join(dir, e.name))
		if err != nil || uint32(i.Mode().Perm()) != e.mode&0o777 {
			t.Fatalf("%s: %v %v", e.name, i, err)
		}
		if got, err := os.ReadFile(filepath.Join(dir, e.name)); e.mode != modeDir && (err != nil || !bytes.Equal(got, e.data)) {
			t.Fatalf("%s differs: %v", e.name, err)
		}
	}
	if err := writeCPIO(&b, append(es, es[0])); err == nil {
		t.Fatal("two files of one name were accepted")
	}
}

// qemu starts a guest without libvirt and returns its console.
func qemu(t *testing.T, dir string, args ...string) *Console {
	t.Helper()
	file := func(n string) string { return filepath.Join(dir, n) }
	c := QEMU(dir, args...)
	var errs bytes.Buffer
	c.Stderr = &errs
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = c.Process.Kill() // it has ended by itself when all went well
		_ = c.Wait()
		if b, err := os.ReadFile(file(ConsoleFile)); err == nil && t.Failed() {
			t.Logf("console:\n%s%s", b, errs.String())
		}
	})
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	con, err := Dial(ctx, file(ControlSock))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(con.Close)
	return con
}

func runIn(t *testing.T, c *Console, format string, a ...any) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	out, err := c.Run(ctx, format, a...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// writeAndCheck runs the writer in dir and compares console and checker.
func writeAndCheck(t *testing.T, c *Console, host, dir string) {
	t.Helper()
	runIn(t, c, "writer start %s count=40", dir)
	runIn(t, c, "writer wait")
	r, err := c.Check(t.Context(), dir)
	if err != nil || !r.OK() || r.Append.Highest != 40 || r.Blocks.Highest != 40 {
		t.Fatalf("found %v, %v", r, err)
	}
	a, err := workload.ReadAcksFile(filepath.Join(host, AckFile))
	if err != nil || a.Append != 40 || a.Blocks != 40 || len(a.Errors) != 0 {
		t.Fatalf("acknowledged %+v, %v", a, err)
	}
}

func TestMemoryGuest(t *testing.T) {
	need(t, "qemu-system-x86_64", "mke2fs")
	dir := t.TempDir()
	kernel, initrd, err := BuildInitrd(dir)
	if err != nil {
		t.Fatal(err)
	}
	if k2, i2, err := BuildInitrd(dir); err != nil || k2 != kernel || i2 != initrd {
		t.Fatalf("built again: %s %s %v", k2, i2, err)
	}
	disk := filepath.Join(dir, "d.raw")
	if err := os.WriteFile(disk, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(disk, 64<<20); err != nil {
		t.Fatal(err)
	}
	c := qemu(t, dir, "-kernel", kernel, "-initrd", initrd, "-append", Cmdline, "-drive", "file="+disk+",if=virtio,format=raw")
	runIn(t, c, "mkfs /dev/vda")
	runIn(t, c, "mount /dev/vda /mnt")
	writeAndCheck(t, c, dir, "/mnt")
	runIn(t, c, "put /mnt/note hello there")
	if out := runIn(t, c, "cat /mnt/note"); out != "hello there" {
		t.Fatalf("read %q", out)
	}
	if _, err := c.Run(t.Context(), "cat /nowhere"); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Fatalf("a failing command gave %v", err)
	}
	runIn(t, c, "stop")
	waitGone(t, c)
	if err := run("", "e2fsck", "-fn", disk); err != nil {
		t.Fatal(err)
	}
}

func TestGPTGuest(t *testing.T) {
	need(t, "qemu-system-x86_64", "mke2fs", "sfdisk", "grub-mkimage")
	dir := t.TempDir()
	disk := filepath.Join(dir, "boot.raw")
	if err := BuildGPTDisk(disk, GPTOptions{Size: 192 << 20}); err != nil {
		t.Fatal(err)
	}
	c := qemu(t, dir, "-drive", "file="+disk+",if=virtio,format=raw")
	if out := runIn(t, c, "cat /proc/self/mounts"); !strings.Contains(out, "/dev/vda2 / ext4 rw") {
		t.Fatalf("mounts:\n%s", out)
	}
	writeAndCheck(t, c, dir, "/data")
	runIn(t, c, "stop")
	waitGone(t, c)
	// The file system alone, cut out of the disk, is clean.
	part := filepath.Join(dir, "part.raw")
	if err := run("", "dd", "if="+disk, "of="+part, "bs=1M", "skip=2", "count=189", "conv=sparse", "status=none"); err != nil {
		t.Fatal(err)
	}
	if err := run("", "e2fsck", "-fn", part); err != nil {
		t.Fatal(err)
	}
}

// waitGone waits until QEMU has ended, which closes the console.
func waitGone(t *testing.T, c *Console) {
	t.Helper()
	select {
	case <-c.done:
	case <-time.After(30 * time.Second):
		t.Fatal("the guest did not stop")
	}
}

func TestDialGivesUp(t *testing.T) {
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, sock); err == nil {
		t.Fatal("a guest that never answers was taken for one that does")
	}
}
