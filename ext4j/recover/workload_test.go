package recover

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// worker changes a mounted file system at random, from a seed.
type worker struct {
	t    testing.TB
	rng  *rand.Rand
	root string
	n    int      // names given so far
	dirs []string // relative
	file []string // relative; files, links of all kinds
	held []*os.File
	// orphans allows files to be held open and removed.
	orphans bool
}

func newWorker(t testing.TB, root string, seed uint64) *worker {
	return &worker{t: t, rng: rand.New(rand.NewPCG(seed, 0)), root: root, dirs: []string{"."}}
}

func (w *worker) path(rel string) string { return filepath.Join(w.root, rel) }

func (w *worker) name(kind string) string {
	w.n++
	dir := w.dirs[w.rng.IntN(len(w.dirs))]
	// Long names fill directories quickly.
	return filepath.Join(dir, fmt.Sprintf("%s-%d-%s", kind, w.n, strings.Repeat("x", w.rng.IntN(100))))
}

// pick is a random file, or "" if there is none.
func (w *worker) pick() string {
	if len(w.file) == 0 {
		return ""
	}
	return w.file[w.rng.IntN(len(w.file))]
}

func (w *worker) bytes(n int) []byte {
	b := make([]byte, n)
	for i := 0; i < n; i += 8 {
		copy(b[i:], fmt.Sprintf("%08x", w.rng.Uint32()))
	}
	if n >= 4 && w.rng.IntN(3) == 0 {
		copy(b, "\xc0\x3b\x39\x98") // the journal's magic, to be escaped in data=journal
	}
	return b
}

// steps makes n changes and then an fsync, which commits them without writing
// the metadata home.
func (w *worker) steps(n int) {
	w.t.Helper()
	for range n {
		if err := w.step(); err != nil && !harmless(err) {
			w.t.Fatal(err)
		}
	}
	w.commit()
}

// harmless errors are those of a full file system or of a change that meets another one.
func harmless(err error) bool {
	for _, e := range []error{unix.ENOSPC, unix.ENOENT, unix.EEXIST, unix.ENOTEMPTY, unix.EOPNOTSUPP, unix.EISDIR, unix.ELOOP, unix.EMLINK, unix.EINVAL, unix.EPERM, unix.ENAMETOOLONG} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

func (w *worker) commit() {
	w.t.Helper()
	f, err := os.OpenFile(w.path("commit"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		w.t.Fatal(err)
	}
	_, err = f.Write([]byte("."))
	if errors.Is(err, unix.ENOSPC) {
		err = nil
	}
	if err = errors.Join(err, f.Sync(), f.Close()); err != nil {
		w.t.Fatal(err)
	}
}

func (w *worker) step() error {
	switch k := w.rng.IntN(100); {
	case k < 25:
		return w.create()
	case k < 35:
		return w.mkdir()
	case k < 45:
		return w.append()
	case k < 60:
		return w.remove()
	case k < 65:
		return w.rename()
	case k < 70:
		return w.link()
	case k < 78:
		return w.symlink()
	case k < 83:
		return w.truncate()
	case k < 88:
		return w.xattr()
	case k < 92:
		return w.attributes()
	case k < 95 && w.orphans:
		return w.hold()
	case k < 97:
		return w.fallocate()
	}
	return w.bulk()
}

func (w *worker) create() error {
	name := w.name("f")
	w.file = append(w.file, name)
	return os.WriteFile(w.path(name), w.bytes(w.rng.IntN(20000)), 0o644)
}

func (w *worker) mkdir() error {
	name := w.name("d")
	if err := os.Mkdir(w.path(name), 0o755); err != nil {
		return err
	}
	w.dirs = append(w.dirs, name)
	return nil
}

func (w *worker) append() error {
	name := w.pick()
	if name == "" {
		return nil
	}
	f, err := os.OpenFile(w.path(name), os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		return err
	}
	_, err = f.Write(w.bytes(w.rng.IntN(9000)))
	if w.rng.IntN(4) == 0 {
		err = errors.Join(err, f.Sync())
	}
	return errors.Join(err, f.Close())
}

func (w *worker) remove() error {
	if w.rng.IntN(6) == 0 && len(w.dirs) > 1 {
		i := 1 + w.rng.IntN(len(w.dirs)-1)
		dir := w.dirs[i]
		var keep []string
		for _, d := range w.dirs {
			if d != dir && !strings.HasPrefix(d, dir+"/") {
				keep = append(keep, d)
			}
		}
		w.dirs = keep
		return os.RemoveAll(w.path(dir))
	}
	if len(w.file) == 0 {
		return nil
	}
	i := w.rng.IntN(len(w.file))
	name := w.file[i]
	w.file = append(w.file[:i], w.file[i+1:]...)
	return os.Remove(w.path(name))
}

func (w *worker) rename() error {
	old, name := w.pick(), w.name("r")
	if old == "" {
		return nil
	}
	w.file = append(w.file, name)
	return os.Rename(w.path(old), w.path(name))
}

func (w *worker) link() error {
	old, name := w.pick(), w.name("l")
	if old == "" {
		return nil
	}
	w.file = append(w.file, name)
	return os.Link(w.path(old), w.path(name))
}

func (w *worker) symlink() error {
	name := w.name("s")
	w.file = append(w.file, name)
	// A target of 60 bytes or more has a block of its own, which starts with the magic.
	return os.Symlink("\xc0\x3b\x39\x98"+strings.Repeat("y", 1+w.rng.IntN(900)), w.path(name))
}

func (w *worker) truncate() error {
	name := w.pick()
	if name == "" {
		return nil
	}
	return os.Truncate(w.path(name), int64(w.rng.IntN(30000)))
}

func (w *worker) xattr() error {
	name := w.pick()
	if name == "" {
		return nil
	}
	return unix.Lsetxattr(w.path(name), "trusted.k"+fmt.Sprint(w.rng.IntN(5)), bytes.Repeat([]byte{'v'}, 1+w.rng.IntN(700)), 0)
}

func (w *worker) attributes() error {
	name := w.pick()
	if name == "" {
		return nil
	}
	return errors.Join(os.Lchown(w.path(name), w.rng.IntN(1000), w.rng.IntN(1000)), syscall.Chmod(w.path(name), uint32(w.rng.IntN(0o777))))
}

// hold keeps a file open and removes it: an orphan.
func (w *worker) hold() error {
	name := w.name("o")
	f, err := os.Create(w.path(name))
	if err != nil {
		return err
	}
	w.held = append(w.held, f)
	_, err = f.Write(w.bytes(5000))
	return errors.Join(err, os.Remove(w.path(name)))
}

func (w *worker) release() {
	for _, f := range w.held {
		f.Close()
	}
	w.held = nil
}

func (w *worker) fallocate() error {
	name := w.pick()
	if name == "" {
		return nil
	}
	f, err := os.OpenFile(w.path(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	mode := []uint32{0, unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE, unix.FALLOC_FL_ZERO_RANGE}[w.rng.IntN(4)]
	return errors.Join(unix.Fallocate(int(f.Fd()), mode, int64(w.rng.IntN(20000)), int64(1+w.rng.IntN(40000))), f.Close())
}

// bulk fills a directory and sometimes empties it: many metadata blocks, and revokes.
func (w *worker) bulk() error {
	dir := w.name("b")
	if err := os.Mkdir(w.path(dir), 0o755); err != nil {
		return err
	}
	for i := range 150 {
		name := filepath.Join(w.path(dir), fmt.Sprintf("%d-%s", i, strings.Repeat("z", 100)))
		if err := os.Symlink(strings.Repeat("t", 100), name); err != nil {
			return err
		}
	}
	if w.rng.IntN(2) == 0 {
		w.commit()
		return os.RemoveAll(w.path(dir))
	}
	w.dirs = append(w.dirs, dir)
	return nil
}
