package recover

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"kagami/ext4j/ext4"
)

// area is a run of bytes that is compared by other means.
type area struct{ off, n int64 }

// differing lists the blocks of bs bytes in which two images differ, but for the areas.
func differing(t testing.TB, a, b string, bs int64, except ...area) []int64 {
	t.Helper()
	fa, err := os.Open(a)
	if err != nil {
		t.Fatal(err)
	}
	defer fa.Close()
	fb, err := os.Open(b)
	if err != nil {
		t.Fatal(err)
	}
	defer fb.Close()
	var diff []int64
	const chunk = 1 << 20
	pa, pb := make([]byte, chunk), make([]byte, chunk)
	for off := int64(0); ; off += chunk {
		na, erra := io.ReadFull(io.NewSectionReader(fa, off, chunk), pa)
		nb, errb := io.ReadFull(io.NewSectionReader(fb, off, chunk), pb)
		if na != nb {
			t.Fatalf("lengths differ at %d: %d, %d", off, na, nb)
		}
		for _, e := range except {
			lo, hi := max(e.off, off), min(e.off+e.n, off+int64(na))
			if lo < hi {
				copy(pa[lo-off:hi-off], pb[lo-off:])
			}
		}
		if !bytes.Equal(pa[:na], pb[:na]) {
			for i := int64(0); i < int64(na); i += bs {
				if !bytes.Equal(pa[i:min(i+bs, int64(na))], pb[i:min(i+bs, int64(na))]) {
					diff = append(diff, (off+i)/bs)
				}
			}
		}
		if erra != nil || errb != nil {
			return diff
		}
	}
}

// rawAt reads n bytes of an image.
func rawAt(t testing.TB, img string, off int64, n int) []byte {
	t.Helper()
	f, err := os.Open(img)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		t.Fatal(err)
	}
	return b
}

// superFields names the fields of a superblock in which two images differ.
func superFields(t testing.TB, a, b string) []string {
	t.Helper()
	fields := []struct {
		name string
		off  int
		n    int
	}{{"inodes", 0, 4}, {"blocks", 4, 8}, {"free blocks", 0xc, 4}, {"free inodes", 0x10, 4}, {"geometry", 0x14, 0x18}, {"mtime", 0x2c, 4},
		{"wtime", 0x30, 4}, {"mount count", 0x34, 2}, {"max mount count", 0x36, 2}, {"magic", 0x38, 2}, {"state", 0x3a, 2}, {"errors", 0x3c, 4},
		{"lastcheck", 0x40, 4}, {"interval", 0x44, 8}, {"revision", 0x4c, 4}, {"defaults", 0x50, 0xc}, {"compat", 0x5c, 4}, {"incompat", 0x60, 4},
		{"ro_compat", 0x64, 4}, {"identity", 0x68, 0x20}, {"last mounted", 0x88, 0x40}, {"prealloc", 0xc8, 8}, {"journal", 0xd0, 0x18},
		{"orphan", 0xe8, 4}, {"hash", 0xec, 0x14}, {"mount options", 0x100, 4}, {"meta_bg", 0x104, 4}, {"mkfs time", 0x108, 4},
		{"journal backup", 0x10c, 0x44}, {"blocks hi", 0x150, 8}, {"free blocks hi", 0x158, 4}, {"sizes", 0x15c, 4}, {"flags", 0x160, 4},
		{"raid", 0x164, 0x10}, {"misc", 0x174, 4}, {"kbytes written", 0x178, 8}, {"snapshot", 0x180, 0x14}, {"error record", 0x194, 0x6c},
		{"mount opts", 0x200, 0x40}, {"quota", 0x240, 8}, {"overhead", 0x248, 4}, {"rest", 0x24c, 0x28}, {"wtime hi", 0x274, 1},
		{"times hi", 0x275, 7}, {"orphan file", 0x27c, 8}, {"reserved", 0x284, 0x178}, {"checksum", 0x3fc, 4}}
	ra, rb := rawAt(t, a, ext4.Offset, ext4.Size), rawAt(t, b, ext4.Offset, ext4.Size)
	var diff []string
	seen := 0
	for _, f := range fields {
		if f.off != seen {
			t.Fatalf("field %s at 0x%x, the last one ended at 0x%x", f.name, f.off, seen)
		}
		seen += f.n
		if !bytes.Equal(ra[f.off:f.off+f.n], rb[f.off:f.off+f.n]) {
			diff = append(diff, f.name)
		}
	}
	return diff
}

// without drops some words from a list.
func without(list []string, drop ...string) []string {
	var keep []string
	for _, s := range list {
		found := false
		for _, d := range drop {
			found = found || s == d
		}
		if !found {
			keep = append(keep, s)
		}
	}
	return keep
}

// tree describes everything in a mounted file system: names, kinds, modes,
// owners, times, links, sizes, content, targets, xattrs.
func tree(t testing.TB, root string) []string {
	t.Helper()
	var lines []string
	err := filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		line, err := describeFile(root, p)
		lines = append(lines, line)
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	sort.Strings(lines)
	return lines
}

func describeFile(root, p string) (string, error) {
	rel, err := filepath.Rel(root, p)
	if err != nil {
		return "", err
	}
	var st syscall.Stat_t
	if err := syscall.Lstat(p, &st); err != nil {
		return "", err
	}
	line := fmt.Sprintf("%s ino=%d mode=%o uid=%d gid=%d links=%d size=%d blocks=%d mtime=%d.%d ctime=%d.%d", rel, st.Ino, st.Mode, st.Uid, st.Gid,
		st.Nlink, st.Size, st.Blocks, st.Mtim.Sec, st.Mtim.Nsec, st.Ctim.Sec, st.Ctim.Nsec)
	switch st.Mode & syscall.S_IFMT {
	case syscall.S_IFREG:
		f, err := os.Open(p)
		if err != nil {
			return "", err
		}
		defer f.Close()
		h := sha256.New()
		if _, err := io.Copy(h, f); err != nil {
			return "", err
		}
		line += fmt.Sprintf(" sha256=%x", h.Sum(nil))
	case syscall.S_IFLNK:
		target, err := os.Readlink(p)
		if err != nil {
			return "", err
		}
		line += fmt.Sprintf(" -> %q", target)
	}
	attrs, err := xattrs(p)
	return line + attrs, err
}

func xattrs(p string) (string, error) {
	b := make([]byte, 64<<10)
	n, err := unix.Llistxattr(p, b)
	if err != nil {
		return "", err
	}
	names := strings.Split(strings.TrimRight(string(b[:n]), "\x00"), "\x00")
	sort.Strings(names)
	var out string
	for _, name := range names {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(p, name, b)
		if err != nil {
			return "", err
		}
		out += fmt.Sprintf(" %s=%x", name, sha256.Sum256(b[:n]))
	}
	return out, nil
}

// treeOf mounts an image read-only (a copy of it: the kernel may write) and describes it.
func treeOf(t testing.TB, img string, opts string) []string {
	t.Helper()
	m := mountImage(t, img, unix.MS_RDONLY, opts)
	defer m.unmount()
	return tree(t, m.dir)
}

// diffLines gives the first lines that are in only one of two sorted lists.
func diffLines(a, b []string) string {
	in := map[string]int{}
	for _, l := range a {
		in[l]++
	}
	for _, l := range b {
		in[l]--
	}
	var out []string
	for l, n := range in {
		if n != 0 {
			out = append(out, fmt.Sprintf("%+d %s", n, l))
		}
	}
	sort.Strings(out)
	return strings.Join(out[:min(len(out), 10)], "\n")
}
