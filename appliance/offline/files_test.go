package offline

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"kagami/tests/ext4files"
)

// whenChanged is the third time of a line: nobody can set it.
var whenChanged = regexp.MustCompile(`(\d+,\d+ \S+ \S+) \S+`)

func withoutChange(lines []string) []string {
	var out []string
	for _, l := range lines {
		out = append(out, whenChanged.ReplaceAllString(l, "$1"))
	}
	return out
}

// TestRestoreIsACopy: a restored tree is what was there, to the kernel, in all that can be set.
func TestRestoreIsACopy(t *testing.T) {
	for _, k := range ext4files.Tried()[:2] {
		t.Run(k.Name, func(t *testing.T) {
			image, want := ext4files.Made(t, k)
			before := readAll(t, image)
			empty := ext4files.Empty(t, ext4files.Kind{MiB: 256, Mkfs: []string{"-t", "ext4", "-I", "512"}})
			ext4files.Mounted(t, empty, "user_xattr,acl,noatime", func(dir string) {
				to := filepath.Join(dir, "restored")
				r, err := Restore(t.Context(), image, Place{}, "/", to, RestoreOptions{})
				if err != nil || len(r.Left) > 0 || r.Files < len(want)-1 {
					t.Fatalf("%+v, %v", r, err)
				}
				ext4files.FirstDifference(t, withoutChange(ext4files.KernelTree(t, to)), withoutChange(want))
				if st, err := os.Stat(to + "/sparse"); err != nil || r.Bytes > 100<<20 {
					t.Errorf("%d bytes were written; sparse: %+v, %v", r.Bytes, st, err)
				}
				var cat bytes.Buffer
				if err := Cat(t.Context(), image, Place{}, "small dir/up/deep/hard", false, &cat); err != nil {
					t.Error(err)
				}
				if file, err := os.ReadFile(filepath.Join(to, "file-5000")); err != nil || !bytes.Equal(file, cat.Bytes()) {
					t.Errorf("cat: %d bytes, %v", cat.Len(), err)
				}
				if _, err := Restore(t.Context(), image, Place{}, "/", to, RestoreOptions{}); !errors.Is(err, ErrRefused) {
					t.Errorf("over what is there: %v", err)
				}
				if r, err := Restore(t.Context(), image, Place{}, "many/deep/hard", filepath.Join(dir, "one"), RestoreOptions{}); err != nil || r.Files != 1 || r.Bytes != 5000 {
					t.Errorf("one file: %+v, %v", r, err)
				}
			})
			if !bytes.Equal(before, readAll(t, image)) {
				t.Error("the image was changed")
			}
		})
	}
}

func readAll(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestRestoreStaysInside: names of a hostile guest lead nowhere else.
func TestRestoreStaysInside(t *testing.T) {
	image := ext4files.Empty(t, ext4files.Kind{MiB: 16, Mkfs: []string{"-t", "ext4", "-O", "^metadata_csum,^has_journal"}})
	dir := t.TempDir()
	victim := filepath.Join(dir, "victim")
	if err := os.Mkdir(victim, 0o700); err != nil {
		t.Fatal(err)
	}
	ext4files.Mounted(t, image, "user_xattr", func(mnt string) {
		for _, err := range []error{os.Symlink(victim, mnt+"/aaaa"), os.Mkdir(mnt+"/bbbb", 0o777), os.WriteFile(mnt+"/bbbb/file", []byte("x"), 0o600),
			os.WriteFile(mnt+"/cc", []byte("y"), 0o600), os.WriteFile(mnt+"/dd_x", []byte("z"), 0o600)} {
			if err != nil {
				t.Fatal(err)
			}
		}
	})
	for what, c := range map[string]struct{ name, as string }{
		"a folder named as a link": {"bbbb", "aaaa"},
		"a file named ..":          {"cc", ".."},
		"a name with a slash":      {"dd_x", "dd/x"},
	} {
		img := readAll(t, image)
		at := bytes.Index(img, []byte(c.name))
		for at >= 0 && int(img[at-2]) != len(c.name) {
			next := bytes.Index(img[at+1:], []byte(c.name))
			if next < 0 {
				t.Fatalf("%s: no entry", what)
			}
			at += 1 + next
		}
		copy(img[at:], c.as)
		path := filepath.Join(t.TempDir(), "hostile")
		if err := os.WriteFile(path, img, 0o600); err != nil {
			t.Fatal(err)
		}
		to := filepath.Join(t.TempDir(), "to")
		r, err := Restore(context.Background(), path, Place{}, "/", to, RestoreOptions{})
		t.Logf("%s: %+v, %v", what, r, err)
		if names, err := os.ReadDir(victim); err != nil || len(names) > 0 {
			t.Errorf("%s: %v is where a link leads, %v", what, names, err)
		}
		if names, err := os.ReadDir(filepath.Dir(to)); err != nil || len(names) > 1 {
			t.Errorf("%s: %v beside the destination, %v", what, names, err)
		}
		rep, err := Check(t.Context(), path, Place{}, false, nil)
		if err != nil || rep.Clean() {
			t.Errorf("%s: nothing was found: %v", what, err)
		}
	}
}

// TestListIsDirty: of an image whose journal has to be replayed the recovered tree is shown, and the
// image stays as it was.
func TestListIsDirty(t *testing.T) {
	path, content := dirtyImage(t, 0)
	var names []string
	list := func(name string, o ListOptions) error {
		names = nil
		return List(path, Place{}, name, o, func(f FileInfo) error {
			names = append(names, f.Mode+" "+f.Path)
			if f.Error != "" {
				t.Errorf("%s: %s", f.Path, f.Error)
			}
			return nil
		})
	}
	if err := list("/", ListOptions{}); err != nil || !strings.Contains(strings.Join(names, "\n"), "-rw-r--r-- c2") {
		t.Errorf("%q, %v", names, err)
	}
	if err := list("c2", ListOptions{}); err != nil || len(names) != 1 {
		t.Errorf("%q, %v", names, err)
	}
	if err := list("/", ListOptions{Directory: true}); err != nil || len(names) != 1 || !strings.HasPrefix(names[0], "drwx") {
		t.Errorf("%q, %v", names, err)
	}
	if err := list("none", ListOptions{}); !errors.Is(err, ErrNotThere) {
		t.Error(err)
	}
	if err := Cat(t.Context(), path, Place{}, "/lost+found", false, &bytes.Buffer{}); !errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	rep, err := Check(t.Context(), path, Place{}, false, nil)
	if err != nil || !rep.Clean() {
		t.Errorf("%+v, %v", rep, err)
	}
	same(t, path, content)
}
