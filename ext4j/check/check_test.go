package check

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"testing"

	"kagami/ext4j/browse"
	"kagami/ext4j/ext4"
	"kagami/ext4j/recover"
	"kagami/tests/dirty"
	"kagami/tests/ext4files"
)

func checked(t *testing.T, image string) Report {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	fs, err := ext4.ProbeUnverified(f, 0, st.Size())
	if err != nil {
		t.Fatal(err)
	}
	rep, err := Run(t.Context(), fs, nil)
	if err != nil {
		t.Fatal(err)
	}
	return rep
}

// TestHealthy: nothing is found in what the kernel has written, and e2fsck agrees.
func TestHealthy(t *testing.T) {
	for _, k := range ext4files.Tried() {
		t.Run(k.Name, func(t *testing.T) {
			image, tree := ext4files.Made(t, k)
			rep := checked(t, image)
			if !rep.Clean() || int(rep.Inodes) < len(tree)-5 || rep.Directories < 5 {
				t.Errorf("%d files: %+v", len(tree), rep)
			}
			ext4files.Command(t, "e2fsck", "-fn", image)
		})
	}
}

// TestDamage: each kind of damage is found, and named.
func TestDamage(t *testing.T) {
	image, _ := ext4files.Made(t, ext4files.Kinds[0])
	healthy, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	inode := func(name string) string {
		out, err := exec.Command("debugfs", "-R", "stat \""+name+"\"", image).Output()
		if err != nil {
			t.Fatal(err)
		}
		var n int
		if _, err := fmt.Sscanf(strings.TrimSpace(string(out)), "Inode: %d", &n); err != nil {
			t.Fatalf("%v in %q", err, out)
		}
		return fmt.Sprintf("<%d>", n)
	}
	for what, c := range map[string]struct {
		commands []string // of debugfs
		patch    func(img []byte)
		found    string
	}{
		"link count":             {commands: []string{"sif file-100 links_count 7"}, found: "it has 1 names, and a link count of 7"},
		"a block freed":          {commands: []string{"freeb 2000 100"}, found: "are in use and its bitmap calls them free"},
		"blocks leaked":          {commands: []string{"setb 15000 3"}, found: "3 blocks are free and its bitmap calls them used"},
		"an inode freed":         {commands: []string{"freei " + inode("file-100")}, found: "which is not in use"},
		"a name removed":         {commands: []string{"unlink file-100"}, found: "it has no name, and a link count of 1"},
		"a block used twice":     {commands: []string{"sif file-4096 block[2] 0", "sif file-4096 flags 0", "sif file-4096 block[0] 9000", "sif file-5000 flags 0", "sif file-5000 block[0] 9000", "sif file-5000 block[1] 0", "sif file-5000 block[2] 0"}, found: "block 9000 is used by something else, too"},
		"a directory's block":    {patch: func(img []byte) { damageName(t, img, "a name that is rather long") }, found: "wrong checksum of block"},
		"the superblock":         {patch: func(img []byte) { img[1024+0x88]++ }, found: "its checksum is wrong"},
		"free blocks of a group": {commands: []string{"set_bg 0 free_blocks_count 5"}, found: "its descriptor says 5"},
	} {
		t.Run(what, func(t *testing.T) {
			img := append([]byte(nil), healthy...)
			if c.patch != nil {
				c.patch(img)
			}
			if err := os.WriteFile(image, img, 0o600); err != nil {
				t.Fatal(err)
			}
			for _, cmd := range c.commands {
				ext4files.Command(t, "debugfs", "-w", "-R", cmd, image)
			}
			rep := checked(t, image)
			for _, p := range rep.Problems {
				if strings.Contains(p.What, c.found) {
					return
				}
			}
			t.Errorf("no %q in %+v", c.found, rep.Problems)
		})
	}
}

// damageName changes a letter of a name in a directory.
func damageName(t *testing.T, img []byte, name string) {
	t.Helper()
	at := strings.Index(string(img), name)
	if at < 0 {
		t.Fatal("not found")
	}
	img[at]++
}

// TestTooManyInodes: what a superblock claims takes no memory that the image does not have.
func TestTooManyInodes(t *testing.T) {
	image := ext4files.Empty(t, ext4files.Kind{MiB: 16, Mkfs: []string{"-t", "ext4", "-b", "1024", "-g", "256", "-N", "8000", "-O", "^resize_inode,^metadata_csum,^has_journal"}})
	img, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	super := img[1024:]
	groups := binary.LittleEndian.Uint32(super) / binary.LittleEndian.Uint32(super[0x28:])
	binary.LittleEndian.PutUint32(super[0x28:], 8192)
	binary.LittleEndian.PutUint32(super, 8192*groups)
	if err := os.WriteFile(image, img, 0o600); err != nil {
		t.Fatal(err)
	}
	if rep := checked(t, image); len(rep.Problems) != 1 || !strings.Contains(rep.Problems[0].What, "do not fit") {
		t.Errorf("%+v", rep.Problems)
	}
}

// TestCopies: copies of the superblock are looked at.
func TestCopies(t *testing.T) {
	image, _ := ext4files.Made(t, ext4files.Kind{Name: "1k", MiB: 48, Mkfs: []string{"-t", "ext4", "-b", "1024"}})
	img, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	const second = 8193 * 1024
	if binary.LittleEndian.Uint16(img[second+0x38:]) != 0xef53 {
		t.Fatal("no copy there")
	}
	img[second+0x68]++
	if err := os.WriteFile(image, img, 0o600); err != nil {
		t.Fatal(err)
	}
	rep := checked(t, image)
	if len(rep.Problems) != 1 || rep.Problems[0].Where != "copy of the superblock in block 8193" {
		t.Errorf("%+v", rep.Problems)
	}
}

// FuzzCheck lets somebody change a small file system at will, four bytes at a time: whatever it is then, checking it and
// reading all of it ends, and nothing is taken for more than the image has room for.
func FuzzCheck(f *testing.F) {
	base, err := dirty.Image()
	if err != nil {
		f.Fatal(err)
	}
	r, _, err := recover.View(bytes.NewReader(base), 0, int64(len(base)))
	if err != nil {
		f.Fatal(err)
	}
	if _, err := r.ReadAt(base, 0); err != nil && !errors.Is(err, io.EOF) {
		f.Fatal(err)
	}
	f.Add([]byte{0, 4, 0, 0, 1, 2, 3, 4})
	f.Add(bytes.Repeat([]byte{0x20, 0x44, 0, 0, 0xff, 0xff, 0xff, 0x7f}, 3))
	f.Fuzz(func(t *testing.T, in []byte) {
		img := bytes.Clone(base)
		for ; len(in) >= 8; in = in[8:] {
			at := int(binary.LittleEndian.Uint32(in)) % (len(img) - 4)
			copy(img[at:], in[4:8])
		}
		raw := ext4.Raw(img[ext4.Offset : ext4.Offset+ext4.Size])
		raw.SetChecksum()
		copy(img[ext4.Offset:], raw[:])
		fs, err := ext4.Probe(bytes.NewReader(img), 0, int64(len(img)))
		if err != nil {
			return
		}
		if _, err := Run(t.Context(), fs, nil); err != nil {
			t.Fatal(err)
		}
		root, err := fs.Node(ext4.RootInode)
		if err != nil {
			return
		}
		read := int64(0)
		_ = browse.Walk(fs, root, browse.Visitor{Broken: func(string, error) error { return nil }, Enter: func(n browse.File) error {
			_, _ = n.Xattrs()
			_, _ = n.Readlink()
			return n.Data(func(_ int64, p []byte) error {
				if read += int64(len(p)); read > 16<<20 {
					return io.ErrShortBuffer
				}
				return nil
			})
		}})
	})
}
