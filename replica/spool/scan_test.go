package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"math/rand/v2"
	"testing"

	"kagami/ext4j/epoch"
)

// segmentBytes is a segment as it lies on disk.
func segmentBytes(h header, recs ...epoch.Record) []byte {
	b := h.encode()
	for _, r := range recs {
		b = r.AppendStored(b, epoch.CodecRaw, r.Payload, h.seed())
	}
	return append(b, make([]byte, max(0, h.Bytes-int64(len(b))))...)
}

func closeRec(lsn epoch.LSN, session uint64) epoch.Record {
	r := epoch.Record{Type: epoch.TypeClose, Lineage: epoch.UUID{9}, Session: session, LSN: lsn, Disk: epoch.GroupWide,
		Payload: epoch.CloseInfo{TimeNs: int64(lsn), Reason: epoch.ByFlush, First: lsn}.Encode(), Length: 32}
	r.Seal()
	return r
}

func writeRec(lsn epoch.LSN, session uint64, n int) epoch.Record {
	p := make([]byte, n)
	r := rand.New(rand.NewPCG(uint64(lsn), session))
	for i := range p {
		p[i] = byte(r.Uint32())
	}
	rec := epoch.Record{Type: epoch.TypeWrite, Lineage: epoch.UUID{9}, Session: session, LSN: lsn, Length: uint64(n), Payload: p}
	rec.Seal()
	return rec
}

func seg(number uint64, prev, first epoch.LSN, session uint64) header {
	return header{Number: number, Group: testGroup, Lineage: epoch.UUID{9}, Session: session, Incarnation: number*977 + session,
		First: first, Prev: prev, Bytes: 16384}
}

func TestChain(t *testing.T) {
	type s struct{ number, prev, first epoch.LSN }
	for name, c := range map[string]struct {
		segs    []s
		applied epoch.LSN
		want    string
	}{
		"empty":              {nil, 0, "[]"},
		"one":                {[]s{{1, 0, 1}}, 0, "[1]"},
		"order":              {[]s{{3, 20, 21}, {1, 0, 1}, {2, 10, 11}}, 0, "[1 2 3]"},
		"applied inside":     {[]s{{1, 0, 1}, {2, 10, 11}, {3, 20, 21}}, 15, "[2 3]"},
		"applied at the end": {[]s{{1, 0, 1}, {2, 10, 11}, {3, 20, 21}}, 20, "[3]"},
		"void by a newer":    {[]s{{1, 0, 1}, {2, 10, 11}, {3, 5, 6}}, 0, "[1 3]"},
		"void, same place":   {[]s{{1, 0, 1}, {2, 10, 11}, {3, 10, 11}}, 0, "[1 3]"},
		"numbers with gaps":  {[]s{{4, 0, 1}, {9, 10, 11}}, 0, "[4 9]"},
		"begins anew":        {[]s{{1, 0, 1}, {2, 10, 50}}, 10, "[2]"},
		"missing":            {[]s{{2, 10, 11}}, 5, "[]"},
	} {
		heads := make([]header, len(c.segs))
		for i, x := range c.segs {
			heads[i] = seg(uint64(x.number), x.prev, x.first, 1)
		}
		order, err := chain(heads, c.applied)
		var got []uint64
		for _, i := range order {
			got = append(got, heads[i].Number)
		}
		if s := fmt.Sprint(got); err != nil || s != c.want {
			t.Errorf("%s: %s, want %s: %v", name, s, c.want, err)
		}
	}
	if _, err := chain([]header{seg(1, 0, 1, 1), seg(1, 5, 6, 1)}, 0); !errors.Is(err, ErrCorrupt) {
		t.Errorf("twice the same number: %v", err)
	}
}

// TestWalk reads hand-made logs.
func TestWalk(t *testing.T) {
	w1, w2, c3 := writeRec(1, 1, 300), writeRec(2, 1, 300), closeRec(3, 1)
	damaged := func(b []byte, off int) []byte { b[off] ^= 1; return b }
	for name, c := range map[string]struct {
		heads   []header
		bytes   [][]byte
		close   epoch.LSN
		dropped int
		notes   int
	}{
		"whole":   {[]header{seg(1, 0, 1, 1)}, [][]byte{segmentBytes(seg(1, 0, 1, 1), w1, w2, c3)}, 3, 0, 0},
		"partial": {[]header{seg(1, 0, 1, 1)}, [][]byte{segmentBytes(seg(1, 0, 1, 1), w1, w2, c3, writeRec(4, 1, 9))}, 3, 1, 0},
		"damaged last": {[]header{seg(1, 0, 1, 1)},
			[][]byte{damaged(segmentBytes(seg(1, 0, 1, 1), closeRec(1, 1), writeRec(2, 1, 9)), headerBytes+epoch.StoredSize(32)+100)}, 1, 0, 0},
		"damaged middle": {[]header{seg(1, 0, 1, 1)},
			[][]byte{damaged(segmentBytes(seg(1, 0, 1, 1), closeRec(1, 1), w2, c3), headerBytes+epoch.StoredSize(32)+100)}, 1, 0, 1},
		"damaged record magic": {[]header{seg(1, 0, 1, 1)},
			[][]byte{damaged(segmentBytes(seg(1, 0, 1, 1), closeRec(1, 1), w2, c3), headerBytes+epoch.StoredSize(32))}, 1, 0, 1},
		"two segments": {[]header{seg(1, 0, 1, 1), seg(2, 2, 3, 1)},
			[][]byte{segmentBytes(seg(1, 0, 1, 1), w1, w2), segmentBytes(seg(2, 2, 3, 1), c3)}, 3, 0, 0},
		"void tail": {[]header{seg(1, 0, 1, 1), seg(2, 1, 2, 2)},
			[][]byte{segmentBytes(seg(1, 0, 1, 1), closeRec(1, 1), w2, c3), segmentBytes(seg(2, 1, 2, 2), closeRec(2, 2))}, 2, 0, 0},
		"hole": {[]header{seg(1, 0, 1, 1), seg(2, 5, 6, 1)},
			[][]byte{segmentBytes(seg(1, 0, 1, 1), w1, w2, c3), segmentBytes(seg(2, 5, 6, 1), closeRec(6, 1))}, 3, 0, 1},
		"other session inside an epoch": {[]header{seg(1, 0, 1, 1), seg(2, 1, 2, 2)},
			[][]byte{segmentBytes(seg(1, 0, 1, 1), w1), segmentBytes(seg(2, 1, 2, 2), closeRec(2, 2))}, 0, 1, 1},
		"gap at the start": {[]header{seg(1, 0, 100, 1)}, [][]byte{segmentBytes(seg(1, 0, 100, 1), closeRec(100, 1))}, 100, 0, 0},
		"short file":       {[]header{seg(1, 0, 1, 1)}, [][]byte{segmentBytes(seg(1, 0, 1, 1), closeRec(1, 1), w2)[:headerBytes+250]}, 1, 0, 0},
	} {
		v, err := walk(c.heads,
			func(i int) *scanner {
				return newScanner(bytes.NewReader(c.bytes[i]), &c.heads[i], c.heads[i].Bytes, nil)
			},
			func(i int) string { return fmt.Sprint(i) })
		if err != nil || v.close.LSN != c.close || v.closed != (c.close != 0) || v.dropped != c.dropped || len(v.notes) != c.notes {
			t.Errorf("%s: %+v, %v", name, v, err)
		}
	}
}

// TestDamage: bytes that were written as they are, but make no sense, are an error and no end of the log.
func TestDamage(t *testing.T) {
	h := seg(1, 0, 1, 1)
	c := closeRec(1, 1)
	bad := closeRec(2, 1)
	bad.Payload = bad.Payload[:31]
	bad.Length = 31
	bad.Seal()
	zstd := writeRec(2, 1, 50)
	odd := writeRec(2, 1, 50)
	odd.Type = epoch.TypePoint
	odd.Seal()
	wrong := writeRec(7, 1, 50)
	other := writeRec(2, 5, 50)
	for name, b := range map[string][]byte{
		"close payload": bad.AppendStored(nil, epoch.CodecRaw, bad.Payload, h.seed()),
		"codec":         zstd.AppendStored(nil, epoch.CodecZstd, zstd.Payload[:20], h.seed()),
		"type":          odd.AppendStored(nil, epoch.CodecRaw, odd.Payload, h.seed()),
		"LSN":           wrong.AppendStored(nil, epoch.CodecRaw, wrong.Payload, h.seed()),
		"session":       other.AppendStored(nil, epoch.CodecRaw, other.Payload, h.seed()),
	} {
		data := append(c.AppendStored(h.encode(), epoch.CodecRaw, c.Payload, h.seed()), b...)
		_, err := walk([]header{h}, func(int) *scanner { return newScanner(bytes.NewReader(data), &h, h.Bytes, nil) },
			func(int) string { return "x.seg" })
		if !errors.Is(err, errDamage) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// FuzzScan walks arbitrary bytes as the records of two segments: no panic, no
// more memory than a few reads, and the log that is found is dense and ends
// with a Close. With fix, the sums are made right first, so that the fields
// behind them are reached.
func FuzzScan(f *testing.F) {
	h1, h2 := seg(1, 0, 1, 1), seg(2, 2, 3, 1)
	stored := func(h header, recs ...epoch.Record) []byte {
		return bytes.TrimRight(segmentBytes(h, recs...)[headerBytes:], "\x00")
	}
	f.Add(stored(h1, writeRec(1, 1, 20), closeRec(2, 1)), stored(h2, closeRec(3, 1)), uint16(2), false)
	f.Add(stored(h1, closeRec(1, 1)), bytes.Repeat([]byte("KREC"), 30), uint16(1), true)
	f.Fuzz(func(t *testing.T, a, b []byte, prev uint16, fix bool) {
		h2.Prev, h2.First = epoch.LSN(prev), epoch.LSN(prev)+1
		heads := []header{h1, h2}
		data := [][]byte{append(h1.encode(), a...), append(h2.encode(), b...)}
		if fix {
			fixSums(data[0][headerBytes:], h1.seed())
			fixSums(data[1][headerBytes:], h2.seed())
		}
		order, err := chain(heads, 0)
		if err != nil {
			t.Fatal(err)
		}
		log := make([]header, len(order))
		for k, i := range order {
			log[k] = heads[i]
		}
		v, err := walk(log,
			func(k int) *scanner {
				return newScanner(bytes.NewReader(data[order[k]]), &log[k], log[k].Bytes, nil)
			},
			func(int) string { return "" })
		checkView(t, v, err)
	})
}

// fixSums makes the sums of what looks like records right.
func fixSums(b []byte, seed uint32) {
	le := binary.LittleEndian
	for len(b) >= epoch.HeaderSize {
		n := epoch.HeaderSize + int(le.Uint32(b[76:]))
		if n > len(b) {
			return
		}
		r := epoch.Record{Type: epoch.Type(b[4]), Flags: b[5], Lineage: epoch.UUID(b[16:32]), Session: le.Uint64(b[32:]),
			LSN: epoch.LSN(le.Uint64(b[40:])), Disk: le.Uint32(b[48:]), Offset: le.Uint64(b[56:]), Length: le.Uint64(b[64:]),
			Payload: b[epoch.HeaderSize:n]}
		le.PutUint32(b[80:], r.ComputeSum())
		le.PutUint32(b[84:], crc32.Update(crc32.Update(seed, castagnoli, b[:84]), castagnoli, b[epoch.HeaderSize:n]))
		b = b[n:]
	}
}

// FuzzHeader decodes arbitrary headers with a right sum.
func FuzzHeader(f *testing.F) {
	f.Add(goldenHeader.encode()[:128])
	f.Fuzz(func(t *testing.T, b []byte) {
		block := append(bytes.Clone(b), make([]byte, headerBytes)...)[:headerBytes]
		sealBlock(block)
		h, err := decodeHeader(block)
		if err != nil {
			return
		}
		if got, err := decodeHeader(h.encode()); err != nil || got != h {
			t.Fatalf("%+v became %+v: %v", h, got, err)
		}
	})
}

func checkView(t *testing.T, v logView, err error) {
	if err != nil {
		return
	}
	last := epoch.LSN(0)
	for _, p := range v.parts {
		if p.first == 0 {
			continue
		}
		if last != 0 && p.first != last+1 || p.last < p.first || p.end <= headerBytes {
			t.Fatalf("log is not dense: %+v", v.parts)
		}
		last = p.last
	}
	if last != v.close.LSN || v.closed != (last != 0) {
		t.Fatalf("log ends at %d, last close %d", last, v.close.LSN)
	}
}
