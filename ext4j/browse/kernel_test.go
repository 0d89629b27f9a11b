package browse

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"testing"
	"time"

	"kagami/ext4j/ext4"
	"kagami/tests/ext4files"
)

// ourTree lists a tree as this package reads it.
func ourTree(t *testing.T, fs *ext4.FS) []string {
	t.Helper()
	var out []string
	root, err := fs.Node(ext4.RootInode)
	if err != nil {
		t.Fatal(err)
	}
	err = Walk(fs, root, Visitor{Enter: func(f File) error {
		content := ""
		switch {
		case f.RegularFile():
			h, at := sha256.New(), int64(0)
			zeros := make([]byte, 1<<20)
			upTo := func(end int64) {
				for at < end {
					n := min(end-at, int64(len(zeros)))
					h.Write(zeros[:n])
					at += n
				}
			}
			err := f.Data(func(off int64, p []byte) error {
				upTo(off)
				h.Write(p)
				at += int64(len(p))
				return nil
			})
			if err != nil {
				return err
			}
			upTo(int64(f.Size))
			content = fmt.Sprintf("%x", h.Sum(nil))
		case f.Symlink():
			if content, err = f.Readlink(); err != nil {
				return err
			}
		}
		xs, err := f.Xattrs()
		if err != nil {
			return err
		}
		var attrs []string
		for _, x := range xs {
			attrs = append(attrs, fmt.Sprintf("%s=%x", x.Name, sha256.Sum256(x.Value)))
		}
		out = append(out, ext4files.Line(f.Path, uint32(f.Mode), f.UID, f.GID, uint64(f.Links), int64(f.Size), f.Major, f.Minor,
			[]time.Time{f.Atime, f.Mtime, f.Ctime}, content, attrs))
		return nil
	}})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

func openImage(t *testing.T, image string) *ext4.FS {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	fs, err := ext4.Probe(f, 0, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	return fs
}

// TestReadsAsTheKernelDoes: every file of file systems that the kernel has written, with all that stat(2),
// readlink(2), read(2) and getxattr(2) say of it.
func TestReadsAsTheKernelDoes(t *testing.T) {
	for _, k := range ext4files.Tried() {
		t.Run(k.Name, func(t *testing.T) {
			image, want := ext4files.Made(t, k)
			fs := openImage(t, image)
			ext4files.FirstDifference(t, ourTree(t, fs), want)
			if len(want) < 800 {
				t.Errorf("only %d files", len(want))
			}
			lookups(t, fs)
		})
	}
}

// lookups finds files by path, through links.
func lookups(t *testing.T, fs *ext4.FS) {
	t.Helper()
	hard, err := Lookup(fs, "/many/deep/hard", false)
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range []string{"many/../many//deep/./hard", "/small dir/up/deep/hard", "../file-5000"} {
		if n, err := Lookup(fs, path, true); err != nil || n.Number != hard.Number {
			t.Errorf("%s: %+v, %v", path, n, err)
		}
	}
	if n, err := Lookup(fs, "small dir/up", false); err != nil || !n.Symlink() {
		t.Errorf("%v", err)
	}
	for _, path := range []string{"nothing", "file-1/x", "link-1", "many/deep/none/x"} {
		if _, err := Lookup(fs, path, true); !errors.Is(err, ErrNotThere) {
			t.Errorf("%s: %v", path, err)
		}
	}
	p, q := make([]byte, 5000), make([]byte, 5000)
	if _, err := hard.ReadAt(p, 0); err != nil {
		t.Error(err)
	}
	if n, err := hard.ReadAt(q, 1234); n != 5000-1234 || !errors.Is(err, io.EOF) || !bytes.Equal(q[:n], p[1234:]) {
		t.Errorf("%d bytes, %v", n, err)
	}
}
