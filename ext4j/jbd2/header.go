package jbd2

import "encoding/binary"

// Magic starts every block of the log that is not data.
const Magic = 0xc03b3998

// HeaderSize is the size of the header of every log block, in bytes.
const HeaderSize = 12

// BlockType says what a log block is.
type BlockType uint32

// The block types.
const (
	TypeDescriptor   BlockType = 1
	TypeCommit       BlockType = 2
	TypeSuperblockV1 BlockType = 3
	TypeSuperblockV2 BlockType = 4
	TypeRevoke       BlockType = 5
)

// Header is the start of a log block.
type Header struct {
	Type     BlockType
	Sequence TID
}

// DecodeHeader reads the header of a log block. It reports false when b is
// too short or does not start with the magic; the type may be an unknown one.
func DecodeHeader(b []byte) (Header, bool) {
	if len(b) < HeaderSize || binary.BigEndian.Uint32(b) != Magic {
		return Header{}, false
	}
	return Header{
		Type:     BlockType(binary.BigEndian.Uint32(b[4:])),
		Sequence: TID(binary.BigEndian.Uint32(b[8:])),
	}, true
}
