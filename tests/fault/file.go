package fault

import (
	"bytes"
	"io"
	"io/fs"
	"syscall"

	"kagami/images"
)

// File is an open file.
type File struct {
	fs     *FS
	ino    *inode
	name   string
	closed bool
}

var _ images.File = (*File)(nil)

// usable locks the disk; the caller unlocks it whatever the error.
func (h *File) usable() error {
	h.fs.d.mu.Lock()
	switch {
	case h.fs.stopped:
		return ErrStopped
	case h.closed:
		return fs.ErrClosed
	}
	return nil
}

// change runs a step on the file.
func (h *File) change(op Op, off, n int64, step func() error) error {
	return h.fs.do(op, h.name, func() error {
		if h.closed {
			return fs.ErrClosed
		}
		if off < 0 || n < 0 {
			return syscall.EINVAL
		}
		return step()
	})
}

func (h *File) apply(c change) {
	h.ino.change(c)
	h.ino.mtime = h.fs.d.now()
}

// ReadAt reads what was written last.
func (h *File) ReadAt(p []byte, off int64) (int, error) {
	if hook := h.fs.hook.Load(); hook != nil {
		if err := (*hook)(OpRead, h.name); err != nil {
			return 0, pathError("read", h.name, err)
		}
	}
	err := h.usable()
	defer h.fs.d.mu.Unlock()
	if err != nil {
		return 0, pathError("read", h.name, err)
	}
	if x := h.fs.match(OpRead, h.name); x != nil {
		return 0, pathError("read", h.name, x.Err)
	}
	if off < 0 {
		return 0, pathError("read", h.name, syscall.EINVAL)
	}
	n := max(0, min(int64(len(p)), h.ino.cur.size-off))
	h.ino.cur.read(p[:n], off)
	if n < int64(len(p)) {
		return int(n), io.EOF
	}
	return int(n), nil
}

// WriteAt writes p, or a part of it when it fails.
func (h *File) WriteAt(p []byte, off int64) (int, error) {
	if hook := h.fs.hook.Load(); hook != nil {
		if err := (*hook)(OpWrite, h.name); err != nil {
			return 0, pathError("write", h.name, err)
		}
	}
	d := h.fs.d
	d.mu.Lock()
	defer d.mu.Unlock()
	v := h.fs.begin(OpWrite, h.name)
	switch {
	case h.closed:
		return 0, pathError("write", h.name, fs.ErrClosed)
	case off < 0:
		return 0, pathError("write", h.name, syscall.EINVAL)
	case v.err != nil && !v.apply && !v.part:
		return 0, pathError("write", h.name, v.err)
	case v.part && len(p) > 0:
		p = p[:d.rng.IntN(len(p))]
	}
	n, err := h.fit(p, off)
	if n > 0 {
		h.apply(writeChange(p[:n], off))
	}
	if v.err != nil {
		err = v.err
	}
	return n, pathError("write", h.name, err)
}

// fit tells how much of a write there is space for.
func (h *File) fit(p []byte, off int64) (int, error) {
	d := h.fs.d
	if err := d.room(h.ino, off, int64(len(p))); err == nil {
		return len(p), nil
	}
	left := (d.capacity - d.used()) / pageBytes
	n := 0
	for n < len(p) {
		at := off + int64(n)
		if !h.ino.cur.allocated(at / pageBytes) {
			if left <= 0 {
				break
			}
			left--
		}
		n += int(min(int64(len(p)-n), pageBytes-at%pageBytes))
	}
	return n, syscall.ENOSPC
}

// Datasync makes the file durable. When it fails by injection, a random part
// of the pending changes is durable and the rest never will be, although
// reads may still show it.
func (h *File) Datasync() error {
	if hook := h.fs.hook.Load(); hook != nil {
		if err := (*hook)(OpSync, h.name); err != nil {
			return pathError("datasync", h.name, err)
		}
	}
	d := h.fs.d
	d.mu.Lock()
	defer d.mu.Unlock()
	v := h.fs.begin(OpSync, h.name)
	i := h.ino
	switch {
	case h.closed:
		return pathError("datasync", h.name, fs.ErrClosed)
	case v.err == nil || v.apply:
		i.sync()
		if d.rng.IntN(2) == 0 { // fdatasync need not write the times
			i.durableMtime = i.mtime
		}
	case !h.fs.stopped:
		i.lose(d.rng)
		if d.rng.IntN(2) == 0 {
			i.cur = i.durable.clone()
		}
	}
	return pathError("datasync", h.name, v.err)
}

// DropCache makes reads see what is durable, whatever was pending.
func (h *File) DropCache() error {
	err := h.usable()
	defer h.fs.d.mu.Unlock()
	if err == nil {
		h.ino.lose(h.fs.d.rng)
		h.ino.cur = h.ino.durable.clone()
	}
	return pathError("fadvise", h.name, err)
}

// Truncate sets the size.
func (h *File) Truncate(size int64) error {
	return h.change(OpTruncate, size, 0, func() error {
		h.apply(change{kind: doTruncate, off: size})
		return nil
	})
}

// Size is the file's length.
func (h *File) Size() (int64, error) {
	err := h.usable()
	defer h.fs.d.mu.Unlock()
	return h.ino.cur.size, pathError("stat", h.name, err)
}

// inside clips a range to the file's size.
func (h *File) inside(off, n int64) int64 { return max(0, min(n, h.ino.cur.size-off)) }

// PunchHole zeroes a range and gives its space back.
func (h *File) PunchHole(off, n int64) error {
	return h.change(OpPunch, off, n, func() error {
		h.apply(change{kind: doPunch, off: off, n: h.inside(off, n)})
		return nil
	})
}

// ZeroRange zeroes a range and keeps its space.
func (h *File) ZeroRange(off, n int64) error {
	return h.change(OpZero, off, n, func() error {
		n := h.inside(off, n)
		if err := h.fs.d.room(h.ino, off, n); err != nil {
			return err
		}
		h.apply(change{kind: doZero, off: off, n: n})
		return nil
	})
}

// Allocate reserves space.
func (h *File) Allocate(off, n int64) error {
	return h.change(OpAllocate, off, n, func() error {
		if err := h.fs.d.room(h.ino, off, n); err != nil {
			return err
		}
		h.ino.change(change{kind: doAllocate, off: off, n: n})
		return nil
	})
}

// NextData finds the next run of pages that were written.
func (h *File) NextData(off int64) (start, end int64, err error) {
	err = h.usable()
	defer h.fs.d.mu.Unlock()
	if err != nil {
		return 0, 0, pathError("seek", h.name, err)
	}
	start, end, ok := h.ino.cur.nextData(off)
	if !ok {
		return 0, 0, io.EOF
	}
	return start, end, nil
}

// Xattr reads an extended attribute.
func (h *File) Xattr(name string) ([]byte, error) {
	err := h.usable()
	defer h.fs.d.mu.Unlock()
	if err != nil {
		return nil, pathError("getxattr", h.name, err)
	}
	return bytes.Clone(h.ino.cur.xattr[name]), nil
}

// SetXattr writes an extended attribute.
func (h *File) SetXattr(name string, value []byte) error {
	return h.change(OpXattr, 0, 0, func() error {
		h.ino.change(change{kind: doXattr, name: name, data: append([]byte{}, value...)})
		return nil
	})
}

// ModTime is the time of the last change of content.
func (h *File) ModTime() (int64, error) {
	err := h.usable()
	defer h.fs.d.mu.Unlock()
	return h.ino.mtime, pathError("stat", h.name, err)
}

// Lock locks the file against other handles.
func (h *File) Lock() error {
	err := h.usable()
	defer h.fs.d.mu.Unlock()
	if err != nil {
		return pathError("lock", h.name, err)
	}
	if h.ino.locker != nil && h.ino.locker != h {
		return pathError("lock", h.name, images.ErrLocked)
	}
	h.ino.locker = h
	return nil
}

// Close releases the file and its lock.
func (h *File) Close() error {
	d := h.fs.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if h.closed {
		return pathError("close", h.name, fs.ErrClosed)
	}
	h.closed = true
	if h.fs.stopped {
		return nil
	}
	if h.ino.locker == h {
		h.ino.locker = nil
	}
	if h.fs.open[h.ino]--; h.fs.open[h.ino] == 0 {
		delete(h.fs.open, h.ino)
	}
	return nil
}
