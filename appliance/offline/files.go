package offline

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"kagami/ext4j/browse"
	"kagami/ext4j/ext4"
	"kagami/ext4j/recover"
	"kagami/images"
)

// tree is an image opened to look at its files: as a mount would show them, the journal
// replayed in memory if it has to be.
type tree struct {
	img *images.Image
	fs  *ext4.FS
}

func openTree(path string, at Place, inUse bool) (*tree, error) {
	img, err := openToLook(path, inUse)
	if err != nil {
		return nil, err
	}
	where, err := at.find(img, img.Size())
	if err == nil {
		var r io.ReaderAt
		if r, _, err = recover.View(img, where.off, where.size); err == nil {
			var fs *ext4.FS
			if fs, err = ext4.Probe(r, 0, where.size); err == nil {
				return &tree{img, fs}, nil
			}
		}
		err = told(err, img, at)
	}
	return nil, errors.Join(err, img.Close())
}

func (t *tree) close() error { return t.img.Close() }

// lookup finds a file, in this package's words.
func (t *tree) lookup(path string, follow bool) (*ext4.Node, error) {
	n, err := browse.Lookup(t.fs, path, follow)
	if errors.Is(err, browse.ErrNotThere) {
		return nil, fmt.Errorf("%w: %w", ErrNotThere, err)
	}
	return n, fileError(err)
}

// fileError tells what this package does not read from what is damaged.
func fileError(err error) error {
	if errors.Is(err, ext4.ErrUnsupported) {
		return &refusal{err}
	}
	return err
}

// FileInfo is what is said of a file.
type FileInfo struct {
	Path    string    `json:"path"`
	Inode   uint32    `json:"inode"`
	Mode    string    `json:"mode"` // as ls -l writes it
	Links   uint16    `json:"links"`
	UID     uint32    `json:"uid"`
	GID     uint32    `json:"gid"`
	Size    uint64    `json:"size"` // bytes
	Device  string    `json:"device,omitempty"`
	ModTime time.Time `json:"mtime"`
	Target  string    `json:"target,omitempty"`
	Xattrs  []string  `json:"xattrs,omitempty"` // their names
	Error   string    `json:"error,omitempty"`  // why not all of it is there
}

// ListOptions change what List shows.
type ListOptions struct {
	InUse     bool
	Recursive bool
	Directory bool // a directory itself, not what is in it
}

// List shows a file, or the files in a directory, in the order in which they are stored. What cannot be
// read is listed with its error.
func List(path string, at Place, name string, o ListOptions, show func(FileInfo) error) error {
	t, err := openTree(path, at, o.InUse)
	if err != nil {
		return err
	}
	return errors.Join(t.list(name, o, show), t.close())
}

func (t *tree) list(name string, o ListOptions, show func(FileInfo) error) error {
	from, err := t.lookup(name, !o.Directory)
	if err != nil {
		return err
	}
	if !from.Dir() || o.Directory {
		return show(info(name, from))
	}
	broken := func(path string, err error) error { return show(FileInfo{Path: path, Error: err.Error()}) }
	if !o.Recursive {
		return t.listOne(from, show, broken)
	}
	return browse.Walk(t.fs, from, browse.Visitor{Broken: broken, Enter: func(f browse.File) error {
		if f.Path == "." {
			return nil
		}
		return show(info(f.Path, f.Node))
	}})
}

// listOne lists one directory.
func (t *tree) listOne(dir *ext4.Node, show func(FileInfo) error, broken func(string, error) error) error {
	err := dir.ReadDir(func(e ext4.Entry) error {
		if e.Name == "." || e.Name == ".." {
			return nil
		}
		n, err := t.fs.Node(e.Inode)
		if err != nil {
			return broken(e.Name, err)
		}
		return show(info(e.Name, n))
	})
	return fileError(err)
}

func info(path string, n *ext4.Node) FileInfo {
	i := FileInfo{Path: path, Inode: n.Number, Mode: modeText(n.Mode), Links: n.Links, UID: n.UID, GID: n.GID, Size: n.Size, ModTime: n.Mtime.UTC()}
	var errs []error
	if n.Symlink() {
		target, err := n.Readlink()
		i.Target, errs = target, append(errs, err)
	}
	if k := n.Mode & ext4.ModeKind; k == ext4.ModeChar || k == ext4.ModeBlock {
		i.Device = fmt.Sprintf("%d, %d", n.Major, n.Minor)
	}
	attrs, err := n.Xattrs()
	for _, x := range attrs {
		i.Xattrs = append(i.Xattrs, x.Name)
	}
	if err := errors.Join(append(errs, err)...); err != nil {
		i.Error = err.Error()
	}
	return i
}

// modeText is a mode as ls -l writes it.
func modeText(mode uint16) string {
	b := []byte("?rwxrwxrwx")
	for kind, c := range map[uint16]byte{ext4.ModeFIFO: 'p', ext4.ModeChar: 'c', ext4.ModeDir: 'd', ext4.ModeBlock: 'b',
		ext4.ModeRegular: '-', ext4.ModeSymlink: 'l', ext4.ModeSocket: 's'} {
		if mode&ext4.ModeKind == kind {
			b[0] = c
		}
	}
	for i := range 9 {
		if mode&(0o400>>i) == 0 {
			b[i+1] = '-'
		}
	}
	for i, c := range []string{"sS", "sS", "tT"} {
		if mode&(0o4000>>i) == 0 {
			continue
		}
		at := 3 * (i + 1)
		b[at] = c[btoi(b[at] == '-')]
	}
	return string(b)
}

func btoi(v bool) int {
	if v {
		return 1
	}
	return 0
}

// Cat writes a regular file's content; symbolic links are followed.
func Cat(ctx context.Context, path string, at Place, name string, inUse bool, to io.Writer) error {
	t, err := openTree(path, at, inUse)
	if err != nil {
		return err
	}
	return errors.Join(t.cat(ctx, name, to), t.close())
}

func (t *tree) cat(ctx context.Context, name string, to io.Writer) error {
	n, err := t.lookup(name, true)
	if err != nil {
		return err
	}
	if !n.RegularFile() {
		return fmt.Errorf("%w: %s is no regular file (%s)", ErrRefused, name, modeText(n.Mode))
	}
	at, zeros := int64(0), make([]byte, 64<<10)
	upTo := func(end int64) error {
		for at < end {
			if ctx.Err() != nil {
				return context.Cause(ctx)
			}
			k, err := to.Write(zeros[:min(end-at, int64(len(zeros)))])
			at += int64(k)
			if err != nil {
				return fmt.Errorf("write: %w", err)
			}
		}
		return nil
	}
	err = n.Data(func(off int64, p []byte) error {
		if err := upTo(off); err != nil {
			return err
		}
		at += int64(len(p))
		if _, err := to.Write(p); err != nil {
			return fmt.Errorf("write: %w", err)
		}
		return context.Cause(ctx)
	})
	if err == nil {
		err = upTo(int64(n.Size))
	}
	if err != nil {
		return fmt.Errorf("%s: %w", strings.TrimPrefix(name, "/"), fileError(err))
	}
	return nil
}
