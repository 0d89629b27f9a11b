package images

import (
	"bytes"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"
)

// needTool skips, loudly in CI, when a program is missing.
func needTool(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err == nil {
		return path
	}
	if os.Getenv("CI") == "true" {
		t.Fatalf("%s is not installed", name)
	}
	t.Skipf("%s is not installed", name)
	return ""
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, size int64) (*osFile, string) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "f")
	f, err := OS{}.Create(name, 0o600)
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	must(t, f.Truncate(size))
	return f.(*osFile), name
}

func allocated(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	must(t, unix.Stat(name, &st))
	return st.Blocks * 512
}

func TestOSReadWrite(t *testing.T) {
	f, _ := create(t, 0)
	n, err := f.WriteAt([]byte("hello"), 10)
	if n != 5 || err != nil {
		t.Fatal(n, err)
	}
	buf := make([]byte, 10)
	if n, err = f.ReadAt(buf, 8); n != 7 || !errors.Is(err, io.EOF) || string(buf[:n]) != "\x00\x00hello" {
		t.Fatalf("%d %v %q", n, err, buf[:n])
	}
	if size, err := f.Size(); size != 15 || err != nil {
		t.Fatal(size, err)
	}
	before, err := f.ModTime()
	must(t, err)
	must(t, f.Datasync())
	if after, _ := f.ModTime(); after != before {
		t.Fatal("Datasync changed the time of modification")
	}
}

func TestOSCreateOpenErrors(t *testing.T) {
	dir := t.TempDir()
	name := filepath.Join(dir, "f")
	if _, err := (OS{}).Open(name); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	must(t, os.WriteFile(name, nil, 0o600))
	if _, err := (OS{}).Create(name, 0o600); !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	fifo := filepath.Join(dir, "fifo")
	must(t, unix.Mkfifo(fifo, 0o600))
	for _, odd := range []string{dir, fifo, "/dev/null"} {
		if f, err := (OS{}).Open(odd); err == nil {
			_ = f.Close()
			t.Errorf("opened %s", odd)
		}
	}
}

func TestOSHolesAndExtents(t *testing.T) {
	const mib = 1 << 20
	f, name := create(t, 8*mib)
	if _, _, err := f.NextData(0); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte{7}, 2*mib)
	_, err := f.WriteAt(data, mib)
	must(t, err)
	must(t, f.Datasync())
	for _, from := range []int64{0, mib, mib + 4096} {
		s, e, err := f.NextData(from)
		if err != nil || s != max(from, mib) || e != 3*mib {
			t.Fatalf("NextData(%d) = %d, %d, %v", from, s, e, err)
		}
	}
	if _, _, err := f.NextData(9 * mib); !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	if _, _, err := f.NextData(-1); err == nil || errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	full := allocated(t, name)
	must(t, f.PunchHole(mib, mib))
	if got := allocated(t, name); got > full-mib {
		t.Fatalf("%d bytes allocated after the punch, %d before", got, full)
	}
	must(t, f.ZeroRange(2*mib, mib))
	if got := allocated(t, name); got < mib {
		t.Fatalf("zero range gave the space back: %d bytes left", got)
	}
	wantZeros(t, f, 8*mib)
	must(t, f.Allocate(4*mib, 2*mib))
	must(t, f.Allocate(8*mib, mib)) // past the end: the size stays
	if got := allocated(t, name); got < 4*mib {
		t.Fatalf("%d bytes allocated", got)
	}
	must(t, f.PunchHole(0, 0))
	if err := f.PunchHole(-1, 0); err == nil {
		t.Fatal("negative offset accepted")
	}
	wantZeros(t, f, 8*mib)
}

func wantZeros(t *testing.T, f File, size int64) {
	t.Helper()
	got := make([]byte, size+1)
	n, err := f.ReadAt(got, 0)
	if int64(n) != size || !errors.Is(err, io.EOF) {
		t.Fatal(n, err)
	}
	if slices.ContainsFunc(got, func(b byte) bool { return b != 0 }) {
		t.Fatal("not all zeros")
	}
}

func TestOSWriteZerosFallback(t *testing.T) {
	f, _ := create(t, 0)
	size := int64(len(zeros)*2 + 777)
	_, err := f.WriteAt(bytes.Repeat([]byte{9}, int(size)), 0)
	must(t, err)
	must(t, f.writeZeros(1, size)) // one byte past the end
	if got, _ := f.Size(); got != size {
		t.Fatalf("size %d, want %d", got, size)
	}
	head := make([]byte, 1)
	_, err = f.ReadAt(head, 0)
	must(t, err)
	if head[0] != 9 {
		t.Fatal("byte before the range changed")
	}
	must(t, f.writeZeros(0, 1))
	wantZeros(t, f, size)
	must(t, f.writeZeros(size+5, 10))
	if f.writeZeros(-1, 2) == nil {
		t.Fatal("negative offset accepted")
	}
}

func TestOSXattr(t *testing.T) {
	f, _ := create(t, 0)
	if v, err := f.Xattr("user.kagami.x"); v != nil || err != nil {
		t.Fatal(v, err)
	}
	for _, want := range []string{"one", "", "three"} {
		must(t, f.SetXattr("user.kagami.x", []byte(want)))
		if v, err := f.Xattr("user.kagami.x"); v == nil || string(v) != want || err != nil {
			t.Fatalf("%q %v", v, err)
		}
	}
	if !f.fullSync.Load() {
		t.Fatal("the next Datasync would be an fdatasync, which leaves the attribute behind")
	}
	must(t, f.Datasync())
	if f.fullSync.Load() {
		t.Fatal("every later Datasync is an fsync")
	}
	if err := f.SetXattr("nonsense", nil); err == nil {
		t.Fatal("attribute outside user.* accepted")
	}
}

func TestOSDatasyncErrorStays(t *testing.T) {
	f, _ := create(t, 0)
	want := errors.New("lost")
	f.syncErr = want
	if err := f.Datasync(); !errors.Is(err, want) {
		t.Fatal(err)
	}
}

func TestOSUseAfterClose(t *testing.T) {
	f, _ := create(t, 10)
	must(t, f.Close())
	_, _, nerr := f.NextData(0)
	_, serr := f.Size()
	for i, err := range []error{f.Datasync(), f.PunchHole(0, 1), f.Lock(), f.Truncate(1), nerr, serr} {
		if !errors.Is(err, os.ErrClosed) {
			t.Errorf("%d: %v", i, err)
		}
	}
}

func TestOSLock(t *testing.T) {
	f, name := create(t, 1<<20)
	must(t, f.Lock())
	must(t, f.Lock()) // our own: no conflict
	g, err := OS{}.Open(name)
	must(t, err)
	if err := g.Lock(); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	must(t, f.Close())
	must(t, g.Lock())
	must(t, g.Close())
}

// TestOSLockAgainstQEMU: QEMU refuses an image we hold, and we one that QEMU holds.
func TestOSLockAgainstQEMU(t *testing.T) {
	qemuIO := needTool(t, "qemu-io")
	f, name := create(t, 1<<20)
	must(t, f.Lock())
	out, err := exec.Command(qemuIO, "-f", "raw", "-c", "read 0 512", name).CombinedOutput()
	if err == nil || !bytes.Contains(out, []byte("lock")) {
		t.Fatalf("qemu-io opened a locked image: %v\n%s", err, out)
	}
	must(t, f.Close())

	cmd := exec.Command(qemuIO, "-f", "raw", name)
	in, err := cmd.StdinPipe()
	must(t, err)
	stdout, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	_, err = io.WriteString(in, "read 0 512\n")
	must(t, err)
	_, err = stdout.Read(make([]byte, 4096)) // the prompt or the result: the image is open
	must(t, err)
	g, err := OS{}.Open(name)
	must(t, err)
	if err := g.Lock(); !errors.Is(err, ErrLocked) {
		t.Errorf("locked an image that QEMU holds: %v", err)
	}
	must(t, in.Close())
	must(t, cmd.Wait())
	must(t, g.Lock())
	must(t, g.Close())
}

func TestOSFolders(t *testing.T) {
	o, root := OS{}, t.TempDir()
	deep := filepath.Join(root, "a", "b", "c")
	must(t, o.MkdirAll(deep, 0o750))
	must(t, o.MkdirAll(deep, 0o750))
	for _, n := range []string{"z", "m", "a"} {
		must(t, os.WriteFile(filepath.Join(deep, n), nil, 0o600))
	}
	names, err := o.ReadDir(deep)
	if !slices.Equal(names, []string{"a", "m", "z"}) || err != nil {
		t.Fatal(names, err)
	}
	must(t, o.Rename(filepath.Join(deep, "z"), filepath.Join(deep, "a")))
	must(t, o.Remove(filepath.Join(deep, "m")))
	must(t, o.SyncDir(deep))
	if names, _ = o.ReadDir(deep); !slices.Equal(names, []string{"a"}) {
		t.Fatal(names)
	}
	if err := o.MkdirAll(filepath.Join(deep, "a", "x"), 0o750); !errors.Is(err, unix.ENOTDIR) {
		t.Fatal(err)
	}
	if _, err := o.ReadDir(filepath.Join(root, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	free, err := o.Free(root)
	if free <= 0 || err != nil {
		t.Fatal(free, err)
	}
}
