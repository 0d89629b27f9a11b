package sim

import (
	"flag"
	"runtime"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

var (
	firstSeed = flag.Uint64("seed", 1, "the first seed of TestSeeds")
	seeds     = flag.Uint64("seeds", 0, "the number of seeds of TestSeeds; 0: 500, or as many as fit its time under the race detector")
	tries     = flag.Int("tries", 1, "how often TestSeeds runs each seed")
)

// budget is the time of TestSeeds under the race detector, and fewestSeeds what it
// runs then however slow the machine is; usualSeeds is what it runs without.
const (
	budget      = 15 * time.Second
	fewestSeeds = 4
	usualSeeds  = 500
)

// seen is what the players of all runs saw.
var seen struct {
	sync.Mutex
	tally
}

// run is one run to be played.
type run struct {
	seed   uint64
	mutant Mutant
	script func(*World) error // nil: misfortunes at random
	events int                // of these, the first ones; 0: all
	tweak  func(*Config)      // nil: as the seed draws it
}

// play runs one seed in a bubble.
func play(t *testing.T, r run) (err error, log string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w, werr := NewWorld(r.seed, r.mutant, r.tweak)
		if werr != nil {
			t.Fatal(werr)
		}
		if r.events > 0 {
			w.c.Events = min(w.c.Events, r.events)
		}
		if r.script == nil {
			r.script = (*World).misfortunes
		}
		err = w.Play(r.script)
		log = w.Log()
		seen.Lock()
		defer seen.Unlock()
		seen.add(w.tally())
	})
	return err, log
}

// TestSeeds runs the simulator, seeds side by side. A failure names its seed and prints
// the shortest history that still fails.
func TestSeeds(t *testing.T) {
	most := *seeds
	if most == 0 && !raceEnabled {
		most = usualSeeds
	}
	began := time.Now()
	var next atomic.Uint64
	more := func() (seed uint64, ok bool) {
		n := next.Add(1)
		return *firstSeed + n - 1, n <= most || most == 0 && (n <= fewestSeeds || time.Since(began) < budget)
	}
	var played atomic.Uint64
	t.Run("side by side", func(t *testing.T) {
		for i := range runtime.GOMAXPROCS(0) {
			t.Run(strconv.Itoa(i), func(t *testing.T) {
				t.Parallel()
				for seed, ok := more(); ok && !t.Failed(); seed, ok = more() {
					tryOut(t, seed)
					played.Add(1)
				}
			})
		}
	})
	took := time.Since(began)
	t.Logf("%d seeds from %d on in %v, %.1f a second; of an ext4 %d FLUSHes were answered, of all disks %d locally; %d disasters with a promise of an ext4, %d with the replica behind it; %d chunks compared beside the guest",
		played.Load(), *firstSeed, took.Round(time.Millisecond), float64(played.Load())/took.Seconds(), seen.flushes, seen.local, seen.checked, seen.behind, seen.compared)
	if played.Load() >= usualSeeds && (seen.local < 1000 || seen.behind < 10 || seen.compared < 1000) {
		t.Error("too few FLUSHes were answered locally, or looked at: the run shows little of them")
	}
}

// found are seeds that have failed, and what was wrong.
var found = []uint64{
	4991, // pages that a failed fdatasync had left in the cache counted as equal to the source's
}

// asFound leaves out what the simulator did not know then.
func asFound(c *Config) { c.BacklogBytes, c.FillsHere, c.Jumps, c.Failover = 0, false, false, false }

// TestFoundSeeds plays them again.
func TestFoundSeeds(t *testing.T) {
	for _, seed := range found {
		if err, log := play(t, run{seed: seed, tweak: asFound}); err != nil {
			t.Errorf("seed %d: %v\n%s", seed, err, log)
		}
	}
}

// tryOut plays a seed, and where it fails, looks for a shorter history.
func tryOut(t *testing.T, seed uint64) {
	t.Helper()
	for range *tries {
		err, log := play(t, run{seed: seed})
		if err == nil {
			continue
		}
		for n := 1; n < longest; n++ {
			for range shrinkTries {
				if e, l := play(t, run{seed: seed, events: n}); e != nil {
					t.Errorf("seed %d: %v\nwith its first %d events alone: %v\n%s", seed, err, n, e, l)
					return
				}
			}
		}
		t.Errorf("seed %d: %v\n%s", seed, err, log)
		return
	}
}

// longest is more than the events of any run; shrinkTries is how often a shorter
// history is tried, since goroutines may interleave in another way.
const (
	longest     = 20
	shrinkTries = 3
)
