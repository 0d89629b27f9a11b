package ext4

import (
	"encoding/binary"
)

// GroupFlags are the flags of a group descriptor.
type GroupFlags uint16

// The flags of a group descriptor.
const (
	InodeUninit GroupFlags = 1 // the inode bitmap was never written
	BlockUninit GroupFlags = 2 // the block bitmap was never written; what it would hold is computed
	InodeZeroed GroupFlags = 4 // the inode table is zeroed
)

// GroupDesc is a group descriptor (struct ext4_group_desc), as far as it says
// where things lie and what is free:
//
//	0x00 u32 block bitmap    0x04 u32 inode bitmap   0x08 u32 inode table
//	0x0c u16 free blocks     0x0e u16 free inodes    0x10 u16 directories
//	0x12 u16 flags           0x18 u16 sum of the block bitmap   0x1a u16 of the inode bitmap
//	0x20 u32, 0x24 u32, 0x28 u32, 0x2c u16, 0x2e u16, 0x30 u16, 0x38 u16, 0x3a u16: their high halves, in descriptors of 64 bytes
type GroupDesc struct {
	BlockBitmap, InodeBitmap, InodeTable uint64 // blocks
	Flags                                GroupFlags
	BlockBitmapSum, InodeBitmapSum       uint32 // 32 bits, or 16 in descriptors of 32 bytes
	FreeBlocks, FreeInodes, UsedDirs     uint32 // clusters, with bigalloc
}

// DecodeGroupDesc reads the descriptor of group n from the start of b, at least
// DescSize bytes, and tells whether its checksum is right (true where there is none).
func (fs *FS) DecodeGroupDesc(n uint32, b []byte) (GroupDesc, bool) {
	b = b[:fs.DescSize]
	le := binary.LittleEndian
	d := GroupDesc{
		BlockBitmap: uint64(le.Uint32(b)), InodeBitmap: uint64(le.Uint32(b[4:])), InodeTable: uint64(le.Uint32(b[8:])),
		Flags: GroupFlags(le.Uint16(b[0x12:])), BlockBitmapSum: uint32(le.Uint16(b[0x18:])), InodeBitmapSum: uint32(le.Uint16(b[0x1a:])),
		FreeBlocks: uint32(le.Uint16(b[0x0c:])), FreeInodes: uint32(le.Uint16(b[0x0e:])), UsedDirs: uint32(le.Uint16(b[0x10:])),
	}
	if len(b) >= 64 {
		d.BlockBitmap |= uint64(le.Uint32(b[0x20:])) << 32
		d.InodeBitmap |= uint64(le.Uint32(b[0x24:])) << 32
		d.InodeTable |= uint64(le.Uint32(b[0x28:])) << 32
		d.BlockBitmapSum |= uint32(le.Uint16(b[0x38:])) << 16
		d.InodeBitmapSum |= uint32(le.Uint16(b[0x3a:])) << 16
		d.FreeBlocks |= uint32(le.Uint16(b[0x2c:])) << 16
		d.FreeInodes |= uint32(le.Uint16(b[0x2e:])) << 16
		d.UsedDirs |= uint32(le.Uint16(b[0x30:])) << 16
	}
	return d, fs.groupSumOK(n, b)
}

// DescsPerBlock is the number of group descriptors in a block.
func (fs *FS) DescsPerBlock() uint32 { return fs.BlockSize / fs.DescSize }

// DescBlock is the block that holds the nth block of group descriptors.
func (fs *FS) DescBlock(n uint32) uint64 { return fs.descBlock(n) }

// BlockBitmapOK checks a block bitmap against its descriptor, by the kernel's
// ext4_block_bitmap_csum. Without metadata_csum there is nothing to check
// against and the answer is no.
func (fs *FS) BlockBitmapOK(d GroupDesc, bitmap []byte) bool {
	n := fs.BlocksPerGroup / fs.ClusterBlocks / 8
	if fs.ROCompat&MetadataCsum == 0 || uint64(n) > uint64(len(bitmap)) {
		return false
	}
	sum := crc32c(fs.seed, bitmap[:n])
	if fs.DescSize < 64 {
		sum &= 0xffff
	}
	return sum == d.BlockBitmapSum
}

// InodeBitmapOK checks an inode bitmap against its descriptor (ext4_inode_bitmap_csum); true where there is no checksum.
func (fs *FS) InodeBitmapOK(d GroupDesc, bitmap []byte) bool {
	if fs.ROCompat&MetadataCsum == 0 {
		return true
	}
	sum := crc32c(fs.seed, bitmap[:(fs.InodesPerGroup+7)/8])
	if fs.DescSize < 64 {
		sum &= 0xffff
	}
	return sum == d.InodeBitmapSum
}

// GroupStart is the first block of a group, GroupBlocks how many it has.
func (fs *FS) GroupStart(n uint32) uint64 {
	return uint64(fs.FirstDataBlock) + uint64(n)*uint64(fs.BlocksPerGroup)
}

// GroupBlocks is the number of blocks of a group; the last one may be short.
func (fs *FS) GroupBlocks(n uint32) uint32 {
	return uint32(min(uint64(fs.BlocksPerGroup), fs.Blocks-fs.GroupStart(n)))
}

// Desc reads the descriptor of group n, whatever its checksum.
func (fs *FS) Desc(n uint32) (d GroupDesc, sumOK bool, err error) {
	b, err := fs.rawDesc(n)
	if err != nil {
		return GroupDesc{}, false, err
	}
	d, ok := fs.DecodeGroupDesc(n, b)
	return d, ok, nil
}

// Supers visits the blocks of all groups that hold superblocks and group descriptors, backups
// included.
func (fs *FS) Supers(yield func(block uint64, super bool)) {
	per := fs.DescsPerBlock()
	old := (fs.Groups + per - 1) / per // blocks of descriptors that follow each superblock
	meta := fs.Incompat&MetaBg != 0
	if meta {
		old = min(old, fs.firstMetaBg)
	}
	for g := range fs.Groups {
		at := fs.GroupStart(g)
		if g == 0 && fs.BlockSize == 1024 && fs.FirstDataBlock == 0 {
			yield(0, false) // the boot block
			at++
		}
		if fs.hasSuper(g) {
			yield(at, true)
			at++
			for k := range old {
				yield(at+uint64(k), false)
			}
		}
		if n := g / per; meta && n >= fs.firstMetaBg && (g%per == 0 || g%per == 1 || g%per == per-1) {
			yield(at, false)
		}
	}
}

// InodeTableBlocks is the length of each group's inode table, in blocks.
func (fs *FS) InodeTableBlocks() uint64 {
	return (uint64(fs.InodesPerGroup)*uint64(fs.InodeSize) + uint64(fs.BlockSize) - 1) / uint64(fs.BlockSize)
}

// DecodeInode reads inode n from the start of b, at least InodeSize bytes, and
// tells whether its checksum is right (true where there is none).
func (fs *FS) DecodeInode(n uint32, b []byte) (Inode, bool) {
	b = b[:fs.InodeSize]
	i := fs.decodeInode(n, b)
	return i, fs.ROCompat&MetadataCsum == 0 || inodeSumOK(b, i.seed)
}
