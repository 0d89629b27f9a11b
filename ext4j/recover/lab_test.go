package recover

import (
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// This file makes images with the kernel's own ext4 and holds the tools the
// tests compare with.

// missing skips a test for want of something, and fails it in CI.
func missing(t testing.TB, format string, args ...any) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf(format, args...)
	}
	t.Skipf(format, args...)
}

func needTools(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err != nil {
			missing(t, "%s is not installed", tool)
		}
	}
}

// needMount skips a test that must mount images where that is not possible.
func needMount(t testing.TB) {
	t.Helper()
	needTools(t, "mke2fs", "e2fsck", "debugfs", "losetup")
	if os.Geteuid() != 0 {
		missing(t, "needs root to mount loop devices")
	}
}

// run runs a tool; an exit code above max is an error.
func run(t testing.TB, max int, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC")
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !(errors.As(err, &exit) && exit.ExitCode() >= 0 && exit.ExitCode() <= max) {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// format makes a file system of mib MiB in a new file.
func format(t testing.TB, mib int64, args ...string) string {
	t.Helper()
	needTools(t, "mke2fs")
	img := filepath.Join(t.TempDir(), "fs")
	f, err := os.Create(img)
	if err == nil {
		err = errors.Join(f.Truncate(mib<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	run(t, 0, "mke2fs", append(append([]string{"-q", "-F"}, args...), img)...)
	return img
}

// mounted is an image mounted by the kernel.
type mounted struct {
	t    testing.TB
	img  string
	loop string // device name, as in /sys/block
	dir  string
}

// mountImage attaches an image to a loop device and mounts it.
func mountImage(t testing.TB, img string, flags uintptr, opts string) *mounted {
	t.Helper()
	m, err := tryMount(t, img, flags, opts)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// tryMount is mountImage for images that the kernel may refuse.
func tryMount(t testing.TB, img string, flags uintptr, opts string) (*mounted, error) {
	t.Helper()
	dev := attach(t, img)
	m := &mounted{t: t, img: img, loop: filepath.Base(dev), dir: t.TempDir()}
	if err := unix.Mount(dev, m.dir, "ext4", flags, opts); err != nil {
		run(t, 0, "losetup", "-d", dev)
		return nil, fmt.Errorf("mount %s with %q: %w", img, opts, err)
	}
	t.Cleanup(m.unmount)
	return m, nil
}

// attach gives an image a free loop device; another process may be faster than losetup, so it tries again.
func attach(t testing.TB, img string) string {
	t.Helper()
	for range 20 {
		out := strings.TrimSpace(run(t, 1, "losetup", "-f", "--show", img))
		if strings.HasPrefix(out, "/dev/loop") {
			return out
		}
		t.Logf("losetup: %s", out)
		time.Sleep(50 * time.Millisecond)
	}
	t.Fatal("no loop device to be had")
	return ""
}

// unmount may be called twice.
func (m *mounted) unmount() {
	if m.loop == "" {
		return
	}
	// A mount namespace made meanwhile may have a copy of this mount. The file
	// system is in order all the same once it is read-only; one that was shut down
	// cannot be made so, and has nothing to bring in order.
	_ = unix.Mount("", m.dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	for i := 0; ; i++ {
		err := unix.Unmount(m.dir, 0)
		if err == nil {
			break
		}
		if i == 50 || !errors.Is(err, unix.EBUSY) {
			m.t.Errorf("unmount: %v", err)
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	run(m.t, 0, "losetup", "-d", "/dev/"+m.loop)
	m.loop = ""
}

// writes counts the write requests the loop device has finished, and those under way.
func (m *mounted) writes() (done, inflight int) {
	b, err := os.ReadFile("/sys/block/" + m.loop + "/stat")
	f := strings.Fields(string(b))
	if err != nil || len(f) < 9 {
		m.t.Fatalf("statistics of %s: %q, %v", m.loop, b, err)
	}
	done, _ = strconv.Atoi(f[4])
	inflight, _ = strconv.Atoi(f[8])
	return done, inflight
}

// snapshot copies the image as it would be after a crash at this moment: the
// copy counts only if the file system wrote nothing meanwhile.
func (m *mounted) snapshot() string {
	m.t.Helper()
	for range 100 {
		before, busy := m.writes()
		out := copyFile(m.t, m.img)
		if after, late := m.writes(); before == after && busy == 0 && late == 0 {
			return out
		}
		os.Remove(out)
		time.Sleep(20 * time.Millisecond)
	}
	m.t.Fatal("the file system never stops writing")
	return ""
}

// copyFile copies a file, sparsely, to a new temporary one.
func copyFile(t testing.TB, from string) string {
	t.Helper()
	in, err := os.Open(from)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.CreateTemp(t.TempDir(), "copy")
	if err == nil {
		err = copySparse(out, in)
	}
	if err = errors.Join(err, out.Close()); err != nil {
		t.Fatal(err)
	}
	return out.Name()
}

func copySparse(out, in *os.File) error {
	st, err := in.Stat()
	if err != nil {
		return err
	}
	for at := int64(0); ; {
		start, err := unix.Seek(int(in.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return out.Truncate(st.Size())
		}
		if err != nil {
			return err
		}
		if at, err = unix.Seek(int(in.Fd()), start, unix.SEEK_HOLE); err != nil {
			return err
		}
		if _, err := out.Seek(start, io.SeekStart); err != nil {
			return err
		}
		if _, err := io.Copy(out, io.NewSectionReader(in, start, at-start)); err != nil {
			return err
		}
	}
}

// fileDevice is an image file as a Device.
type fileDevice struct{ *os.File }

func (f fileDevice) Datasync() error { return unix.Fdatasync(int(f.Fd())) }

// recoverFile runs Run on an image file.
func recoverFile(t testing.TB, img string, opts Options) (Report, error) {
	t.Helper()
	f, err := os.OpenFile(img, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return Run(fileDevice{f}, 0, st.Size(), opts)
}
