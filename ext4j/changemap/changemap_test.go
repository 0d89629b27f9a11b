package changemap

import (
	"errors"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/tests/fault"
)

const (
	region = 1 << 20
	regs   = 100_000 // three blocks of bits
	size   = regs*region - 4096
)

var disk = epoch.UUID{1, 2, 3}

func open(t *testing.T, fsys images.FS) *Map {
	t.Helper()
	m, err := Open(fsys, "/m", disk, size, region)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func newFS(t *testing.T, seed uint64) *fault.FS {
	t.Helper()
	return fault.NewFS(int64(seed))
}

// TestMarksSurvive marks at random, crashes, and looks whether every mark that
// returned is there; nothing else may be but marks that were under way.
func TestMarksSurvive(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		fsys := newFS(t, seed)
		asked, sure := map[uint64]bool{}, map[uint64]bool{}
		for life := range 3 {
			m := open(t, fsys)
			for _, r := range m.Regions() {
				if !asked[r] {
					t.Fatalf("seed %d life %d: region %d was never marked", seed, life, r)
				}
			}
			have := map[uint64]bool{}
			for _, r := range m.Regions() {
				have[r] = true
			}
			for r := range sure {
				if !have[r] {
					t.Fatalf("seed %d life %d: region %d was marked and is not there", seed, life, r)
				}
			}
			for range rng.IntN(20) {
				r, n := rng.Uint64N(regs-64), 1+rng.Uint64N(64)
				for i := range n {
					asked[r+i] = true
				}
				if err := m.Mark(int64(r)*region, int64(n-1)*region+1+rng.Int64N(region-4096)); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
				for i := range n {
					sure[r+i] = true
				}
			}
			fsys = fsys.Crash()
		}
	}
}

func TestMarkTwiceCostsNothing(t *testing.T) {
	fsys := newFS(t, 1)
	m := open(t, fsys)
	if err := m.Mark(5*region, 3*region); err != nil {
		t.Fatal(err)
	}
	before := testing.AllocsPerRun(1, func() {})
	if n := testing.AllocsPerRun(100, func() {
		if err := m.Mark(6*region+17, 4096); err != nil {
			t.Fatal(err)
		}
	}); n > before {
		t.Errorf("a mark that is there already allocates %v times", n)
	}
	if m.Count() != 3 || !slices.Equal(m.Regions(), []uint64{5, 6, 7}) {
		t.Errorf("regions %v", m.Regions())
	}
}

func TestManyMarkersShareCommits(t *testing.T) {
	m := open(t, newFS(t, 2))
	var wg sync.WaitGroup
	for i := range int64(200) {
		wg.Go(func() {
			if err := m.Mark(i*region, region); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if m.Count() != 200 {
		t.Errorf("%d regions, want 200", m.Count())
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if err := m.Mark(300*region, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("mark after close: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	fsys := newFS(t, 3)
	m := open(t, fsys)
	for _, r := range [][2]int64{{-1, 1}, {0, 0}, {size, 1}, {size - 1, 2}, {0, -1}} {
		if m.Mark(r[0], r[1]) == nil {
			t.Errorf("mark of %d bytes at %d was accepted", r[1], r[0])
		}
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(fsys, "/m", epoch.UUID{9}, size, region); !errors.Is(err, ErrCorrupt) {
		t.Errorf("map of another disk: %v", err)
	}
	if _, err := Open(fsys, "/n", disk, 1<<62, 4096); err == nil {
		t.Error("a map of a hundred terabytes of bits was accepted")
	}
}
