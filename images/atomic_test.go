package images

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// brokenFS fails the named steps and logs all of them.
type brokenFS struct {
	OS
	fail map[string]error
	log  []string
}

type brokenFile struct {
	File
	fs *brokenFS
}

func (b *brokenFS) step(name string) error {
	b.log = append(b.log, name)
	return b.fail[name]
}

func (b *brokenFS) Create(name string, perm fs.FileMode) (File, error) {
	if err := b.step("create"); err != nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: err} // as the real one
	}
	f, err := b.OS.Create(name, perm)
	if err != nil {
		return nil, err
	}
	return &brokenFile{f, b}, nil
}

func (b *brokenFS) Rename(from, to string) error {
	if err := b.step("rename"); err != nil {
		return err
	}
	return b.OS.Rename(from, to)
}

func (b *brokenFS) SyncDir(dir string) error {
	if err := b.step("syncdir"); err != nil {
		return err
	}
	return b.OS.SyncDir(dir)
}

func (f *brokenFile) WriteAt(p []byte, off int64) (int, error) {
	if err := f.fs.step("write"); err != nil {
		return 0, err
	}
	return f.File.WriteAt(p, off)
}

func (f *brokenFile) Datasync() error {
	if err := f.fs.step("datasync"); err != nil {
		return err
	}
	return f.File.Datasync()
}

func (f *brokenFile) Truncate(size int64) error {
	if err := f.fs.step("truncate"); err != nil {
		return err
	}
	return f.File.Truncate(size)
}

func (f *brokenFile) SetXattr(name string, v []byte) error {
	if err := f.fs.step("setxattr"); err != nil {
		return err
	}
	return f.File.SetXattr(name, v)
}

func (f *brokenFile) Close() error {
	err := f.File.Close()
	if serr := f.fs.step("close"); serr != nil {
		return serr
	}
	return err
}

func TestWriteFileAtomicOrder(t *testing.T) {
	b := &brokenFS{}
	must(t, WriteFileAtomic(b, filepath.Join(t.TempDir(), "f"), []byte("x"), 0o600))
	if got := strings.Join(b.log, " "); got != "create write datasync close rename syncdir" {
		t.Fatal(got)
	}
}

func TestWriteFileAtomicErrors(t *testing.T) {
	for _, step := range []string{"create", "write", "datasync", "close", "rename", "syncdir"} {
		t.Run(step, func(t *testing.T) {
			dir := t.TempDir()
			name := filepath.Join(dir, "f")
			must(t, os.WriteFile(name, []byte("old"), 0o600))
			boom := errors.New("boom")
			b := &brokenFS{fail: map[string]error{step: boom}}
			err := WriteFileAtomic(b, name, []byte("new"), 0o600)
			if !errors.Is(err, boom) || !strings.Contains(err.Error(), "f") {
				t.Fatal(err)
			}
			if _, err := os.Stat(name + TempSuffix); !errors.Is(err, fs.ErrNotExist) {
				t.Fatal("temporary file left behind")
			}
			want := "old"
			if step == "syncdir" {
				want = "new"
			}
			if got, _ := os.ReadFile(name); string(got) != want {
				t.Fatalf("%q, want %q", got, want)
			}
		})
	}
}

func TestWriteFileAtomicLeftover(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(name+TempSuffix, []byte("half of something long"), 0o600))
	must(t, WriteFileAtomic(OS{}, name, []byte("new"), 0o640))
	got, err := ReadFile(OS{}, name, 3)
	if string(got) != "new" || err != nil {
		t.Fatal(string(got), err)
	}
	st, err := os.Stat(name)
	if err != nil || st.Mode().Perm() != 0o640 {
		t.Fatal(st.Mode(), err)
	}
}

func TestReadFileLimit(t *testing.T) {
	name := filepath.Join(t.TempDir(), "f")
	must(t, os.WriteFile(name, []byte("four"), 0o600))
	if _, err := ReadFile(OS{}, name, 3); !errors.Is(err, ErrTooLarge) {
		t.Fatal(err)
	}
	if _, err := ReadFile(OS{}, name+"x", 3); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	must(t, os.WriteFile(name, nil, 0o600))
	if b, err := ReadFile(OS{}, name, 0); len(b) != 0 || err != nil {
		t.Fatal(b, err)
	}
}
