package spool

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"os"
	"strings"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

var update = flag.Bool("update", false, "write the golden files anew")

var goldenHeader = header{Number: 7, Group: testGroup, Replica: testOwner.Replica, Lineage: epoch.UUID{9}, Session: 3, Incarnation: 0x1122334455667788,
	First: 101, Bytes: 64 << 20, Durable: 90, Prev: 100}

func TestHeaderRoundTrip(t *testing.T) {
	for _, h := range []header{goldenHeader, {Group: testGroup, Bytes: 8192}} {
		got, err := decodeHeader(h.encode())
		if err != nil || got != h {
			t.Errorf("%+v became %+v: %v", h, got, err)
		}
	}
}

// TestHeaderRefused: a header of a later release is refused in words; a damaged one is none.
func TestHeaderRefused(t *testing.T) {
	for _, c := range []struct {
		at   int
		val  uint32
		want string
	}{{8, 2, "version 2"}, {12, 4, "features 0x4"}, {88, 1, "key 1"}, {92, 1, "cipher 1"}, {20, 512, "512"}, {96, 4096, "4096"},
		{96, 64<<20 + 1, "67108865"}, {80, 100, "LSN 100"}, {104, 101, "101 durable"}} {
		b := goldenHeader.encode()
		binary.LittleEndian.PutUint32(b[c.at:], c.val)
		sealBlock(b)
		if _, err := decodeHeader(b); err == nil || errors.Is(err, errNoHeader) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("byte %d: %v, want %q", c.at, err, c.want)
		}
	}
	b := goldenHeader.encode()
	for i := range b {
		b[i] ^= 0x10
		if _, err := decodeHeader(b); !errors.Is(err, errNoHeader) {
			t.Fatalf("damage at byte %d: %v", i, err)
		}
		b[i] ^= 0x10
	}
	if _, err := decodeHeader(b[:4095]); !errors.Is(err, errNoHeader) {
		t.Errorf("short header: %v", err)
	}
}

// TestGolden pins the bytes of a segment and of the mark.
func TestGolden(t *testing.T) {
	f := fault.NewFS(1)
	o := Options{FS: f, Dir: "/", Group: testGroup, Replica: testOwner.Replica, SegmentBytes: 8192, MaxBytes: 1 << 20, SmallSegments: true, Inline: true,
		incarnation: func() uint64 { return 0x1122334455667788 }}
	sp, _, err := Open(o, 41)
	if err != nil {
		t.Fatal(err)
	}
	for _, rec := range goldenRecords() {
		if err := sp.Append(&rec, epoch.CodecRaw, rec.Payload); err != nil {
			t.Fatal(err)
		}
	}
	seg, err := f.ReadFile("/00000000.seg")
	if err != nil {
		t.Fatal(err)
	}
	m, err := OpenMark(f, "/applied", testOwner)
	if err != nil {
		t.Fatal(err)
	}
	pos := epoch.Pos{Lineage: epoch.UUID{9}, Session: 3, LSN: 42}
	if err := m.Store(Applied{Pos: pos, CloseTimeNs: 1_700_000_000_000_000_001, SyncDone: true}); err != nil {
		t.Fatal(err)
	}
	mark, err := f.ReadFile("/applied")
	if err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/segment.hex", seg)
	golden(t, "testdata/applied.hex", mark)
}

func goldenRecords() []epoch.Record {
	base := epoch.Record{Lineage: epoch.UUID{9}, Session: 3, Disk: 1}
	w, z, c := base, base, base
	w.Type, w.LSN, w.Offset, w.Length, w.Payload = epoch.TypeWrite, 42, 4096, 5, []byte("hello")
	z.Type, z.LSN, z.Offset, z.Length = epoch.TypeZero, 43, 8192, 1<<20
	c.Type, c.LSN, c.Disk = epoch.TypeClose, 44, epoch.GroupWide
	c.Payload = epoch.CloseInfo{TimeNs: 5, Reason: epoch.ByFlush, First: 42, Bytes: 5}.Encode()
	c.Length = uint64(len(c.Payload))
	recs := []epoch.Record{w, z, c}
	for i := range recs {
		recs[i].Seal()
	}
	return recs
}

// golden compares with a hex dump, from which lines of zeros are left out.
func golden(t *testing.T, name string, b []byte) {
	t.Helper()
	var s strings.Builder
	for off := 0; off < len(b); off += 16 {
		if line := b[off:min(off+16, len(b))]; bytes.Count(line, []byte{0}) != len(line) {
			s.WriteString(hex.EncodeToString(binary.BigEndian.AppendUint32(nil, uint32(off))) + "  " + hex.EncodeToString(line) + "\n")
		}
	}
	if *update {
		if err := os.WriteFile(name, []byte(s.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	if s.String() != string(want) {
		t.Errorf("%s: the format changed:\n%s", name, s.String())
	}
}
