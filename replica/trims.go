package replica

import (
	"cmp"
	"slices"
)

// trimSet remembers, per disk, the ranges of a batch that were trimmed and not
// written again. It is a hint for giving space back: past maxTrims ranges of a
// disk, further ones are not remembered and merely stay allocated.
type trimSet map[uint32][]trimmed

type trimmed struct{ off, end int64 }

const maxTrims = 1024

func (t trimSet) add(slot uint32, off, end int64) {
	t.remove(slot, off, end)
	if len(t[slot]) < maxTrims {
		t[slot] = append(t[slot], trimmed{off, end})
	}
}

// remove takes [off, end) out of the set. A write inside a range makes two of
// it; past the bound the shortest range is forgotten.
func (t trimSet) remove(slot uint32, off, end int64) {
	old := t[slot]
	if !slices.ContainsFunc(old, func(r trimmed) bool { return r.off < end && off < r.end }) {
		return
	}
	kept := make([]trimmed, 0, len(old)+1)
	for _, r := range old {
		if r.end <= off || end <= r.off {
			kept = append(kept, r)
			continue
		}
		if r.off < off {
			kept = append(kept, trimmed{r.off, off})
		}
		if end < r.end {
			kept = append(kept, trimmed{end, r.end})
		}
	}
	if len(kept) > maxTrims {
		i := slices.Index(kept, slices.MinFunc(kept, func(a, b trimmed) int { return cmp.Compare(a.end-a.off, b.end-b.off) }))
		kept = slices.Delete(kept, i, i+1)
	}
	t[slot] = kept
}
