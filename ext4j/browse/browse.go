// Package browse goes through the files of an ext4 file system as a kernel's mount would show
// them: paths, directories, symbolic links. It only reads, through ext4j/ext4, and like that
// takes everything for hostile: a walk of a damaged tree ends, and no path leads out of it.
package browse

import (
	"errors"
	"fmt"
	"strings"

	"kagami/ext4j/ext4"
)

// ErrNotThere: no file of that name.
var ErrNotThere = errors.New("no such file or directory")

// maxLinks is how many symbolic links a path may lead through, as in Linux.
const maxLinks = 40

// maxSteps bounds the components of a path, those of the links on the way included.
const maxSteps = 4096

// Lookup finds a file by its path from the root. Symbolic links on the way are followed, within
// the file system; the last one only with follow.
func Lookup(fs *ext4.FS, path string, follow bool) (*ext4.Node, error) {
	at, err := fs.Node(ext4.RootInode)
	if err != nil {
		return nil, err
	}
	up := []*ext4.Node{at} // the directories above, the root first
	todo := parts(path)
	for links, steps := 0, 0; len(todo) > 0; steps++ {
		name := todo[0]
		todo = todo[1:]
		if steps == maxSteps {
			return nil, fmt.Errorf("%s: %w: too many components", path, ErrNotThere)
		}
		if name == ".." {
			if len(up) > 1 {
				up = up[:len(up)-1]
			}
			at = up[len(up)-1]
			continue
		}
		dir := up[len(up)-1]
		if at, err = child(fs, dir, name); err != nil {
			return nil, fmt.Errorf("%s: %w", path, err)
		}
		switch {
		case at.Symlink() && (follow || len(todo) > 0):
			if links++; links > maxLinks {
				return nil, fmt.Errorf("%s: %w: too many levels of symbolic links", path, ErrNotThere)
			}
			target, err := at.Readlink()
			if err != nil {
				return nil, fmt.Errorf("%s: %w", path, err)
			}
			if strings.HasPrefix(target, "/") {
				up = up[:1]
			}
			todo = append(parts(target), todo...)
			at = up[len(up)-1]
		case at.Dir():
			up = append(up, at)
		case len(todo) > 0:
			return nil, fmt.Errorf("%s: %w: %q is no directory", path, ErrNotThere, name)
		}
	}
	return at, nil
}

// parts are the components of a path, "." left out.
func parts(path string) []string {
	var out []string
	for p := range strings.SplitSeq(path, "/") {
		if p != "" && p != "." {
			out = append(out, p)
		}
	}
	return out
}

var errFound = errors.New("found")

func child(fs *ext4.FS, dir *ext4.Node, name string) (*ext4.Node, error) {
	if dir.Encrypted() {
		return nil, fmt.Errorf("%w: directory %d is encrypted", ext4.ErrUnsupported, dir.Number)
	}
	var inode uint32
	err := dir.ReadDir(func(e ext4.Entry) error {
		if e.Name != name {
			return nil
		}
		inode = e.Inode
		return errFound
	})
	switch {
	case err == nil:
		return nil, fmt.Errorf("%w: %q", ErrNotThere, name)
	case !errors.Is(err, errFound):
		return nil, err
	}
	return fs.Node(inode)
}

// File is one name of a tree.
type File struct {
	Path string // from where the walk began, "." for that itself
	Name string
	*ext4.Node
}

// maxDepth bounds the directories within each other that a walk goes through: their paths would be longer than
// any program takes (PATH_MAX).
const maxDepth = 2048

// Visitor sees a walk. Its functions may be nil.
type Visitor struct {
	// Enter is called for each file, of a directory before what is in it.
	Enter func(File) error
	// Leave is called for each directory after what is in it.
	Leave func(File) error
	// Broken is called for what cannot be read: a name and why. What it returns ends the walk, nil does not.
	Broken func(path string, err error) error
}

// Walk visits a tree from a node on, each directory's names in the order in which they are stored. A directory that was visited
// before is damage: no tree has it twice.
func Walk(fs *ext4.FS, from *ext4.Node, v Visitor) error {
	w := walker{fs: fs, v: v, seen: map[uint32]bool{}}
	return w.visit(File{Path: ".", Name: ".", Node: from}, 0)
}

type walker struct {
	fs   *ext4.FS
	v    Visitor
	seen map[uint32]bool // directories
}

func (w *walker) broken(path string, err error) error {
	if w.v.Broken == nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return w.v.Broken(path, err)
}

func (w *walker) visit(f File, depth int) error {
	if f.Dir() {
		if w.seen[f.Number] || depth > maxDepth {
			return w.broken(f.Path, fmt.Errorf("%w: directory %d is there twice, or too deep", ext4.ErrCorrupt, f.Number))
		}
		w.seen[f.Number] = true
	}
	if w.v.Enter != nil {
		if err := w.v.Enter(f); err != nil {
			return err
		}
	}
	if !f.Dir() {
		return nil
	}
	if err := w.children(f, depth); err != nil {
		return err
	}
	if w.v.Leave != nil {
		return w.v.Leave(f)
	}
	return nil
}

// errStop carries a visitor's error through ReadDir.
type errStop struct{ error }

func (w *walker) children(f File, depth int) error {
	if f.Encrypted() {
		return w.broken(f.Path, fmt.Errorf("%w: directory %d is encrypted", ext4.ErrUnsupported, f.Number))
	}
	err := f.ReadDir(func(e ext4.Entry) error {
		if e.Name == "." || e.Name == ".." {
			return nil
		}
		path := e.Name
		if f.Path != "." {
			path = f.Path + "/" + e.Name
		}
		n, err := w.fs.Node(e.Inode)
		if err != nil {
			err = w.broken(path, err)
		} else {
			err = w.visit(File{Path: path, Name: e.Name, Node: n}, depth+1)
		}
		if err != nil {
			return errStop{err}
		}
		return nil
	})
	var stop errStop
	switch {
	case errors.As(err, &stop):
		return stop.error
	case err != nil:
		return w.broken(f.Path, err)
	}
	return nil
}
