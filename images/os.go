package images

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sys/unix"
)

// OS is the real file system (Linux).
type OS struct{}

// Open opens an existing regular file for reading and writing. Anything else
// (folder, device, FIFO) is refused: sizes and holes mean nothing there.
func (OS) Open(name string) (File, error) {
	// O_NONBLOCK keeps the open of a FIFO from waiting; it does nothing to regular files.
	return asFile(openOS(name, os.O_RDWR|unix.O_NONBLOCK, 0))
}

// Create makes a new, empty file. perm is subject to the umask.
func (OS) Create(name string, perm fs.FileMode) (File, error) {
	return asFile(openOS(name, os.O_RDWR|os.O_CREATE|os.O_EXCL, perm))
}

// asFile keeps a nil *osFile from becoming a File that is not nil.
func asFile(f *osFile, err error) (File, error) {
	if err != nil {
		return nil, err
	}
	return f, nil
}

func openOS(name string, flags int, perm fs.FileMode) (*osFile, error) {
	f, err := os.OpenFile(name, flags, perm)
	if err != nil {
		return nil, err
	}
	of, err := wrapOS(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return of, nil
}

func wrapOS(f *os.File) (*osFile, error) {
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() {
		return nil, fmt.Errorf("open %s: not a regular file", f.Name())
	}
	raw, err := f.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", f.Name(), err)
	}
	return &osFile{f: f, raw: raw}, nil
}

// Rename moves from over to. Durable after SyncDir.
func (OS) Rename(from, to string) error { return os.Rename(from, to) }

// Remove deletes a file. Durable after SyncDir.
func (OS) Remove(name string) error { return os.Remove(name) }

// ReadDir lists the names in a folder, sorted.
func (OS) ReadDir(dir string) (names []string, err error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if names, err = d.Readdirnames(-1); err != nil {
		return nil, err
	}
	slices.Sort(names)
	return names, nil
}

// MkdirAll makes dir and the parents it lacks. Each new name is durable when
// it returns: its parent was fsynced. Folders that were there are left as they are.
func (o OS) MkdirAll(dir string, perm fs.FileMode) error {
	dir = filepath.Clean(dir)
	st, err := os.Stat(dir)
	if err == nil {
		if !st.IsDir() {
			return fmt.Errorf("mkdir %s: %w", dir, unix.ENOTDIR)
		}
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	parent := filepath.Dir(dir)
	if err := o.MkdirAll(parent, perm); err != nil {
		return err
	}
	if err := os.Mkdir(dir, perm); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return o.SyncDir(parent)
}

// SyncDir is fsync(2) on a folder: names made, renamed and removed in it
// before the call are durable when it returns nil.
func (OS) SyncDir(dir string) (err error) {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	return d.Sync()
}

// Free is the space left for unprivileged users at dir, in bytes.
func (OS) Free(dir string) (int64, error) {
	var st unix.Statfs_t
	if err := retry(func() error { return unix.Statfs(dir, &st) }); err != nil {
		return 0, fmt.Errorf("statfs %s: %w", dir, err)
	}
	unit := uint64(st.Frsize)
	if unit == 0 {
		unit = uint64(st.Bsize)
	}
	if unit != 0 && st.Bavail > math.MaxInt64/unit {
		return math.MaxInt64, nil
	}
	return int64(st.Bavail * unit), nil
}

// retry repeats a system call that a signal interrupted.
func retry(call func() error) error {
	for {
		if err := call(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}
