package offline

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"time"

	"golang.org/x/sys/unix"

	"kagami/ext4j/browse"
	"kagami/ext4j/ext4"
)

// RestoreOptions change what Restore does.
type RestoreOptions struct {
	InUse bool
	// Progress, if not nil, is told of bytes written and files made.
	Progress func(bytes int64, files int)
}

// Restored is what Restore made.
type Restored struct {
	Files int   `json:"files"` // names, directories included
	Bytes int64 `json:"bytes"` // of content, holes left out
	// Left are the names that are not as in the image, and why: no right to give a file away, say.
	Left []Trouble `json:"left,omitempty"`
	// More counts further ones.
	More int `json:"more,omitempty"`
}

// Trouble is a name and what is wrong with it.
type Trouble struct {
	Path string `json:"path"`
	Why  string `json:"why"`
}

// maxTroubles bounds Restored.Left.
const maxTroubles = 1000

// Restore copies a file or a tree out of an image: content, holes, hard links, devices, owners,
// modes, times, extended attributes. The destination must not exist; it is made. What the caller has no right to
// set is left out and told. Nothing outside the destination is touched, whatever the image's
// names and links say: each file is made anew in the folder that was made for its directory,
// and no link is ever followed.
func Restore(ctx context.Context, image string, at Place, name, to string, o RestoreOptions) (Restored, error) {
	t, err := openTree(image, at, o.InUse)
	if err != nil {
		return Restored{}, err
	}
	r := restorer{ctx: ctx, o: o, made: map[uint32]string{}, budget: int64(t.fs.Blocks) * int64(t.fs.BlockSize)}
	err = r.run(t, name, to)
	return r.done, errors.Join(err, t.close())
}

type restorer struct {
	ctx    context.Context
	o      RestoreOptions
	done   Restored
	root   int               // the folder that the destination is in
	name   string            // of the destination in it
	dirs   []int             // the folders that are being filled, the innermost last
	made   map[uint32]string // files with several names: the first one, from root
	budget int64             // bytes; no file system holds more than its size
}

func (r *restorer) run(t *tree, name, to string) (err error) {
	n, err := t.lookup(name, true)
	if err != nil {
		return err
	}
	if _, err := os.Lstat(to); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = fmt.Errorf("%w: %s exists", ErrRefused, to)
		}
		return err
	}
	to = path.Clean(to)
	r.name = path.Base(to)
	if r.root, err = unix.Open(path.Dir(to), unix.O_DIRECTORY|unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fmt.Errorf("%w: %s: %w", ErrNotThere, path.Dir(to), err)
	}
	r.dirs = []int{r.root}
	defer func() {
		for _, fd := range r.dirs {
			err = errors.Join(err, unix.Close(fd))
		}
	}()
	return browse.Walk(t.fs, n, browse.Visitor{Enter: r.enter, Leave: r.leave, Broken: func(p string, err error) error {
		r.trouble(p, err)
		return nil
	}})
}

func (r *restorer) trouble(p string, err error) {
	if len(r.done.Left) == maxTroubles {
		r.done.More++
		return
	}
	r.done.Left = append(r.done.Left, Trouble{p, err.Error()})
}

// enter makes a file, or a directory whose attributes are set by leave.
func (r *restorer) enter(f browse.File) error {
	if r.ctx.Err() != nil {
		return context.Cause(r.ctx)
	}
	dir, name := r.dirs[len(r.dirs)-1], f.Name
	if f.Path == "." {
		name = r.name
	}
	r.done.Files++
	if r.o.Progress != nil {
		r.o.Progress(r.done.Bytes, r.done.Files)
	}
	if f.Dir() {
		return r.mkdir(dir, name, f)
	}
	full := path.Join(r.name, f.Path)
	if f.Links > 1 {
		if first, ok := r.made[f.Number]; ok {
			if err := unix.Linkat(r.root, first, dir, name, 0); err != nil {
				r.trouble(f.Path, fmt.Errorf("link to %s: %w", first, err))
			}
			return nil
		}
	}
	if err := r.make(dir, name, f); err != nil {
		var fatal *fatalError
		if errors.As(err, &fatal) {
			return fmt.Errorf("%s: %w", f.Path, fatal.error)
		}
		r.trouble(f.Path, err)
		return nil
	}
	if f.Links > 1 {
		r.made[f.Number] = full
	}
	return nil
}

// fatalError ends a restore: the destination takes nothing more.
type fatalError struct{ error }

func (r *restorer) mkdir(dir int, name string, f browse.File) error {
	if err := unix.Mkdirat(dir, name, 0o700); err != nil {
		return fmt.Errorf("%s: make folder: %w", f.Path, err)
	}
	fd, err := unix.Openat(dir, name, unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("%s: open folder: %w", f.Path, err)
	}
	r.dirs = append(r.dirs, fd)
	return nil
}

func (r *restorer) leave(f browse.File) error {
	fd := r.dirs[len(r.dirs)-1]
	r.dirs = r.dirs[:len(r.dirs)-1]
	if err := r.dress(fd, f); err != nil {
		r.trouble(f.Path, err)
	}
	return unix.Close(fd)
}

// make makes anything but a directory.
func (r *restorer) make(dir int, name string, f browse.File) error {
	switch f.Mode & ext4.ModeKind {
	case ext4.ModeRegular:
		return r.file(dir, name, f)
	case ext4.ModeSymlink:
		target, err := f.Readlink()
		if err != nil {
			return err
		}
		if err := unix.Symlinkat(target, dir, name); err != nil {
			return fmt.Errorf("make link: %w", err)
		}
	case ext4.ModeChar, ext4.ModeBlock, ext4.ModeFIFO, ext4.ModeSocket:
		if err := unix.Mknodat(dir, name, uint32(f.Mode&ext4.ModeKind)|0o600, int(unix.Mkdev(f.Major, f.Minor))); err != nil {
			return fmt.Errorf("make special file: %w", err)
		}
	default:
		return fmt.Errorf("%w: a file of kind %#o", ext4.ErrCorrupt, f.Mode&ext4.ModeKind)
	}
	return r.dressName(dir, name, f)
}

// file makes a regular file. What of it cannot be read is left out, and told.
func (r *restorer) file(dir int, name string, f browse.File) (err error) {
	fd, err := unix.Openat(dir, name, unix.O_CREAT|unix.O_EXCL|unix.O_NOFOLLOW|unix.O_WRONLY|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return fmt.Errorf("make file: %w", err)
	}
	out := os.NewFile(uintptr(fd), name)
	defer func() { err = errors.Join(err, out.Close()) }()
	err = f.Data(func(off int64, p []byte) error {
		if r.ctx.Err() != nil {
			return &fatalError{context.Cause(r.ctx)}
		}
		if r.budget -= int64(len(p)); r.budget < 0 {
			return &fatalError{fmt.Errorf("%w: its files hold more than the file system", ext4.ErrCorrupt)}
		}
		if _, err := out.WriteAt(p, off); err != nil {
			return &fatalError{fmt.Errorf("write: %w", err)}
		}
		r.done.Bytes += int64(len(p))
		if r.o.Progress != nil {
			r.o.Progress(r.done.Bytes, r.done.Files)
		}
		return nil
	})
	if err == nil {
		err = out.Truncate(int64(f.Size))
	}
	return errors.Join(err, r.dress(fd, f))
}

// dress sets owner, attributes, mode and times, in this order: a change of owner takes set-user-ID
// away, and everything but the last changes the times.
func (r *restorer) dress(fd int, f browse.File) error {
	var errs []error
	if err := unix.Fchown(fd, int(f.UID), int(f.GID)); err != nil {
		errs = append(errs, fmt.Errorf("owner %d:%d: %w", f.UID, f.GID, err))
	}
	errs = append(errs, setXattrs(f, func(name string, v []byte) error { return unix.Fsetxattr(fd, name, v, 0) }))
	if err := unix.Fchmod(fd, uint32(f.Mode&0o7777)); err != nil {
		errs = append(errs, fmt.Errorf("mode: %w", err))
	}
	times := []unix.Timespec{timespec(f.Atime), timespec(f.Mtime)}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, fmt.Sprintf("/proc/self/fd/%d", fd), times, 0); err != nil {
		errs = append(errs, fmt.Errorf("times: %w", err))
	}
	return errors.Join(errs...)
}

// dressName is dress for what cannot be opened: links and special files.
func (r *restorer) dressName(dir int, name string, f browse.File) error {
	var errs []error
	if err := unix.Fchownat(dir, name, int(f.UID), int(f.GID), unix.AT_SYMLINK_NOFOLLOW); err != nil {
		errs = append(errs, fmt.Errorf("owner %d:%d: %w", f.UID, f.GID, err))
	}
	at := fmt.Sprintf("/proc/self/fd/%d/%s", dir, name)
	errs = append(errs, setXattrs(f, func(name string, v []byte) error { return unix.Lsetxattr(at, name, v, 0) }))
	if !f.Symlink() {
		if err := unix.Fchmodat(dir, name, uint32(f.Mode&0o7777), 0); err != nil {
			errs = append(errs, fmt.Errorf("mode: %w", err))
		}
	}
	times := []unix.Timespec{timespec(f.Atime), timespec(f.Mtime)}
	if err := unix.UtimesNanoAt(dir, name, times, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		errs = append(errs, fmt.Errorf("times: %w", err))
	}
	return errors.Join(errs...)
}

// timespec is a time of any year: UnixNano ends in 2262.
func timespec(t time.Time) unix.Timespec {
	return unix.Timespec{Sec: t.Unix(), Nsec: int64(t.Nanosecond())}
}

func setXattrs(f browse.File, set func(string, []byte) error) error {
	attrs, err := f.Xattrs()
	errs := []error{err}
	for _, x := range attrs {
		if err := set(x.Name, x.Value); err != nil {
			errs = append(errs, fmt.Errorf("attribute %s: %w", x.Name, err))
		}
	}
	return errors.Join(errs...)
}
