package jbd2

import (
	"encoding/binary"
	"fmt"
	"time"
)

// commitHeaderSize is the part of a commit block that holds anything, in bytes.
const commitHeaderSize = 60

// CommitBlock is what a commit block says:
//
//	12  u8  v1 checksum type, 1: CRC-32   13 u8 its size, 4
//	16  u32 checksum (room for 8)
//	48  u64 commit time, s                56 u32 ns
type CommitBlock struct {
	Sec  uint64 // s since 1970
	Nsec uint32
	// V1 is the checksum of v1; V1Type and V1Size must be 1 and 4. All three
	// zero: the commit has none.
	V1             uint32
	V1Type, V1Size uint8
}

// maxSec is the end of the year 9999: times beyond it cannot be written as JSON.
const maxSec = 253402300799

// Time is the commit time in UTC, or the zero time if the block holds no
// possible one (debugfs of e2fsprogs writes such blocks).
func (c CommitBlock) Time() time.Time {
	if c.Sec > maxSec || c.Nsec >= 1e9 {
		return time.Time{}
	}
	return time.Unix(int64(c.Sec), int64(c.Nsec)).UTC()
}

// SumState says what is known of a commit by its checksums.
type SumState uint8

// The states of a commit's checksum.
const (
	SumNone    SumState = iota // the journal has no checksums, or (v1) this commit has none
	SumGood                    // present and right
	SumPartial                 // v2/v3: right if all after the header was zeros: a commit block written in part
	SumBad                     // present and wrong
)

func (s SumState) String() string {
	return [...]string{"none", "good", "partial", "bad"}[s&3]
}

// DecodeCommit reads a commit block.
func DecodeCommit(block []byte) (CommitBlock, error) {
	if len(block) < commitHeaderSize {
		return CommitBlock{}, fmt.Errorf("%w: commit block of %d bytes", ErrCorrupt, len(block))
	}
	be := binary.BigEndian
	return CommitBlock{
		V1Type: block[12], V1Size: block[13], V1: be.Uint32(block[16:]),
		Sec: be.Uint64(block[48:]), Nsec: be.Uint32(block[56:]),
	}, nil
}

// CommitSum judges a commit block. crc is the v1 checksum of its
// transaction: CRC-32 (crc32be) seeded with ^0 over the descriptor and data blocks.
func (f Format) CommitSum(c CommitBlock, block []byte, crc uint32) SumState {
	switch {
	case f.Features.SumV2or3():
		return f.commitSumV2(block)
	case !f.Features.Has(SumV1):
		return SumNone
	case c.V1Type == 0 && c.V1Size == 0 && c.V1 == 0:
		return SumNone
	case c.V1Type == 1 && c.V1Size == 4 && c.V1 == crc:
		return SumGood
	}
	return SumBad
}

// commitSumV2 checks the CRC-32C over the whole block, and where that fails
// accepts a block whose sectors after the first one were lost, as Linux 6.12 does.
func (f Format) commitSumV2(block []byte) SumState {
	want := binary.BigEndian.Uint32(block[16:])
	if want == crc32cHole(f.Seed, block, 16) {
		return SumGood
	}
	partial := make([]byte, len(block))
	copy(partial, block[:commitHeaderSize])
	if want == crc32cHole(f.Seed, partial, 16) {
		return SumPartial
	}
	return SumBad
}
