package jbd2

import (
	"encoding/binary"
	"fmt"
	"iter"
)

// revokeHeaderSize is the size of a revoke block's header: that of every log
// block, and at 12 the bytes in use, this header included.
const revokeHeaderSize = 16

// RevokeBlock is the content of a revoke block: the blocks whose earlier
// copies in the log must not be replayed.
type RevokeBlock struct {
	entries []byte
	size    int // bytes of an entry: 8 with 64bit, else 4
}

// DecodeRevoke reads a revoke block. sumOK tells whether its checksum is right (true
// where it has none); the error wraps ErrCorrupt when the count is impossible.
func (f Format) DecodeRevoke(block []byte) (r RevokeBlock, sumOK bool, err error) {
	r.size = 4
	if f.Features.Has(Bit64) {
		r.size = 8
	}
	end := len(block)
	if f.Features.SumV2or3() {
		end -= tailSize
	}
	if end < revokeHeaderSize {
		return RevokeBlock{}, false, fmt.Errorf("%w: revoke block of %d bytes", ErrCorrupt, len(block))
	}
	sumOK = f.tailOK(block)
	n := binary.BigEndian.Uint32(block[HeaderSize:])
	if uint64(n) > uint64(end) {
		return RevokeBlock{}, sumOK, fmt.Errorf("%w: revoke block with %d bytes in use of %d", ErrCorrupt, n, end)
	}
	if n > revokeHeaderSize {
		r.entries = block[revokeHeaderSize:n]
	}
	return r, sumOK, nil
}

// Len is the number of revoked blocks.
func (r RevokeBlock) Len() int {
	if r.size == 0 {
		return 0
	}
	return len(r.entries) / r.size
}

// All yields the revoked blocks.
func (r RevokeBlock) All() iter.Seq[uint64] {
	return func(yield func(uint64) bool) {
		for i := range r.Len() {
			if !yield(r.at(i)) {
				return
			}
		}
	}
}

func (r RevokeBlock) at(i int) uint64 {
	e := r.entries[i*r.size:]
	if r.size == 8 {
		return binary.BigEndian.Uint64(e)
	}
	return uint64(binary.BigEndian.Uint32(e))
}

// Revoked reports whether a copy made by transaction tid is void when the
// block was revoked by transaction by: copies of by itself and older ones are.
func Revoked(tid, by TID) bool { return !tid.After(by) }
