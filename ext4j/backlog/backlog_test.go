package backlog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/tests/fault"
)

const dir = "/group"

func record(rng *rand.Rand, lsn epoch.LSN) epoch.Record {
	r := epoch.Record{Type: epoch.TypeTrim, Lineage: epoch.UUID{1}, Session: 3, LSN: lsn, Disk: 1, Offset: 512 * rng.Uint64N(1<<20), Length: 512 * (1 + rng.Uint64N(100))}
	if rng.IntN(4) > 0 {
		r.Type, r.Length = epoch.TypeWrite, 512*(1+rng.Uint64N(512))
		r.Payload = make([]byte, r.Length)
		for i := 0; i < len(r.Payload); i += 8 {
			binary.LittleEndian.PutUint64(r.Payload[i:], rng.Uint64())
		}
	}
	r.Seal()
	return r
}

func rig(t *testing.T, limit, keep int64) (*Backlog, *fault.FS) {
	t.Helper()
	fsys := fault.NewFS(1)
	if err := fsys.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	b, err := Create(fsys, Options{Path: dir + "/backlog", Limit: limit, Keep: keep})
	if err != nil {
		t.Fatal(err)
	}
	return b, fsys
}

// TestOrder: whatever is put comes back once, in order and unchanged, many times round
// the ring; what does not fit is refused as a whole and fits when there is room.
func TestOrder(t *testing.T) {
	const seed = 7
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	b, fsys := rig(t, 3<<20+1000, 0)
	if names, err := fsys.ReadDir(dir); err != nil || len(names) > 0 {
		t.Fatalf("the file has a name: %q, %v", names, err)
	}
	var want []epoch.Record
	next, full, took := epoch.LSN(100), 0, 0
	for range 600 {
		var recs []epoch.Record
		for range 1 + rng.IntN(4) {
			recs = append(recs, record(rng, next+epoch.LSN(len(recs))))
		}
		switch err := b.Append(recs); {
		case errors.Is(err, ErrFull):
			full++
		case err != nil:
			t.Fatal(err)
		default:
			want, next = append(want, recs...), next+epoch.LSN(len(recs))
		}
		for range rng.IntN(3) {
			if rng.IntN(3) > 0 {
				continue
			}
			got, err := b.Next(1 << 20)
			if err != nil {
				t.Fatal(err)
			}
			for i, r := range got {
				w := want[i]
				if r.LSN != w.LSN || r.Type != w.Type || r.Offset != w.Offset || r.Length != w.Length || !bytes.Equal(r.Payload, w.Payload) || r.Verify() != nil {
					t.Fatalf("record %d came back as %d", w.LSN, r.LSN)
				}
			}
			if want = want[len(got):]; (len(want) == 0) != (b.Bytes() == 0) {
				t.Fatalf("%d records are left in %d bytes", len(want), b.Bytes())
			}
			took += len(got)
		}
	}
	if full < 10 || took < 1000 {
		t.Errorf("full %d times, %d records taken: the test does not go round", full, took)
	}
	if err := b.Close(); err != nil {
		t.Fatal(err)
	}
}

// TestSpaceKept: what has to stay free stays free, and a full disk is ErrFull, too.
func TestSpaceKept(t *testing.T) {
	b, fsys := rig(t, 256<<20, 32<<20)
	fsys.SetCapacity(64 << 20)
	rng := rand.New(rand.NewPCG(1, 1))
	for lsn := epoch.LSN(1); ; lsn++ {
		err := b.Append([]epoch.Record{record(rng, lsn)})
		if errors.Is(err, ErrFull) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	if free, err := fsys.Free(dir); err != nil || free < 32<<20 || b.Bytes() < 12<<20 {
		t.Errorf("%d bytes are free, %d are in it: %v", free, b.Bytes(), err)
	}
	if _, err := Create(fsys, Options{Path: dir + "/small", Limit: 1000}); err == nil {
		t.Error("a backlog that holds no record was made")
	}
}

// TestDamage: no bit of the file can change without an error.
func TestDamage(t *testing.T) {
	rng := rand.New(rand.NewPCG(5, 5))
	for range 60 {
		b, _ := rig(t, 2<<20, 0)
		f := &flipping{File: b.f}
		b.f = f
		var recs []epoch.Record
		for i := range 3 {
			recs = append(recs, record(rng, epoch.LSN(i+1)))
		}
		if err := b.Append(recs); err != nil {
			t.Fatal(err)
		}
		f.bit = rng.Int64N(8 * b.Bytes())
		if got, err := b.Next(1 << 20); !errors.Is(err, epoch.ErrCorrupt) && !errors.Is(err, epoch.ErrUnsupported) && !errors.Is(err, epoch.ErrShort) {
			t.Fatalf("bit %d changed: %d records, %v", f.bit, len(got), err)
		}
	}
	b, _ := rig(t, 2<<20, 0)
	if err := errors.Join(b.Append([]epoch.Record{record(rng, 1)}), b.Append([]epoch.Record{record(rng, 2)})); err != nil {
		t.Fatal(err)
	}
	if err := b.Append([]epoch.Record{record(rng, 4)}); err == nil {
		t.Error("a record was left out")
	}
}

// flipping reads one bit wrong.
type flipping struct {
	images.File
	bit int64
}

func (f *flipping) ReadAt(p []byte, off int64) (int, error) {
	n, err := f.File.ReadAt(p, off)
	if at := f.bit/8 - off; at >= 0 && at < int64(n) {
		p[at] ^= 1 << (f.bit % 8)
	}
	return n, err
}
