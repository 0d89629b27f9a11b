package jbd2

import "encoding/binary"

// tailSize is the size of the checksum that ends descriptor and revoke blocks
// under v2 and v3, in bytes.
const tailSize = 4

// Format is what is needed to read the blocks of one journal.
type Format struct {
	BlockSize int // bytes
	Features  Features
	Seed      uint32
}

// TagFlags are the flags of a tag.
type TagFlags uint16

// The flags of a tag.
const (
	FlagEscape   TagFlags = 1 // the block starts with the magic, which is zeroed in the log
	FlagSameUUID TagFlags = 2 // no UUID follows the tag
	FlagDeleted  TagFlags = 4 // written by nobody; recovery ignores it
	FlagLast     TagFlags = 8 // the descriptor's last tag
)

// Tag says where one data block of the log belongs.
type Tag struct {
	Block uint64 // block of the file system
	Sum   uint32 // v3: 32 bits, v2: 16 bits, else meaningless
	Flags TagFlags
}

// Escaped reports whether the block's first four bytes must be set to the magic.
func (t Tag) Escaped() bool { return t.Flags&FlagEscape != 0 }

// TagSize is the size of a tag without its UUID, in bytes:
//
//	      none, v1   v2     v3          v3                else
//	       8         10     16     0  u32 block      0  u32 block
//	64bit  12        14     16     4  u32 flags      4  u16 checksum (v2)
//	                               8  u32 block, hi  6  u16 flags
//	                              12  u32 checksum   8  u32 block, hi (64bit)
//
// The two bytes that v2 adds stay unused (the kernel adds them at the end).
func (f Format) TagSize() int {
	switch {
	case f.Features.Has(SumV3):
		return 16
	case f.Features.Has(SumV2 | Bit64):
		return 14
	case f.Features.Has(SumV2):
		return 10
	case f.Features.Has(Bit64):
		return 12
	}
	return 8
}

// decodeTag reads a tag of TagSize bytes.
func (f Format) decodeTag(b []byte) Tag {
	be := binary.BigEndian
	t := Tag{Block: uint64(be.Uint32(b)), Sum: uint32(be.Uint16(b[4:])), Flags: TagFlags(be.Uint16(b[6:]))}
	if f.Features.Has(SumV3) {
		// The flags are a u32 at 4; recovery reads its low half, at 6, as in the other layouts.
		t.Sum = be.Uint32(b[12:])
	}
	if f.Features.Has(Bit64) {
		t.Block |= uint64(be.Uint32(b[8:])) << 32
	}
	return t
}
