package ext4j

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
)

// mirror is a replica that applies what a rig ships, at once.
type mirror struct {
	r       *rig
	mu      sync.Mutex
	disks   [][]byte
	applied int // of r.sent
}

// pump ships, applies and acknowledges what there is.
func (m *mirror) pump() {
	m.r.ship()
	m.mu.Lock()
	defer m.mu.Unlock()
	closed := epoch.LSN(0)
	for _, rec := range m.r.sent[m.applied:] {
		switch rec.Type {
		case epoch.TypeWrite:
			copy(m.disks[rec.Disk][rec.Offset:], rec.Payload)
		case epoch.TypeZero, epoch.TypeTrim:
			clear(m.disks[rec.Disk][rec.Offset:rec.End()])
		case epoch.TypeClose:
			closed = rec.LSN
		}
	}
	if m.applied = len(m.r.sent); closed != 0 {
		m.r.ack(1, closed)
	}
}

func (m *mirror) hash(ctx context.Context, slot uint32, offsets []int64) ([][]byte, error) {
	time.Sleep(20 * time.Millisecond) // a round trip, in which the guest writes on
	m.mu.Lock()
	defer m.mu.Unlock()
	return hashesOf(m.disks)(ctx, slot, offsets)
}

// TestVerify: while a guest writes on, some of it to the same place again and again, a
// comparison finds what rotted at the replica, and nothing else; a repair ends that.
func TestVerify(t *testing.T) {
	for seed := range uint64(4) {
		synctest.Test(t, func(t *testing.T) {
			r := started(t, Options{})
			defer r.close()
			m := &mirror{r: r, disks: [][]byte{make([]byte, rigSize), make([]byte, rigSize)}}
			rng := rand.New(rand.NewPCG(seed, 0))
			stop := false
			var mu sync.Mutex
			stopped := func() bool { mu.Lock(); defer mu.Unlock(); return stop }
			guest := r.call(func() error {
				rng := rand.New(rand.NewPCG(seed, 1))
				for i := 0; !stopped(); i++ {
					off := 3 * int64(Chunk) // the hot chunk
					if i%3 == 0 {
						off = rng.Int64N(rigSize/2/512-8) * 512 // the upper half is left alone
					}
					if err := r.disk[i%2].WriteAt(fill(4096, byte(i)), off, false); err != nil {
						return err
					}
					time.Sleep(time.Millisecond)
				}
				return nil
			})
			run := func(o VerifyOptions) Verified {
				var v Verified
				c := r.call(func() (err error) {
					v, err = r.g.Verify(context.Background(), r.g.WholeRanges(), m.hash, o)
					return err
				})
				for !c.returned() {
					m.pump()
					time.Sleep(time.Millisecond)
				}
				if c.err != nil {
					t.Fatal(c.err)
				}
				return v
			}
			v := run(VerifyOptions{})
			if v.Differ != 0 || v.Compared != 2*rigSize/Chunk || v.Again == 0 {
				t.Errorf("seed %d, nothing rotted: %+v", seed, v)
			}
			bad := map[chunk]bool{}
			m.mu.Lock()
			for range 3 {
				slot, c := rng.IntN(2), rigSize/2+rng.Int64N(rigSize/2/Chunk)*Chunk
				m.disks[slot][c+rng.Int64N(Chunk)] ^= 1
				bad[chunk{uint32(slot), c}] = true
			}
			m.mu.Unlock()
			var found []Difference
			differs := func(d Difference) error {
				if bytes.Equal(d.Here, d.There) {
					t.Error("a difference without one")
				}
				found = append(found, d)
				return nil
			}
			v = run(VerifyOptions{Differs: differs, Repair: seed%2 == 0})
			if v.Differ != int64(len(bad)) || len(found) != len(bad) || v.Repaired != 0 && v.Repaired != v.Differ {
				t.Errorf("seed %d: %+v, found %v of %v", seed, v, found, bad)
			}
			for _, d := range found {
				if !bad[chunk{d.Slot, d.Off}] {
					t.Errorf("seed %d: %+v did not rot", seed, d)
				}
			}
			if v = run(VerifyOptions{}); (v.Differ == 0) != (seed%2 == 0) {
				t.Errorf("seed %d, afterwards: %+v", seed, v)
			}
			mu.Lock()
			stop = true
			mu.Unlock()
			if err := guest.wait(); err != nil {
				t.Fatal(err)
			}
		})
	}
}

// TestVerifyEnds: the end of ctx, of the session, and a resync end a comparison.
func TestVerifyEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		early := newRig(t, Options{})
		defer early.close()
		if _, err := early.g.Verify(context.Background(), early.g.WholeRanges(), nil, VerifyOptions{}); !errors.Is(err, errUnequal) {
			t.Errorf("before a session: %v", err)
		}
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		none := hashesOf([][]byte{make([]byte, rigSize), make([]byte, rigSize)})
		verify := func() *call {
			return r.call(func() error { _, err := r.g.Verify(ctx, r.g.WholeRanges(), none, VerifyOptions{}); return err })
		}
		c := verify()
		synctest.Wait()
		second := verify()
		if err := second.wait(); err == nil {
			t.Error("two comparisons of one disk at once")
		}
		r.g.Begin(epoch.UUID{9}, 2, 50, true)
		if err := c.wait(); err == nil {
			t.Error("the end of the session did not end it")
		}
		if err := verify().wait(); !errors.Is(err, errUnequal) {
			t.Errorf("during a resync: %v", err)
		}
		r.g.Begin(epoch.UUID{9}, 3, 60, false)
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		c = verify()
		synctest.Wait()
		cancel()
		if err := c.wait(); !errors.Is(err, context.Canceled) {
			t.Errorf("cancelled: %v", err)
		}
	})
}

// TestWalkSkips: what a comparison goes on with is what its progress said was done.
func TestWalkSkips(t *testing.T) {
	ranges := walk{{0, 0, 3 * Chunk}, {0, 5 * Chunk, Chunk}, {1, 0, 2 * Chunk}}
	var all []chunk
	for w := slices.Clone(ranges); len(w) > 0; {
		all = append(all, w.next()...)
	}
	for n := range len(all) + 2 {
		w := slices.Clone(ranges)
		if got := w.skip(int64(n)*Chunk + 5); got != int64(min(n, len(all)))*Chunk {
			t.Errorf("skipped %d for %d chunks", got, n)
		}
		var left []chunk
		for len(w) > 0 {
			left = append(left, w.next()...)
		}
		if want := all[min(n, len(all)):]; !slices.Equal(left, want) {
			t.Errorf("after %d chunks: %v, want %v", n, left, want)
		}
	}
}
