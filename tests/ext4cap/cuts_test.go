package ext4cap

import (
	"bytes"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kagami/ext4j/ext4"
	"kagami/ext4j/recover"
)

// notWhole are streams in which something writes below a file system, or makes it
// anew: e2fsck has reason to complain there, whoever recovers.
var notWhole = []string{"raw writes while unmounted", "journal removed and made again", "mkfs again", "files made by debugfs while unmounted", "resize",
	"journaled data written as ordered data", "log overwritten", "revoked copy written as data", "tail moved too early"}

// TestCutsSeeds recovers disks that lost their power in user space and lets the
// kernel recover copies: names, attributes and contents are the same, so is every byte but
// what says when it was done, and e2fsck finds nothing to complain of.
func TestCutsSeeds(t *testing.T) {
	if !everything {
		t.Skip("runs without the race detector, in the step of the crash tests")
	}
	cutAll(t, streams(t))
}

// TestCutsKindsSeeds is TestCutsSeeds in file systems of further kinds.
func TestCutsKindsSeeds(t *testing.T) {
	if !everything {
		t.Skip("runs without the race detector, in the step of the crash tests")
	}
	cutAll(t, kindStreams(t))
}

// kindStreams captures Kinds, once for every round.
func kindStreams(t *testing.T) map[string]Stream {
	t.Helper()
	need(t)
	rounds, seed := soak(t)
	all := map[string]Stream{}
	for i := range max(1, rounds) {
		for _, w := range Kinds() {
			s, err := Capture(tempShm(t), w, seed+uint64(i))
			if err != nil {
				t.Fatal(w.Name, ": ", err)
			}
			all[fmt.Sprintf("%s, seed %d", w.Name, seed+uint64(i))] = s
		}
	}
	return all
}

func cutAll(t *testing.T, all map[string]Stream) {
	t.Helper()
	n, seed := soak(t)
	n = max(1, 3*n)
	tried, replayed, refused := 0, 0, 0
	for i, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			s := all[name]
			j := judge(t, s)
			j.Options = s.Mount
			for _, c := range s.Cuts(rand.New(rand.NewPCG(seed, uint64(i))), n) {
				tried++
				rep, err := j.compare(t, c, slices.Contains(notWhole, name))
				switch {
				case err != nil:
					refused++
				case rep.Written > 0:
					replayed++
				}
			}
		})
	}
	t.Logf("%d crashes in %d streams; %d with something to replay, %d refused", tried, len(all), replayed, refused)
	if replayed < tried/3 {
		t.Error("too few crashes leave something to replay: the test shows little")
	}
}

// compare recovers a state both ways. Its error is a refusal, which the kernel
// shares or which is one of fast commits.
func (j *Judge) compare(t *testing.T, c Cut, broken bool) (recover.Report, error) {
	t.Helper()
	ours := memory(append([]byte(nil), c.State...))
	rep, refusal := recover.Run(ours, 0, int64(len(ours)), recover.Options{})
	want, err := j.Mount(c.State, true)
	if err != nil {
		t.Fatal(c.Name, ": ", err)
	}
	theirs := bytes.Clone(j.Left())
	if refusal != nil {
		if !strings.HasPrefix(want, "not mounted") && !strings.Contains(refusal.Error(), "fast commits") && !broken {
			t.Errorf("%s: %v, but the kernel recovers it", c.Name, refusal)
		}
		if !bytes.Equal(ours, c.State) {
			t.Errorf("%s: refused, but changed", c.Name)
		}
		return rep, refusal
	}
	if rep.Resumed && strings.HasPrefix(want, "not mounted: bad message") {
		// A superblock torn in the middle: the kernel gives up, recover knows both halves.
		j.sound(t, c, ours, broken)
		return rep, nil
	}
	got, err := j.Mount(ours, true)
	if err != nil {
		t.Fatal(c.Name, ": ", err)
	}
	if got != want {
		keep(t, c)
		t.Errorf("%s: the kernel's recovery shows\n%s\nours\n%s", c.Name, want, got)
	}
	if rep.Orphans {
		ours = bytes.Clone(j.Left()) // the kernel has dealt with them in both
	}
	if !broken && !strings.HasPrefix(want, "not mounted") {
		for _, d := range unlike(ours, theirs) {
			t.Errorf("%s: byte %d is %d, the kernel leaves %d", c.Name, d, ours[d], theirs[d])
		}
		j.fsck(t, c, ours)
	}
	return rep, nil
}

// sound holds a result that there is nothing to compare with: the kernel mounts it, with
// nothing to recover, and e2fsck finds nothing.
func (j *Judge) sound(t *testing.T, c Cut, ours []byte, broken bool) {
	t.Helper()
	t.Logf("%s: the kernel gives up over the superblock, recovery goes on", c.Name)
	got, err := j.Mount(ours, true)
	if err != nil {
		t.Fatal(c.Name, ": ", err)
	}
	if strings.HasPrefix(got, "not mounted") {
		keep(t, c)
		t.Errorf("%s: recovered, but %s", c.Name, got)
	} else if !broken {
		j.fsck(t, c, bytes.Clone(j.Left()))
	}
}

// ignored are the fields of the superblock that say when and how much was written, and its checksum.
var ignored = [][2]int{{0x30, 0x34}, {0x178, 0x180}, {0x274, 0x275}, {0x3fc, 0x400}}

// unlike lists the first bytes that differ and count.
func unlike(a, b []byte) (all []int) {
	for o := 0; o < len(a) && len(all) < 5; o += sector {
		if bytes.Equal(a[o:o+sector], b[o:o+sector]) {
			continue
		}
		for i := o; i < o+sector; i++ {
			in := func(f [2]int) bool { return i-ext4.Offset >= f[0] && i-ext4.Offset < f[1] }
			if a[i] != b[i] && !slices.ContainsFunc(ignored, in) {
				all = append(all, i)
			}
		}
	}
	return all
}

func (j *Judge) fsck(t *testing.T, c Cut, img []byte) {
	t.Helper()
	if err := j.load(img); err != nil {
		t.Fatal(err)
	}
	out, err := exec.Command("e2fsck", "-fn", j.Path()).CombinedOutput()
	if err != nil {
		keep(t, c)
		t.Errorf("%s: e2fsck -fn: %v\n%s", c.Name, err, out)
	}
}

// keep leaves a state for a closer look in the folder EXT4_KEEP, if that is set.
func keep(t *testing.T, c Cut) {
	t.Helper()
	if dir := os.Getenv("EXT4_KEEP"); dir != "" {
		if err := os.WriteFile(filepath.Join(dir, "state"), c.State, 0o600); err != nil {
			t.Error(err)
		}
	}
}
