package nbd

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"math/rand/v2"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// The server is judged here by clients that others wrote.

// fileDevice is a raw file, as plain as can be.
type fileDevice struct {
	f *os.File
}

func newFileDevice(t testing.TB, size int64) *fileDevice {
	t.Helper()
	f, err := os.Create(filepath.Join(t.TempDir(), "disk.raw"))
	must(t, err)
	t.Cleanup(func() { _ = f.Close() })
	must(t, f.Truncate(size))
	return &fileDevice{f}
}

func (d *fileDevice) Size() int64 {
	st, err := d.f.Stat()
	if err != nil {
		return -1
	}
	return st.Size()
}

func (d *fileDevice) Opened()          {}
func (d *fileDevice) Closed()          {}
func (d *fileDevice) WouldBlock() bool { return false }
func (d *fileDevice) Flush() error     { return unix.Fdatasync(int(d.f.Fd())) }

func (d *fileDevice) synced(err error, fua bool) error {
	if err == nil && fua {
		return d.Flush()
	}
	return err
}

func (d *fileDevice) ReadAt(p []byte, off int64) error {
	_, err := d.f.ReadAt(p, off)
	return err
}

func (d *fileDevice) WriteAt(p []byte, off int64, fua bool) error {
	_, err := d.f.WriteAt(p, off)
	return d.synced(err, fua)
}

func (d *fileDevice) WriteZeroes(off, n int64, noHole, fua bool) error {
	mode := uint32(unix.FALLOC_FL_PUNCH_HOLE)
	if noHole {
		mode = unix.FALLOC_FL_ZERO_RANGE
	}
	if n == 0 {
		return d.synced(nil, fua)
	}
	return d.synced(unix.Fallocate(int(d.f.Fd()), mode|unix.FALLOC_FL_KEEP_SIZE, off, n), fua)
}

func (d *fileDevice) Trim(off, n int64, fua bool) error { return d.WriteZeroes(off, n, false, fua) }

func (d *fileDevice) Extents(off, n int64) ([]Extent, error) {
	end := off + n
	data, err := unix.Seek(int(d.f.Fd()), off, unix.SEEK_DATA)
	if err == unix.ENXIO || err == nil && data >= end {
		return []Extent{{n, true, true}}, nil
	}
	if err != nil {
		return nil, err
	}
	if data > off {
		return []Extent{{data - off, true, true}}, nil
	}
	hole, err := unix.Seek(int(d.f.Fd()), off, unix.SEEK_HOLE)
	return []Extent{{min(hole, end) - off, false, false}}, err
}

// whole is fileDevice with extents up to the end of the range.
type wholeExtents struct{ *fileDevice }

func (d wholeExtents) Extents(off, n int64) (all []Extent, err error) {
	for n > 0 {
		runs, err := d.fileDevice.Extents(off, n)
		if err != nil {
			return nil, err
		}
		all = append(all, runs...)
		off, n = off+runs[0].Length, n-runs[0].Length
	}
	return all, nil
}

func tool(t testing.TB, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		missing(t, name+" is not installed")
	}
	return path
}

// missing skips, but fails where nothing may be missing.
func missing(t testing.TB, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatal(what)
	}
	t.Skip(what)
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	out, err := exec.Command(tool(t, name), args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}

func uri(name, path string) string {
	return "nbd+unix:///" + name + "?socket=" + url.QueryEscape(path)
}

// randomFile makes a file with data, holes and zeros in turn.
func randomFile(t testing.TB, size int64) string {
	t.Helper()
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	name := filepath.Join(t.TempDir(), "random")
	f, err := os.Create(name)
	must(t, err)
	must(t, f.Truncate(size))
	for off := int64(0); off < size; {
		n := min(1+rnd.Int64N(1<<20), size-off)
		if rnd.IntN(2) == 0 {
			p := make([]byte, n)
			for i := range p[:min(n, 5000)] {
				p[i] = byte(rnd.Uint32())
			}
			_, err := f.WriteAt(p, off)
			must(t, err)
		}
		off += n
	}
	must(t, f.Close())
	return name
}

func sameContent(t testing.TB, a, b string) {
	t.Helper()
	fa, err := os.Open(a)
	must(t, err)
	defer fa.Close()
	fb, err := os.Open(b)
	must(t, err)
	defer fb.Close()
	pa, pb := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		na, erra := io.ReadFull(fa, pa)
		nb, _ := io.ReadFull(fb, pb)
		if !bytes.Equal(pa[:na], pb[:nb]) {
			t.Fatalf("%s and %s differ", a, b)
		}
		if erra != nil {
			return
		}
	}
}

func TestNbdinfo(t *testing.T) {
	d := newFileDevice(t, 16<<20)
	_, err := d.f.WriteAt(bytes.Repeat([]byte{1}, 65536), 1<<20)
	must(t, err)
	must(t, d.Flush())
	_, path := serve(t, Options{}, Export{Name: "disk", Description: "a disk", Device: wholeExtents{d}}, Export{Name: "other", Device: d, ReadOnly: true})
	var info struct {
		Protocol   string
		Structured bool
		Exports    []map[string]any
	}
	must(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri("disk", path))), &info))
	want := map[string]any{
		"export-name": "disk", "description": "a disk", "is_read_only": false, "can_df": true, "can_flush": true, "can_fua": true,
		"can_multi_conn": true, "can_trim": true, "can_zero": true, "can_fast_zero": false, "can_cache": false,
		"export-size": float64(16 << 20),
	}
	if info.Protocol != "newstyle-fixed" || !info.Structured || len(info.Exports) != 1 {
		t.Fatalf("%+v", info)
	}
	for k, v := range want {
		if got := info.Exports[0][k]; got != v {
			t.Errorf("%s: %v, want %v", k, got, v)
		}
	}
	must(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--list", "--json", uri("", path))), &info))
	if len(info.Exports) != 2 || info.Exports[1]["export-name"] != "other" || info.Exports[1]["is_read_only"] != true {
		t.Errorf("%+v", info.Exports)
	}
	type run1 struct {
		Offset, Length int64
		Description    string
	}
	var runs []run1
	must(t, json.Unmarshal([]byte(run(t, "nbdinfo", "--map", "--json", uri("disk", path))), &runs))
	wantRuns := []run1{{0, 1 << 20, "hole,zero"}, {1 << 20, 65536, "data"}, {1<<20 + 65536, 15<<20 - 65536, "hole,zero"}}
	if fmt.Sprint(runs) != fmt.Sprint(wantRuns) {
		t.Errorf("%v, want %v", runs, wantRuns)
	}
}

func TestNbdcopy(t *testing.T) {
	const size = 48<<20 + 512
	src := randomFile(t, size)
	d := newFileDevice(t, size)
	_, path := serve(t, Options{}, Export{Name: "disk", Device: d})
	run(t, "nbdcopy", "--flush", src, uri("disk", path))
	sameContent(t, src, d.f.Name())
	back := filepath.Join(t.TempDir(), "back")
	run(t, "nbdcopy", uri("disk", path), back)
	sameContent(t, src, back)
}

func TestLibnbd(t *testing.T) {
	const python = "/usr/bin/python3"
	if out, err := exec.Command(python, "-c", "import nbd").CombinedOutput(); err != nil {
		missing(t, fmt.Sprintf("libnbd's module for %s is not installed: %s", python, out))
	}
	for _, mode := range []string{"structured", "simple"} {
		t.Run(mode, func(t *testing.T) {
			d := wholeExtents{newFileDevice(t, 64<<20)}
			_, path := serve(t, Options{}, Export{Name: "disk", Description: "a disk", Device: d},
				Export{Name: "ro", Device: newFileDevice(t, 1<<20), ReadOnly: true})
			if out := run(t, python, "testdata/client.py", path, mode); out != "all right\n" {
				t.Error(out)
			}
		})
	}
}

func TestQemuIO(t *testing.T) {
	d := newRAM(t, 64<<20)
	d.history = nil
	_, path := serve(t, Options{}, Export{Name: "disk", Device: d})
	out := run(t, "qemu-io", "-f", "raw", "-t", "none", "-c", "write -P 7 4096 1M", "-c", "read -P 7 4096 1M", "-c", "write -f -P 8 0 512",
		"-c", "read -P 8 0 512", "-c", "write -z 8192 4096", "-c", "read -P 0 8192 4096", "-c", "write -z -u 1M 64k", "-c", "discard 4M 60M",
		"-c", "write -P 9 62M 2M", "-c", "aio_write -P 3 2M 1M", "-c", "aio_read 0 4M", "-c", "aio_flush", "-c", "flush",
		"-c", "read -P 3 2M 1M", "-c", "length", uri("disk", path))
	if strings.Contains(out, "ailed") || strings.Contains(out, "rror") || !strings.Contains(out, "64 MiB") {
		t.Error(out)
	}
	calls := strings.Join(d.take(), "\n")
	for _, want := range []string{"write-fua 0+512", "flush", "trim 4194304+", "zero-nohole 8192+4096", "zero 1048576+65536"} {
		if !strings.Contains(calls, want) {
			t.Errorf("no %q among the calls:\n%s", want, calls)
		}
	}
}

func TestQemuImg(t *testing.T) {
	const size = 32 << 20
	src := randomFile(t, size)
	d := newFileDevice(t, size)
	_, path := serve(t, Options{}, Export{Name: "disk", Device: wholeExtents{d}})
	u := uri("disk", path)
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", "-W", src, u)
	sameContent(t, src, d.f.Name())
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", src, u)
	back := filepath.Join(t.TempDir(), "back.qcow2")
	run(t, "qemu-img", "convert", "-f", "raw", "-O", "qcow2", u, back)
	run(t, "qemu-img", "compare", "-f", "raw", "-F", "qcow2", u, back)

	var runs []struct{ Start, Length int64 }
	must(t, json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "raw", u)), &runs))
	end := int64(0)
	for _, r := range runs {
		if r.Start != end {
			t.Fatalf("hole in the map: %+v", runs)
		}
		end += r.Length
	}
	if end != size || len(runs) < 3 {
		t.Errorf("%+v", runs)
	}
	run(t, "qemu-img", "bench", "-f", "raw", "-t", "none", "-w", "-c", "2000", "-d", "16", "-s", "4096", "--flush-interval=100", u)
	run(t, "qemu-img", "bench", "-f", "raw", "-t", "none", "-c", "2000", "-d", "16", "-s", "65536", u)
}

func TestFio(t *testing.T) {
	if out, err := exec.Command(tool(t, "fio"), "--enghelp").Output(); err != nil || !bytes.Contains(out, []byte("nbd")) {
		missing(t, "fio has no nbd engine")
	}
	_, path := serve(t, Options{}, Export{Name: "disk", Device: newFileDevice(t, 32<<20)})
	out := run(t, "fio", "--name=verify", "--ioengine=nbd", "--uri="+uri("disk", path), "--rw=randwrite", "--bs=4k-64k", "--iodepth=32",
		"--size=32m", "--io_size=32m", "--verify=crc32c", "--verify_state_save=0", "--verify_fatal=1", "--fsync=64", "--do_verify=1", "--allrandrepeat=1",
		"--output="+filepath.Join(t.TempDir(), "out"))
	if strings.Contains(out, "error") {
		t.Error(out)
	}
}

// TestKernelExt4 puts the kernel's ext4 on the server: nbdfuse makes a file
// of the export, a loop device a block device of the file.
func TestKernelExt4(t *testing.T) {
	for _, name := range []string{"nbdfuse", "losetup", "mkfs.ext4", "mount", "umount", "e2fsck", "debugfs", "fusermount3", "unshare"} {
		tool(t, name)
	}
	if _, err := os.Stat("/dev/fuse"); err != nil || os.Geteuid() != 0 {
		missing(t, "/dev/fuse and root are needed")
	}
	d := newFileDevice(t, 96<<20)
	_, path := serve(t, Options{}, Export{Name: "disk", Device: d})
	dir := t.TempDir()
	dev := loopOverFuse(t, filepath.Join(dir, "fuse"), path)
	runUnseen(t, "mkfs.ext4 -q", dev)
	mnt := filepath.Join(dir, "mnt")
	must(t, os.Mkdir(mnt, 0o700))
	src := randomFile(t, 20<<20)
	for pass := range 2 {
		run(t, "mount", "-o", "discard", dev, mnt)
		unmount := func() {
			run(t, "mount", "-o", "remount,ro", mnt) // a copy in another mount namespace may outlive the unmount
			run(t, "umount", mnt)
		}
		t.Cleanup(func() {
			if unmount != nil {
				unmount()
			}
		})
		name := filepath.Join(mnt, fmt.Sprintf("file%d", pass))
		run(t, "cp", src, name)
		run(t, "sync", name)
		for old := range pass + 1 {
			sameContent(t, src, filepath.Join(mnt, fmt.Sprintf("file%d", old)))
		}
		unmount()
		unmount = nil
		// What the server's side holds counts, not what caches above it do.
		for old := range pass + 1 {
			dump := filepath.Join(dir, "dump")
			run(t, "debugfs", "-R", fmt.Sprintf("dump /file%d %s", old, dump), d.f.Name())
			sameContent(t, src, dump)
		}
	}
	runUnseen(t, "e2fsck -fn", d.f.Name())
}

// runUnseen runs one of e2fsprogs without the list of mounts. They open every
// loop device in it, and would wait for one that somebody else has stalled.
func runUnseen(t *testing.T, command, file string) {
	t.Helper()
	run(t, "unshare", "-m", "sh", "-c", "mount -t tmpfs none /proc && exec "+command+` "$0"`, file)
}

// TestQemuReconnects: QEMU sends a request that was left unanswered again to
// the next server at the same path, and its user sees no error.
func TestQemuReconnects(t *testing.T) {
	d := newRAM(t, 1<<20)
	d.history = nil
	release := make(chan struct{})
	d.hook = func(op string, _, _ int64) error {
		if op == "flush" || op == "write-fua" {
			<-release
			return ErrGone
		}
		return nil
	}
	s, path := serve(t, Options{}, Export{Name: "disk", Device: d})
	open := opener(t, release)
	cmd := exec.Command(tool(t, "qemu-io"), "-t", "none", "--image-opts",
		"driver=nbd,server.type=unix,server.path="+path+",export=disk,reconnect-delay=60",
		"-c", "aio_write -f -P 5 0 4096", "-c", "aio_flush", "-c", "read -P 5 0 4096")
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	eventually(t, "a request hangs", func() bool { return slices.Contains(d.callsNow(), "write-fua 0+4096") })
	go open()
	s.Close()

	next := newRAM(t, 1<<20)
	next.history = nil
	s2 := NewServer(Options{})
	must(t, s2.Add(Export{Name: "disk", Device: next}))
	l, err := ListenUnix(path, -1, 0o600)
	must(t, err)
	go func() { _ = s2.Serve(context.Background(), l) }()
	defer s2.Close()
	if err := cmd.Wait(); err != nil || strings.Contains(said.String(), "rror") || strings.Contains(said.String(), "ailed") {
		t.Errorf("qemu-io: %v\n%s", err, said.String())
	}
	if calls := next.take(); !slices.Contains(calls, "write-fua 0+4096") {
		t.Errorf("the write was not sent again: %v", calls)
	}
}

// loopOverFuse makes a block device of the export, and takes it away at the end.
func loopOverFuse(t *testing.T, mnt, path string) string {
	t.Helper()
	must(t, os.Mkdir(mnt, 0o700))
	cmd := exec.Command(tool(t, "nbdfuse"), mnt, uri("disk", path))
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	must(t, cmd.Start())
	t.Cleanup(func() {
		if out, err := exec.Command("fusermount3", "-u", mnt).CombinedOutput(); err != nil {
			t.Errorf("fusermount3: %v %s", err, out)
		}
		if err := cmd.Wait(); err != nil {
			t.Errorf("nbdfuse: %v %s", err, said.String())
		}
	})
	file := filepath.Join(mnt, "nbd")
	eventually(t, "nbdfuse is up", func() bool { _, err := os.Stat(file); return err == nil })
	dev := strings.TrimSpace(run(t, "losetup", "-f", "--show", file))
	t.Cleanup(func() { run(t, "losetup", "-d", dev) })
	return dev
}
