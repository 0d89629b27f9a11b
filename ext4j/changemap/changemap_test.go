package changemap

import (
	"errors"
	"io/fs"
	"math/rand/v2"
	"slices"
	"strings"
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

// origin is the usual one, with a disk of another size.
func origin(diskBytes, regionBytes int64) Origin {
	return Origin{Group: epoch.UUID{7}, Disk: disk, DiskBytes: diskBytes, RegionBytes: regionBytes, Lineage: epoch.UUID{8},
		Fork: epoch.Pos{Lineage: epoch.UUID{9}, Session: 10, LSN: 11}}
}

// openOrCreate is what a daemon does at its first start, and at a start that
// was broken off before it noted that the map exists.
func openOrCreate(fsys images.FS, path string, o Origin) (*Map, error) {
	m, err := Open(fsys, path, o)
	if errors.Is(err, fs.ErrNotExist) {
		return Create(fsys, path, o, false)
	}
	return m, err
}

func open(t *testing.T, fsys images.FS) *Map {
	t.Helper()
	m, err := openOrCreate(fsys, "/m", origin(size, region))
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
	for name, change := range map[string]func(*Origin){
		"group":       func(o *Origin) { o.Group[0]++ },
		"disk":        func(o *Origin) { o.Disk[0]++ },
		"size":        func(o *Origin) { o.DiskBytes -= 512 },
		"regions":     func(o *Origin) { o.RegionBytes *= 2 },
		"lineage":     func(o *Origin) { o.Lineage[0]++ },
		"fork":        func(o *Origin) { o.Fork.LSN++ },
		"fork's line": func(o *Origin) { o.Fork.Lineage[0]++ },
		"session":     func(o *Origin) { o.Fork.Session++ },
	} {
		o := origin(size, region)
		change(&o)
		if _, err := Open(fsys, "/m", o); !errors.Is(err, ErrCorrupt) {
			t.Errorf("map of another %s: %v", name, err)
		}
	}
	if _, err := Create(fsys, "/n", origin(1<<62, 4096), false); err == nil {
		t.Error("a map of a hundred terabytes of bits was accepted")
	}
	if _, err := Open(fsys, "/n", origin(size, region)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a map that is missing: %v", err)
	}
}

// TestLaterRelease: a map of a later release is not damage, which would make
// somebody throw it away.
func TestLaterRelease(t *testing.T) {
	f := newFS(t, 3)
	m := open(t, f)
	must(t, m.Mark(0, 1))
	must(t, m.Close())
	good, err := f.ReadFile("/m")
	must(t, err)
	for at, words := range map[int]string{8: "version 7, this release reads 1", 12: "features 0x7"} {
		b := slices.Clone(good)
		b[at] = 7
		seal(b[:blockBytes])
		f.WriteFile("/m", b)
		if _, err := Open(f, "/m", origin(size, region)); err == nil || errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), words) {
			t.Errorf("%v, want %q", err, words)
		}
	}
	good[16] = 7 // an optional feature
	seal(good[:blockBytes])
	f.WriteFile("/m", good)
	must(t, open(t, f).Close())
	if b, _ := f.ReadFile("/m"); b[16] != 7 {
		t.Error("an optional feature was dropped")
	}
}

// TestFull: a map that was lost is made anew with every region of the disk, and no other.
func TestFull(t *testing.T) {
	for _, regions := range []int64{1, 7, 8, 9, 40_000} {
		f := newFS(t, 4)
		m, err := Create(f, "/m", origin(regions*4096-1, 4096), true)
		must(t, err)
		f = f.Crash()
		_ = m.Close() // of a machine that lost power
		m, err = Open(f, "/m", origin(regions*4096-1, 4096))
		must(t, err)
		if r := m.Regions(); int64(m.Count()) != regions || r[0] != 0 || int64(r[len(r)-1]) != regions-1 {
			t.Errorf("%d regions, want %d", m.Count(), regions)
		}
	}
}
