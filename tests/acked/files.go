package acked

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
)

// filer makes and changes small files in two folders, "0" and "1". A file has
// one of 12 names (slots) and is in one of the folders. Operation n does one of:
//
//	create  write the file under its name, fsync it, fsync the folder
//	put     write a temporary file, fsync it, rename it over the name, fsync the folder
//	move    rename the file into the other folder, fsync both folders
//	remove  unlink the file, fsync the folder
type filer struct {
	common
	dir   string
	slots [slots]slot // as the operations so far left them
}

const slots = 12

// slot is what one name stands for: the file of operation seq in a folder, or
// nothing when seq is 0.
type slot struct {
	seq    uint64
	folder int
}

type fileOp struct {
	kind   string
	slot   int
	before slot
	after  slot
}

// next is what operation n does, given the slots before it.
func (l *filer) next(n uint64) fileOp {
	rng := l.rand(n)
	i := rng.IntN(slots)
	op := fileOp{slot: i, before: l.slots[i], after: l.slots[i]}
	choice := rng.IntN(10)
	switch {
	case op.before.seq == 0 && choice < 5:
		op.kind, op.after = "create", slot{n, rng.IntN(2)}
	case op.before.seq == 0:
		op.kind, op.after = "put", slot{n, rng.IntN(2)}
	case choice < 5:
		op.kind, op.after.seq = "put", n
	case choice < 8:
		op.kind, op.after.folder = "move", 1-op.before.folder
	default:
		op.kind, op.after = "remove", slot{}
	}
	return op
}

// content is the file that operation n writes.
func (l *filer) content(n uint64) []byte {
	rng := l.rand(n ^ 1<<63)
	b := fmt.Appendf(nil, "file of writer %d, operation %d, seed %d\n", l.number, n, l.seed)
	for range rng.IntN(2500) {
		x := rng.Uint64()
		b = append(b, byte(x), byte(x>>8), byte(x>>16), byte(x>>24), byte(x>>32), byte(x>>40), byte(x>>48), byte(x>>56))
	}
	return b
}

func (l *filer) top() string { return fmt.Sprintf("files-%d", l.number) }

func slotName(i int) string { return fmt.Sprintf("file-%02d", i) }

func (l *filer) folder(i int) string { return filepath.Join(l.dir, fmt.Sprint(i)) }

func (l *filer) path(s slot, i int) string { return filepath.Join(l.folder(s.folder), slotName(i)) }

func (l *filer) prepare(dir string) error {
	l.dir = filepath.Join(dir, l.top())
	for _, d := range []string{l.dir, l.folder(0), l.folder(1)} {
		if err := os.Mkdir(d, 0o700); err != nil {
			return err
		}
		if err := errors.Join(syncDir(d), syncDir(filepath.Dir(d))); err != nil {
			return err
		}
	}
	return nil
}

func (l *filer) perform(n uint64) (err error) {
	op := l.next(n)
	to, from := l.path(op.after, op.slot), l.path(op.before, op.slot)
	switch op.kind {
	case "create":
		err = writeFile(to, l.content(n))
	case "put":
		err = l.put(to, n)
	case "move":
		err = os.Rename(from, to)
	case "remove":
		err = os.Remove(from)
	}
	if err != nil {
		return err
	}
	if err := syncDir(filepath.Dir(to)); err != nil {
		return err
	}
	if filepath.Dir(from) != filepath.Dir(to) {
		if err := syncDir(filepath.Dir(from)); err != nil {
			return err
		}
	}
	l.slots[op.slot] = op.after
	return nil
}

const temporary = "temporary"

// put makes the file whole and durable before it gets its name.
func (l *filer) put(to string, n uint64) error {
	tmp := filepath.Join(filepath.Dir(to), temporary)
	if err := writeFile(tmp, l.content(n)); err != nil {
		return err
	}
	return os.Rename(tmp, to)
}

// writeFile makes a file that does not exist yet and its data durable; its
// name is not.
func writeFile(path string, content []byte) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("fsync %s: %w", path, err)
	}
	return f.Close()
}

func (l *filer) close() error { return nil }

// check plays the acknowledged operations and compares the two folders with
// the result, allowing for the operation under way.
func (l *filer) check(dir string, acked, issued uint64, f *findings) {
	l.dir = filepath.Join(dir, l.top())
	f.allowed[l.top()] = true
	by := [slots]uint64{} // the acknowledged operation that made each slot what it is
	for n := uint64(1); n <= acked; n++ {
		op := l.next(n)
		l.slots[op.slot], by[op.slot] = op.after, n
	}
	var under fileOp
	if issued > acked {
		under = l.next(issued)
	}
	found, err := l.scan(under, issued, f)
	if err != nil {
		f.inventedf("%s cannot be read: %v", l.top(), err)
	}
	for i := range l.slots {
		l.checkSlot(i, found[slotName(i)], by[i], under, f)
	}
}

// scan lists the folders: for each slot's name the folders it is in. Names
// that are no slot's are reported, but for the temporary file of an operation
// under way.
func (l *filer) scan(under fileOp, issued uint64, f *findings) (map[string][]int, error) {
	known := map[string]bool{}
	for i := range slots {
		known[slotName(i)] = true
	}
	found := map[string][]int{}
	var errs []error
	for d := range 2 {
		entries, err := os.ReadDir(l.folder(d))
		if errors.Is(err, fs.ErrNotExist) {
			f.lostf(0, "folder %s/%d, durable before the first operation, is missing", l.top(), d)
		} else if err != nil {
			errs = append(errs, err)
		}
		for _, e := range entries {
			switch {
			case known[e.Name()]:
				found[e.Name()] = append(found[e.Name()], d)
			case e.Name() == temporary && under.kind == "put" && under.after.folder == d:
				l.checkUnderWay(filepath.Join(l.folder(d), temporary), issued, f)
			default:
				f.inventedf("%s/%d/%s", l.top(), d, e.Name())
			}
		}
	}
	return found, errors.Join(errs...)
}

// checkSlot compares one name with what it must stand for: the state that the
// last acknowledged operation left, or that of the operation under way.
func (l *filer) checkSlot(i int, folders []int, by uint64, under fileOp, f *findings) {
	name := fmt.Sprintf("%s/%s", l.top(), slotName(i))
	want := l.slots[i]
	changing := under.kind != "" && under.slot == i
	allowed := []slot{want}
	if changing {
		allowed = append(allowed, under.after)
	}
	switch len(folders) {
	case 0:
		if want.seq != 0 && !(changing && under.after.seq == 0) {
			f.lostf(by, "%s is missing", name)
		}
		return
	case 2:
		f.inventedf("%s is in both folders", name)
	}
	for _, d := range folders {
		l.checkFile(name, slot{folder: d}, i, allowed, by, changing && under.kind == "create", f)
	}
}

// checkFile compares the file that was found with the allowed ones.
func (l *filer) checkFile(name string, at slot, i int, allowed []slot, by uint64, creating bool, f *findings) {
	got, err := readBounded(l.path(at, i))
	if err != nil {
		f.lostf(by, "%s cannot be read: %v", name, err)
		return
	}
	for k, a := range allowed {
		if a.seq == 0 || a.folder != at.folder {
			continue
		}
		want := l.content(a.seq)
		if bytes.Equal(got, want) || (k == 1 && creating && partial(got, want) < 0) {
			return
		}
	}
	switch {
	case by != 0:
		f.lostf(by, "%s in folder %d is not what it left there: %d bytes, %q…", name, at.folder, len(got), head(got))
	default:
		f.inventedf("%s in folder %d was never made: %d bytes, %q…", name, at.folder, len(got), head(got))
	}
}

// checkUnderWay looks at the temporary file of an operation under way.
func (l *filer) checkUnderWay(path string, issued uint64, f *findings) {
	got, err := readBounded(path)
	if err != nil {
		f.inventedf("%s cannot be read: %v", path, err)
	} else if at := partial(got, l.content(issued)); at >= 0 {
		f.inventedf("%s holds bytes that were never written, at %d", path, at)
	}
}

// readBounded reads a file of at most 1 MiB.
func readBounded(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	const limit = 1 << 20
	b, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && len(b) > limit {
		err = fmt.Errorf("longer than %d bytes", limit)
	}
	return b, err
}
