package epoch

import (
	"encoding/binary"
	"fmt"
	"unicode"
	"unicode/utf8"
)

// Payloads of the markers that are reserved in format version 1. A release
// that does not carry a marker out refuses it with ErrUnsupported; so does this
// one with all of them. Bytes and flags that are zero here may get a meaning
// together with a required feature of the protocol.

// Bounds of marker payloads.
const (
	MaxName      = 255 // bytes of the name of a point or disk
	MaxReplicas  = 16  // replicas of a group
	MaxSlot      = 1<<16 - 2
	MinBlockSize = 512 // bytes
	MaxBlockSize = 64 << 10
)

// PointKind says what a point marker stands for. A kind that is not known
// is a point all the same.
type PointKind uint8

// Kinds of points.
const (
	PointNamed      PointKind = 1 // a moment that somebody gave a name; crash-consistent
	PointConsistent PointKind = 2 // the guest's file systems were frozen: application-consistent
	PointCommit     PointKind = 3 // a commit point: ext4j saw a jbd2 transaction commit
)

// PointInfo is the payload of a point marker. The point is the epoch that ends
// with the next Close record.
//
//	 0  i64 time at the source, ns since 1970
//	 8  u8  kind
//	 9  u8  zero
//	10  u16 bytes of the name, at most 255
//	12  u32 flags, 0
//	16  name, UTF-8 without control characters; may be empty
type PointInfo struct {
	TimeNs int64
	Kind   PointKind
	Name   string
}

// Encode makes the payload.
func (p PointInfo) Encode() ([]byte, error) {
	if err := p.check(); err != nil {
		return nil, err
	}
	b := make([]byte, 16, 16+len(p.Name))
	binary.LittleEndian.PutUint64(b, uint64(p.TimeNs))
	b[8] = byte(p.Kind)
	binary.LittleEndian.PutUint16(b[10:], uint16(len(p.Name)))
	return append(b, p.Name...), nil
}

func (p PointInfo) check() error {
	if p.Kind == 0 {
		return fmt.Errorf("%w: point of no kind", ErrCorrupt)
	}
	return checkName("point", p.Name)
}

// DecodePoint reads the payload of a point marker.
func DecodePoint(b []byte) (PointInfo, error) {
	if len(b) < 16 {
		return PointInfo{}, fmt.Errorf("%w: point marker of %d bytes", ErrCorrupt, len(b))
	}
	le := binary.LittleEndian
	if f := le.Uint32(b[12:]); f != 0 {
		return PointInfo{}, fmt.Errorf("%w: point marker with flags %#x", ErrUnsupported, f)
	}
	if b[9] != 0 || len(b) != 16+int(le.Uint16(b[10:])) {
		return PointInfo{}, fmt.Errorf("%w: malformed point marker of %d bytes", ErrCorrupt, len(b))
	}
	p := PointInfo{TimeNs: int64(le.Uint64(b)), Kind: PointKind(b[8]), Name: string(b[16:])}
	return p, p.check()
}

// DiskInfo is the payload of the markers that add, resize and remove a disk:
// the disk as it is from the next epoch on, or, when it is removed, as it was.
//
//	 0  16 B disk UUID
//	16  u32  slot in the group, at most 65534; never used again after a removal
//	20  u32  logical block size, bytes: a power of two, 512 to 65536
//	24  u64  length, bytes: whole blocks, at most 2^60
//	32  u32  flags, 0
//	36  u16  bytes of the name, 1 to 255
//	38  2 B  zero
//	40  name, UTF-8 without control characters
type DiskInfo struct {
	ID        UUID
	Slot      uint32
	BlockSize uint32
	Bytes     uint64
	Name      string
}

// Encode makes the payload.
func (d DiskInfo) Encode() ([]byte, error) {
	if err := d.check(); err != nil {
		return nil, err
	}
	b := make([]byte, 40, 40+len(d.Name))
	le := binary.LittleEndian
	copy(b, d.ID[:])
	le.PutUint32(b[16:], d.Slot)
	le.PutUint32(b[20:], d.BlockSize)
	le.PutUint64(b[24:], d.Bytes)
	le.PutUint16(b[36:], uint16(len(d.Name)))
	return append(b, d.Name...), nil
}

func (d DiskInfo) check() error {
	switch {
	case d.ID.IsZero() || d.Slot > MaxSlot || d.Name == "":
		return fmt.Errorf("%w: disk %q in slot %d with id %s", ErrCorrupt, d.Name, d.Slot, d.ID)
	case d.BlockSize < MinBlockSize || d.BlockSize > MaxBlockSize || d.BlockSize&(d.BlockSize-1) != 0:
		return fmt.Errorf("%w: disk with blocks of %d bytes", ErrCorrupt, d.BlockSize)
	case d.Bytes == 0 || d.Bytes > MaxOffset || d.Bytes%uint64(d.BlockSize) != 0:
		return fmt.Errorf("%w: disk of %d bytes in blocks of %d", ErrCorrupt, d.Bytes, d.BlockSize)
	}
	return checkName("disk", d.Name)
}

// DecodeDisk reads the payload of a marker that adds, resizes or removes a disk.
func DecodeDisk(b []byte) (DiskInfo, error) {
	if len(b) < 40 {
		return DiskInfo{}, fmt.Errorf("%w: disk marker of %d bytes", ErrCorrupt, len(b))
	}
	le := binary.LittleEndian
	if f := le.Uint32(b[32:]); f != 0 {
		return DiskInfo{}, fmt.Errorf("%w: disk marker with flags %#x", ErrUnsupported, f)
	}
	if !allZero(b[38:40]) || len(b) != 40+int(le.Uint16(b[36:])) {
		return DiskInfo{}, fmt.Errorf("%w: malformed disk marker of %d bytes", ErrCorrupt, len(b))
	}
	d := DiskInfo{Slot: le.Uint32(b[16:]), BlockSize: le.Uint32(b[20:]), Bytes: le.Uint64(b[24:]), Name: string(b[40:])}
	copy(d.ID[:], b)
	return d, d.check()
}

// Membership is the payload of a membership marker: the replicas that an
// acknowledged epoch is durable at, from the next epoch on.
//
//	0  u16  number of replicas, at most 16
//	2  2 B  zero
//	4  u32  flags, 0
//	8  16 B each: their UUIDs, ascending
type Membership struct {
	Replicas []UUID
}

// Encode makes the payload.
func (m Membership) Encode() ([]byte, error) {
	if err := m.check(); err != nil {
		return nil, err
	}
	b := make([]byte, 8, 8+16*len(m.Replicas))
	binary.LittleEndian.PutUint16(b, uint16(len(m.Replicas)))
	for _, u := range m.Replicas {
		b = append(b, u[:]...)
	}
	return b, nil
}

func (m Membership) check() error {
	if len(m.Replicas) > MaxReplicas {
		return fmt.Errorf("%w: membership of %d replicas", ErrCorrupt, len(m.Replicas))
	}
	last := UUID{}
	for _, u := range m.Replicas {
		if string(u[:]) <= string(last[:]) { // the zero UUID names nobody
			return fmt.Errorf("%w: replica %s is out of order in a membership", ErrCorrupt, u)
		}
		last = u
	}
	return nil
}

// DecodeMembership reads the payload of a membership marker.
func DecodeMembership(b []byte) (Membership, error) {
	if len(b) < 8 {
		return Membership{}, fmt.Errorf("%w: membership marker of %d bytes", ErrCorrupt, len(b))
	}
	le := binary.LittleEndian
	if f := le.Uint32(b[4:]); f != 0 {
		return Membership{}, fmt.Errorf("%w: membership marker with flags %#x", ErrUnsupported, f)
	}
	n := int(le.Uint16(b))
	if n > MaxReplicas || len(b) != 8+16*n || !allZero(b[2:4]) {
		return Membership{}, fmt.Errorf("%w: malformed membership marker of %d bytes", ErrCorrupt, len(b))
	}
	var m Membership
	for i := range n {
		m.Replicas = append(m.Replicas, UUID(b[8+16*i:]))
	}
	return m, m.check()
}

// checkName bounds a name that comes with a marker. It may end up on a terminal.
func checkName(of, name string) error {
	if len(name) > MaxName || !utf8.ValidString(name) {
		return fmt.Errorf("%w: name of a %s with %d bytes, or not UTF-8", ErrCorrupt, of, len(name))
	}
	for _, r := range name {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("%w: name %q of a %s", ErrCorrupt, name, of)
		}
	}
	return nil
}

// checkReserved looks at the payload of a reserved marker. It never returns
// nil: what is well-formed is still not carried out by this release.
func (r *Record) checkReserved() error {
	if r.Disk != GroupWide || r.Offset != 0 || uint64(len(r.Payload)) != r.Length {
		return fmt.Errorf("%w: malformed %s marker", ErrCorrupt, r.Type)
	}
	var err error
	var what string
	switch r.Type {
	case TypePoint:
		var p PointInfo
		p, err = DecodePoint(r.Payload)
		what = fmt.Sprintf("point %q", p.Name)
	case TypeMembership:
		var m Membership
		m, err = DecodeMembership(r.Payload)
		what = fmt.Sprintf("membership of %d replicas", len(m.Replicas))
	default:
		var d DiskInfo
		d, err = DecodeDisk(r.Payload)
		what = fmt.Sprintf("%s of disk %q, %d bytes in blocks of %d", r.Type, d.Name, d.Bytes, d.BlockSize)
	}
	if err != nil {
		return fmt.Errorf("record %d: %w", r.LSN, err)
	}
	return fmt.Errorf("%w: record %d, %s", ErrUnsupported, r.LSN, what)
}
