package offline

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"kagami/ext4j/ext4"
	"kagami/images"
	"kagami/tests/dirty"
)

// dirtyImage writes a file system with a journal to be replayed to a new file, with
// before bytes of something else in front of it.
func dirtyImage(t *testing.T, before int) (path string, content []byte) {
	t.Helper()
	fs, err := dirty.Image()
	if err != nil {
		t.Fatal(err)
	}
	content = append(bytes.Repeat([]byte{0x5a}, before), fs...)
	return write(t, content), content
}

func write(t *testing.T, content []byte) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func same(t *testing.T, path string, want []byte) {
	t.Helper()
	got, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s was changed", filepath.Base(path))
	}
}

// clean fails unless e2fsck finds nothing to complain of.
func clean(t *testing.T, path string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "e2fsck", "-fn", path).CombinedOutput(); err != nil {
		t.Errorf("e2fsck -fn: %v\n%s", err, out)
	}
}

func TestRecoverInPlace(t *testing.T) {
	path, _ := dirtyImage(t, 0)
	r, err := Recover(t.Context(), path, Place{}, RecoverOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if !r.Needed || r.Transactions == 0 || r.Written == 0 {
		t.Errorf("nothing was replayed: %+v", r)
	}
	clean(t, path)
	after, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if r, err = Recover(t.Context(), path, Place{}, RecoverOptions{}); err != nil || r.Needed {
		t.Errorf("a second time: needed %v, %v", r.Needed, err)
	}
	same(t, path, after)
}

func TestRecoverDryRunChangesNothing(t *testing.T) {
	path, content := dirtyImage(t, 0)
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	r, err := Recover(t.Context(), path, Place{}, RecoverOptions{DryRun: true})
	if err != nil || r.Written == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	same(t, path, content)
}

func TestRecoverToAnotherFile(t *testing.T) {
	path, content := dirtyImage(t, 0)
	out := filepath.Join(filepath.Dir(path), "out.raw")
	told := int64(0)
	r, err := Recover(t.Context(), path, Place{}, RecoverOptions{Out: out, Copied: func(done, _ int64) { told = done }})
	if err != nil || r.Out != out || r.Written == 0 || told == 0 {
		t.Fatalf("%+v, told %d, %v", r, told, err)
	}
	same(t, path, content)
	clean(t, out)

	// It is what would have become of the image itself.
	if _, err := Recover(t.Context(), path, Place{}, RecoverOptions{}); err != nil {
		t.Fatal(err)
	}
	inPlace, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	same(t, out, inPlace)

	if _, err := Recover(t.Context(), path, Place{}, RecoverOptions{Out: out}); !errors.Is(err, ErrRefused) {
		t.Errorf("over a file that exists: %v", err)
	}
	same(t, out, inPlace)
}

func TestRecoverBrokenOffLeavesNoCopy(t *testing.T) {
	path, content := dirtyImage(t, 0)
	ctx, cancel := context.WithCancel(t.Context())
	opts := RecoverOptions{Out: filepath.Join(filepath.Dir(path), "out.raw"), Copied: func(int64, int64) { cancel() }}
	if _, err := Recover(ctx, path, Place{}, opts); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	names, err := os.ReadDir(filepath.Dir(path))
	if err != nil || len(names) != 1 {
		t.Errorf("left: %v, %v", names, err)
	}
	same(t, path, content)
}

func TestRecoverAtOffsetAndPartition(t *testing.T) {
	const start = 1 << 20
	for name, at := range map[string]Place{"offset": {Offset: start}, "partition": {Partition: 2}} {
		t.Run(name, func(t *testing.T) {
			path, content := dirtyImage(t, start)
			// An MBR with the file system as the second entry.
			e := content[446+16 : 446+32]
			clear(content[446:512])
			e[4] = 0x83
			binary.LittleEndian.PutUint32(e[8:], start/512)
			binary.LittleEndian.PutUint32(e[12:], uint32(len(content)-start)/512)
			content[510], content[511] = 0x55, 0xaa
			if err := os.WriteFile(path, content, 0o600); err != nil {
				t.Fatal(err)
			}
			r, err := Recover(t.Context(), path, at, RecoverOptions{})
			if err != nil || r.Offset != start || r.Written == 0 {
				t.Fatalf("%+v, %v", r, err)
			}
			after, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			if !bytes.Equal(after[:start], content[:start]) {
				t.Error("what lies before the file system was changed")
			}
			clean(t, write(t, after[start:]))

			_, err = Recover(t.Context(), path, Place{}, RecoverOptions{})
			if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "mbr partition table: choose one of the partitions 2") {
				t.Errorf("without a place: %v", err)
			}
			if _, err = Recover(t.Context(), path, Place{Partition: 3}, RecoverOptions{}); !errors.Is(err, ErrNotThere) {
				t.Errorf("partition 3: %v", err)
			}
			same(t, path, after)
		})
	}
}

// unknownFeature makes a file system need something that nobody knows.
func unknownFeature(img []byte) {
	raw := (*ext4.Raw)(img[1024:])
	raw.SetIncompat(raw.Incompat() | 1<<30)
	raw.SetChecksum()
}

func TestRecoverRefusesAndLeavesTheImage(t *testing.T) {
	bad := func(change func([]byte)) []byte {
		img, err := dirty.Image()
		if err != nil {
			t.Fatal(err)
		}
		change(img)
		return img
	}
	for name, img := range map[string][]byte{
		"unknown feature":    bad(unknownFeature),
		"damaged superblock": bad(func(img []byte) { img[1024+0x20]++ }),
		"no file system":     make([]byte, 1<<20),
		"a text":             []byte("not a disk"),
	} {
		t.Run(name, func(t *testing.T) {
			path := write(t, img)
			for _, opts := range []RecoverOptions{{}, {DryRun: true}, {Out: path + ".out"}} {
				if _, err := Recover(t.Context(), path, Place{}, opts); !errors.Is(err, ErrRefused) {
					t.Errorf("%+v: %v", opts, err)
				}
			}
			same(t, path, img)
			if names, err := os.ReadDir(filepath.Dir(path)); err != nil || len(names) != 1 {
				t.Errorf("left: %v, %v", names, err)
			}
		})
	}
	if _, err := Recover(t.Context(), filepath.Join(t.TempDir(), "none"), Place{}, RecoverOptions{}); !errors.Is(err, ErrNotThere) {
		t.Errorf("no image: %v", err)
	}
	if _, err := Recover(t.Context(), write(t, make([]byte, 512)), Place{Offset: 512}, RecoverOptions{}); !errors.Is(err, ErrNotThere) {
		t.Errorf("behind the end: %v", err)
	}
}

func TestRecoverLeavesImagesInUse(t *testing.T) {
	path, content := dirtyImage(t, 0)
	refused := func(who string) {
		t.Helper()
		for _, opts := range []RecoverOptions{{}, {DryRun: true}, {Out: path + ".out"}} {
			if _, err := Recover(t.Context(), path, Place{}, opts); !errors.Is(err, ErrInUse) {
				t.Errorf("%s: %+v: %v", who, opts, err)
			}
		}
		same(t, path, content)
	}
	img, err := images.OpenImage(images.OS{}, path, images.Want{})
	if err != nil {
		t.Fatal(err)
	}
	refused("kagami")
	if err := img.Close(); err != nil {
		t.Fatal(err)
	}

	dev, err := exec.CommandContext(t.Context(), "losetup", "-r", "-f", "--show", path).Output()
	if err != nil {
		if os.Getenv("CI") == "true" || os.Geteuid() == 0 {
			t.Fatal("losetup: ", err)
		}
		t.Skip("needs a loop device")
	}
	t.Cleanup(func() {
		if err := exec.Command("losetup", "-d", strings.TrimSpace(string(dev))).Run(); err != nil {
			t.Error("losetup -d: ", err)
		}
	})
	refused("loop")
}
