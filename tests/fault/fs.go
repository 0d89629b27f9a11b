package fault

import (
	"errors"
	"io/fs"
	"path"
	"sort"
	"sync/atomic"

	"kagami/images"
)

// ErrStopped is returned by every operation of a machine that crashed or was killed.
var ErrStopped = errors.New("the machine has stopped")

// FS is the file system as one boot (or one process) sees it. Crash and Kill
// end it and return the next one.
type FS struct {
	d       *disk
	open    map[*inode]int
	stopped bool
	steps   int64
	stopAt  int64 // step at which it stops, 0: never
	faults  []*Fault
	fired   int
	hook    atomic.Pointer[func(Op, string) error] // see SetHook
}

var _ images.FS = (*FS)(nil)

// NewFS makes an empty file system whose random choices come from seed. The
// folders "/" and "." exist.
func NewFS(seed int64) *FS {
	d := newDisk(seed)
	d.boot = &FS{d: d, open: map[*inode]int{}}
	return d.boot
}

// Crash is a power loss and the restart after it. Every handle of f, and f
// itself, return ErrStopped from now on.
func (f *FS) Crash() *FS { return f.restart((*disk).powerLoss) }

// Kill is the death of the process and its restart: what was written is
// still read, and still not durable.
func (f *FS) Kill() *FS { return f.restart(func(*disk) {}) }

func (f *FS) restart(loss func(*disk)) *FS {
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.boot != f {
		panic("fault: this FS was restarted before")
	}
	f.stopped = true
	loss(d)
	for _, i := range d.inodes(true) {
		i.locker = nil
	}
	d.boot = &FS{d: d, open: map[*inode]int{}}
	return d.boot
}

// Fork copies the machine as it is, page cache and pending changes included;
// the copy's random choices come from seed. It has no open files.
func (f *FS) Fork(seed int64) *FS {
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	n := newDisk(seed)
	n.capacity, n.clock, n.ticks = d.capacity, d.clock, d.ticks
	for k := range d.dirs {
		n.dirs[k] = true
	}
	twin := map[*inode]*inode{nil: nil}
	for _, i := range d.inodes(true) {
		twin[i] = &inode{cur: i.cur.clone(), durable: i.durable.clone(), pending: append([]change(nil), i.pending...),
			mtime: i.mtime, durableMtime: i.durableMtime}
	}
	for k, i := range d.names {
		n.names[k] = twin[i]
	}
	for k, i := range d.durable {
		n.durable[k] = twin[i]
	}
	for _, o := range d.nameOps {
		n.nameOps = append(n.nameOps, nameOp{from: o.from, to: o.to, ino: twin[o.ino]})
	}
	n.boot = &FS{d: n, open: map[*inode]int{}}
	return n.boot
}

// Open opens an existing file.
func (f *FS) Open(name string) (images.File, error) {
	name = path.Clean(name)
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.stopped {
		return nil, pathError("open", name, ErrStopped)
	}
	i, err := d.lookup(name)
	if err != nil {
		return nil, pathError("open", name, err)
	}
	return f.handle(i, name), nil
}

func (f *FS) handle(i *inode, name string) *File {
	f.open[i]++
	return &File{fs: f, ino: i, name: name}
}

// Create makes a new, empty file; its name is durable after SyncDir.
func (f *FS) Create(name string, _ fs.FileMode) (images.File, error) {
	name = path.Clean(name)
	var h *File
	err := f.do(OpCreate, name, func() error {
		if f.d.names[name] != nil || f.d.dirs[name] {
			return fs.ErrExist
		}
		if !f.d.dirs[path.Dir(name)] {
			return fs.ErrNotExist
		}
		i := newInode()
		i.mtime = f.d.now()
		f.d.nameOp(nameOp{to: name, ino: i})
		h = f.handle(i, name)
		return nil
	})
	if err != nil {
		return nil, err
	}
	return h, nil
}

// Rename moves a file over another one.
func (f *FS) Rename(from, to string) error {
	from, to = path.Clean(from), path.Clean(to)
	return f.do(OpRename, from, func() error {
		if _, err := f.d.lookup(from); err != nil {
			return err
		}
		if f.d.dirs[to] {
			return fs.ErrExist
		}
		if !f.d.dirs[path.Dir(to)] {
			return fs.ErrNotExist
		}
		if from != to {
			f.d.nameOp(nameOp{from: from, to: to})
		}
		return nil
	})
}

// Remove deletes a file; open handles go on working.
func (f *FS) Remove(name string) error {
	name = path.Clean(name)
	return f.do(OpRemove, name, func() error {
		if _, err := f.d.lookup(name); err != nil {
			return err
		}
		f.d.nameOp(nameOp{from: name})
		return nil
	})
}

// ReadDir lists files and folders in dir.
func (f *FS) ReadDir(dir string) ([]string, error) {
	dir = path.Clean(dir)
	d := f.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if f.stopped {
		return nil, pathError("readdir", dir, ErrStopped)
	}
	if !d.dirs[dir] {
		return nil, pathError("readdir", dir, fs.ErrNotExist)
	}
	names := []string{}
	for n := range d.names {
		if path.Dir(n) == dir {
			names = append(names, path.Base(n))
		}
	}
	for n := range d.dirs {
		if n != dir && path.Dir(n) == dir {
			names = append(names, path.Base(n))
		}
	}
	sort.Strings(names)
	return names, nil
}

// MkdirAll makes folders; they are durable at once.
func (f *FS) MkdirAll(dir string, _ fs.FileMode) error {
	dir = path.Clean(dir)
	return f.do(OpMkdir, dir, func() error {
		for p := dir; !f.d.dirs[p]; p = path.Dir(p) {
			if f.d.names[p] != nil {
				return fs.ErrExist
			}
		}
		for p := dir; !f.d.dirs[p]; p = path.Dir(p) {
			f.d.dirs[p] = true
		}
		return nil
	})
}

// SyncDir makes the names in dir durable.
func (f *FS) SyncDir(dir string) error {
	dir = path.Clean(dir)
	return f.do(OpSyncDir, dir, func() error {
		if !f.d.dirs[dir] {
			return fs.ErrNotExist
		}
		f.d.syncDir(dir)
		return nil
	})
}

// Free is the space left under the capacity; 1 PiB when there is none.
func (f *FS) Free(dir string) (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	if f.stopped {
		return 0, pathError("statfs", dir, ErrStopped)
	}
	if f.d.capacity == 0 {
		return 1 << 50, nil
	}
	return max(0, f.d.capacity-f.d.used()), nil
}

func pathError(op, name string, err error) error {
	if err == nil {
		return nil
	}
	return &fs.PathError{Op: op, Path: name, Err: err}
}
