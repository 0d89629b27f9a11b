package images

import (
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/sys/unix"
)

// osFile is an open file of OS. Every system call runs under raw.Control,
// which keeps the descriptor from being closed, and its number from being
// reused, in mid-call. ReadAt and WriteAt of os.File do the same; they also
// loop over short transfers and EINTR.
type osFile struct {
	f   *os.File
	raw syscall.RawConn

	// fullSync asks the next Datasync for an fsync: fdatasync need not write
	// an inode of which only the extended attributes changed (ext4's does not).
	fullSync atomic.Bool

	syncMu  sync.Mutex // held across fdatasync, see Datasync
	syncErr error      // the first Datasync error; it stays
}

func (o *osFile) ReadAt(p []byte, off int64) (int, error)  { return o.f.ReadAt(p, off) }
func (o *osFile) WriteAt(p []byte, off int64) (int, error) { return o.f.WriteAt(p, off) }
func (o *osFile) Truncate(size int64) error                { return o.f.Truncate(size) }
func (o *osFile) Close() error                             { return o.f.Close() }

// control runs one system call on the descriptor and names it in the error.
func (o *osFile) control(what string, call func(fd int) error) error {
	var err error
	if cerr := o.raw.Control(func(fd uintptr) {
		err = retry(func() error { return call(int(fd)) })
	}); cerr != nil {
		err = os.ErrClosed // the only reason Control has, in a form that callers can test for
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", what, o.f.Name(), err)
	}
	return nil
}

// Datasync makes every change completed before the call durable. Calls on one
// file run one after another: the kernel reports a write-back error to one
// caller only, and a second one in parallel would be told that all is well.
// For the same reason the first error is returned by every later call.
func (o *osFile) Datasync() error {
	o.syncMu.Lock()
	defer o.syncMu.Unlock()
	if o.syncErr != nil {
		return o.syncErr
	}
	if o.fullSync.Swap(false) {
		o.syncErr = o.control("fsync", unix.Fsync)
	} else {
		o.syncErr = o.control("fdatasync", unix.Fdatasync)
	}
	return o.syncErr
}

// DropCache asks the kernel to forget the file's clean pages. It keeps those that
// are mapped or being written, which an image has none of.
func (o *osFile) DropCache() error {
	return o.control("fadvise", func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
}

func (o *osFile) stat() (st unix.Stat_t, err error) {
	err = o.control("fstat", func(fd int) error { return unix.Fstat(fd, &st) })
	return st, err
}

func (o *osFile) Size() (int64, error) {
	st, err := o.stat()
	return st.Size, err
}

func (o *osFile) ModTime() (int64, error) {
	st, err := o.stat()
	return st.Mtim.Nano(), err
}

// PunchHole falls back to writing zeros where the file system has no holes.
func (o *osFile) PunchHole(off, n int64) error {
	return o.zero("punch hole", unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

// ZeroRange falls back to writing zeros where the file system cannot.
func (o *osFile) ZeroRange(off, n int64) error {
	return o.zero("zero range", unix.FALLOC_FL_ZERO_RANGE|unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (o *osFile) zero(what string, mode uint32, off, n int64) error {
	err := o.fallocate(what, mode, off, n)
	if errors.Is(err, unix.EOPNOTSUPP) {
		return o.writeZeros(off, n)
	}
	return err
}

func (o *osFile) Allocate(off, n int64) error {
	return o.fallocate("allocate", unix.FALLOC_FL_KEEP_SIZE, off, n)
}

func (o *osFile) fallocate(what string, mode uint32, off, n int64) error {
	if n == 0 && off >= 0 {
		return nil // fallocate(2) refuses an empty range
	}
	return o.control(what, func(fd int) error { return unix.Fallocate(fd, mode, off, n) })
}

var zeros [256 << 10]byte

// writeZeros zeros [off, off+n) piece by piece. It never grows the file:
// what lies past the end reads as zeros already.
func (o *osFile) writeZeros(off, n int64) error {
	size, err := o.Size()
	if err != nil {
		return err
	}
	if off < 0 || n < 0 {
		return fmt.Errorf("write zeros to %s: %w", o.f.Name(), unix.EINVAL)
	}
	for n = min(n, size-off); n > 0; {
		w, err := o.f.WriteAt(zeros[:min(n, int64(len(zeros)))], off)
		if err != nil {
			return err
		}
		off, n = off+int64(w), n-int64(w)
	}
	return nil
}

func (o *osFile) NextData(off int64) (start, end int64, err error) {
	if off < 0 { // lseek(2) says ENXIO, as for an offset past the end
		return 0, 0, fmt.Errorf("seek data in %s at %d: %w", o.f.Name(), off, unix.EINVAL)
	}
	err = o.control("seek data in", func(fd int) (err error) {
		if start, err = unix.Seek(fd, off, unix.SEEK_DATA); err != nil {
			return err
		}
		end, err = unix.Seek(fd, start, unix.SEEK_HOLE)
		return err
	})
	if errors.Is(err, unix.ENXIO) { // no data from off on, or off is past the end
		return 0, 0, io.EOF
	}
	return start, end, err
}

// Xattr reads the attribute under its full name ("user.…").
func (o *osFile) Xattr(name string) (value []byte, err error) {
	buf := make([]byte, 64<<10) // XATTR_SIZE_MAX: no value is larger
	err = o.control("read attribute "+name+" of", func(fd int) error {
		n, err := unix.Fgetxattr(fd, name, buf)
		if err == nil {
			value = append([]byte{}, buf[:n]...)
		}
		return err
	})
	if errors.Is(err, unix.ENODATA) {
		return nil, nil
	}
	return value, err
}

// SetXattr writes the attribute under its full name ("user.…").
func (o *osFile) SetXattr(name string, value []byte) error {
	err := o.control("set attribute "+name+" of", func(fd int) error {
		return unix.Fsetxattr(fd, name, value, 0)
	})
	if err == nil {
		o.fullSync.Store(true) // after the change: the Datasync that must cover it begins later
	}
	return err
}

// Lock takes an open-file-description write lock from byte 0 to infinity.
// QEMU's image locks are read locks of the same kind on bytes 100–163 and
// 200–263 (QEMU: block/file-posix.c, RAW_LOCK_PERM_BASE, RAW_LOCK_SHARED_BASE),
// so each refuses the other.
func (o *osFile) Lock() error {
	err := o.control("lock", func(fd int) error {
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		return ErrLocked
	}
	return err
}
