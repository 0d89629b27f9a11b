package epoch

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strings"
	"testing"
)

var (
	somePoint = PointInfo{TimeNs: 1_700_000_000_123_456_789, Kind: PointConsistent, Name: "before the upgrade, 水"}
	someDisk  = DiskInfo{ID: UUID{1, 2, 3}, Slot: 4, BlockSize: 4096, Bytes: 10 << 30, Name: "vdc"}
	someOnes  = Membership{Replicas: []UUID{{1}, {1, 2}, {0xff}}}
)

func payload(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// reserved is a well-formed record of each reserved type.
func reserved() map[Type][]byte {
	return map[Type][]byte{TypePoint: payload(somePoint.Encode()), TypeDiskAdd: payload(someDisk.Encode()), TypeDiskRemove: payload(someDisk.Encode()),
		TypeDiskResize: payload(someDisk.Encode()), TypeMembership: payload(someOnes.Encode())}
}

func markerRecord(typ Type, p []byte) Record {
	r := Record{Type: typ, LSN: 7, Session: 3, Disk: GroupWide, Length: uint64(len(p)), Payload: p}
	r.Seal()
	return r
}

func TestPointRoundTrip(t *testing.T) {
	for _, p := range []PointInfo{somePoint, {Kind: PointNamed}, {TimeNs: -1, Kind: 200, Name: strings.Repeat("x", MaxName)}} {
		b, err := p.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodePoint(b); err != nil || got != p {
			t.Errorf("%+v became %+v: %v", p, got, err)
		}
	}
	for name, p := range map[string]PointInfo{"no kind": {Name: "x"}, "long": {Kind: 1, Name: strings.Repeat("x", MaxName+1)},
		"control": {Kind: 1, Name: "a\x1b[2J"}, "newline": {Kind: 1, Name: "a\nb"}, "not UTF-8": {Kind: 1, Name: "\xff"}} {
		if _, err := p.Encode(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: encoded: %v", name, err)
		}
	}
}

func TestDiskRoundTrip(t *testing.T) {
	with := func(f func(*DiskInfo)) DiskInfo {
		d := someDisk
		f(&d)
		return d
	}
	for _, d := range []DiskInfo{someDisk, with(func(d *DiskInfo) { d.Slot, d.BlockSize, d.Bytes = MaxSlot, MaxBlockSize, MaxOffset }),
		with(func(d *DiskInfo) { d.Slot, d.BlockSize, d.Bytes, d.Name = 0, 512, 512, strings.Repeat("x", MaxName) })} {
		b, err := d.Encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := DecodeDisk(b); err != nil || got != d {
			t.Errorf("%+v became %+v: %v", d, got, err)
		}
	}
	for name, f := range map[string]func(*DiskInfo){
		"no id":        func(d *DiskInfo) { d.ID = UUID{} },
		"slot":         func(d *DiskInfo) { d.Slot = MaxSlot + 1 },
		"no name":      func(d *DiskInfo) { d.Name = "" },
		"long name":    func(d *DiskInfo) { d.Name = strings.Repeat("x", MaxName+1) },
		"control":      func(d *DiskInfo) { d.Name = "a\x00" },
		"block 0":      func(d *DiskInfo) { d.BlockSize = 0 },
		"block 256":    func(d *DiskInfo) { d.BlockSize = 256 },
		"block 128 Ki": func(d *DiskInfo) { d.BlockSize = 128 << 10 },
		"block 1000":   func(d *DiskInfo) { d.BlockSize = 1000 },
		"empty":        func(d *DiskInfo) { d.Bytes = 0 },
		"half a block": func(d *DiskInfo) { d.Bytes += 512 },
		"too long":     func(d *DiskInfo) { d.Bytes = MaxOffset + 4096 },
	} {
		if _, err := with(f).Encode(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: encoded: %v", name, err)
		}
	}
}

func TestMembershipRoundTrip(t *testing.T) {
	most := Membership{}
	for i := range MaxReplicas {
		most.Replicas = append(most.Replicas, UUID{byte(i + 1)})
	}
	for _, m := range []Membership{{}, someOnes, most} {
		b, err := m.Encode()
		if err != nil {
			t.Fatal(err)
		}
		got, err := DecodeMembership(b)
		if again, _ := got.Encode(); err != nil || !bytes.Equal(again, b) || len(got.Replicas) != len(m.Replicas) {
			t.Errorf("%+v became %+v: %v", m, got, err)
		}
	}
	for name, m := range map[string]Membership{"zero": {[]UUID{{}}}, "twice": {[]UUID{{1}, {1}}}, "order": {[]UUID{{2}, {1}}},
		"too many": {append(most.Replicas, UUID{0xff})}} {
		if _, err := m.Encode(); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: encoded: %v", name, err)
		}
	}
}

// TestMarkerPayloadsAreDistrusted tries every length, and every byte changed:
// what decodes encodes to the same bytes.
func TestMarkerPayloadsAreDistrusted(t *testing.T) {
	for typ, whole := range reserved() {
		for n := range whole {
			if r := markerRecord(typ, whole[:n:n]); !errors.Is(r.Check(), ErrCorrupt) {
				t.Errorf("%s cut to %d of %d bytes: %v", typ, n, len(whole), r.Check())
			}
		}
		if r := markerRecord(typ, append(bytes.Clone(whole), 0)); !errors.Is(r.Check(), ErrCorrupt) {
			t.Errorf("%s with a byte behind it: %v", typ, r.Check())
		}
		for i := range whole {
			for bit := range 8 {
				b := bytes.Clone(whole)
				b[i] ^= 1 << bit
				sameAgain(t, typ, b)
			}
		}
	}
}

// sameAgain checks that a payload is refused, or is exactly what it decodes to.
func sameAgain(t *testing.T, typ Type, b []byte) {
	t.Helper()
	var again []byte
	var err error
	switch typ {
	case TypePoint:
		var p PointInfo
		if p, err = DecodePoint(b); err == nil {
			again, err = p.Encode()
		}
	case TypeMembership:
		var m Membership
		if m, err = DecodeMembership(b); err == nil {
			again, err = m.Encode()
		}
	default:
		var d DiskInfo
		if d, err = DecodeDisk(b); err == nil {
			again, err = d.Encode()
		}
	}
	switch {
	case err != nil && !errors.Is(err, ErrCorrupt) && !errors.Is(err, ErrUnsupported):
		t.Fatalf("%s %x: %v", typ, b, err)
	case err == nil && !bytes.Equal(again, b):
		t.Fatalf("%s %x encodes again as %x", typ, b, again)
	}
}

// TestUnsupportedIsNotCorrupt: what a later release may send is told from
// damage, by its sums; damage to it is still damage.
func TestUnsupportedIsNotCorrupt(t *testing.T) {
	records := map[string]Record{"type 200": markerRecord(200, []byte("whatever it is")), "type 0": markerRecord(0, nil),
		"reference": markerRecord(TypeReference, nil), "difference on a disk": {Type: TypeDifference, LSN: 1, Disk: 3, Offset: 5, Length: 1 << 40}}
	for typ, p := range reserved() {
		records[typ.String()] = markerRecord(typ, p)
		flagged := bytes.Clone(p)
		binary.LittleEndian.PutUint32(flagged[map[Type]int{TypePoint: 12, TypeMembership: 4}[typ]:], 1)
		if typ == TypePoint || typ == TypeMembership {
			records[typ.String()+" with a flag"] = markerRecord(typ, flagged)
		}
	}
	for name, r := range records {
		r.Seal()
		whole := r.AppendStored(nil, CodecRaw, r.Payload, 5)
		if _, n, err := DecodeStored(whole, 5, nil); !errors.Is(err, ErrUnsupported) || errors.Is(err, ErrCorrupt) || n != 0 {
			t.Errorf("%s: %d bytes, %v", name, n, err)
		}
		r.Sum++
		if _, _, err := DecodeStored(r.AppendStored(nil, CodecRaw, r.Payload, 5), 5, nil); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s with a wrong record sum: %v", name, err)
		}
		for i := range whole {
			b := bytes.Clone(whole)
			b[i] ^= 0x10
			if _, _, err := DecodeStored(b, 5, nil); errors.Is(err, ErrUnsupported) {
				t.Fatalf("%s damaged at byte %d is taken for a later release's: %v", name, i, err)
			}
		}
	}
	malformed := markerRecord(TypeDiskAdd, payload(someDisk.Encode()))
	malformed.Disk = 1
	if err := malformed.Check(); !errors.Is(err, ErrCorrupt) {
		t.Errorf("a marker of one disk: %v", err)
	}
}

func FuzzMarkers(f *testing.F) {
	for typ, p := range reserved() {
		f.Add(uint8(typ), p)
	}
	f.Fuzz(func(t *testing.T, typ uint8, b []byte) { sameAgain(t, Type(typ), b) })
}
