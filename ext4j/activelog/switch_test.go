package activelog

import (
	"context"
	"syscall"
	"testing"

	"kagami/tests/fault"
)

// history adds one region after the other, so that the log changes halves twice, until something fails.
// It returns how many were durable.
func history(f *fault.FS) int {
	l, _, err := Open(f, "/log", Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 100})
	if err != nil {
		return 0
	}
	defer func() { _ = l.Close() }() // its errors are those of the machine that stopped
	for i := range 50 {
		if l.Acquire(context.Background(), 0, int64(i)*4096, 1) != nil {
			return i
		}
	}
	return 50
}

func expect(t *testing.T, f *fault.FS, n int, seed, step int64) {
	t.Helper()
	l, found, err := Open(f, "/log", Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 100})
	if err != nil {
		t.Fatalf("seed %d, step %d: %v", seed, step, err)
	}
	if len(found) < n || len(found) > n+1 {
		t.Fatalf("seed %d, step %d: found %d regions, want %d", seed, step, len(found), n)
	}
	must(t, l.Close())
}

// TestSwitchCrash crashes at every step of a history with two changes of halves.
func TestSwitchCrash(t *testing.T) {
	for seed := range scale(int64(8)) {
		f := fault.NewFS(seed)
		if n := history(f); n != 50 {
			t.Fatalf("history ended at %d", n)
		}
		steps := f.Steps()
		for step := int64(1); step <= steps; step++ {
			f := fault.NewFS(seed)
			f.StopAfter(step)
			n := history(f)
			expect(t, f.Crash(), n, seed, step)
		}
	}
}

// TestSwitchSyncError fails each fdatasync in turn, kills the process, and loses
// the power while the log is opened again: what is then read must not count on
// blocks that only the page cache held.
func TestSwitchSyncError(t *testing.T) {
	for seed := range scale(int64(40)) {
		for nth := 20; nth < 30; nth++ { // around the first change of halves
			f := fault.NewFS(seed)
			f.Inject(fault.Fault{Op: fault.OpSync, Name: "log", Nth: nth, Err: syscall.EIO})
			n := history(f)
			f = f.Kill()
			f.StopAfter(1 + seed%6)
			if l, _, err := Open(f, "/log", Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 100}); err == nil {
				must(t, l.Close())
			}
			expect(t, f.Crash(), n, seed, int64(nth))
		}
	}
}
