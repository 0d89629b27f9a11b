// Package ext4 finds an ext2, ext3 or ext4 file system in an image and reads
// what journal recovery needs of it: the superblock, group descriptors, the
// journal's inode and the map of its blocks, with all their checksums.
//
// It only reads. What it reads was written by a guest and may be hostile:
// every number is checked before it is used as a length, offset or count, no
// walk is deeper than the format allows, and memory is bounded by what the caller asks for.
//
// The format is that of Linux fs/ext4 (ext4.h, super.c, inode.c, extents.c). All
// integers are little-endian.
package ext4
