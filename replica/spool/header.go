package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"kagami/ext4j/epoch"
)

// headerBytes is the size of a segment's header; records begin there.
const headerBytes = 4096

const (
	segmentMagic   = "KAGAMISP"
	segmentVersion = 1
	sumOffset      = 4092 // of every block of 4096 bytes in this package
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errNoHeader: the block is no header (never written, torn or damaged).
var errNoHeader = errors.New("no valid segment header")

// header is a segment's header. README.md has the layout.
type header struct {
	Number      uint64 // 0: the segment is free, written full, and holds nothing
	Group       epoch.UUID
	Replica     epoch.UUID
	Lineage     epoch.UUID // of every record in the segment
	Session     uint64     // of every record in the segment
	Incarnation uint64
	First       epoch.LSN
	Bytes       int64     // size of the segment, header included
	Durable     epoch.LSN // known durable, or applied, when the segment was begun
	Prev        epoch.LSN // the record before First; First-1, or less where the log begins anew
}

// seed is what the stored sums of the segment's records start from.
func (h *header) seed() uint32 {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], h.Incarnation)
	return crc32.Checksum(b[:], castagnoli)
}

func (h *header) encode() []byte {
	b := make([]byte, headerBytes)
	le := binary.LittleEndian
	copy(b, segmentMagic)
	le.PutUint32(b[8:], segmentVersion)
	le.PutUint32(b[20:], headerBytes)
	le.PutUint64(b[24:], h.Number)
	copy(b[32:], h.Group[:])
	copy(b[48:], h.Lineage[:])
	le.PutUint64(b[64:], h.Session)
	le.PutUint64(b[72:], h.Incarnation)
	le.PutUint64(b[80:], uint64(h.First))
	le.PutUint64(b[96:], uint64(h.Bytes))
	le.PutUint64(b[104:], uint64(h.Durable))
	le.PutUint64(b[112:], uint64(h.Prev))
	copy(b[120:], h.Replica[:])
	sealBlock(b)
	return b
}

// decodeHeader reads a header block. errNoHeader means that the slot is free;
// any other error that this release must not touch the segment.
func decodeHeader(b []byte) (header, error) {
	if len(b) < headerBytes || string(b[:8]) != segmentMagic || !blockSealed(b[:headerBytes]) {
		return header{}, errNoHeader
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[8:]); v != segmentVersion {
		return header{}, fmt.Errorf("segment format version %d is not known to this release", v)
	}
	if f := le.Uint32(b[12:]); f != 0 {
		return header{}, fmt.Errorf("segment needs features %#x, not known to this release", f)
	}
	if k, c := le.Uint32(b[88:]), le.Uint32(b[92:]); k != 0 || c != 0 {
		return header{}, fmt.Errorf("segment is encrypted (key %d, cipher %d), not known to this release", k, c)
	}
	h := header{Number: le.Uint64(b[24:]), Session: le.Uint64(b[64:]), Incarnation: le.Uint64(b[72:]),
		First: epoch.LSN(le.Uint64(b[80:])), Bytes: int64(le.Uint64(b[96:])),
		Durable: epoch.LSN(le.Uint64(b[104:])), Prev: epoch.LSN(le.Uint64(b[112:]))}
	copy(h.Group[:], b[32:48])
	copy(h.Lineage[:], b[48:64])
	copy(h.Replica[:], b[120:136])
	return h, h.check(le.Uint32(b[20:]))
}

func (h *header) check(bytes uint32) error {
	if bytes != headerBytes || h.Bytes < 2*headerBytes || h.Bytes%headerBytes != 0 {
		return fmt.Errorf("%w: header of %d bytes, segment of %d", ErrCorrupt, bytes, h.Bytes)
	}
	if h.Number != 0 && (h.Prev >= h.First || h.Durable > h.Prev) {
		return fmt.Errorf("%w: segment %d begins at LSN %d after %d, %d durable", ErrCorrupt, h.Number, h.First, h.Prev, h.Durable)
	}
	return nil
}

// sealBlock puts the CRC32C of a 4096-byte block into its last four bytes.
func sealBlock(b []byte) {
	binary.LittleEndian.PutUint32(b[sumOffset:], crc32.Checksum(b[:sumOffset], castagnoli))
}

func blockSealed(b []byte) bool {
	return crc32.Checksum(b[:sumOffset], castagnoli) == binary.LittleEndian.Uint32(b[sumOffset:])
}
