package replica

import (
	"math/rand/v2"
	"testing"
)

// TestTrimsAgainstModel: what the set holds is what was trimmed and not
// written since, byte for byte; past its bound it may hold less.
func TestTrimsAgainstModel(t *testing.T) {
	const size = 200
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 0))
		set := trimSet{}
		var model [2][size]bool
		for step := range 200 {
			slot := rng.Uint32N(2)
			off := rng.Int64N(size)
			end := off + 1 + rng.Int64N(min(size-off, 1+rng.Int64N(60)))
			add := rng.IntN(3) == 0
			if add {
				set.add(slot, off, end)
			} else {
				set.remove(slot, off, end)
			}
			for i := off; i < end; i++ {
				model[slot][i] = add
			}
			for slot := range uint32(2) {
				var got [size]bool
				for _, r := range set[slot] {
					if r.off >= r.end {
						t.Fatalf("seed %d, step %d: range %+v", seed, step, r)
					}
					for i := r.off; i < r.end; i++ {
						if got[i] {
							t.Fatalf("seed %d, step %d: byte %d is held twice", seed, step, i)
						}
						got[i] = true
					}
				}
				if got != model[slot] {
					t.Fatalf("seed %d, step %d: disk %d holds other bytes than were trimmed", seed, step, slot)
				}
			}
		}
	}
}

// TestTrimsBounded: a guest that trims everything and then writes every other
// sector cannot make the set, or the time it takes, grow without bound.
func TestTrimsBounded(t *testing.T) {
	set := trimSet{}
	set.add(0, 0, 1<<40)
	for i := range int64(20_000) {
		set.remove(0, i*1024, i*1024+512)
		if n := len(set[0]); n > maxTrims {
			t.Fatalf("after %d writes the set holds %d ranges", i+1, n)
		}
	}
	for i := range int64(10_000) {
		set.add(1, i*1024, i*1024+512)
	}
	if n := len(set[1]); n > maxTrims {
		t.Errorf("the set holds %d ranges", n)
	}
}
