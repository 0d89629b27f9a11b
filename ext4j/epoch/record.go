package epoch

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
)

// Type says what a record does.
type Type uint8

// The record types of format version 1. Those marked reserved are defined, with
// their payloads (marker.go), so that later releases can send them; this release
// refuses them in words (ErrUnsupported).
const (
	TypeWrite      Type = 1  // payload replaces [Offset, Offset+Length)
	TypeZero       Type = 2  // [Offset, Offset+Length) reads as zeros, space kept
	TypeTrim       Type = 3  // [Offset, Offset+Length) reads as zeros, space given back
	TypeClose      Type = 4  // ends an epoch; payload is a CloseInfo
	TypeSyncDone   Type = 5  // all before it plus the images make a complete copy; payload empty
	TypeNop        Type = 6  // keeps the LSN dense where a failed write left none
	TypePoint      Type = 7  // reserved: names a point; payload is a PointInfo
	TypeDiskAdd    Type = 8  // reserved: payload is a DiskInfo
	TypeDiskRemove Type = 9  // reserved: payload is a DiskInfo
	TypeDiskResize Type = 10 // reserved: payload is a DiskInfo
	TypeMembership Type = 11 // reserved: payload is a Membership
	TypeReference  Type = 12 // reserved: content equals an earlier record
	TypeDifference Type = 13 // reserved: content as a difference
)

// Flags of a record.
const (
	// FlagResync marks records made by a first sync or a resync, not by the guest.
	FlagResync uint8 = 1 << 0
)

// GroupWide is the disk slot of markers.
const GroupWide uint32 = 0xffffffff

// Limits of format version 1.
const (
	HeaderSize = 96
	// MaxPayload bounds a record's payload, raw and stored, in bytes.
	MaxPayload = 256 << 10
	// MaxExtent bounds the length of one zero or trim record, in bytes.
	MaxExtent = 64 << 20
	// MaxOffset bounds Offset+Length.
	MaxOffset = 1 << 60
)

const magic = 0x4345524b // "KREC"

// Codecs of a stored payload.
const (
	CodecRaw  uint8 = 0
	CodecZstd uint8 = 1
)

// Record is one unit of the stream. Payload is the raw form.
type Record struct {
	Type    Type
	Flags   uint8
	Lineage UUID
	Session uint64
	LSN     LSN
	Disk    uint32
	Offset  uint64
	Length  uint64
	Payload []byte
	Sum     uint32 // record sum, set by Seal, checked by Verify
}

var table = crc32.MakeTable(crc32.Castagnoli)

// ComputeSum is the record sum of r: CRC32C over the canonical header and the raw payload.
func (r *Record) ComputeSum() uint32 {
	var h [58]byte
	h[0], h[1] = byte(r.Type), r.Flags
	copy(h[2:], r.Lineage[:])
	binary.LittleEndian.PutUint64(h[18:], r.Session)
	binary.LittleEndian.PutUint64(h[26:], uint64(r.LSN))
	binary.LittleEndian.PutUint32(h[34:], r.Disk)
	binary.LittleEndian.PutUint64(h[38:], r.Offset)
	binary.LittleEndian.PutUint64(h[46:], r.Length)
	binary.LittleEndian.PutUint32(h[54:], uint32(len(r.Payload)))
	return crc32.Update(crc32.Checksum(h[:], table), table, r.Payload)
}

// Seal sets the record sum; the source calls it once, when the content is final.
func (r *Record) Seal() { r.Sum = r.ComputeSum() }

// Errors of decoding. ErrShort means that more bytes are needed; ErrCorrupt
// that these bytes are no record (at the tail of a log: its end);
// ErrUnsupported that they are a whole record, as its sums show, of a kind that
// this release cannot carry out: who sent it must be told, and it must not be
// passed over.
var (
	ErrShort       = errors.New("record is incomplete")
	ErrCorrupt     = errors.New("not a valid record")
	ErrUnsupported = errors.New("record not supported by this release")
)

// Check tells whether the record's fields are possible: known type, lengths in
// bounds, no overflow. It does not look at sums.
func (r *Record) Check() error {
	if r.LSN == 0 {
		return fmt.Errorf("%w: LSN 0", ErrCorrupt)
	}
	switch r.Type {
	case TypeWrite:
		if r.Length == 0 || r.Length > MaxPayload || uint64(len(r.Payload)) != r.Length {
			return fmt.Errorf("%w: write of %d bytes with %d of payload", ErrCorrupt, r.Length, len(r.Payload))
		}
	case TypeZero, TypeTrim:
		if r.Length == 0 || r.Length > MaxExtent || len(r.Payload) != 0 {
			return fmt.Errorf("%w: %s of %d bytes", ErrCorrupt, r.Type, r.Length)
		}
	case TypeClose, TypeSyncDone, TypeNop:
		if r.Disk != GroupWide || r.Offset != 0 || uint64(len(r.Payload)) != r.Length {
			return fmt.Errorf("%w: malformed %s marker", ErrCorrupt, r.Type)
		}
		return nil
	case TypePoint, TypeDiskAdd, TypeDiskRemove, TypeDiskResize, TypeMembership:
		return r.checkReserved()
	default:
		return fmt.Errorf("%w: record %d is of type %d (%s)", ErrUnsupported, r.LSN, uint8(r.Type), r.Type)
	}
	if r.Disk == GroupWide {
		return fmt.Errorf("%w: %s without a disk", ErrCorrupt, r.Type)
	}
	if r.Offset > MaxOffset || r.Offset+r.Length > MaxOffset {
		return fmt.Errorf("%w: offset %d out of range", ErrCorrupt, r.Offset)
	}
	return nil
}

// Verify checks fields and record sum. A record is ErrUnsupported only if its sum is right.
func (r *Record) Verify() error {
	err := r.Check()
	if err != nil && !errors.Is(err, ErrUnsupported) {
		return err
	}
	if s := r.ComputeSum(); s != r.Sum {
		return fmt.Errorf("%w: record %d has sum %08x, want %08x", ErrCorrupt, r.LSN, s, r.Sum)
	}
	return err
}

// End is Offset+Length.
func (r *Record) End() uint64 { return r.Offset + r.Length }

// Changes reports whether the record changes a disk.
func (r *Record) Changes() bool {
	return r.Type == TypeWrite || r.Type == TypeZero || r.Type == TypeTrim
}

func (t Type) String() string {
	names := [...]string{1: "write", 2: "zero", 3: "trim", 4: "close", 5: "syncdone", 6: "nop", 7: "point",
		8: "diskadd", 9: "diskremove", 10: "diskresize", 11: "membership", 12: "reference", 13: "difference"}
	if int(t) < len(names) && names[t] != "" {
		return names[t]
	}
	return fmt.Sprintf("type%d", uint8(t))
}

// AppendStored appends the record's stored form to dst. stored is the payload
// as stored under codec (the raw payload itself for CodecRaw); seed is the
// seed of the place it is stored in.
func (r *Record) AppendStored(dst []byte, codec uint8, stored []byte, seed uint32) []byte {
	n := len(dst)
	dst = append(dst, make([]byte, HeaderSize)...)
	h := dst[n:]
	le := binary.LittleEndian
	le.PutUint32(h[0:], magic)
	h[4], h[5] = byte(r.Type), r.Flags
	le.PutUint16(h[6:], HeaderSize)
	h[8] = codec
	copy(h[16:], r.Lineage[:])
	le.PutUint64(h[32:], r.Session)
	le.PutUint64(h[40:], uint64(r.LSN))
	le.PutUint32(h[48:], r.Disk)
	le.PutUint64(h[56:], r.Offset)
	le.PutUint64(h[64:], r.Length)
	le.PutUint32(h[72:], uint32(len(r.Payload)))
	le.PutUint32(h[76:], uint32(len(stored)))
	le.PutUint32(h[80:], r.Sum)
	le.PutUint32(h[84:], crc32.Update(crc32.Update(seed, table, h[:84]), table, stored))
	return append(dst, stored...)
}

// StoredSize is the size of the stored form with a payload of n stored bytes.
func StoredSize(n int) int { return HeaderSize + n }

// Inflate turns a stored payload under a codec into its raw form. rawLen is
// at most MaxPayload; an implementation must not make more than that.
type Inflate func(codec uint8, stored []byte, rawLen int) ([]byte, error)

// DecodeStored reads one record from the front of b and returns it with the
// number of bytes it took. The payload of a raw record aliases b. Fields,
// both sums and the bounds are checked; inflate may be nil when only raw
// payloads are expected.
func DecodeStored(b []byte, seed uint32, inflate Inflate) (Record, int, error) {
	if len(b) < HeaderSize {
		return Record{}, 0, ErrShort
	}
	le := binary.LittleEndian
	h := b[:HeaderSize]
	if le.Uint32(h) != magic || le.Uint16(h[6:]) != HeaderSize || !allZero(h[9:16]) || !allZero(h[52:56]) || !allZero(h[88:96]) {
		return Record{}, 0, fmt.Errorf("%w: bad header", ErrCorrupt)
	}
	raw, stored := le.Uint32(h[72:]), le.Uint32(h[76:])
	if raw > MaxPayload || stored > MaxPayload {
		return Record{}, 0, fmt.Errorf("%w: payload of %d bytes (%d stored)", ErrCorrupt, raw, stored)
	}
	n := HeaderSize + int(stored)
	if len(b) < n {
		return Record{}, 0, ErrShort
	}
	if crc32.Update(crc32.Update(seed, table, h[:84]), table, b[HeaderSize:n]) != le.Uint32(h[84:]) {
		return Record{}, 0, fmt.Errorf("%w: stored sum differs", ErrCorrupt)
	}
	r := Record{Type: Type(h[4]), Flags: h[5], Session: le.Uint64(h[32:]), LSN: LSN(le.Uint64(h[40:])),
		Disk: le.Uint32(h[48:]), Offset: le.Uint64(h[56:]), Length: le.Uint64(h[64:]), Sum: le.Uint32(h[80:])}
	copy(r.Lineage[:], h[16:32])
	switch codec := h[8]; {
	case codec > CodecZstd:
		return Record{}, 0, fmt.Errorf("%w: payload of record %d is stored under codec %d", ErrUnsupported, r.LSN, codec)
	case codec == CodecRaw && raw == stored:
		r.Payload = b[HeaderSize:n:n]
	case codec != CodecRaw && inflate != nil:
		p, err := inflate(codec, b[HeaderSize:n], int(raw))
		if err != nil {
			return Record{}, 0, fmt.Errorf("%w: payload of record %d: %w", ErrCorrupt, r.LSN, err)
		}
		if len(p) != int(raw) {
			return Record{}, 0, fmt.Errorf("%w: payload of record %d has %d bytes, header says %d", ErrCorrupt, r.LSN, len(p), raw)
		}
		r.Payload = p
	default:
		return Record{}, 0, fmt.Errorf("%w: payload of record %d: %d bytes stored under codec %d for %d", ErrCorrupt, r.LSN, stored, codec, raw)
	}
	if err := r.Verify(); err != nil {
		return Record{}, 0, err
	}
	return r, n, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}
