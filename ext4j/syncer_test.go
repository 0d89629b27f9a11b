package ext4j

import (
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// syncRun is one fdatasync, told by the error it returned.
type syncRun struct{ began, ended time.Time }

func (r *syncRun) Error() string { return "run" }

// TestSyncerBeganAfter: each request is answered by a run that began at or
// after it and has ended; runs do not overlap; requests that wait together share one.
func TestSyncerBeganAfter(t *testing.T) {
	for seed := range uint64(30) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 0))
			running, runs, requests := false, 0, 0
			s := &syncer{run: func() error {
				if running {
					t.Errorf("seed %d: two runs at a time", seed)
				}
				running = true
				r := &syncRun{began: time.Now()}
				time.Sleep(time.Duration(1+rng.IntN(20)) * time.Millisecond)
				r.ended, running = time.Now(), false
				runs++
				return r
			}}
			var wg sync.WaitGroup
			for w := range 8 {
				rng := rand.New(rand.NewPCG(seed, uint64(w+1)))
				n := 5 + rng.IntN(20)
				requests += n
				wg.Go(func() {
					for range n {
						time.Sleep(time.Duration(rng.IntN(15)) * time.Millisecond)
						asked := time.Now()
						var r *syncRun
						if err := <-s.request(); !errors.As(err, &r) || r.began.Before(asked) || r.ended.After(time.Now()) || r.ended.IsZero() {
							t.Errorf("seed %d: asked at %v, answered %+v at %v", seed, asked, err, time.Now())
						}
					}
				})
			}
			wg.Wait()
			s.end(ErrGone)
			if runs*2 > requests {
				t.Errorf("seed %d: %d runs for %d requests: they are not shared", seed, runs, requests)
			}
		})
	}
}

// TestSyncerJoinsOnlyTheNext: a request during a run does not take that run's result.
func TestSyncerJoinsOnlyTheNext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		began := 0
		release := make(chan error)
		s := &syncer{run: func() error { began++; return <-release }}
		first := s.request()
		synctest.Wait()
		second, third := s.request(), s.request()
		release <- errors.New("first")
		if err := <-first; err == nil {
			t.Error("the first run's error is lost")
		}
		synctest.Wait()
		select {
		case err := <-second:
			t.Fatalf("answered %v by a run that began before the request", err)
		default:
		}
		release <- nil
		if err := errors.Join(<-second, <-third); err != nil || began != 2 {
			t.Errorf("%d runs, %v", began, err)
		}
		s.end(ErrGone)
	})
}
