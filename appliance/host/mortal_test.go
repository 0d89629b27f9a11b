package host

import (
	"errors"
	"io/fs"
	"strings"
	"sync"

	"kagami/images"
)

// errDead is what a killed daemon's calls return; nobody sees it.
var errDead = errors.New("this daemon was killed")

// mortalFS is the file system of one life of a daemon. After die nothing that
// life still does changes a file, as if the process had been killed there.
type mortalFS struct {
	images.FS
	mu   sync.RWMutex // read: for the time of one change
	dead bool
	// free is what Free says, by the beginning of a path; the longest wins.
	free map[string]int64
	// fail may fail a change by what it is ("rename", …) and its path.
	fail func(op, path string) error
}

func newMortalFS() *mortalFS { return &mortalFS{FS: images.OS{}, free: map[string]int64{}} }

func (m *mortalFS) die() {
	m.mu.Lock()
	m.dead = true
	m.mu.Unlock()
}

func (m *mortalFS) set(change func()) {
	m.mu.Lock()
	change()
	m.mu.Unlock()
}

func (m *mortalFS) change(op, path string, do func() error) error {
	m.mu.RLock()
	defer m.mu.RUnlock()
	if m.dead {
		return errDead
	}
	if m.fail != nil {
		if err := m.fail(op, path); err != nil {
			return err
		}
	}
	return do()
}

func (m *mortalFS) Open(name string) (images.File, error) {
	f, err := m.FS.Open(name)
	if err != nil {
		return nil, err
	}
	return &mortalFile{f, m, name}, nil
}

func (m *mortalFS) Create(name string, perm fs.FileMode) (f images.File, err error) {
	err = m.change("create", name, func() error {
		f, err = m.FS.Create(name, perm)
		return err
	})
	if err != nil {
		return nil, err
	}
	return &mortalFile{f, m, name}, nil
}

func (m *mortalFS) Rename(from, to string) error {
	return m.change("rename", to, func() error { return m.FS.Rename(from, to) })
}

func (m *mortalFS) Remove(name string) error {
	return m.change("remove", name, func() error { return m.FS.Remove(name) })
}

func (m *mortalFS) MkdirAll(dir string, perm fs.FileMode) error {
	return m.change("mkdir", dir, func() error { return m.FS.MkdirAll(dir, perm) })
}

func (m *mortalFS) SyncDir(dir string) error {
	return m.change("syncdir", dir, func() error { return m.FS.SyncDir(dir) })
}

func (m *mortalFS) Free(dir string) (int64, error) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	best := -1
	for prefix := range m.free {
		if strings.HasPrefix(dir, prefix) && len(prefix) > best {
			best = len(prefix)
		}
	}
	if best >= 0 {
		return m.free[dir[:best]], nil
	}
	return m.FS.Free(dir)
}

type mortalFile struct {
	images.File
	m    *mortalFS
	name string
}

func (f *mortalFile) WriteAt(p []byte, off int64) (n int, err error) {
	err = f.m.change("write", f.name, func() error {
		n, err = f.File.WriteAt(p, off)
		return err
	})
	return n, err
}

func (f *mortalFile) Datasync() error { return f.m.change("datasync", f.name, f.File.Datasync) }

func (f *mortalFile) Truncate(size int64) error {
	return f.m.change("truncate", f.name, func() error { return f.File.Truncate(size) })
}

func (f *mortalFile) PunchHole(off, n int64) error {
	return f.m.change("punch", f.name, func() error { return f.File.PunchHole(off, n) })
}

func (f *mortalFile) ZeroRange(off, n int64) error {
	return f.m.change("zero", f.name, func() error { return f.File.ZeroRange(off, n) })
}

func (f *mortalFile) Allocate(off, n int64) error {
	return f.m.change("allocate", f.name, func() error { return f.File.Allocate(off, n) })
}

func (f *mortalFile) SetXattr(name string, v []byte) error {
	return f.m.change("setxattr", f.name, func() error { return f.File.SetXattr(name, v) })
}

func (f *mortalFile) ReadAt(p []byte, off int64) (n int, err error) {
	f.m.mu.RLock()
	fail := f.m.fail
	f.m.mu.RUnlock()
	if fail != nil {
		if err := fail("read", f.name); err != nil {
			return 0, err
		}
	}
	return f.File.ReadAt(p, off)
}
