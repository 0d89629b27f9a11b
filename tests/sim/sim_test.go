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
	t.Logf("%d seeds from %d on in %v", n, *firstSeed, time.Since(began).Round(time.Millisecond))
}
