package ext4cap

import (
	"errors"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"

	"kagami/ext4j/follow"
)

// need skips a test where a file system cannot be captured, and fails it in CI.
func need(t *testing.T) {
	t.Helper()
	lacks := ""
	if os.Geteuid() != 0 {
		lacks = "root"
	}
	for _, path := range []string{"/dev/fuse", "/dev/loop-control", "/dev/shm"} {
		if _, err := os.Stat(path); err != nil {
			lacks = path
		}
	}
	for _, tool := range []string{"mke2fs", "losetup", "debugfs", "tune2fs", "resize2fs"} {
		if _, err := exec.LookPath(tool); err != nil {
			lacks = tool
		}
	}
	switch {
	case lacks == "":
	case os.Getenv("CI") == "true":
		t.Fatalf("needs %s", lacks)
	default:
		t.Skipf("needs %s", lacks)
	}
}

func tempShm(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "ext4cap")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// soak is how much longer the tests run: EXT4_SOAK, with the seed EXT4_SEED.
func soak(t *testing.T) (rounds int, seed uint64) {
	t.Helper()
	rounds, _ = strconv.Atoi(os.Getenv("EXT4_SOAK"))
	seed = 1
	if s, err := strconv.ParseUint(os.Getenv("EXT4_SEED"), 10, 64); err == nil {
		seed = s
	}
	t.Logf("seed %d", seed)
	return rounds, seed
}

// streams captures every workload once, and forges the rest.
func streams(t *testing.T) map[string]Stream {
	t.Helper()
	need(t)
	rounds, seed := soak(t)
	captured.once.Do(func() {
		captured.m, captured.err = capture(t, seed)
		for i := 1; i < rounds && captured.err == nil; i++ {
			more, err := capture(t, seed+uint64(i))
			for name, s := range more {
				captured.m[fmt.Sprintf("%s, seed %d", name, seed+uint64(i))] = s
			}
			captured.err = err
		}
	})
	if captured.err != nil {
		t.Fatal(captured.err)
	}
	return captured.m
}

func capture(t *testing.T, seed uint64) (map[string]Stream, error) {
	m, err := Forged(tempShm(t), seed)
	if err != nil {
		return nil, fmt.Errorf("forge: %w", err)
	}
	for _, w := range Workloads() {
		if m[w.Name], err = Capture(tempShm(t), w, seed); err != nil {
			return nil, fmt.Errorf("%s: %w", w.Name, err)
		}
	}
	return m, nil
}

var captured struct {
	once sync.Once
	m    map[string]Stream
	err  error
}

func judge(t *testing.T, s Stream) *Judge {
	t.Helper()
	j, err := NewJudge(tempShm(t), int64(len(s.Base)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := j.Close(); err != nil {
			t.Error(err)
		}
	})
	return j
}

// lags are how many FLUSHes late acknowledgements come in a stream. Late ones make
// nearly all FLUSHes wait, so the short run has them where several were under way.
func lags(name string) []int {
	switch {
	case os.Getenv("EXT4_SOAK") != "":
		return []int{0, 1, 5}
	case strings.HasPrefix(name, "threads"), strings.HasPrefix(name, "appends"):
		return []int{0, 2}
	}
	return []int{0}
}

// TestRulesSeeds recovers the disk at every FLUSH that was answered locally, and
// at all between it and what the replica had: they have to look alike.
func TestRulesSeeds(t *testing.T) {
	if !everything {
		t.Skip("runs without the race detector, in the step of the crash tests")
	}
	all, local := streams(t), 0
	for _, name := range slices.Sorted(maps.Keys(all)) {
		t.Run(name, func(t *testing.T) {
			s := all[name]
			j := judge(t, s)
			for _, lag := range lags(name) {
				p := s.Play(follow.Options{}, lag)
				t.Logf("acks %d late: %d records, %d FLUSHes, %d local, %d waited, %d empty; %d commits; classes %v; %s", lag, len(s.Log), p.Flushes, p.Local, p.Waited, p.Empty,
					p.Commits, p.Counts, p.Status.Parts[0].State)
				if err := s.Check(j, p.Answers); err != nil {
					t.Fatal(err)
				}
				local += p.Local
			}
		})
	}
	t.Logf("%d FLUSHes were answered locally in all", local)
	if local < 1000 {
		t.Errorf("only %d FLUSHes were answered locally: the test shows little", local)
	}
}

// notices are streams that show what a mutant breaks. EXT4_SOAK=1 tries them all, for the
// table in docs/testing.md.
var notices = map[follow.Mutant][]string{
	follow.AnyFlush:      {"appends, nodelalloc"},
	follow.SinceFlush:    {"appends, nodelalloc"},
	follow.StaleView:     {"overwrites, data=ordered"},
	follow.KeepView:      {"files made by debugfs while unmounted"},
	follow.KeepCopies:    {"journaled data written as ordered data"},
	follow.IgnoreRevoke:  {"revoked copy written as data"},
	follow.IgnoreCommit:  {"appends, nodelalloc"},
	follow.AlwaysLive:    {"raw writes while unmounted"},
	follow.FastLog:       {"fast_commit"},
	follow.NoBefore:      {"overwrites, data=ordered"},
	follow.TrustTail:     {"tail moved too early"},
	follow.IgnoreJournal: {"log overwritten"},
}

func TestMutants(t *testing.T) {
	if !everything {
		t.Skip("runs without the race detector, in the step of the crash tests")
	}
	all := streams(t)
	for _, m := range follow.Mutants() {
		t.Run(m.String(), func(t *testing.T) {
			names := notices[m]
			if os.Getenv("EXT4_SOAK") != "" {
				names = slices.Sorted(maps.Keys(all))
			}
			var caught []string
			for _, name := range names {
				if lies(t, all[name], m) {
					caught = append(caught, name)
				}
			}
			if len(caught) == 0 {
				t.Errorf("not caught")
			}
			t.Logf("caught in %d of %d streams: %q", len(caught), len(names), caught)
		})
	}
}

// lies tells whether the judge catches a mutant in a stream.
func lies(t *testing.T, s Stream, m follow.Mutant) bool {
	t.Helper()
	j := judge(t, s)
	for _, lag := range []int{0, 1, 5} {
		var lie *Lie
		if err := s.Check(j, s.Play(follow.Options{Mutant: m}, lag).Answers); errors.As(err, &lie) {
			return true
		} else if err != nil {
			t.Fatal(err)
		}
	}
	return false
}
