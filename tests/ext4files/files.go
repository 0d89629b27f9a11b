// Package ext4files makes file systems with files of every kind, written by the kernel, and lists a
// mounted tree as the kernel reads it.
package ext4files

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// Kind is a kind of file system.
type Kind struct {
	Name string
	MiB  int64
	Mkfs []string // arguments of mke2fs
}

// Kinds are file systems that must be read as the kernel reads them. The first QuickKinds are tried in every go
// test, all with EXT4_SOAK set.
var Kinds = []Kind{
	{"default", 64, []string{"-t", "ext4"}},
	{"1k inline_data", 48, []string{"-t", "ext4", "-b", "1024", "-O", "inline_data"}},
	{"ext2", 48, []string{"-t", "ext2", "-b", "1024"}},
	{"ea_inode", 64, []string{"-t", "ext4", "-O", "ea_inode,large_dir"}},
	{"bigalloc inode 512", 64, []string{"-t", "ext4", "-O", "bigalloc", "-C", "16384", "-I", "512"}},
	{"inode 128", 48, []string{"-t", "ext4", "-I", "128", "-b", "2048"}},
	{"no checksums", 48, []string{"-t", "ext4", "-O", "^metadata_csum"}},
	{"ext3", 64, []string{"-t", "ext3"}},
	{"ext3 1k", 48, []string{"-t", "ext3", "-b", "1024"}},
	{"meta_bg", 64, []string{"-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"}},
	{"csum seed", 64, []string{"-t", "ext4", "-O", "metadata_csum_seed"}},
	{"32 bit", 48, []string{"-t", "ext4", "-O", "^64bit"}},
	{"uninit_bg", 48, []string{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum,uninit_bg"}},
	{"inline_data inode 1024", 64, []string{"-t", "ext4", "-I", "1024", "-O", "inline_data,ea_inode"}},
	{"no filetype", 48, []string{"-t", "ext4", "-O", "^filetype"}},
	{"no dir_index", 48, []string{"-t", "ext4", "-O", "^dir_index"}},
	{"sparse_super2", 48, []string{"-t", "ext4", "-b", "1024", "-O", "sparse_super2,^resize_inode"}},
}

const QuickKinds = 6

// Tried are the kinds to try now.
func Tried() []Kind {
	if os.Getenv("EXT4_SOAK") == "" {
		return Kinds[:QuickKinds]
	}
	return Kinds
}

// Command runs a program that must succeed.
func Command(t testing.TB, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

// Mounted runs do on a mount of an image.
func Mounted(t testing.TB, image, options string, do func(dir string)) {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "mnt")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	Command(t, "mount", "-o", "loop,"+options, image, dir)
	defer func() {
		for range 50 {
			if exec.Command("umount", dir).Run() == nil {
				return
			}
			time.Sleep(20 * time.Millisecond)
		}
		t.Errorf("cannot unmount %s", dir)
	}()
	do(dir)
}

// populate makes files of every kind.
func populate(t testing.TB, dir string, rng *rand.Rand) {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil && !errors.Is(err, unix.ENOTSUP) && !errors.Is(err, unix.ENOSPC) {
			t.Fatal(err)
		}
	}
	path := func(name string) string { return filepath.Join(dir, name) }
	random := func(n int) []byte {
		p := make([]byte, n)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		return p
	}
	for _, n := range []int{0, 1, 59, 60, 61, 100, 150, 200, 1000, 4096, 5000, 70_000, 1 << 20, 3<<20 + 7} {
		must(os.WriteFile(path(fmt.Sprintf("file-%d", n)), random(n), fs.FileMode(rng.IntN(0o1000))))
	}
	sparse, err := os.Create(path("sparse"))
	must(err)
	for _, off := range []int64{0, 100_000, 5 << 20, 100 << 20, 250 << 20} {
		_, err := sparse.WriteAt(random(3000), off)
		must(err)
	}
	must(sparse.Truncate(300 << 20))
	must(sparse.Close())
	for i := range 300 { // fragments: a deep tree of extents
		f, err := os.OpenFile(path(fmt.Sprintf("fragments-%d", i%2)), os.O_RDWR|os.O_CREATE, 0o600)
		must(err)
		_, err = f.WriteAt(random(512), int64(i)*20_000)
		must(errors.Join(err, f.Sync(), f.Close()))
	}
	f, err := os.Create(path("preallocated"))
	must(err)
	must(unix.Fallocate(int(f.Fd()), 0, 0, 200_000))
	_, err = f.WriteAt(random(4096), 50_000)
	must(errors.Join(err, f.Truncate(150_000), f.Close()))
	must(os.MkdirAll(path("many/deep/er"), 0o755))
	for i := range 1500 {
		must(os.WriteFile(path(fmt.Sprintf("many/a name that is rather long, so that there are many blocks %d", i)), nil, 0o644))
	}
	for i := range 700 {
		must(os.Remove(path(fmt.Sprintf("many/a name that is rather long, so that there are many blocks %d", i*2))))
	}
	must(os.MkdirAll(path("small dir"), 0o1777))
	for i := range 7 {
		must(os.WriteFile(path(fmt.Sprintf("small dir/%d", i)), random(i*30), 0o4755))
	}
	for _, n := range []int{1, 58, 59, 60, 61, 300, 1000} {
		must(os.Symlink(strings.Repeat("x", n), path(fmt.Sprintf("link-%d", n))))
	}
	must(os.Symlink("../many", path("small dir/up")))
	must(os.Link(path("file-5000"), path("many/deep/hard")))
	must(unix.Mknod(path("fifo"), unix.S_IFIFO|0o600, 0))
	must(unix.Mknod(path("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))))
	must(unix.Mknod(path("large"), unix.S_IFBLK|0o660, int(unix.Mkdev(300, 70_000))))
	must(unix.Mknod(path("socket"), unix.S_IFSOCK|0o600, 0))
	must(os.Lchown(path("link-58"), 100_000, 7))
	must(os.Chown(path("file-100"), 70_000, 1<<30))
	for i, name := range []string{"file-1", "file-60", "file-150", "file-5000", "small dir", "many", "fifo", "link-61"} {
		must(unix.Lsetxattr(path(name), "trusted.t", []byte("trust"), 0))
		must(unix.Lsetxattr(path(name), "security.k", random(i), 0))
		if name == "fifo" || name == "link-61" {
			continue
		}
		must(unix.Lsetxattr(path(name), "user.short", []byte("value"), 0))
		must(unix.Lsetxattr(path(name), "user.empty", nil, 0))
		must(unix.Lsetxattr(path(name), "user.longer", random(200*i), 0))
	}
	must(unix.Lsetxattr(path("file-1000"), "user.huge", random(20_000), 0))
	acl := []byte{2, 0, 0, 0}
	for _, e := range [][3]uint32{{1, 6, 0xffffffff}, {2, 4, 70_000}, {4, 5, 0xffffffff}, {8, 7, 5}, {0x10, 7, 0xffffffff}, {0x20, 0, 0xffffffff}} {
		acl = binary.LittleEndian.AppendUint16(acl, uint16(e[0]))
		acl = binary.LittleEndian.AppendUint16(acl, uint16(e[1]))
		acl = binary.LittleEndian.AppendUint32(acl, e[2])
	}
	must(unix.Lsetxattr(path("file-4096"), "system.posix_acl_access", acl, 0))
	must(unix.Lsetxattr(path("many"), "system.posix_acl_default", acl, 0))
	for name, at := range map[string]time.Time{"file-61": time.Date(1955, 11, 5, 6, 15, 0, 7, time.UTC), "file-200": time.Date(2040, 1, 1, 0, 0, 0, 999_999_999, time.UTC),
		"null": time.Date(2300, 1, 1, 0, 0, 0, 1, time.UTC), "many/deep": time.Unix(0, 0)} {
		must(os.Chtimes(path(name), at, at.Add(time.Hour)))
	}
}

// Line is what is compared of a file.
func Line(path string, mode, uid, gid uint32, links uint64, size int64, major, minor uint32, times []time.Time, content string, attrs []string) string {
	slices.Sort(attrs)
	if mode&unix.S_IFMT == unix.S_IFDIR {
		size = 0 // of an inline one stat(2) says what the kernel makes of it
	}
	var at []string
	for _, t := range times {
		at = append(at, fmt.Sprintf("%d.%09d", t.Unix(), t.Nanosecond()))
	}
	return fmt.Sprintf("%q %o %d:%d %d links %d bytes %d,%d %s %s %q", path, mode, uid, gid, links, size, major, minor, strings.Join(at, " "), content, attrs)
}

// KernelTree lists a mounted tree.
func KernelTree(t testing.TB, dir string) []string {
	t.Helper()
	var out []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		rel, err := filepath.Rel(dir, path)
		if err != nil {
			return err
		}
		content := ""
		switch e.Type() {
		case 0:
			f, err := os.Open(path)
			if err != nil {
				return err
			}
			h := sha256.New()
			if _, err := io.Copy(h, f); err != nil {
				return err
			}
			content = fmt.Sprintf("%x", h.Sum(nil))
			if err := f.Close(); err != nil {
				return err
			}
		case fs.ModeSymlink:
			if content, err = os.Readlink(path); err != nil {
				return err
			}
		}
		attrs, err := kernelXattrs(path)
		if err != nil {
			return err
		}
		major, minor := uint32(0), uint32(0)
		if e.Type()&fs.ModeDevice != 0 {
			major, minor = unix.Major(st.Rdev), unix.Minor(st.Rdev)
		}
		out = append(out, Line(rel, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, major, minor,
			[]time.Time{time.Unix(st.Atim.Unix()), time.Unix(st.Mtim.Unix()), time.Unix(st.Ctim.Unix())}, content, attrs))
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(out)
	return out
}

func kernelXattrs(path string) ([]string, error) {
	list, value := make([]byte, 64<<10), make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		return nil, err
	}
	var out []string
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return nil, err
		}
		out = append(out, fmt.Sprintf("%s=%x", name, sha256.Sum256(value[:n])))
	}
	return out, nil
}

// FirstDifference ends a test in which two lists are not alike.
func FirstDifference(t testing.TB, got, want []string) {
	t.Helper()
	for i := range max(len(got), len(want)) {
		a, b := "(nothing)", "(nothing)"
		if i < len(got) {
			a = got[i]
		}
		if i < len(want) {
			b = want[i]
		}
		if a != b {
			t.Fatalf("of %d files and %d:\n%s\nthe kernel reads\n%s", len(got), len(want), a, b)
		}
	}
}

// Made is a populated image of a kind, and the kernel's list of it.
func Made(t testing.TB, k Kind) (image string, tree []string) {
	t.Helper()
	image = Empty(t, k)
	Mounted(t, image, "user_xattr,acl", func(dir string) { populate(t, dir, rand.New(rand.NewPCG(1, 1))) })
	Mounted(t, image, "ro,noatime", func(dir string) { tree = KernelTree(t, dir) })
	return image, tree
}

// Empty is an image of a kind with nothing in it.
func Empty(t testing.TB, k Kind) (image string) {
	t.Helper()
	image = filepath.Join(t.TempDir(), "image")
	f, err := os.Create(image)
	if err == nil {
		err = errors.Join(f.Truncate(k.MiB<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	Command(t, "mke2fs", append(append([]string{"-q", "-F"}, k.Mkfs...), image)...)
	return image
}
