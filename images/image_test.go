package images

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

const mib = int64(1 << 20)

func newImage(t *testing.T, size int64) *Image {
	t.Helper()
	img, err := CreateImage(OS{}, filepath.Join(t.TempDir(), "disk.raw"), size, "disk-1")
	must(t, err)
	t.Cleanup(func() { _ = img.Close() })
	return img
}

func TestImageCreateOpen(t *testing.T) {
	img := newImage(t, 3*mib)
	path := img.Path()
	if _, err := OpenImage(OS{}, path, Want{}); !errors.Is(err, ErrLocked) {
		t.Fatal(err)
	}
	if _, err := CreateImage(OS{}, path, mib, ""); !errors.Is(err, fs.ErrExist) {
		t.Fatal(err)
	}
	must(t, img.Close())
	for _, c := range []struct {
		want Want
		err  error
	}{
		{Want{}, nil},
		{Want{Size: 3 * mib, Identity: "disk-1"}, nil},
		{Want{Size: mib}, ErrSize},
		{Want{Identity: "disk-2"}, ErrIdentity},
	} {
		got, err := OpenImage(OS{}, path, c.want)
		if !errors.Is(err, c.err) {
			t.Fatalf("%+v: %v", c.want, err)
		}
		if err == nil {
			if got.Size() != 3*mib {
				t.Fatal(got.Size())
			}
			must(t, got.Close())
		}
	}
	if _, err := OpenImage(OS{}, path+"x", Want{}); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	if _, err := CreateImage(OS{}, path+"x", 0, ""); !errors.Is(err, ErrSize) {
		t.Fatal(err)
	}
	must(t, os.WriteFile(path+"0", nil, 0o600))
	if _, err := OpenImage(OS{}, path+"0", Want{}); !errors.Is(err, ErrSize) {
		t.Fatal(err)
	}
}

func TestImageCreateSteps(t *testing.T) {
	for _, step := range []string{"", "create", "truncate", "setxattr", "datasync", "rename", "syncdir"} {
		t.Run("fail "+step, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			must(t, os.WriteFile(path+TempSuffix, []byte("left by a crash"), 0o600))
			boom := errors.New("boom")
			b := &brokenFS{fail: map[string]error{step: boom}}
			img, err := CreateImage(b, path, mib, "id")
			if step == "" {
				must(t, err)
				if got := strings.Join(b.log, " "); got != "create create truncate setxattr datasync rename syncdir" {
					t.Fatal(got)
				}
				must(t, img.Close())
				return
			}
			if !errors.Is(err, boom) {
				t.Fatal(err)
			}
			if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
				t.Fatal("half an image is left under its name")
			}
		})
	}
}

func TestImageBounds(t *testing.T) {
	img := newImage(t, mib)
	bad := [][2]int64{{-1, 1}, {mib, 1}, {mib - 1, 2}, {0, mib + 1}, {1 << 62, 1 << 62}, {5, -1}}
	for _, r := range bad {
		off, n := r[0], r[1]
		calls := map[string]error{
			"zero": img.WriteZeroes(off, n, true), "punch": img.Trim(off, n), "allocate": img.Allocate(off, n),
		}
		_, calls["extents"] = img.Extents(off, n, 10)
		if n >= 0 && n < 2*mib {
			_, calls["write"] = img.WriteAt(make([]byte, n), off)
		}
		for name, err := range calls {
			if !errors.Is(err, ErrRange) {
				t.Errorf("%s(%d, %d): %v", name, off, n, err)
			}
		}
	}
	if _, err := img.ReadAt(make([]byte, 1), -1); !errors.Is(err, ErrRange) {
		t.Error(err)
	}
	if n, err := img.ReadAt(make([]byte, 10), mib-4); n != 4 || !errors.Is(err, io.EOF) {
		t.Error(n, err)
	}
	if n, err := img.ReadAt(make([]byte, 10), 5*mib); n != 0 || !errors.Is(err, io.EOF) {
		t.Error(n, err)
	}
	must(t, img.Trim(mib, 0))
	must(t, os.Truncate(img.Path(), 100)) // somebody cuts the file
	if n, err := img.ReadAt(make([]byte, 200), 0); n != 100 || !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Error(n, err)
	}
}

func TestImageDataAndAttrs(t *testing.T) {
	img := newImage(t, 4*mib)
	data := bytes.Repeat([]byte{5}, int(2*mib))
	_, err := img.WriteAt(data, mib)
	must(t, err)
	must(t, img.WriteZeroes(mib, 4096, true))
	must(t, img.WriteZeroes(mib+4096, 4096, false))
	must(t, img.Trim(mib+8192, 100))
	got := make([]byte, mib)
	_, err = img.ReadAt(got, mib)
	must(t, err)
	want := append(make([]byte, 8292), data[8292:mib]...)
	if !bytes.Equal(got, want) {
		t.Fatal("content differs")
	}
	must(t, img.Allocate(0, mib))
	must(t, img.SetAttr("user.kagami.clean", []byte("42")))
	must(t, img.Datasync())
	if v, err := img.Attr("user.kagami.clean"); string(v) != "42" || err != nil {
		t.Fatal(v, err)
	}
	if _, err := img.ModTime(); err != nil {
		t.Fatal(err)
	}
}

// mapFile is a File whose allocation is given: tests need extents that do
// not depend on the host's file system.
type mapFile struct {
	File
	data [][2]int64
	err  error
}

func (m *mapFile) NextData(off int64) (int64, int64, error) {
	if m.err != nil {
		return 0, 0, m.err
	}
	for _, d := range m.data {
		if d[1] > off {
			return max(d[0], off), d[1], nil
		}
	}
	return 0, 0, io.EOF
}

func TestImageExtents(t *testing.T) {
	// The last run reaches past the end, as preallocated space may.
	img := &Image{f: &mapFile{data: [][2]int64{{10, 20}, {30, 40}, {90, 140}}}, size: 100}
	for _, c := range []struct {
		off, n int64
		limit  int
		want   string
	}{
		{0, 100, 10, "h0+10 d10+10 h20+10 d30+10 h40+50 d90+10"},
		{0, 10, 10, "h0+10"},
		{5, 10, 10, "h5+5 d10+5"},
		{12, 5, 10, "d12+5"},
		{12, 30, 10, "d12+8 h20+10 d30+10 h40+2"},
		{0, 100, 1, "h0+10"},
		{0, 100, 2, "h0+10 d10+10"},
		{0, 100, 3, "h0+10 d10+10 h20+10"},
		{95, 5, 10, "d95+5"},
		{100, 0, 10, ""},
		{0, 100, 0, ""},
	} {
		runs, err := img.Extents(c.off, c.n, c.limit)
		must(t, err)
		var words []string
		for _, r := range runs {
			kind := "d"
			if r.Hole {
				kind = "h"
			}
			words = append(words, fmt.Sprintf("%s%d+%d", kind, r.Offset, r.Length))
		}
		if got := strings.Join(words, " "); got != c.want {
			t.Errorf("Extents(%d, %d, %d) = %s, want %s", c.off, c.n, c.limit, got, c.want)
		}
	}
	boom := errors.New("boom")
	img.f = &mapFile{err: boom}
	if _, err := img.Extents(0, 100, 10); !errors.Is(err, boom) {
		t.Error(err)
	}
}

func TestImageExtentsReal(t *testing.T) {
	img := newImage(t, 4*mib)
	_, err := img.WriteAt(make([]byte, mib), mib) // zeros, but allocated
	must(t, err)
	runs, err := img.Extents(0, 4*mib, 100)
	must(t, err)
	want := []Extent{{0, mib, true}, {mib, mib, false}, {2 * mib, 2 * mib, true}}
	if !reflect.DeepEqual(runs, want) {
		t.Fatal(runs)
	}
	if s, e, err := img.NextData(mib + 512); s != mib+512 || e != 2*mib || err != nil {
		t.Fatal(s, e, err)
	}
}

func TestCheckSpace(t *testing.T) {
	dir := t.TempDir()
	must(t, CheckSpace(OS{}, dir, 1))
	if err := CheckSpace(OS{}, dir, 1<<62); !errors.Is(err, ErrNoSpace) {
		t.Fatal(err)
	}
	if err := CheckSpace(OS{}, filepath.Join(dir, "none"), 1); !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
}

// TestErrorsNameTheFileOnce: what goes wrong with a file is said of it once.
func TestErrorsNameTheFileOnce(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.raw")
	_, missing := OpenImage(OS{}, path, Want{})
	img, err := CreateImage(OS{}, path, 1<<20, "")
	must(t, err)
	defer img.Close()
	_, inUse := OpenImage(OS{}, path, Want{})
	_, exists := CreateImage(OS{}, path, 1<<20, "")
	_, noFolder := CreateImage(OS{}, filepath.Join(dir, "none", "a.raw"), 1<<20, "")
	noFile := WriteFileAtomic(OS{}, filepath.Join(dir, "none", "a.raw"), nil, 0o600)
	for _, err := range []error{missing, inUse, exists, noFolder, noFile} {
		if err == nil || strings.Count(err.Error(), "a.raw") != 1 {
			t.Errorf("%v", err)
		}
	}
}
