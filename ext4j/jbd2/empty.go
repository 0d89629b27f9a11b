package jbd2

import "encoding/binary"

// MarkEmpty changes the superblock in b (at least 1024 bytes, as read from the
// journal) so that the log is empty: start 0, errno 0, and next as the
// sequence; head, when not 0, is where the next transaction may go, and a set
// fast_commit is cleared, as the kernel does for a clean journal. All bytes that
// change lie in the first 512.
func (s Superblock) MarkEmpty(b []byte, next TID, head uint32) {
	be := binary.BigEndian
	be.PutUint32(b[offSequence:], uint32(next))
	be.PutUint32(b[offStart:], 0)
	if s.Version > 1 {
		if head != 0 {
			be.PutUint32(b[offHead:], head)
		}
		be.PutUint32(b[offIncompat:], uint32(s.Features&^FastCommit>>32))
	}
	s.ClearErrno(b)
}

// ClearErrno changes the superblock in b so that it records no error. All
// bytes that change lie in the first 512.
func (s Superblock) ClearErrno(b []byte) {
	binary.BigEndian.PutUint32(b[offErrno:], 0)
	if s.Version > 1 && s.Features.SumV2or3() {
		binary.BigEndian.PutUint32(b[offSuperSum:], crc32cHole(^uint32(0), b[:SuperblockSize], offSuperSum))
	}
}
