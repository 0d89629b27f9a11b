// Package ext4cap records what the kernel's file systems write to a disk: a
// FUSE file under a loop device, whose every write, zeroing and FLUSH is
// logged in the order in which it took effect. It needs root, /dev/fuse and loop devices.
//
// The loop device takes one request after the other, so a log shows what the
// block layer issued, merged as it was, and every write before a FLUSH in the log
// was answered before the FLUSH was sent.
package ext4cap

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// Kind of a Record.
type Kind uint8

// The kinds.
const (
	Write Kind = iota
	Zero       // the range reads as zeros
	Flush
	Note // Data says in words what the workload did: see Disk.Note
)

// Record is one request.
type Record struct {
	Kind Kind
	Off  int64
	Len  int64
	Data []byte
}

// Disk is a disk that logs.
type Disk struct {
	Dev  string // the loop device
	Path string // the FUSE file
	size int64

	dir    string
	back   *os.File
	server *fuse.Server

	mu  sync.Mutex
	log []Record
}

// New makes an empty disk of size bytes in dir, without a log.
func New(dir string, size int64) (*Disk, error) {
	d := &Disk{size: size, dir: filepath.Join(dir, "fuse"), Path: filepath.Join(dir, "fuse", "disk")}
	back, err := os.OpenFile(filepath.Join(dir, "back"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	d.back = back
	if err := errors.Join(back.Truncate(size), os.Mkdir(d.dir, 0o700)); err != nil {
		return nil, errors.Join(err, back.Close())
	}
	timeout := time.Hour
	d.server, err = fs.Mount(d.dir, &root{d: d}, &fs.Options{AttrTimeout: &timeout, EntryTimeout: &timeout,
		MountOptions: fuse.MountOptions{FsName: "ext4cap", MaxWrite: 1 << 20, DirectMount: true}})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount FUSE: %w", err), back.Close())
	}
	if err := d.attach(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// attach finds a loop device; another process may be faster, so it tries again.
func (d *Disk) attach() error {
	var out []byte
	for range 20 {
		out, _ = exec.Command("losetup", "-f", "--show", d.Path).CombinedOutput()
		if dev := strings.TrimSpace(string(out)); strings.HasPrefix(dev, "/dev/loop") {
			d.Dev = dev
			return nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return fmt.Errorf("losetup: %s", out)
}

// Close detaches and unmounts. The backing file stays.
func (d *Disk) Close() error {
	var errs []error
	if d.Dev != "" {
		errs = append(errs, exec.Command("losetup", "-d", d.Dev).Run())
	}
	for range 50 {
		err := d.server.Unmount()
		if err == nil {
			break
		}
		time.Sleep(20 * time.Millisecond)
	}
	return errors.Join(append(errs, d.back.Close())...)
}

// Size is the disk's size in bytes.
func (d *Disk) Size() int64 { return d.size }

// Image copies what the disk holds now.
func (d *Disk) Image() ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := make([]byte, d.size)
	_, err := d.back.ReadAt(p, 0)
	return p, err
}

// Note puts a mark into the log.
func (d *Disk) Note(text string) { d.add(Record{Kind: Note, Data: []byte(text)}) }

// Log returns what was logged since the last call.
func (d *Disk) Log() []Record {
	d.mu.Lock()
	defer d.mu.Unlock()
	l := d.log
	d.log = nil
	return l
}

func (d *Disk) add(r Record) {
	d.mu.Lock()
	d.log = append(d.log, r)
	d.mu.Unlock()
}

// root is the FUSE file system's only folder.
type root struct {
	fs.Inode
	d *Disk
}

func (r *root) OnAdd(ctx context.Context) {
	r.AddChild("disk", r.NewPersistentInode(ctx, &file{d: r.d}, fs.StableAttr{Mode: fuse.S_IFREG}), false)
}

// file is the disk as a file.
type file struct {
	fs.Inode
	d *Disk
}

var (
	_ fs.NodeGetattrer = (*file)(nil)
	_ fs.NodeOpener    = (*file)(nil)
	_ fs.NodeReader    = (*file)(nil)
	_ fs.NodeWriter    = (*file)(nil)
	_ fs.NodeFsyncer   = (*file)(nil)
	_ fs.NodeAllocater = (*file)(nil)
	_ fs.NodeSetattrer = (*file)(nil)
)

func (f *file) Getattr(_ context.Context, _ fs.FileHandle, out *fuse.AttrOut) syscall.Errno {
	out.Mode, out.Size, out.Nlink = fuse.S_IFREG|0o600, uint64(f.d.size), 1
	return 0
}

func (f *file) Setattr(ctx context.Context, h fs.FileHandle, _ *fuse.SetAttrIn, out *fuse.AttrOut) syscall.Errno {
	return f.Getattr(ctx, h, out)
}

// Open makes every write come at once: the page cache would keep them until a FLUSH.
func (f *file) Open(context.Context, uint32) (fs.FileHandle, uint32, syscall.Errno) {
	return nil, fuse.FOPEN_DIRECT_IO, 0
}

func (f *file) Read(_ context.Context, _ fs.FileHandle, p []byte, off int64) (fuse.ReadResult, syscall.Errno) {
	n, err := f.d.back.ReadAt(p, off)
	if n == 0 && err != nil {
		return nil, syscall.EIO
	}
	return fuse.ReadResultData(p[:n]), 0
}

func (f *file) Write(_ context.Context, _ fs.FileHandle, p []byte, off int64) (uint32, syscall.Errno) {
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if _, err := d.back.WriteAt(p, off); err != nil {
		return 0, syscall.EIO
	}
	d.log = append(d.log, Record{Kind: Write, Off: off, Len: int64(len(p)), Data: append([]byte(nil), p...)})
	return uint32(len(p)), 0
}

func (f *file) Fsync(context.Context, fs.FileHandle, uint32) syscall.Errno {
	f.d.add(Record{Kind: Flush})
	return 0
}

func (f *file) Allocate(_ context.Context, _ fs.FileHandle, off, n uint64, mode uint32) syscall.Errno {
	d := f.d
	if mode&(unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_ZERO_RANGE) == 0 {
		return syscall.EOPNOTSUPP
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := unix.Fallocate(int(d.back.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, int64(off), int64(n)); err != nil {
		return syscall.EIO
	}
	d.log = append(d.log, Record{Kind: Zero, Off: int64(off), Len: int64(n)})
	return 0
}
