package ext4j

import (
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

// TestRangeLockExcludes runs many lockers of random ranges: no two overlapping
// ranges are ever held at a time, and all get their turn.
func TestRangeLockExcludes(t *testing.T) {
	for seed := range uint64(20) {
		synctest.Test(t, func(t *testing.T) {
			const size, workers, turns = 64, 12, 30
			var l rangeLock
			var mu sync.Mutex
			var owner [size]int
			var wg sync.WaitGroup
			for w := 1; w <= workers; w++ {
				rng := rand.New(rand.NewPCG(seed, uint64(w)))
				wg.Go(func() {
					for range turns {
						off := rng.Int64N(size)
						n := 1 + rng.Int64N(size-off)
						h := l.lock(off, n)
						mu.Lock()
						for i := off; i < off+n; i++ {
							if owner[i] != 0 {
								t.Errorf("seed %d: byte %d is held by %d and %d", seed, i, owner[i], w)
							}
							owner[i] = w
						}
						mu.Unlock()
						time.Sleep(time.Duration(rng.IntN(5)))
						mu.Lock()
						clear(owner[off : off+n])
						mu.Unlock()
						l.unlock(h)
					}
				})
			}
			wg.Wait()
			if len(l.queue) != 0 {
				t.Errorf("seed %d: %d ranges are still held", seed, len(l.queue))
			}
		})
	}
}

// TestRangeLockApart: ranges that only touch do not wait for each other.
func TestRangeLockApart(t *testing.T) {
	var l rangeLock
	a, b, c := l.lock(0, 4096), l.lock(4096, 1), l.lock(4097, 1<<40)
	l.unlock(b)
	l.unlock(a)
	l.unlock(c)
}

// TestRangeLockIsFair: a large range beside small ones that never leave it
// free as a whole waits for those that came before it and for no other.
func TestRangeLockIsFair(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var l rangeLock
		const small = 4
		var wg sync.WaitGroup
		var ended atomic.Bool
		for w := range int64(small) {
			wg.Go(func() {
				time.Sleep(time.Duration(w) * time.Second)
				for range 100 { // held all the time but for a moment
					h := l.lock(10*w, 10)
					time.Sleep(small * time.Second)
					l.unlock(h)
				}
				ended.Store(true)
			})
		}
		time.Sleep(10 * time.Second)
		began := time.Now()
		h := l.lock(0, 10*small)
		if waited := time.Since(began); waited > small*time.Second || ended.Load() {
			t.Errorf("the large range waited for %v", waited)
		}
		synctest.Wait()
		l.unlock(h)
		wg.Wait()
	})
}
