package epoch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"math/rand/v2"
	"testing"
)

// randomRecord makes a record that Check accepts.
func randomRecord(rng *rand.Rand) Record {
	r := Record{Flags: uint8(rng.UintN(256)), Session: rng.Uint64(), LSN: LSN(rng.Uint64())}
	r.LSN += LSN(b2i(r.LSN == 0))
	for i := range r.Lineage {
		r.Lineage[i] = byte(rng.UintN(256))
	}
	r.Type = []Type{TypeWrite, TypeWrite, TypeZero, TypeTrim, TypeClose, TypeSyncDone, TypeNop}[rng.IntN(7)]
	switch r.Type {
	case TypeWrite:
		r.Disk = rng.Uint32N(GroupWide)
		r.Length = []uint64{1, 511, 512, 4096, MaxPayload - 1, MaxPayload, 1 + rng.Uint64N(MaxPayload)}[rng.IntN(7)]
		r.Payload = randomBytes(rng, int(r.Length))
	case TypeZero, TypeTrim:
		r.Disk = rng.Uint32N(GroupWide)
		r.Length = []uint64{1, MaxExtent, 1 + rng.Uint64N(MaxExtent)}[rng.IntN(3)]
	case TypeClose:
		r.Disk, r.Payload = GroupWide, CloseInfo{TimeNs: rng.Int64(), Reason: ByTime, First: LSN(rng.Uint64()), Bytes: rng.Uint64()}.Encode()
		r.Length = uint64(len(r.Payload))
	default:
		r.Disk = GroupWide
	}
	if r.Changes() {
		r.Offset = []uint64{0, MaxOffset - r.Length, rng.Uint64N(MaxOffset - r.Length)}[rng.IntN(3)]
	}
	r.Seal()
	return r
}

func b2i(b bool) int {
	if b {
		return 1
	}
	return 0
}

func randomBytes(rng *rand.Rand, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rng.Uint32())
	}
	return b
}

func TestRoundTrip(t *testing.T) {
	const seed = 1
	rng := rand.New(rand.NewPCG(seed, 0))
	for i := range 400 {
		r, place := randomRecord(rng), rng.Uint32()
		before := randomBytes(rng, rng.IntN(3))
		b := r.AppendStored(bytes.Clone(before), CodecRaw, r.Payload, place)
		if !bytes.HasPrefix(b, before) || len(b) != len(before)+StoredSize(len(r.Payload)) {
			t.Fatalf("seed %d, record %d: %d bytes after %d", seed, i, len(b), len(before))
		}
		got, n, err := DecodeStored(append(b[len(before):], "what follows"...), place, nil)
		if err != nil || n != len(b)-len(before) {
			t.Fatalf("seed %d, record %d %+v: %d bytes, %v", seed, i, r, n, err)
		}
		if !sameRecord(&got, &r) {
			t.Fatalf("seed %d, record %d: got %+v, want %+v", seed, i, got, r)
		}
		if len(r.Payload) > 0 && (r.Length != uint64(len(r.Payload)) || cap(got.Payload) != len(got.Payload)) {
			t.Fatalf("payload of %d bytes has room for %d: an append would overwrite the next record", len(got.Payload), cap(got.Payload))
		}
	}
}

// TestEveryBit flips every bit of every golden record: none of the results may
// decode, whatever follows.
func TestEveryBit(t *testing.T) {
	for _, g := range goldenRecords() {
		whole := g.bytes()
		for i := range whole {
			for bit := range 8 {
				b := append(bytes.Clone(whole), make([]byte, 64)...)
				b[i] ^= 1 << bit
				_, _, err := DecodeStored(b, goldenSeed, inflateGolden)
				if !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrShort) {
					t.Fatalf("%s with bit %d of byte %d flipped: %v", g.name, bit, i, err)
				}
			}
		}
	}
}

func TestCutShort(t *testing.T) {
	for _, g := range goldenRecords() {
		whole := g.bytes()
		for n := range whole {
			if _, _, err := DecodeStored(whole[:n:n], goldenSeed, inflateGolden); !errors.Is(err, ErrShort) {
				t.Fatalf("%s cut to %d of %d bytes: %v", g.name, n, len(whole), err)
			}
		}
	}
}

func TestOtherPlace(t *testing.T) {
	for _, g := range goldenRecords() {
		if _, _, err := DecodeStored(g.bytes(), goldenSeed+1, inflateGolden); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s decodes with another place's seed: %v", g.name, err)
		}
	}
}

// TestRecordSumCoversHeader: a record whose stored form was made anew around
// other fields (as a faulty intermediate would) is caught by the record sum.
func TestRecordSumCoversHeader(t *testing.T) {
	changes := map[string]func(*Record){
		"type":    func(r *Record) { r.Type = TypeTrim },
		"flags":   func(r *Record) { r.Flags ^= 1 },
		"lineage": func(r *Record) { r.Lineage[7] ^= 1 },
		"session": func(r *Record) { r.Session++ },
		"lsn":     func(r *Record) { r.LSN++ },
		"disk":    func(r *Record) { r.Disk++ },
		"offset":  func(r *Record) { r.Offset++ },
		"length":  func(r *Record) { r.Length++ },
	}
	for name, change := range changes {
		r := Record{Type: TypeZero, LSN: 9, Session: 2, Disk: 1, Offset: 4096, Length: 4096}
		r.Seal()
		change(&r)
		if _, _, err := DecodeStored(r.AppendStored(nil, CodecRaw, nil, 7), 7, nil); !errors.Is(err, ErrCorrupt) {
			t.Errorf("changed %s: %v", name, err)
		}
	}
	w := Record{Type: TypeWrite, LSN: 9, Length: 4, Payload: []byte("abcd")}
	w.Seal()
	w.Payload = []byte("abce")
	if err := w.Verify(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("changed payload: %v", err)
	}
}

func TestCheckBounds(t *testing.T) {
	payload := make([]byte, MaxPayload+1)
	w := func(f func(*Record)) Record {
		r := Record{Type: TypeWrite, LSN: 1, Length: 8, Payload: payload[:8]}
		f(&r)
		return r
	}
	good := map[string]Record{
		"plain":     w(func(*Record) {}),
		"largest":   w(func(r *Record) { r.Length, r.Payload = MaxPayload, payload[:MaxPayload] }),
		"far":       w(func(r *Record) { r.Offset = MaxOffset - 8 }),
		"long trim": {Type: TypeTrim, LSN: 1, Length: MaxExtent},
		"nop":       {Type: TypeNop, LSN: 1, Disk: GroupWide},
	}
	bad := map[string]Record{
		"LSN 0":          w(func(r *Record) { r.LSN = 0 }),
		"empty":          w(func(r *Record) { r.Length, r.Payload = 0, nil }),
		"too large":      w(func(r *Record) { r.Length, r.Payload = MaxPayload+1, payload }),
		"short payload":  w(func(r *Record) { r.Length = 9 }),
		"no disk":        w(func(r *Record) { r.Disk = GroupWide }),
		"past the end":   w(func(r *Record) { r.Offset = MaxOffset - 7 }),
		"overflow":       w(func(r *Record) { r.Offset = ^uint64(0) - 3 }),
		"point, a disk":  w(func(r *Record) { r.Type = TypePoint }),
		"zero, empty":    {Type: TypeZero, LSN: 1},
		"zero, too long": {Type: TypeZero, LSN: 1, Length: MaxExtent + 1},
		"zero, payload":  {Type: TypeZero, LSN: 1, Length: 8, Payload: payload[:8]},
		"trim, overflow": {Type: TypeTrim, LSN: 1, Offset: ^uint64(0), Length: MaxExtent},
		"close, disk":    {Type: TypeClose, LSN: 1, Disk: 1},
		"close, offset":  {Type: TypeClose, LSN: 1, Disk: GroupWide, Offset: 1},
		"close, length":  {Type: TypeClose, LSN: 1, Disk: GroupWide, Length: 32},
	}
	for name, r := range good {
		if err := r.Check(); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	for name, r := range bad {
		if err := r.Check(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s is accepted: %v", name, err)
		}
		r.Seal()
		if len(r.Payload) > MaxPayload {
			continue // AppendStored's caller answers for that
		}
		if _, _, err := DecodeStored(r.AppendStored(nil, CodecRaw, r.Payload, 0), 0, nil); err == nil {
			t.Errorf("%s decodes", name)
		}
	}
}

// resum makes the stored sum of a damaged record right again, so that what is
// behind the sum is tested.
func resum(b []byte, seed uint32) []byte {
	n := min(uint64(HeaderSize)+uint64(binary.LittleEndian.Uint32(b[76:])), uint64(len(b)))
	binary.LittleEndian.PutUint32(b[84:], crc32.Update(crc32.Update(seed, table, b[:84]), table, b[HeaderSize:n]))
	return b
}

func TestLyingHeaders(t *testing.T) {
	le := binary.LittleEndian
	lies := map[string]func(b []byte){
		"raw length above the bound":    func(b []byte) { le.PutUint32(b[72:], MaxPayload+1) },
		"stored length above the bound": func(b []byte) { le.PutUint32(b[76:], MaxPayload+1) },
		"raw codec, two lengths":        func(b []byte) { le.PutUint32(b[72:], le.Uint32(b[72:])-1) },
		"header length":                 func(b []byte) { le.PutUint16(b[6:], HeaderSize+8) },
		"reserved byte 9":               func(b []byte) { b[9] = 1 },
		"reserved byte 15":              func(b []byte) { b[15] = 1 },
		"reserved byte 52":              func(b []byte) { b[52] = 1 },
		"reserved byte 95":              func(b []byte) { b[95] = 1 },
	}
	for name, lie := range lies {
		b := bytes.Clone(goldenRecords()[0].bytes())
		lie(b)
		if _, _, err := DecodeStored(resum(b, goldenSeed), goldenSeed, inflateGolden); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestUnknownCodec(t *testing.T) {
	b := bytes.Clone(goldenRecords()[0].bytes())
	b[8] = CodecZstd + 1
	if _, _, err := DecodeStored(resum(b, goldenSeed), goldenSeed, inflateGolden); !errors.Is(err, ErrUnsupported) {
		t.Error(err)
	}
}

// TestInflateIsDistrusted: an inflater that fails or makes another length than
// promised yields no record.
func TestInflateIsDistrusted(t *testing.T) {
	g := goldenRecords()[2]
	for name, f := range map[string]Inflate{
		"none":   nil,
		"failed": func(uint8, []byte, int) ([]byte, error) { return nil, errors.New("bad") },
		"short":  func(_ uint8, _ []byte, n int) ([]byte, error) { return make([]byte, n-1), nil },
		"long":   func(_ uint8, _ []byte, n int) ([]byte, error) { return make([]byte, n+1), nil },
		"wrong":  func(_ uint8, _ []byte, n int) ([]byte, error) { return make([]byte, n), nil },
	} {
		if _, _, err := DecodeStored(g.bytes(), goldenSeed, f); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestClose(t *testing.T) {
	c := CloseInfo{TimeNs: -5, Reason: ByStop, First: 1 << 60, Bytes: ^uint64(0)}
	got, err := DecodeClose(c.Encode())
	if err != nil || got != c {
		t.Errorf("got %+v, %v; want %+v", got, err, c)
	}
	for _, n := range []int{0, 31, 33} {
		if _, err := DecodeClose(make([]byte, n)); !errors.Is(err, ErrCorrupt) {
			t.Errorf("close marker of %d bytes: %v", n, err)
		}
	}
}

func TestUUID(t *testing.T) {
	seen := map[UUID]bool{}
	for range 100 {
		u := NewUUID()
		back, err := ParseUUID(u.String())
		if err != nil || back != u || seen[u] || u[6]>>4 != 4 || u[8]>>6 != 2 {
			t.Fatalf("%v: read back as %v, %v", u, back, err)
		}
		seen[u] = true
	}
	for _, bad := range []string{"", "x", "00000000-0000-0000-0000-00000000000", "0000000000000000000000000000000000000", "g0000000-0000-0000-0000-000000000000",
		"-00000000-0000-0000-0000-00000000000", "000000000000-0000-0000-0000-00000000"} {
		if u, err := ParseUUID(bad); err == nil {
			t.Errorf("%q is read as %v", bad, u)
		}
	}
}

func TestTypeNames(t *testing.T) {
	for typ := Type(1); typ <= TypeDifference; typ++ {
		if s := typ.String(); s == "" || s[0] == 't' && s != "trim" {
			t.Errorf("type %d is called %q", typ, s)
		}
	}
	if s := Type(99).String(); s != "type99" {
		t.Errorf("type 99 is called %q", s)
	}
}

// FuzzDecodeStored: whatever the bytes, no panic, no more memory than a
// record may have, and what decodes encodes to the same bytes.
func FuzzDecodeStored(f *testing.F) {
	for _, g := range goldenRecords() {
		f.Add(g.bytes(), uint32(goldenSeed), true)
		f.Add(append(g.bytes(), 1, 2, 3), uint32(goldenSeed), false)
	}
	f.Fuzz(func(t *testing.T, b []byte, seed uint32, repair bool) {
		if repair && len(b) >= HeaderSize {
			b = resum(bytes.Clone(b), seed)
		}
		var asked int
		r, n, err := DecodeStored(b, seed, func(_ uint8, stored []byte, rawLen int) ([]byte, error) {
			asked = rawLen
			return bytes.Clone(stored), nil
		})
		if asked > MaxPayload {
			t.Fatalf("inflate was asked for %d bytes", asked)
		}
		if err != nil {
			if n != 0 || !(errors.Is(err, ErrCorrupt) || errors.Is(err, ErrShort) || errors.Is(err, ErrUnsupported)) {
				t.Fatalf("%d bytes, %v", n, err)
			}
			return
		}
		if n > len(b) || r.Check() != nil || r.Verify() != nil {
			t.Fatalf("took %d of %d bytes: %+v", n, len(b), r)
		}
		if again := r.AppendStored(nil, b[8], b[HeaderSize:n], seed); !bytes.Equal(again, b[:n]) {
			t.Fatalf("%x encodes again as %x", b[:n], again)
		}
	})
}
