package changemap

import (
	"bytes"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"kagami/images"
	"kagami/tests/fault"
)

var update = flag.Bool("update", false, "write the golden file anew")

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestCrash marks at random and crashes at random steps: every bit whose Mark
// returned is found, and none that nobody asked for.
func TestCrash(t *testing.T) {
	const regions = 100_000 // four pages of bits
	found := 0
	for seed := range scale(int64(1500)) {
		rng := rand.New(rand.NewPCG(uint64(seed), 1))
		f := fault.NewFS(seed)
		must2, may := map[uint64]bool{}, map[uint64]bool{}
		for range 5 {
			f.StopAfter(int64(1 + rng.IntN(24)))
			if rng.IntN(4) == 0 {
				f.Inject(fault.Fault{Op: fault.OpSync, Nth: rng.IntN(8), Err: syscall.EIO})
			}
			m, err := openOrCreate(f, "/map", origin(regions*4096, 4096))
			if err == nil {
				check(t, seed, m, must2, may)
				for _, r := range m.Regions() {
					must2[r] = true // Open made it durable
					found++
				}
				failed := false
				for range 12 {
					off := rng.Int64N(regions * 4096)
					n := min(1+rng.Int64N(3*4096), regions*4096-off)
					err := m.Mark(off, n)
					failed = failed || err != nil
					for i := off / 4096; i <= (off+n-1)/4096; i++ {
						may[uint64(i)] = true
						if err == nil {
							must2[uint64(i)] = true
						}
					}
				}
				if !f.Stopped() && !failed {
					check(t, seed, m, must2, may)
				}
			} else if errors.Is(err, ErrCorrupt) {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if rng.IntN(3) == 0 {
				f = f.Kill()
			} else {
				f = f.Crash()
			}
		}
	}
	if found == 0 {
		t.Error("never found anything")
	}
}

func check(t *testing.T, seed int64, m *Map, want, may map[uint64]bool) {
	t.Helper()
	have := map[uint64]bool{}
	for _, r := range m.Regions() {
		have[r] = true
		if !may[r] {
			t.Fatalf("seed %d: region %d was never marked", seed, r)
		}
	}
	for r := range want {
		if !have[r] {
			t.Fatalf("seed %d: region %d is lost", seed, r)
		}
	}
	if len(have) != m.Count() {
		t.Fatalf("seed %d: %d regions, counted %d", seed, len(have), m.Count())
	}
}

func TestGolden(t *testing.T) {
	f := fault.NewFS(1)
	m, err := Create(f, "/map", origin(1<<40, 1<<20), false)
	must(t, err)
	must(t, m.Mark(3<<20, 9<<20))
	must(t, m.Mark(1<<40-1, 1))
	b, err := f.ReadFile("/map")
	must(t, err)
	var s strings.Builder
	fmt.Fprintf(&s, "%d bytes\n", len(b))
	for off := 0; off < len(b); off += 16 {
		if line := b[off : off+16]; bytes.Count(line, []byte{0}) != len(line) {
			fmt.Fprintf(&s, "%08x  %s\n", off, hex.EncodeToString(line))
		}
	}
	if *update {
		must(t, os.WriteFile("testdata/map.hex", []byte(s.String()), 0o644))
	}
	want, err := os.ReadFile("testdata/map.hex")
	must(t, err)
	if s.String() != string(want) {
		t.Errorf("the format changed:\n%s", s.String())
	}
}

func TestOnDisk(t *testing.T) {
	name := filepath.Join(t.TempDir(), "changes-0.map")
	m, err := Create(images.OS{}, name, origin(100<<20, 1<<20), false)
	must(t, err)
	must(t, m.Mark(7<<20, 2<<20))
	must(t, m.Close())
	m, err = Open(images.OS{}, name, origin(100<<20, 1<<20))
	must(t, err)
	if s := fmt.Sprint(m.Regions()); s != "[7 8]" {
		t.Error(s)
	}
	must(t, m.Close())
}

// TestSyncErrorIsFinal: after one failed fdatasync no Mark returns nil that needs one.
func TestSyncErrorIsFinal(t *testing.T) {
	f := newFS(t, 1)
	m := open(t, f)
	must(t, m.Mark(0, 1))
	f.Inject(fault.Fault{Op: fault.OpSync, Err: syscall.EIO})
	for range 2 {
		if err := m.Mark(5*region, 1); !errors.Is(err, syscall.EIO) {
			t.Error(err)
		}
	}
	if _, err := Open(f, "/m", origin(size, region)); !errors.Is(err, images.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	must(t, m.Close())
	if err := m.Close(); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

func TestShortFile(t *testing.T) {
	f := newFS(t, 1)
	must(t, open(t, f).Close())
	b, err := f.ReadFile("/m")
	must(t, err)
	for _, n := range []int{0, 100, blockBytes, len(b) - 1} {
		f.WriteFile("/m", b[:n])
		if _, err := Open(f, "/m", origin(size, region)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}
