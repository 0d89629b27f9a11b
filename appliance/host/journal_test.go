package host

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"kagami/appliance/control"
)

// run runs a tool that must succeed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		missing(t, name)
	}
	out, err := exec.Command(name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return strings.TrimSpace(string(out))
}

// dirtyExt4 is an image of a file system as it is while the kernel has it
// mounted and has just committed: its journal must be replayed.
func dirtyExt4(t *testing.T, mkfs ...string) string {
	t.Helper()
	if os.Geteuid() != 0 {
		missing(t, "root, to mount")
	}
	img, dir := filepath.Join(t.TempDir(), "fs"), t.TempDir()
	must(t, os.WriteFile(img, nil, 0o600))
	must(t, os.Truncate(img, 16<<20))
	run(t, "mke2fs", append(append([]string{"-q", "-F", "-t", "ext4", "-b", "1024"}, mkfs...), img)...)
	run(t, "mount", "-o", "loop", img, dir)
	defer func() {
		await(t, "the image to be unmounted", func() bool { return unix.Unmount(dir, 0) == nil })
	}()
	for i := range 8 {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("file%d", i)))
		must(t, err)
		_, err = f.Write(bytes.Repeat([]byte{byte('a' + i)}, 3000))
		must(t, err)
		must(t, f.Sync())
		_, err = f.Write([]byte("and an append")) // what a fast commit can hold
		must(t, err)
		must(t, f.Sync())
		must(t, f.Close())
	}
	out := filepath.Join(t.TempDir(), "copy")
	settled(t, img, out)
	return out
}

// settled copies an image at a moment when the kernel does not write it.
func settled(t *testing.T, img, out string) {
	t.Helper()
	await(t, "the kernel to stop writing", func() bool {
		before := readFile(t, img)
		time.Sleep(50 * time.Millisecond)
		if !bytes.Equal(before, readFile(t, img)) {
			return false
		}
		must(t, os.WriteFile(out, before, 0o600))
		return true
	})
}

// needsRecovery reads the flag in the superblock (s_feature_incompat, 0x4).
func needsRecovery(t *testing.T, img []byte) bool {
	t.Helper()
	return binary.LittleEndian.Uint32(img[1024+0x60:])&4 != 0
}

// failoverOf protects a VM whose disk holds an image, loses its site, and
// fails over. It returns the report and what the replica's image holds then.
func failoverOf(t *testing.T, img string) (control.FailoverReport, []byte, *pair) {
	t.Helper()
	p := newPair(t).up()
	content := readFile(t, img)
	if !needsRecovery(t, content) {
		t.Fatal("the image is clean: there is nothing to test")
	}
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": content})
	p.main.mustProtect(testVM)
	vm.destroy()
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	rep, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	if vm := p.dr.host.vm(testVM); vm == nil || !vm.state().Active() {
		t.Fatal("the replica does not run")
	} else {
		vm.destroy()
	}
	return rep, readFile(t, p.dr.path("state/images/vm1/vda.raw")), p
}

// TestJournalIsReplayed, so that the next tests mean something.
func TestJournalIsReplayed(t *testing.T) {
	rep, after, p := failoverOf(t, dirtyExt4(t))
	if rep.Replayed == 0 || len(rep.Notes) > 0 || needsRecovery(t, after) {
		t.Errorf("report %+v, needs recovery %v", rep, needsRecovery(t, after))
	}
	run(t, "e2fsck", "-fn", p.dr.path("state/images/vm1/vda.raw"))
}

// TestJournalNotReplayable: the journal cannot be replayed exactly. The VM
// boots with it as it is, and that is said, in the report and in status.
func TestJournalNotReplayable(t *testing.T) {
	for _, c := range []struct {
		name  string
		image func(*testing.T) string
		words []string
	}{
		{"pending fast commits", func(t *testing.T) string { return dirtyExt4(t, "-O", "fast_commit") }, []string{"fast commit"}},
		{"unknown feature", func(t *testing.T) string {
			img := dirtyExt4(t, "-O", "^metadata_csum")
			b := readFile(t, img)
			binary.LittleEndian.PutUint32(b[1024+0x60:], binary.LittleEndian.Uint32(b[1024+0x60:])|1<<30)
			must(t, os.WriteFile(img, b, 0o600))
			return img
		}, []string{"feature"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			img := c.image(t)
			before := readFile(t, img)
			rep, after, p := failoverOf(t, img)
			if !bytes.Equal(before, after) {
				t.Error("the image was changed")
			}
			notes := strings.Join(rep.Notes, "\n")
			t.Log(notes)
			for _, w := range append(c.words, "vda: the journal is left as it is, the guest's kernel will replay it") {
				if !strings.Contains(notes, w) {
					t.Errorf("no %q in the notes %q", w, notes)
				}
			}
			if rep.Replayed != 0 || rep.Domain != testVM {
				t.Errorf("report: %+v", rep)
			}
			if g := p.dr.group(testVM); g.Failover == nil || strings.Join(g.Failover.Notes, "\n") != notes {
				t.Errorf("status does not say it: %+v", g.Failover)
			}
		})
	}
}
