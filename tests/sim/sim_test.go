package sim

import (
	"flag"
	"testing"
	"testing/synctest"
	"time"
)

var (
	firstSeed = flag.Uint64("seed", 1, "the first seed of TestSeeds")
	seeds     = flag.Uint64("seeds", 0, "the number of seeds of TestSeeds; 0: as many as fit its time")
	tries     = flag.Int("tries", 1, "how often TestSeeds runs each seed")
)

// budget is the time of TestSeeds when no number of seeds is given, and
// fewestSeeds what it runs however slow the machine is.
const (
	budget      = 15 * time.Second
	fewestSeeds = 4
)

// seen is what the players of all runs saw.
var seen tally

// play runs one seed in a bubble.
func play(t *testing.T, seed uint64, mutant Mutant, script func(*World) error) (err error, log string) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		w, werr := NewWorld(seed, mutant)
		if werr != nil {
			t.Fatal(werr)
		}
		err = w.Play(script)
		log = w.Log()
		if w.player != nil {
			w.player.tally.local = int(w.local)
			seen.add(w.player.tally)
		}
	})
	return err, log
}

// TestSeeds runs the simulator. A failure names its seed.
func TestSeeds(t *testing.T) {
	began, n := time.Now(), uint64(0)
	for ; *seeds > n || *seeds == 0 && (n < fewestSeeds || time.Since(began) < budget); n++ {
		for range *tries {
			if err, log := play(t, *firstSeed+n, NoMutant, (*World).misfortunes); err != nil {
				t.Errorf("seed %d: %v\n%s", *firstSeed+n, err, log)
			}
		}
	}
	took := time.Since(began)
	t.Logf("%d seeds from %d on in %v, %.1f a second; an ext4's: %d FLUSHes answered, of all disks %d locally, %d disasters, %d with the replica behind a promise",
		n, *firstSeed, took.Round(time.Millisecond), float64(n)/took.Seconds(), seen.flushes, seen.local, seen.checked, seen.behind)
}
