package ext4

import "encoding/binary"

// Size is the size of the superblock, Offset its place in a file system, both in bytes.
const (
	Size   = 1024
	Offset = 1024
)

// Raw is the superblock as it stands on disk.
type Raw [Size]byte

// The places of the fields that recovery changes.
const (
	offFreeBlocksLo = 0x0c
	offFreeInodes   = 0x10
	offMagic        = 0x38
	offState        = 0x3a
	offIncompat     = 0x60
	offROCompat     = 0x64
	offFreeBlocksHi = 0x158
	offErrors       = 0x194 // s_error_count to s_last_error_func
	endErrors       = 0x200
	offOrphanFile   = 0x280
	offChecksum     = 0x3fc
)

// State is the superblock's s_state.
type State uint16

// The bits of State.
const (
	StateValid  State = 1 // unmounted cleanly, or journaled
	StateErrors State = 2 // errors were found
	StateOrphan State = 4 // orphans were being recovered
)

// State reads s_state.
func (r *Raw) State() State { return State(binary.LittleEndian.Uint16(r[offState:])) }

// SetState writes s_state.
func (r *Raw) SetState(s State) { binary.LittleEndian.PutUint16(r[offState:], uint16(s)) }

// Incompat reads the incompatible features.
func (r *Raw) Incompat() Incompat { return Incompat(binary.LittleEndian.Uint32(r[offIncompat:])) }

// SetIncompat writes the incompatible features.
func (r *Raw) SetIncompat(i Incompat) { binary.LittleEndian.PutUint32(r[offIncompat:], uint32(i)) }

// SetFree writes the counts of free blocks and free inodes. hi says whether
// the count of blocks has 64 bits.
func (r *Raw) SetFree(blocks uint64, inodes uint32, hi bool) {
	le := binary.LittleEndian
	le.PutUint32(r[offFreeBlocksLo:], uint32(blocks))
	if hi {
		le.PutUint32(r[offFreeBlocksHi:], uint32(blocks>>32))
	}
	le.PutUint32(r[offFreeInodes:], inodes)
}

// KeepErrors copies the record of errors (s_error_count up to
// s_last_error_func) from another version of the superblock. The kernel
// writes it outside the journal and keeps it across a replay.
func (r *Raw) KeepErrors(from *Raw) { copy(r[offErrors:endErrors], from[offErrors:endErrors]) }

// Same tells whether r is a copy of the superblock of the same file system, and whole.
func (r *Raw) Same(as *Raw) bool {
	const uuid = 0x68
	return [2]byte(r[offMagic:]) == [2]byte(as[offMagic:]) && [16]byte(r[uuid:]) == [16]byte(as[uuid:]) && r.ChecksumOK()
}

// hasChecksum reports metadata_csum.
func (r *Raw) hasChecksum() bool {
	return ROCompat(binary.LittleEndian.Uint32(r[offROCompat:]))&MetadataCsum != 0
}

func (r *Raw) sum() uint32 { return crc32c(^uint32(0), r[:offChecksum]) }

// SetChecksum redoes the checksum, if there is one.
func (r *Raw) SetChecksum() {
	if r.hasChecksum() {
		binary.LittleEndian.PutUint32(r[offChecksum:], r.sum())
	}
}

// ChecksumOK checks the checksum, if there is one.
func (r *Raw) ChecksumOK() bool {
	return !r.hasChecksum() || binary.LittleEndian.Uint32(r[offChecksum:]) == r.sum()
}
