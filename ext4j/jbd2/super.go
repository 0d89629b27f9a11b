package jbd2

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// SuperblockSize is the size of the journal's superblock, in bytes; it is the
// start of the journal's block 0.
const SuperblockSize = 1024

// MinBlocks is the length below which the kernel refuses a log, in blocks.
const MinBlocks = 1024

// ErrCorrupt marks a journal whose content contradicts itself: the kernel
// refuses to recover it too.
var ErrCorrupt = errors.New("corrupt journal")

// ErrUnsupported marks a journal that is of a kind this package does not know.
var ErrUnsupported = errors.New("unsupported journal")

// Superblock is the journal's superblock:
//
//	0x00  header, type 3 (v1) or 4 (v2)
//	0x0c  u32 block size        0x10 u32 blocks in the journal
//	0x14  u32 first log block   0x18 u32 sequence expected at the log's start
//	0x1c  u32 start of the log, 0: the log is empty
//	0x20  u32 errno             (a v1 superblock ends here)
//	0x24  u32 compat, 0x28 incompat, 0x2c ro_compat features
//	0x30  16 B UUID             0x40 u32 number of file systems
//	0x50  u8  checksum type, 4: CRC-32C
//	0x54  u32 blocks for fast commits, 0: 256
//	0x58  u32 head: where the next transaction would have gone, when empty
//	0xfc  u32 checksum, CRC-32C over all 1024 bytes with this field zero
type Superblock struct {
	Version   int // 1 or 2
	BlockSize uint32
	MaxLen    uint32 // blocks, block 0 included
	First     uint32
	Sequence  TID
	Start     uint32
	Errno     int32
	Features  Features
	ROCompat  uint32
	UUID      [16]byte
	FastLen   uint32 // s_num_fc_blks as it stands
	Head      uint32
}

const (
	offSequence = 0x18
	offStart    = 0x1c
	offErrno    = 0x20
	offIncompat = 0x28
	offSumType  = 0x50
	offHead     = 0x58
	offSuperSum = 0xfc
	sumCRC32C   = 4
)

// DecodeSuperblock reads a journal's superblock from the first 1024 bytes of
// its block 0 and checks what can be checked without knowing the file system:
// magic, version, features, checksum. Errors wrap ErrCorrupt or ErrUnsupported.
func DecodeSuperblock(b []byte) (Superblock, error) {
	if len(b) < SuperblockSize {
		return Superblock{}, fmt.Errorf("%w: superblock of %d bytes", ErrCorrupt, len(b))
	}
	h, ok := DecodeHeader(b)
	if !ok {
		return Superblock{}, fmt.Errorf("%w: no journal superblock where the journal starts", ErrCorrupt)
	}
	be := binary.BigEndian
	s := Superblock{
		BlockSize: be.Uint32(b[0x0c:]), MaxLen: be.Uint32(b[0x10:]), First: be.Uint32(b[0x14:]),
		Sequence: TID(be.Uint32(b[offSequence:])), Start: be.Uint32(b[offStart:]), Errno: int32(be.Uint32(b[offErrno:])),
	}
	switch h.Type {
	case TypeSuperblockV1:
		s.Version = 1
		return s, nil
	case TypeSuperblockV2:
		s.Version = 2
	default:
		return Superblock{}, fmt.Errorf("%w: superblock of type %d", ErrUnsupported, h.Type)
	}
	s.Features = makeFeatures(be.Uint32(b[0x24:]), be.Uint32(b[offIncompat:]))
	s.ROCompat = be.Uint32(b[0x2c:])
	copy(s.UUID[:], b[0x30:])
	s.FastLen, s.Head = be.Uint32(b[0x54:]), be.Uint32(b[offHead:])
	return s, s.checkFeatures(b)
}

func (s Superblock) checkFeatures(b []byte) error {
	f := s.Features
	switch {
	case f.UnknownIncompat() != 0:
		return fmt.Errorf("%w: unknown incompatible features 0x%x", ErrUnsupported, f.UnknownIncompat())
	case s.ROCompat != 0:
		return fmt.Errorf("%w: unknown read-only features 0x%x", ErrUnsupported, s.ROCompat)
	case f.Has(SumV2 | SumV3):
		return fmt.Errorf("%w: checksums v2 and v3 are both set", ErrCorrupt)
	case f.SumV2or3() && f.Has(SumV1):
		return fmt.Errorf("%w: checksums v1 and v2/v3 are both set", ErrCorrupt)
	case f.SumV2or3() && b[offSumType] != sumCRC32C:
		return fmt.Errorf("%w: checksum type %d", ErrUnsupported, b[offSumType])
	case f.SumV2or3() && !superSumOK(b):
		return fmt.Errorf("%w: wrong checksum of the journal's superblock", ErrCorrupt)
	}
	return nil
}

func superSumOK(b []byte) bool {
	return binary.BigEndian.Uint32(b[offSuperSum:]) == crc32cHole(^uint32(0), b[:SuperblockSize], offSuperSum)
}

// Check holds the superblock against the file system: its block size and the
// journal file's length, both as the file system has them. Errors wrap ErrCorrupt.
func (s Superblock) Check(blockSize uint32, fileBlocks uint64) error {
	switch {
	case s.BlockSize != blockSize:
		return fmt.Errorf("%w: block size %d, the file system's is %d", ErrCorrupt, s.BlockSize, blockSize)
	case uint64(s.MaxLen) > fileBlocks:
		return fmt.Errorf("%w: %d blocks claimed, its file has %d", ErrCorrupt, s.MaxLen, fileBlocks)
	case s.Features.Has(FastCommit) && s.FastBlocks() >= s.MaxLen:
		return fmt.Errorf("%w: %d blocks for fast commits of %d", ErrCorrupt, s.FastBlocks(), s.MaxLen)
	case s.First == 0 || s.First >= s.MaxLen:
		return fmt.Errorf("%w: first log block %d of %d", ErrCorrupt, s.First, s.MaxLen)
	case s.Last() < s.First || s.Last()-s.First+1 < MinBlocks:
		return fmt.Errorf("%w: log of blocks %d to %d is too short", ErrCorrupt, s.First, s.Last())
	case s.Start != 0 && (s.Start < s.First || s.Start >= s.Last()):
		return fmt.Errorf("%w: log starts at block %d, outside %d to %d", ErrCorrupt, s.Start, s.First, s.Last())
	}
	return nil
}

// FastBlocks is the number of blocks set aside for fast commits when the
// feature is set.
func (s Superblock) FastBlocks() uint32 {
	if s.FastLen == 0 {
		return 256
	}
	return s.FastLen
}

// Last is the block after the last one of the log.
func (s Superblock) Last() uint32 {
	if s.Features.Has(FastCommit) {
		return s.MaxLen - s.FastBlocks()
	}
	return s.MaxLen
}

// Journal gives what Scan needs. The superblock must have passed Check.
func (s Superblock) Journal() Journal {
	return Journal{
		Format: Format{BlockSize: int(s.BlockSize), Features: s.Features, Seed: Seed(s.UUID)},
		First:  s.First, Last: s.Last(), Start: s.Start, Sequence: s.Sequence,
	}
}
