package images

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"syscall"
)

// IdentityAttr is the extended attribute that binds an image to a disk: the
// disk's UUID as text.
const IdentityAttr = "user.kagami.disk"

// Errors of opening and using an image.
var (
	// ErrIdentity: the image belongs to another disk, or to none.
	ErrIdentity = errors.New("image is not this disk's")
	// ErrSize: the image does not have the disk's size.
	ErrSize = errors.New("image has the wrong size")
	// ErrRange: an offset or length outside the image.
	ErrRange = errors.New("outside the image")
	// ErrNoSpace: the file system lacks the room. It is found before anything is written.
	ErrNoSpace = errors.New("not enough free space")
)

// Want is what OpenImage insists on.
type Want struct {
	Size     int64  // bytes; 0 accepts any size above zero
	Identity string // value of IdentityAttr; "" accepts any, or none
}

// Image is a raw file served as a block device of fixed size. It is locked
// for as long as it is open: QEMU and other openers are refused. All methods
// are safe for concurrent use; ordering overlapping changes is the caller's part.
//
// Invariant: the file keeps its size; nothing outside [0, size) is touched.
type Image struct {
	f    File
	path string
	size int64
}

// OpenImage opens, locks and checks the image at path. Errors wrap
// fs.ErrNotExist, ErrLocked, ErrSize or ErrIdentity.
func OpenImage(fsys FS, path string, want Want) (*Image, error) {
	f, err := fsys.Open(path)
	if err != nil {
		return nil, err // it names the file and what was tried
	}
	img, err := checkImage(f, path, want)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open image %s: %w", path, err), f.Close())
	}
	return img, nil
}

func checkImage(f File, path string, want Want) (*Image, error) {
	if err := f.Lock(); err != nil {
		return nil, err
	}
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size <= 0 || want.Size != 0 && size != want.Size {
		return nil, fmt.Errorf("%w: %d bytes, want %d", ErrSize, size, want.Size)
	}
	img := &Image{f: f, path: path, size: size}
	if want.Identity == "" {
		return img, nil
	}
	id, err := img.Identity()
	if err != nil {
		return nil, err
	}
	if id != want.Identity {
		return nil, fmt.Errorf("%w: its %s is %q, want %q", ErrIdentity, IdentityAttr, id, want.Identity)
	}
	return img, nil
}

// CreateImage makes a sparse image of size bytes, with an identity ("" for none),
// and returns it open and locked. See MakeImage.
func CreateImage(fsys FS, path string, size int64, identity string) (*Image, error) {
	return MakeImage(fsys, path, size, func(i *Image) error {
		if identity == "" {
			return nil
		}
		if err := i.f.SetXattr(IdentityAttr, []byte(identity)); err != nil {
			return fmt.Errorf("set identity: %w", err)
		}
		return nil
	})
}

// MakeImage makes an image of size bytes with the content that fill writes to it,
// and returns it open and locked. It is complete and durable under path, or not
// there: it is made under path+TempSuffix (what a crash left there is removed),
// filled, fdatasynced, renamed, and its folder fsynced. An existing path is fs.ErrExist.
func MakeImage(fsys FS, path string, size int64, fill func(*Image) error) (*Image, error) {
	if size <= 0 {
		return nil, fmt.Errorf("create image %s: %w: %d bytes", path, ErrSize, size)
	}
	if err := mustNotExist(fsys, path); err != nil {
		return nil, fmt.Errorf("create image: %w", err)
	}
	temp := path + TempSuffix
	f, err := createFresh(fsys, temp, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create image: %w", err)
	}
	img := &Image{f: f, path: path, size: size}
	if err := img.prepare(fill); err != nil {
		return nil, img.discard(fsys, temp, err)
	}
	if err := fsys.Rename(temp, path); err != nil {
		return nil, img.discard(fsys, temp, fmt.Errorf("rename %s: %w", temp, err))
	}
	if err := fsys.SyncDir(filepath.Dir(path)); err != nil {
		return nil, img.discard(fsys, path, fmt.Errorf("fsync folder: %w", err))
	}
	return img, nil
}

func mustNotExist(fsys FS, path string) error {
	f, err := fsys.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return errors.Join(fmt.Errorf("%s: %w", path, fs.ErrExist), f.Close())
}

// prepare locks a new file and makes size and content durable.
func (i *Image) prepare(fill func(*Image) error) error {
	if err := i.f.Lock(); err != nil {
		return err
	}
	if err := i.f.Truncate(i.size); err != nil {
		return fmt.Errorf("set size: %w", err)
	}
	if err := fill(i); err != nil {
		return err
	}
	return i.f.Datasync()
}

// discard takes back an image that could not be completed.
func (i *Image) discard(fsys FS, name string, err error) error {
	err = errors.Join(fmt.Errorf("create image %s: %w", i.path, err), i.f.Close())
	return removeAfter(fsys, name, err)
}

// NoSpace tells whether an error says that a file system, or somebody's share of
// it, is full: something that passes when there is room again.
func NoSpace(err error) bool {
	return errors.Is(err, ErrNoSpace) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT)
}

// CheckSpace fails with ErrNoSpace when dir has less than need bytes left for
// unprivileged users.
func CheckSpace(fsys FS, dir string, need int64) error {
	free, err := fsys.Free(dir)
	if err != nil {
		return err
	}
	if free < need {
		return fmt.Errorf("%s: %w: %d bytes needed, %d free", dir, ErrNoSpace, need, free)
	}
	return nil
}

// Path is the name the image was opened under.
func (i *Image) Path() string { return i.path }

// Size is the image's length in bytes. It never changes.
func (i *Image) Size() int64 { return i.size }

// Identity is the value of IdentityAttr, "" when there is none.
func (i *Image) Identity() (string, error) {
	v, err := i.Attr(IdentityAttr)
	return string(v), err
}

// Attr reads the extended attribute under its full name ("user.…"); a missing one is nil.
func (i *Image) Attr(name string) ([]byte, error) { return i.f.Xattr(name) }

// SetAttr writes the extended attribute; durable after Datasync.
func (i *Image) SetAttr(name string, v []byte) error { return i.f.SetXattr(name, v) }

// ModTime is the time of the last change of content, ns since 1970.
func (i *Image) ModTime() (int64, error) { return i.f.ModTime() }

// File is the open file behind the image.
func (i *Image) File() File { return i.f }

// inside checks a range. An empty one may lie at the end.
func (i *Image) inside(off, n int64) error {
	if off < 0 || n < 0 || off > i.size || n > i.size-off {
		return fmt.Errorf("%s: %w: %d bytes at %d, size %d", i.path, ErrRange, n, off, i.size)
	}
	return nil
}

// ReadAt reads as io.ReaderAt does: past the end it is short, with io.EOF. A
// file that was cut short behind our back is io.ErrUnexpectedEOF.
func (i *Image) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, i.inside(off, 0)
	}
	want := min(int64(len(p)), max(i.size-off, 0))
	n, err := i.f.ReadAt(p[:want], off)
	if int64(n) < want {
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return n, fmt.Errorf("read %s: %w", i.path, err)
	}
	if want < int64(len(p)) {
		return n, io.EOF
	}
	return n, nil
}

// WriteAt writes p. After an error any part of the range may have changed.
func (i *Image) WriteAt(p []byte, off int64) (int, error) {
	if err := i.inside(off, int64(len(p))); err != nil {
		return 0, err
	}
	return i.f.WriteAt(p, off)
}

// WriteZeroes makes [off, off+n) read as zeros. With noHole the space stays
// reserved, else it is given back.
func (i *Image) WriteZeroes(off, n int64, noHole bool) error {
	if err := i.inside(off, n); err != nil {
		return err
	}
	if noHole {
		return i.f.ZeroRange(off, n)
	}
	return i.f.PunchHole(off, n)
}

// Trim gives the space of [off, off+n) back; it reads as zeros afterwards.
func (i *Image) Trim(off, n int64) error { return i.WriteZeroes(off, n, false) }

// Allocate reserves space for [off, off+n) without changing what it reads as.
func (i *Image) Allocate(off, n int64) error {
	if err := i.inside(off, n); err != nil {
		return err
	}
	return i.f.Allocate(off, n)
}

// Datasync makes every change completed before the call durable. An error is
// final: the image must not be used again.
func (i *Image) Datasync() error { return i.f.Datasync() }

// Settle makes what the image holds durable and lets later reads see what the disk
// really has. It is for an image whose last user did not end in good order: that may
// have been because of a failed fdatasync, after which pages read well that never reached the disk.
func (i *Image) Settle() error {
	if err := i.f.Datasync(); err != nil {
		return err
	}
	return i.f.DropCache()
}

// Close releases the image and its lock. It makes nothing durable.
func (i *Image) Close() error { return i.f.Close() }

// Extent is a run of bytes: data, or a hole that reads as zeros.
type Extent struct {
	Offset int64
	Length int64
	Hole   bool
}

// NextData finds the first allocated run that ends after off, clipped to
// start at off or later and to end at size. With none left it returns io.EOF.
func (i *Image) NextData(off int64) (start, end int64, err error) {
	start, end, err = i.f.NextData(off)
	if err != nil {
		return 0, 0, err
	}
	if end = min(end, i.size); start >= end {
		return 0, 0, io.EOF
	}
	return start, end, nil
}

// Extents describes [off, off+n) from its start, data and holes in turn, in
// at most limit runs; it covers less than n bytes only when limit is reached.
// Changes made meanwhile may or may not show.
func (i *Image) Extents(off, n int64, limit int) ([]Extent, error) {
	if err := i.inside(off, n); err != nil {
		return nil, err
	}
	var runs []Extent
	for end := off + n; off < end && len(runs) < limit; {
		start, stop, err := i.NextData(off)
		if errors.Is(err, io.EOF) || err == nil && start >= end {
			start, stop, err = end, end, nil
		}
		if err != nil {
			return nil, err
		}
		if start > off {
			runs = append(runs, Extent{off, start - off, true})
		}
		if stop = min(stop, end); stop > start && len(runs) < limit {
			runs = append(runs, Extent{start, stop - start, false})
		}
		off = stop
	}
	return runs, nil
}
