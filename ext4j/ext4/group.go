package ext4

import (
	"encoding/binary"
	"fmt"
)

// Group is what this package needs of a group descriptor.
type Group struct {
	InodeTable uint64 // block
	FreeBlocks uint32 // clusters, with bigalloc
	FreeInodes uint32
}

// decodeGroup reads a descriptor of DescSize bytes.
func (fs *FS) decodeGroup(b []byte) Group {
	le := binary.LittleEndian
	g := Group{InodeTable: uint64(le.Uint32(b[8:])), FreeBlocks: uint32(le.Uint16(b[12:])), FreeInodes: uint32(le.Uint16(b[14:]))}
	if len(b) >= 64 {
		g.InodeTable |= uint64(le.Uint32(b[0x28:])) << 32
		g.FreeBlocks |= uint32(le.Uint16(b[0x2c:])) << 16
		g.FreeInodes |= uint32(le.Uint16(b[0x2e:])) << 16
	}
	return g
}

// groupSumOK checks a descriptor's checksum, if there is one.
func (fs *FS) groupSumOK(n uint32, b []byte) bool {
	const at = 0x1e
	var num [4]byte
	binary.LittleEndian.PutUint32(num[:], n)
	want := binary.LittleEndian.Uint16(b[at:])
	switch {
	case fs.ROCompat&MetadataCsum != 0:
		crc := crc32c(crc32c(fs.seed, num[:]), b[:at])
		crc = crc32c(crc32c(crc, []byte{0, 0}), b[at+2:])
		return want == uint16(crc)
	case fs.ROCompat&GdtCsum != 0:
		crc := crc16(crc16(crc16(^uint16(0), fs.UUID[:]), num[:]), b[:at])
		return want == crc16(crc, b[at+2:])
	}
	return true
}

// descBlock is the block that holds the nth block of descriptors.
func (fs *FS) descBlock(n uint32) uint64 {
	if fs.Incompat&MetaBg == 0 || n < fs.firstMetaBg {
		super := uint64(0)
		if fs.BlockSize == 1024 {
			super = 1
		}
		return super + 1 + uint64(n)
	}
	group := n * (fs.BlockSize / fs.DescSize)
	block := uint64(fs.FirstDataBlock) + uint64(group)*uint64(fs.BlocksPerGroup)
	if fs.hasSuper(group) {
		block++
	}
	if fs.BlockSize == 1024 && n == 0 && fs.FirstDataBlock == 0 {
		block++ // 1 KiB bigalloc: group 0 starts a block before the superblock
	}
	return block
}

// hasSuper reports whether a group starts with a copy of the superblock.
func (fs *FS) hasSuper(group uint32) bool {
	switch {
	case group == 0:
		return true
	case fs.Compat&SparseSuper2 != 0:
		return group == fs.backupBgs[0] || group == fs.backupBgs[1]
	case group == 1 || fs.ROCompat&SparseSuper == 0:
		return true
	}
	return isPower(group, 3) || isPower(group, 5) || isPower(group, 7)
}

func isPower(n, of uint32) bool {
	for n%of == 0 {
		n /= of
	}
	return n == 1
}

// rawDesc reads the descriptor of group n.
func (fs *FS) rawDesc(n uint32) ([]byte, error) {
	per := fs.DescsPerBlock()
	b := make([]byte, fs.DescSize)
	if err := fs.readIn(fs.descBlock(n/per), uint64(n%per*fs.DescSize), b); err != nil {
		return nil, fmt.Errorf("descriptor of group %d: %w", n, err)
	}
	return b, nil
}

// Group reads the descriptor of group n and checks its checksum.
func (fs *FS) Group(n uint32) (Group, error) {
	if n >= fs.Groups {
		return Group{}, fmt.Errorf("%w: group %d of %d", ErrCorrupt, n, fs.Groups)
	}
	b, err := fs.rawDesc(n)
	if err != nil {
		return Group{}, err
	}
	if !fs.groupSumOK(n, b) {
		return Group{}, fmt.Errorf("%w of the descriptor of group %d", ErrChecksum, n)
	}
	return fs.decodeGroup(b), nil
}

// CountFree adds up the free blocks (not clusters) and inodes of all group
// descriptors, as the kernel does when it mounts: without looking at their checksums.
func (fs *FS) CountFree() (blocks uint64, inodes uint32, err error) {
	per := fs.BlockSize / fs.DescSize
	b := make([]byte, fs.BlockSize)
	for n := range fs.Groups {
		if n%per == 0 {
			if err := fs.ReadBlock(fs.descBlock(n/per), b); err != nil {
				return 0, 0, fmt.Errorf("descriptors from group %d on: %w", n, err)
			}
		}
		g := fs.decodeGroup(b[n%per*fs.DescSize:][:fs.DescSize])
		blocks += uint64(g.FreeBlocks) * uint64(fs.ClusterBlocks)
		inodes += g.FreeInodes
	}
	return blocks, inodes, nil
}
