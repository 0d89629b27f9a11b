// Package stamp makes sectors that tell which write they are from, so that a
// checker that meets one on a disk knows what it is looking at.
//
// A stamped sector is 512 bytes, little-endian:
//
//	  0  8 B "KAGAMIST"
//	  8  u64 seed of the run
//	 16  u64 sequence number of the write, not 0
//	 24  u32 place: a disk's or a file's number in the run
//	 28  u32 zero
//	 32  u64 offset of this sector in its place, bytes
//	 40  fill, derived from the fields above
//	508  u32 CRC32C of bytes 0..508
//
// Every byte follows from the fields, so a sector is either intact or not a
// stamp at all. Every fourth write has a fill that compresses well.
package stamp

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"hash/crc32"
)

// Size is the size of a sector in bytes, the unit at which a disk may tear a write.
const Size = 512

const magic = "KAGAMIST"

var table = crc32.MakeTable(crc32.Castagnoli)

// Stamp says which write a sector is from.
type Stamp struct {
	Seed   uint64
	Seq    uint64
	Place  uint32
	Offset int64
}

func (s Stamp) String() string {
	return fmt.Sprintf("write %d for offset %d of place %d (seed %d)", s.Seq, s.Offset, s.Place, s.Seed)
}

// Fill stamps every sector of p, whose first byte is at s.Offset. The length
// of p must be a multiple of Size.
func Fill(p []byte, s Stamp) {
	for ; len(p) >= Size; p = p[Size:] {
		fillSector(p[:Size], s)
		s.Offset += Size
	}
}

func fillSector(b []byte, s Stamp) {
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint64(b[8:], s.Seed)
	le.PutUint64(b[16:], s.Seq)
	le.PutUint32(b[24:], s.Place)
	le.PutUint32(b[28:], 0)
	le.PutUint64(b[32:], uint64(s.Offset))
	x := s.Seed ^ s.Seq<<20 ^ uint64(s.Offset)<<1 ^ uint64(s.Place)<<56
	for i := 40; i < Size; i += 8 {
		if s.Seq%4 != 0 {
			x += 0x9e3779b97f4a7c15
		}
		le.PutUint64(b[i:], mix(x))
	}
	le.PutUint32(b[Size-4:], crc32.Checksum(b[:Size-4], table))
}

// mix is the output function of splitmix64.
func mix(x uint64) uint64 {
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// Kind is what a sector turned out to be.
type Kind uint8

// The kinds of sector.
const (
	Zero    Kind = iota // all zeros
	Intact              // a stamp, every byte of it as written
	Foreign             // anything else
)

var zeros [Size]byte

// Read tells what a sector of Size bytes is. For a Foreign sector that begins
// like a stamp the fields are returned as they are, for the report.
func Read(b []byte) (Stamp, Kind) {
	if bytes.Equal(b, zeros[:]) {
		return Stamp{}, Zero
	}
	if len(b) != Size || string(b[:8]) != magic {
		return Stamp{}, Foreign
	}
	le := binary.LittleEndian
	s := Stamp{Seed: le.Uint64(b[8:]), Seq: le.Uint64(b[16:]), Place: le.Uint32(b[24:]), Offset: int64(le.Uint64(b[32:]))}
	var want [Size]byte
	if fillSector(want[:], s); s.Seq == 0 || !bytes.Equal(b, want[:]) {
		return s, Foreign
	}
	return s, Intact
}
