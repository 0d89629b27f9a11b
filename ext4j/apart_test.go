package ext4j

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

// TestApart: what waits for a replica that is gone returns as soon as the group goes
// on apart, and FLUSHes wait again once the two are together.
func TestApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{Limits: Limits{QueueBytes: 10_000}})
		defer r.close()
		write := func() *call { return r.call(func() error { return r.disk[0].WriteAt(fill(4096, 1), 0, false) }) }
		must(t, write().wait())
		f := r.call(r.disk[0].Flush)
		synctest.Wait()
		must(t, write().wait())
		w := write()
		time.Sleep(3 * time.Second)
		if synctest.Wait(); f.returned() || w.returned() || r.g.Stats().Waiting != 1 {
			t.Fatalf("FLUSH returned %v, the write that does not fit %v: %+v", f.returned(), w.returned(), r.g.Stats())
		}
		r.g.GoApart(epoch.UUID{9}, 7, time.Time{})
		must(t, f.wait())
		must(t, w.wait())
		must(t, r.call(r.disk[1].Flush).wait())
		if s := r.g.Stats(); s.Lag != 3*time.Second || s.QueueBytes != 0 || s.Waiting != 0 || !s.Apart || !s.Alone || s.Session != 1 {
			t.Errorf("apart: %+v", s)
		}
		if r.g.Take(1<<20, 100) != nil || r.g.Resume(0) {
			t.Error("the session goes on")
		}
		must(t, r.g.Acked(1, 1, 1))
		if r.rec.acked != 0 {
			t.Error("an acknowledgement that came too late reached the recorder")
		}
		if _, err := r.g.Drain(context.Background()); !errors.Is(err, ErrApart) {
			t.Errorf("Drain: %v", err)
		}
	})
}

// TestTogetherAgain: until the end of the resync FLUSHes are answered here; a group
// that must not answer alone makes them wait for just that.
func TestTogetherAgain(t *testing.T) {
	for _, alone := range []bool{true, false} {
		t.Run(fmt.Sprint("alone ", alone), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := started(t, Options{})
				defer r.close()
				must(t, r.disk[0].WriteAt(fill(512, 1), 0, false))
				r.g.GoApart(epoch.UUID{9}, 1, time.Time{})
				r.g.Alone(alone)
				must(t, r.disk[0].WriteAt(fill(512, 2), 512, false))
				early := r.call(r.disk[0].Flush)
				synctest.Wait()
				r.g.Begin(epoch.UUID{9}, 2, 1, true)
				r.sent = nil
				must(t, r.disk[0].WriteAt(fill(512, 3), 1024, false))
				during := r.call(r.disk[0].Flush)
				if synctest.Wait(); early.returned() != alone || during.returned() != alone {
					t.Fatalf("FLUSH before the resync returned %v, during it %v", early.returned(), during.returned())
				}
				must(t, r.g.Scan(t.Context(), []Range{{0, 0, Chunk}}, nil, nil))
				end := r.call(func() error { _, err := r.g.FinishScan(t.Context()); return err })
				synctest.Wait()
				if early.returned() != alone {
					t.Fatal("the FLUSH did not wait for the end of the resync")
				}
				r.ack(2, r.ship())
				must(t, end.wait())
				r.g.Together()
				must(t, early.wait())
				must(t, during.wait())
				if got := r.replay(); !slices.Equal(got[0][:1536], r.img[0].data[:1536]) {
					t.Error("the replica differs")
				}
				must(t, r.disk[0].WriteAt(fill(512, 4), 0, false))
				f := r.call(r.disk[0].Flush)
				if synctest.Wait(); f.returned() {
					t.Error("a FLUSH is answered alone, after the two are together")
				}
				r.ack(2, r.ship())
				must(t, f.wait())
				if s := r.g.Stats(); s.Lag != 0 || s.Alone || s.Apart {
					t.Errorf("together: %+v", s)
				}
			})
		})
	}
}

// TestApartInResync: a resync that is broken off, and a scan that waits for room.
func TestApartInResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{Limits: Limits{QueueBytes: 2 * Chunk}})
		defer r.close()
		for i := range 4 {
			copy(r.img[0].data[i*Chunk:], fill(Chunk, byte(i+1)))
		}
		r.g.Begin(epoch.UUID{9}, 2, 1, true)
		f := r.call(r.disk[0].Flush)
		s := r.call(func() error { return r.g.Scan(t.Context(), []Range{{0, 0, 4 * Chunk}}, nil, nil) })
		if synctest.Wait(); f.returned() || s.returned() {
			t.Fatal("nothing waits")
		}
		r.g.GoApart(epoch.UUID{9}, 2, time.Time{})
		must(t, f.wait())
		must(t, s.wait())
		if _, err := r.g.FinishScan(t.Context()); err == nil {
			t.Error("a resync ends although nothing of it was shipped")
		}
	})
}

// TestVerifyEndsApart: a comparison that waits for a replica which never answers holds nobody
// up once the group goes apart.
func TestVerifyEndsApart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		hangs := func(ctx context.Context, _ uint32, _ []int64) ([][]byte, error) {
			<-ctx.Done()
			return nil, context.Cause(ctx)
		}
		v := r.call(func() error {
			_, err := r.g.Verify(t.Context(), []Range{{0, 0, Chunk}}, hangs, VerifyOptions{})
			return err
		})
		if synctest.Wait(); v.returned() {
			t.Fatal(v.wait())
		}
		r.g.GoApart(epoch.UUID{9}, 1, time.Time{})
		if err := v.wait(); !errors.Is(err, ErrApart) {
			t.Errorf("it ended with %v", err)
		}
		r.g.GoApart(epoch.UUID{9}, 1, time.Time{}) // twice is once
		r.g.Begin(epoch.UUID{9}, 2, 1, false)
		r.g.Together()
		_, err := r.g.Verify(t.Context(), []Range{{0, 0, Chunk}}, hashesOf([][]byte{r.img[0].data, r.img[1].data}), VerifyOptions{})
		must(t, err)
	})
}

// TestApartBeforeAnySession: a daemon that was restarted while its replica is away.
func TestApartBeforeAnySession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		r.g.GoApart(epoch.UUID{9}, 5, time.Now().Add(-time.Minute))
		r.g.OpenGate()
		r.disk[0].Opened()
		must(t, r.disk[0].WriteAt(fill(512, 1), 0, true))
		if s := r.g.Stats(); s.Session != 5 || s.Lag != time.Minute || s.Next != 2 {
			t.Errorf("%+v", s)
		}
	})
}

// markedRecorder takes everything and notes it.
type markedRecorder struct {
	fakeRecorder
	mu    sync.Mutex
	marks map[int64]bool // by region
}

func (m *markedRecorder) Acquire(_ context.Context, _ uint32, off, _ int64) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.marks[off/4096] = true
	return nil
}
func (m *markedRecorder) Release(uint32, int64, int64, epoch.LSN) {}

// TestRecordersSwitch: clients acquire and release while the record switches to and
// fro, also when the log is full: nobody gets stuck, nothing is released where it was
// not acquired (the log would fail), and what was written apart is named.
func TestRecordersSwitch(t *testing.T) {
	log, _, err := activelog.Open(fault.NewFS(1), "/log", activelog.Options{Group: epoch.UUID{1}, RegionBytes: 4096, MaxRegions: 8})
	must(t, err)
	defer log.Close()
	r := NewRecorders(log, nil)
	var wg sync.WaitGroup
	ctx, cancel := context.WithCancel(t.Context())
	for c := range 4 {
		rng := rand.New(rand.NewPCG(uint64(c), 5))
		wg.Go(func() {
			for ctx.Err() == nil {
				off := rng.Int64N(32) * 4096 // four times what the log holds
				if err := r.Acquire(ctx, 0, off, 4096); err != nil {
					if ctx.Err() == nil {
						t.Error(err)
					}
					return
				}
				if m, ok := r.apart.(*markedRecorder); ok {
					m.mu.Lock()
					named := m.marks[off/4096]
					m.mu.Unlock()
					if !named {
						t.Errorf("%d is written apart and not named", off)
					}
				} else if !slices.Contains(log.Regions(), activelog.Region{Index: uint64(off / 4096)}) {
					t.Errorf("%d is written and not in the log", off)
				}
				r.Release(0, off, 4096, 1) // never acknowledged: the log fills and stays full
			}
		})
	}
	for range 50 {
		for log.Count() < 8 {
			time.Sleep(100 * time.Microsecond)
		}
		for !log.Pressure() {
			time.Sleep(100 * time.Microsecond)
		}
		r.Together() // somebody waits in the log, which it is already
		m := &markedRecorder{marks: map[int64]bool{}}
		r.GoApart(m)
		if r.Apart() != m {
			t.Fatal("not apart")
		}
		for marked := 0; marked < 20; time.Sleep(100 * time.Microsecond) {
			m.mu.Lock()
			marked = len(m.marks)
			m.mu.Unlock()
		}
		r.Together()
	}
	cancel()
	wg.Wait()
	if err := log.Err(); err != nil {
		t.Error(err)
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
