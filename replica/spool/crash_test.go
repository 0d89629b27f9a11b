package spool

import (
	"os"
	"strconv"
	"syscall"
	"testing"
	"time"

	"kagami/tests/fault"
)

// TestCrash runs random histories, each with several crashes at random steps.
// A failure prints its seed; run that one with run(t, seed). It is one
// goroutine, so the race detector, under which it is much slower, has little to
// find here; the many seeds run without it.
func TestCrash(t *testing.T) {
	seeds := int64(4000)
	if testing.Short() || raceEnabled {
		seeds = 200
	}
	if s := os.Getenv("SPOOL_SEEDS"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		seeds = n
	}
	start := time.Now()
	var sum world
	for seed := range seeds {
		w := run(t, seed)
		sum.crashes += w.crashes
		sum.kills += w.kills
		sum.full += w.full
		sum.drops += w.drops
		sum.trims += w.trims
		sum.resets += w.resets
		sum.found += w.found
		sum.poisoned += w.poisoned
	}
	t.Logf("%d seeds in %v: %d crashes, %d kills, %d epochs found, %d times full, %d drops, %d trims, %d resets, %d poisoned segments",
		seeds, time.Since(start).Round(time.Millisecond), sum.crashes, sum.kills, sum.found, sum.full, sum.drops, sum.trims, sum.resets, sum.poisoned)
	if sum.found == 0 || sum.full == 0 || sum.drops == 0 || sum.trims == 0 || sum.resets == 0 || sum.poisoned == 0 {
		t.Error("not everything happened")
	}
}

func run(t *testing.T, seed int64) *world {
	w := newWorld(t, seed)
	rec, err := w.open()
	if err != nil || rec != (Recovery{}) {
		w.fatal("open an empty folder: %+v, %v", rec, err)
	}
	for range 5 {
		switch w.rng.IntN(4) {
		case 0:
			w.fs.Inject(fault.Fault{Op: fault.OpSync, Nth: w.rng.IntN(60), Err: syscall.EIO})
		default:
			w.fs.StopAfter(int64(1 + w.rng.IntN(150)))
		}
		for range 200 {
			if !w.step() {
				break
			}
		}
		w.restart()
	}
	return w
}
