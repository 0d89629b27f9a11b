package ext4

import (
	"encoding/binary"
	"fmt"
)

// Inode is what this package needs of an inode.
type Inode struct {
	Number uint32
	Mode   uint16
	Links  uint16
	Flags  uint32
	Size   uint64   // bytes
	Block  [60]byte // the map's root: extents or block numbers
	seed   uint32   // of the checksums of its extent blocks
}

// Flags of an inode.
const (
	flagEncrypt = 0x800
	flagExtents = 0x80000
	flagInline  = 0x10000000
)

// Regular reports a regular file that is linked, not encrypted and not inline.
func (i Inode) Regular() bool {
	return i.Mode&0xf000 == 0x8000 && i.Links > 0 && i.Flags&(flagEncrypt|flagInline) == 0
}

// Inode reads an inode and checks its checksum.
func (fs *FS) Inode(n uint32) (Inode, error) {
	i, _, err := fs.rawInode(n)
	return i, err
}

// rawInode is Inode with the bytes on disk.
func (fs *FS) rawInode(n uint32) (Inode, []byte, error) {
	if n == 0 || n > fs.Inodes {
		return Inode{}, nil, fmt.Errorf("%w: inode %d of %d", ErrCorrupt, n, fs.Inodes)
	}
	g, err := fs.Group((n - 1) / fs.InodesPerGroup)
	if err != nil {
		return Inode{}, nil, fmt.Errorf("inode %d: %w", n, err)
	}
	at := uint64((n-1)%fs.InodesPerGroup) * uint64(fs.InodeSize)
	b := make([]byte, fs.InodeSize)
	if err := fs.readIn(g.InodeTable+at/uint64(fs.BlockSize), at%uint64(fs.BlockSize), b); err != nil {
		return Inode{}, nil, fmt.Errorf("inode %d: %w", n, err)
	}
	i := fs.decodeInode(n, b)
	if fs.ROCompat&MetadataCsum != 0 && !inodeSumOK(b, i.seed) {
		return Inode{}, nil, fmt.Errorf("%w of inode %d", ErrChecksum, n)
	}
	return i, b, nil
}

func (fs *FS) decodeInode(n uint32, b []byte) Inode {
	le := binary.LittleEndian
	i := Inode{
		Number: n, Mode: le.Uint16(b), Links: le.Uint16(b[0x1a:]), Flags: le.Uint32(b[0x20:]),
		Size: uint64(le.Uint32(b[4:])) | uint64(le.Uint32(b[0x6c:]))<<32,
		seed: crc32cU32(crc32cU32(fs.seed, n), le.Uint32(b[0x64:])),
	}
	copy(i.Block[:], b[0x28:])
	return i
}

// inodeSumOK checks an inode's checksum: its low half at 0x7c, its high half
// at 0x82 if the inode's extra part reaches that far.
func inodeSumOK(b []byte, seed uint32) bool {
	const lo, hi = 0x7c, 0x82
	le := binary.LittleEndian
	want := uint32(le.Uint16(b[lo:]))
	crc := crc32c(crc32c(seed, b[:lo]), []byte{0, 0})
	crc = crc32c(crc, b[lo+2:128])
	if len(b) == 128 {
		return want == crc&0xffff
	}
	if le.Uint16(b[0x80:]) < 4 {
		return want == crc32c(crc, b[128:])&0xffff
	}
	want |= uint32(le.Uint16(b[hi:])) << 16
	crc = crc32c(crc32c(crc, b[128:hi]), []byte{0, 0})
	return want == crc32c(crc, b[hi+2:])
}
