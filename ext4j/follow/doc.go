// Package follow knows, from the stream of writes to a disk alone, what its
// ext4 file systems and their journals have committed, and which writes can show
// nothing after a recovery. What it says is used to answer a FLUSH without
// waiting for the other site, and to name epochs by the transactions in them.
//
// It is pure: no I/O, no clock, no goroutine. Records come in the order of their
// LSNs (Observe); what it has to know of the disk besides, it asks for (Wants), and
// is told at an exact place in that order (Loaded).
//
// # What is decided
//
// Let A be the newest record durable at the replica, L the newest one numbered when
// a FLUSH arrived, and R the disk's records in (A, L]. The FLUSH may be
// answered after the local fdatasync alone if every record of R, judged under the
// view at its own LSN while the file system was LIVE, is one of
//
//  1. a write into the log's free part, from head to tail round the ring, after which parsing
//     from the tail ends at the same commit; or one of the journal's superblock that changes
//     only tail, sequence, head and checksum, where every copy that the new
//     tail drops was seen to be written home (logwrite.go);
//  2. a write or zeroing of whole blocks that are all free in the view (groups.go);
//  3. byte-equal, by SHA-256, to the newest committed copy that the log holds of the block, not
//     revoked, with no different write to the block since (part.go);
//  4. a write that touches a block only at or behind the end of a committed regular file, which
//     maps it by a written extent, or leaves the bytes before it as they were (tails.go).
//
// Newest is the newest record that is none of these; so a FLUSH waits for A ≥ Newest,
// which is the same, and no later than A ≥ L. A FLUSH counts all of R, not what
// came since the FLUSH before it: that one may still be unanswered.
//
// The view are group descriptors and block bitmaps as of the last transaction that was
// parsed as a whole, all its checksums right: its copies where the log has them,
// the blocks in their places elsewhere. A transaction counts when its commit block is
// seen, answered or not: an unanswered commit is in R, and is none of 1 to 4.
//
// LIVE (part.live): needs_recovery is set, no error is recorded, the log is not empty,
// metadata and journal have checksums, neither journal_async_commit nor
// fast_commit is on, no bigalloc; all of the log from its head on that parsing met is known; and
// at least one commit was seen, without a gap, since the latest of: attach, new client, new
// session, empty log, a write to superblock, group descriptors, bitmaps or the way to the journal
// (its inode, its map) that is not rule 3's. Where LIVE ends, everything before has to be waited for (mustWait).
//
// # Why that is right
//
// Claim: for every prefix R' of R, recover(A ∪ R') shows the same names and reachable
// bytes as recover(A). So whatever justified a return to a program was in A already, and a
// disaster at any epoch takes nothing from it. By induction over the records r of R, in the order
// of their LSNs; S is the disk before r, all records of R before r being harmless. As no
// record of R completes a commit, the log of S ends at the same transaction T as that of A, and the
// view at r is that of A: the same committed bitmaps, inodes and copies.
//
//   - Rule 1, log: recovery reads the log from tail to the commit of T, and one block further. None of
//     these changes but that last one, and parse shows that the log still ends there: a block of the
//     log counts as known only if it was written or read since it could matter (log.known), so an old
//     block cannot complete a transaction unseen. A write between tail and head is no free part (log.holds).
//   - Rule 1, tail: recovery from the new tail replays less. What it leaves out was seen to be home,
//     unchanged since (committed.home), or is replayed in a newer copy, or is revoked by the same transactions as before.
//     tailMoved refuses a tail at which no transaction known begins.
//   - Rule 2: a free block is in no file, directory or map that recovery shows, since these are in the
//     bitmap (a bitmap whose checksum is wrong, or that was never written, frees nothing). It may have a
//     copy in the log: then recovery overwrites r, in both cases with the same. The journal, superblocks,
//     descriptors, bitmaps and inode tables are not free.
//   - Rule 3: recovery writes that copy, so S and S ∪ r give the same, and without the log's help too once
//     the tail has passed it.
//   - Rule 4: the inode is committed, its size does not change without a commit, and bytes behind the size are
//     shown by nothing; the kernel clears them when the file grows. A committed copy of the block in the log, if
//     any (data=journal), overwrites r in both cases.
//   - A record that covers several blocks is harmless if each block is; its pieces are looked at in their order.
//
// Nothing is assumed of the guest but that it writes what it wants to be found after a
// crash, and that it does not rely on raw writes under a mounted file system. A guest
// that writes nonsense loses no more than its own promise.
//
// # Bounds
//
// For each file system: 16 MiB of block contents (Options.CacheBytes), 64 MiB of the transaction that is
// being written (Options.PendBytes; a larger one ends LIVE), a table of copies with one
// entry of about 100 bytes for each block of the journal, at most 2^18 blocks; group descriptors and bitmaps' places, at
// most 2^16 groups; 2^16 ends of files. Larger file systems are served as well, and
// not followed. Work for a record is bounded by its blocks, and by the length of the
// open transaction where a guest rewrites parts of it that were parsed.
//
// # Files
//
// follower.go: the disk, the records. part.go: one file system, its phases, LIVE, rules 3 and 4. log.go, logwrite.go:
// the journal, rule 1. groups.go: the view, rule 2. tails.go: where files end. pages.go, wants.go, cache.go: what is
// read of the image. mutant.go: the rules broken one by one, for tests/ext4cap, which
// holds all of this against the kernel's streams.
package follow
