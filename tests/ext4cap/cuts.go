package ext4cap

import (
	"fmt"
	"math/rand/v2"
)

// Cut is a moment at which the disk lost its power.
type Cut struct {
	Name  string
	State []byte // what the disk holds then
}

// sector is what a disk writes as a whole.
const sector = 512

// Cuts are n crashes of each of three kinds, all from rnd: at a FLUSH, with all that was
// written before it; at any record, likewise; and at any record, with what
// was written since the last FLUSH kept or lost at random, torn at sectors.
func (s Stream) Cuts(rnd *rand.Rand, n int) []Cut {
	var flushes []int
	for i, r := range s.Log {
		if r.Kind == Flush {
			flushes = append(flushes, i)
		}
	}
	if len(flushes) == 0 {
		return nil
	}
	var all []Cut
	for range n {
		at := flushes[rnd.IntN(len(flushes))]
		all = append(all, Cut{fmt.Sprintf("at the FLUSH that is record %d", at), s.at(at, nil)})
		at = 1 + rnd.IntN(len(s.Log))
		all = append(all, Cut{fmt.Sprintf("before record %d", at), s.at(at, nil)})
		at = 1 + rnd.IntN(len(s.Log))
		all = append(all, Cut{fmt.Sprintf("before record %d, unflushed writes lost at random", at), s.at(at, rnd)})
	}
	return all
}

// at is the disk before record end. With rnd, what no FLUSH covers is lost in part.
func (s Stream) at(end int, rnd *rand.Rand) []byte {
	img := append([]byte(nil), s.Base...)
	safe := end
	if rnd != nil {
		for safe = end; safe > 0 && s.Log[safe-1].Kind != Flush; safe-- {
		}
	}
	for _, r := range s.Log[:safe] {
		apply(img, r)
	}
	for _, r := range s.Log[safe:end] {
		switch rnd.IntN(3) {
		case 0: // lost
		case 1:
			apply(img, r)
		case 2:
			tear(img, r, rnd)
		}
	}
	return img
}

// tear applies some of a record's sectors.
func tear(img []byte, r Record, rnd *rand.Rand) {
	n := r.Len
	if r.Kind == Write {
		n = int64(len(r.Data))
	}
	for o := int64(0); o < n && r.Kind != Note; o += sector {
		if rnd.IntN(2) == 0 {
			continue
		}
		part := Record{Kind: r.Kind, Off: r.Off + o, Len: min(sector, n-o)}
		if r.Kind == Write {
			part.Data = r.Data[o : o+part.Len]
		}
		apply(img, part)
	}
}
