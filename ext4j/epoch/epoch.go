// Package epoch is the vocabulary both sides share: record, epoch, LSN,
// lineage, session, position, and the one codec of a record.
//
// A record is one guest write, zero or trim, or a marker. Records of a group
// carry a dense LSN. An epoch is a run of records that ends with a Close
// record; it is the unit of consistency. A record looks the same in the
// source's memory, on the wire, in the spool and at apply:
//
//	 0  u32  magic "KREC" (0x4345524b)
//	 4  u8   type
//	 5  u8   flags
//	 6  u16  header length, 96
//	 8  u8   codec of the stored payload: 0 raw, 1 zstd
//	 9  7 B  zero
//	16  16 B lineage
//	32  u64  session
//	40  u64  LSN
//	48  u32  disk slot in the group; 0xffffffff in markers of the whole group
//	52  u32  zero
//	56  u64  offset, bytes
//	64  u64  length, bytes: of the extent; of the payload in markers
//	72  u32  raw payload length, bytes
//	76  u32  stored payload length, bytes
//	80  u32  record sum: CRC32C over header (type, flags, lineage, session,
//	         LSN, disk, offset, length) and raw payload; made once, at the source
//	84  u32  stored sum: CRC32C over bytes 0..84 and the stored payload, seeded
//	         by where it is stored (a segment's incarnation, a link's nonce)
//	88  8 B  zero
//	96  stored payload
//
// The payloads of markers are in close.go and marker.go. A record whose sums
// are right but whose type or codec this release does not know is not
// corrupt: it is ErrUnsupported, and what it came from goes no further.
//
// All integers are little-endian. This layout is part of the wire and spool
// formats and must not be changed; golden_test.go pins it.
package epoch

import (
	"crypto/rand"
	"encoding/hex"
	"fmt"
	"strings"
)

// UUID names a group, disk, site, replica or lineage.
type UUID [16]byte

// NewUUID makes a random (version 4) UUID.
func NewUUID() UUID {
	var u UUID
	// crypto/rand.Read never fails: it aborts the process when the kernel has no randomness.
	_, _ = rand.Read(u[:])
	u[6] = u[6]&0x0f | 0x40
	u[8] = u[8]&0x3f | 0x80
	return u
}

// ParseUUID reads the 8-4-4-4-12 form.
func ParseUUID(s string) (UUID, error) {
	var u UUID
	h := strings.ReplaceAll(s, "-", "")
	if len(s) != 36 || len(h) != 32 || s[8] != '-' || s[13] != '-' || s[18] != '-' || s[23] != '-' {
		return u, fmt.Errorf("%q is not a UUID", s)
	}
	if _, err := hex.Decode(u[:], []byte(h)); err != nil {
		return u, fmt.Errorf("%q is not a UUID: %w", s, err)
	}
	return u, nil
}

// IsZero reports the nil UUID.
func (u UUID) IsZero() bool { return u == UUID{} }

func (u UUID) String() string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[0:4], u[4:6], u[6:8], u[8:10], u[10:16])
}

// MarshalText makes a UUID a string in JSON.
func (u UUID) MarshalText() ([]byte, error) { return []byte(u.String()), nil }

// UnmarshalText reads it back.
func (u *UUID) UnmarshalText(b []byte) error {
	v, err := ParseUUID(string(b))
	if err != nil {
		return err
	}
	*u = v
	return nil
}

// LSN is a record's number in its group. The first record has LSN 1; 0 means none.
type LSN uint64

// Pos is a position in a group's history. Positions of different lineages are
// ordered by ancestry, never by their numbers.
type Pos struct {
	Lineage UUID   `json:"lineage"`
	Session uint64 `json:"session"`
	LSN     LSN    `json:"lsn"`
}

func (p Pos) String() string {
	return fmt.Sprintf("%s/%d/%d", p.Lineage.String()[:8], p.Session, p.LSN)
}
