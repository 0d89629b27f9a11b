package ext4

import "fmt"

// checkFeatures refuses what this package does not know.
func (fs *FS) checkFeatures(f *fields) error {
	switch {
	case f.SRevLevel > 1:
		return fmt.Errorf("%w: revision %d", ErrUnsupported, f.SRevLevel)
	case fs.Incompat&JournalDev != 0:
		return fmt.Errorf("%w: this is an external journal, not a file system", ErrUnsupported)
	case fs.Incompat.Unknown() != 0:
		return fmt.Errorf("%w: incompatible features: %v", ErrUnsupported, fs.Incompat.Unknown())
	case fs.ROCompat&MetadataCsum != 0 && f.SChecksumType != 1:
		return fmt.Errorf("%w: metadata checksums of type %d", ErrUnsupported, f.SChecksumType)
	}
	return nil
}

// setGeometry takes sizes and counts from the superblock if they are
// possible, by the kernel's rules. size is the room there is, in bytes.
func (fs *FS) setGeometry(f *fields, size int64) error {
	if f.SLogBlockSize > 6 {
		return fmt.Errorf("%w: block size 2^(10+%d)", ErrCorrupt, f.SLogBlockSize)
	}
	fs.BlockSize = 1024 << f.SLogBlockSize
	fs.Blocks, fs.FreeBlocks = uint64(f.SBlocksCountLo), uint64(f.SFreeBlocksCountLo)
	if fs.Incompat&Bit64 != 0 {
		fs.Blocks |= uint64(f.SBlocksCountHi) << 32
		fs.FreeBlocks |= uint64(f.SFreeBlocksCountHi) << 32
	}
	fs.Inodes, fs.FreeInodes = f.SInodesCount, f.SFreeInodesCount
	fs.FirstDataBlock, fs.BlocksPerGroup, fs.InodesPerGroup = f.SFirstDataBlock, f.SBlocksPerGroup, f.SInodesPerGroup
	fs.firstMetaBg, fs.backupBgs = f.SFirstMetaBg, f.SBackupBgs
	if max := uint64(size) / uint64(fs.BlockSize); fs.Blocks > max {
		return fmt.Errorf("%w: %d blocks, the device has room for %d", ErrCorrupt, fs.Blocks, max)
	}
	if err := fs.setClusters(f); err != nil {
		return err
	}
	if err := fs.setSizes(f); err != nil {
		return err
	}
	return fs.setGroups()
}

func (fs *FS) setClusters(f *fields) error {
	fs.ClusterBlocks = 1
	if fs.ROCompat&Bigalloc != 0 {
		if f.SLogClusterSize < f.SLogBlockSize || f.SLogClusterSize > 20 {
			return fmt.Errorf("%w: cluster size 2^(10+%d)", ErrCorrupt, f.SLogClusterSize)
		}
		fs.ClusterBlocks = 1 << (f.SLogClusterSize - f.SLogBlockSize)
		if uint64(f.SClustersPerGroup)*uint64(fs.ClusterBlocks) != uint64(fs.BlocksPerGroup) {
			return fmt.Errorf("%w: %d blocks but %d clusters in a group", ErrCorrupt, fs.BlocksPerGroup, f.SClustersPerGroup)
		}
	}
	// mke2fs makes no group of less than 256 blocks; this bounds the number of descriptors.
	if n := fs.BlocksPerGroup / fs.ClusterBlocks; fs.BlocksPerGroup < 256 || n == 0 || n > fs.BlockSize*8 {
		return fmt.Errorf("%w: %d blocks in a group", ErrCorrupt, fs.BlocksPerGroup)
	}
	first := uint32(0)
	if fs.BlockSize == 1024 && fs.ClusterBlocks == 1 {
		first = 1
	}
	if fs.FirstDataBlock != first && !(fs.BlockSize == 1024 && fs.FirstDataBlock == 1) {
		return fmt.Errorf("%w: first data block %d", ErrCorrupt, fs.FirstDataBlock)
	}
	return nil
}

func (fs *FS) setSizes(f *fields) error {
	fs.InodeSize, fs.DescSize = 128, 32
	if f.SRevLevel > 0 {
		fs.InodeSize = uint32(f.SInodeSize)
	}
	if fs.Incompat&Bit64 != 0 {
		fs.DescSize = uint32(f.SDescSize)
		if fs.DescSize < 64 || fs.DescSize > 1024 || fs.DescSize&(fs.DescSize-1) != 0 {
			return fmt.Errorf("%w: group descriptors of %d bytes", ErrCorrupt, fs.DescSize)
		}
	}
	if fs.InodeSize < 128 || fs.InodeSize > fs.BlockSize || fs.InodeSize&(fs.InodeSize-1) != 0 {
		return fmt.Errorf("%w: inodes of %d bytes", ErrCorrupt, fs.InodeSize)
	}
	if n := fs.InodesPerGroup; n < fs.BlockSize/fs.InodeSize || n > fs.BlockSize*8 {
		return fmt.Errorf("%w: %d inodes in a group", ErrCorrupt, n)
	}
	return nil
}

func (fs *FS) setGroups() error {
	if fs.Blocks <= uint64(fs.FirstDataBlock) {
		return fmt.Errorf("%w: %d blocks", ErrCorrupt, fs.Blocks)
	}
	groups := (fs.Blocks - uint64(fs.FirstDataBlock) + uint64(fs.BlocksPerGroup) - 1) / uint64(fs.BlocksPerGroup)
	if groups*uint64(fs.InodesPerGroup) != uint64(fs.Inodes) {
		return fmt.Errorf("%w: %d inodes in %d groups of %d", ErrCorrupt, fs.Inodes, groups, fs.InodesPerGroup)
	}
	fs.Groups = uint32(groups) // not more than inodes
	return nil
}
