package jbd2

import (
	"encoding/binary"
	"fmt"
)

// FastArea is the part of the journal that holds fast commits: the blocks
// [First, Last). It is empty without the feature. Superblock must have passed Check.
func (s Superblock) FastArea() (first, last uint32) {
	if !s.Features.Has(FastCommit) || s.Last()+1 >= s.MaxLen {
		return 0, 0
	}
	return s.Last() + 1, s.MaxLen
}

// fastTagHead starts every fast commit: u16 tag 9, u16 length 8, u32
// features, u32 tid, little-endian (Linux fs/ext4/fast_commit.h).
const fastTagHead = 9

// FastPending reports whether the fast-commit area starts with a fast commit made on
// top of the log's last transaction, which recovery would have to replay. It
// says yes as well where the kernel would find that one torn, and no when the log
// is empty: the kernel does not look at the area then.
func FastPending(s Superblock, l Log, read ReadBlock) (bool, error) {
	first, last := s.FastArea()
	if first == last || l.End == EndEmpty {
		return false, nil
	}
	b := make([]byte, s.BlockSize)
	if err := read(first, b); err != nil {
		return false, fmt.Errorf("read block %d of the journal: %w", first, err)
	}
	le := binary.LittleEndian
	return le.Uint16(b) == fastTagHead && TID(le.Uint32(b[8:])) == l.EndTID, nil
}
