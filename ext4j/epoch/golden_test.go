package epoch

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "rewrite the golden file: only with a new format version")

const goldenFile = "testdata/records.golden"

// goldenSeed is the seed of every stored sum in the golden file.
const goldenSeed = 0x5eed5eed

type golden struct {
	name   string
	rec    Record
	codec  uint8
	stored []byte // nil: the payload
}

// goldenPayloads has the payload of each reserved marker.
func goldenPayloads() map[string][]byte {
	return map[string][]byte{"point": payload(somePoint.Encode()), "disk": payload(someDisk.Encode()), "membership": payload(someOnes.Encode())}
}

// goldenRecords has one record of each type that this release writes, and the
// extremes of each field.
func goldenRecords() []golden {
	base := Record{Lineage: UUID{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, Session: 0x1122334455667788, LSN: 0x0102030405060708}
	with := func(f func(*Record)) Record {
		r := base
		f(&r)
		r.Seal()
		return r
	}
	data := []byte("the content of a guest's write, not of a sector's size")
	write := with(func(r *Record) {
		r.Type, r.Disk, r.Offset, r.Payload = TypeWrite, 3, 1<<20, data
		r.Length = uint64(len(data))
	})
	info := CloseInfo{TimeNs: 1_700_000_000_123_456_789, Reason: ByFlush, First: 41, Bytes: 12345}.Encode()
	return []golden{
		{name: "write", rec: write},
		{name: "write-resync", rec: with(func(r *Record) { *r = write; r.Flags = FlagResync })},
		{name: "write-zstd", rec: write, codec: CodecZstd, stored: []byte("stands for a compressed payload")},
		{name: "write-last", rec: with(func(r *Record) {
			r.Type, r.Disk, r.Offset, r.Length, r.Payload = TypeWrite, GroupWide-1, MaxOffset-1, 1, []byte{0xff}
			r.LSN, r.Session = ^LSN(0), ^uint64(0)
		})},
		{name: "zero", rec: with(func(r *Record) { r.Type, r.Disk, r.Offset, r.Length = TypeZero, 0, 4096, MaxExtent })},
		{name: "trim", rec: with(func(r *Record) { r.Type, r.Disk, r.Offset, r.Length = TypeTrim, 1, 0, 512 })},
		{name: "close", rec: with(func(r *Record) { r.Type, r.Disk, r.Length, r.Payload = TypeClose, GroupWide, 32, info })},
		{name: "syncdone", rec: with(func(r *Record) { r.Type, r.Disk, r.Flags = TypeSyncDone, GroupWide, FlagResync })},
		{name: "nop", rec: with(func(r *Record) { r.Type, r.Disk = TypeNop, GroupWide })},
	}
}

func (g *golden) bytes() []byte {
	stored := g.stored
	if stored == nil {
		stored = g.rec.Payload
	}
	return g.rec.AppendStored(nil, g.codec, stored, goldenSeed)
}

// inflateGolden stands for a decompressor.
func inflateGolden(codec uint8, stored []byte, rawLen int) ([]byte, error) {
	for _, g := range goldenRecords() {
		if g.codec == codec && bytes.Equal(g.stored, stored) && rawLen == len(g.rec.Payload) {
			return bytes.Clone(g.rec.Payload), nil
		}
	}
	return nil, fmt.Errorf("no golden record is stored as %q", stored)
}

// TestGolden pins the format: a change of the golden file breaks every spool
// and every peer in the field.
func TestGolden(t *testing.T) {
	if *update {
		var b strings.Builder
		for _, g := range goldenRecords() {
			fmt.Fprintf(&b, "%s %s\n", g.name, hex.EncodeToString(g.bytes()))
		}
		for _, name := range slices.Sorted(maps.Keys(goldenPayloads())) {
			fmt.Fprintf(&b, "%s %s\n", name, hex.EncodeToString(goldenPayloads()[name]))
		}
		if err := os.WriteFile(goldenFile, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := readGolden(t)
	if n := len(goldenRecords()) + len(goldenPayloads()); len(want) != n {
		t.Errorf("%d records and payloads in %s, %d are tested", len(want), goldenFile, n)
	}
	for name, p := range goldenPayloads() {
		if got := hex.EncodeToString(p); got != want[name] {
			t.Errorf("payload of a %s marker encodes as\n%s, want\n%s", name, got, want[name])
		}
	}
	for _, g := range goldenRecords() {
		t.Run(g.name, func(t *testing.T) {
			if got := hex.EncodeToString(g.bytes()); got != want[g.name] {
				t.Errorf("encodes as\n%s, want\n%s", got, want[g.name])
			}
			b, err := hex.DecodeString(want[g.name])
			if err != nil {
				t.Fatal(err)
			}
			r, n, err := DecodeStored(b, goldenSeed, inflateGolden)
			if err != nil || n != len(b) {
				t.Fatalf("decode: %d of %d bytes, %v", n, len(b), err)
			}
			if !sameRecord(&r, &g.rec) {
				t.Errorf("decodes as %+v, want %+v", r, g.rec)
			}
		})
	}
}

func readGolden(t *testing.T) map[string]string {
	t.Helper()
	f, err := os.Open(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]string{}
	for s := bufio.NewScanner(f); s.Scan(); {
		if name, hexed, ok := strings.Cut(s.Text(), " "); ok {
			out[name] = hexed
		}
	}
	return out
}

func sameRecord(a, b *Record) bool {
	return a.Type == b.Type && a.Flags == b.Flags && a.Lineage == b.Lineage && a.Session == b.Session && a.LSN == b.LSN &&
		a.Disk == b.Disk && a.Offset == b.Offset && a.Length == b.Length && a.Sum == b.Sum && bytes.Equal(a.Payload, b.Payload)
}
