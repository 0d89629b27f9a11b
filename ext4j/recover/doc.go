// Package recover replays the journal of an ext3 or ext4 file system in place,
// without mounting it, and leaves the file system as the kernel would.
//
// # Order of writes
//
// Everything is read, checked and decided before the first write; an error
// that wraps ErrRefused means that nothing was written. Then:
//
//  1. The newest valid, unrevoked copy of every journaled block is written to its
//     place, but for the 1024 bytes of the superblock. Datasync.
//  2. The superblock as of the journal's last copy of it (or as it is), still with
//     needs_recovery, is written in two steps: bytes 512 to 1023 (the checksum is there);
//     Datasync; bytes 0 to 511; Datasync. Left out if nothing changes.
//  3. The journal's superblock is marked empty: one write of 512 bytes. Datasync.
//  4. The superblock without needs_recovery and with the sums of the group
//     descriptors as its free counts, in two steps as in 2.
//
// # Crashes
//
// A crash may tear any write since the last Datasync at 512-byte boundaries
// and lose any part of it. Running again from any such state ends in the
// same bytes:
//
//   - During 1, needs_recovery is set and the journal untouched, because no
//     journaled block may lie in it. What leads to the journal (superblock, the
//     journal's inode and block map) is the same before and after the replay, which
//     is checked beforehand, so that no mixture of old and new sectors leads
//     elsewhere. The replay is repeated and gives the same content.
//   - During 2, the superblock on disk is the old one, the new one, or the old
//     first half with the new second half, as the second half is durable
//     before the first one is written. The checksum of that mixture is wrong,
//     but it is the checksum of the superblock this package is about to write: the mixture
//     is recognised by computing that one again (the fields it depends on lie in
//     the first half) and finding all of the second half, its checksum included, on disk.
//     Any other wrong checksum is refused.
//   - During 3, one sector changes: it is old or new. Old: all of the above
//     is repeated. New: step 1 is durable, so the journal is not needed any more.
//   - During 4, as in 2. The counts do not depend on the superblock's own.
//
// # What is the kernel's, what is e2fsck's
//
// Where a journal is intact, the result is what the kernel leaves: replayed
// blocks, s_start 0, s_sequence two past the last commit, s_head behind it, errno moved
// into the superblock's error state, the superblock's record of errors (written outside
// the journal) kept across the replay. Times (s_wtime and others) are not touched: there is no clock here.
//
// Where a journal is damaged the kernel refuses to mount and e2fsck -y repairs:
//
//   - Damaged commit block: what was committed before it is replayed, the rest is
//     dropped and the file system is marked with errors, as e2fsck does. (The kernel replays the
//     same and then refuses.)
//   - Damaged data block: it is skipped, all else is replayed, and the mark "valid" is
//     taken from the file system, as e2fsck does, so that the next fsck is a full one. The journal
//     is declared empty. (The kernel replays the same, refuses and keeps the journal.)
//   - Damaged descriptor or revoke block: refused. (So does the kernel;
//     e2fsck drops the whole journal.)
//
// Orphans (files deleted while open, interrupted truncates) are not handled: the kernel
// does that when it mounts. Until then e2fsck -fn reports them as it does after
// e2fsck's own replay. Report tells whether there are any.
package recover
