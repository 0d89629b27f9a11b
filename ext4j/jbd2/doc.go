// Package jbd2 decodes the journal of ext3 and ext4 and follows it to its end
// by the rules of the kernel's recovery.
//
// It is pure: it does no I/O of its own (blocks come from a ReadBlock), keeps
// no clock, starts no goroutine and imports nothing of kagami. Every length
// and count read from a block is checked before use; memory is bounded by the
// length of the journal.
//
// The format is that of Linux fs/jbd2 (include/linux/jbd2.h, recovery.c,
// commit.c, revoke.c) and of e2fsprogs' kernel-jbd.h. All integers are
// big-endian but for the fast-commit area. Every block of the log starts with
//
//	0  u32  magic 0xc03b3998
//	4  u32  type: 1 descriptor, 2 commit, 3 superblock v1, 4 superblock v2, 5 revoke
//	8  u32  sequence: the transaction's ID
//
// A transaction is a run of descriptor blocks, each followed by the blocks its
// tags name, of revoke blocks in any place, and one commit block. The log is a
// ring of the blocks [First, Last); block 0 is the journal's superblock.
//
// Checksums come in three kinds, which exclude each other: v1 (compat feature
// bit 0) is one CRC-32 in the commit block over descriptors and data; v2 and
// v3 (incompat bits 3 and 4) are a CRC-32C, without the final inversion and
// seeded by the journal's UUID, in each descriptor, revoke and commit block and in
// each tag. v3 differs from v2 in the tag's layout only.
package jbd2
