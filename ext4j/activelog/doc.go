// Package activelog is the source's durable list of regions that may differ
// between the sites after a crash.
//
// A region enters the list, durably, before the first pwrite or send that
// touches it (Acquire), and may leave it when every record that touched it was
// acknowledged by the replica (Acked) and an fdatasync of its disk that began
// after its last pwrite had returned (Release, SyncBegin) returned without
// error (SyncEnd). After a restart the recovered list names everything the two
// sites must compare.
//
// # Use
//
// After each attach: Follow. Around each write: Acquire, pwrite, assign the LSN, Release. Around each
// fdatasync of an image: SyncBegin, fdatasync, and SyncEnd if it succeeded. When
// NeedsRoom receives, acquirers wait because the list is full: close the open
// epoch, so that acknowledgements come, and fdatasync every disk.
//
// # File
//
// The file has two halves, each a row of blocks of 4096 bytes; block.go has the
// layout. One half is current. It begins with a snapshot of the whole set;
// changes are appended in batches, one fdatasync each. A batch that does not fit
// is written as the other half's snapshot, with the next generation, and that
// half is then the current one.
//
// The two halves are never both invalid: a half is only overwritten while the
// other one, the current, is durable as a whole. Its snapshot was fdatasynced
// before any batch was appended to it or any Acquire that needed it returned,
// and appending does not touch it. So after a crash either the new snapshot is
// complete, or the old half is as it was.
//
// Recovery takes the half of the highest generation whose snapshot is complete
// and replays its batches up to the first invalid block. It makes durable what
// it read, because the last process may have been killed before its fdatasync, or
// have seen it fail, and begins a new generation in the other half, above
// every generation seen: so no block that was left behind can follow a new one.
// Damage that no crash can cause (a valid block of a later batch behind an
// invalid one) is ErrCorrupt. Rot in a snapshot to which nothing was appended yet
// cannot be told from a torn one.
//
// # Goroutines and locks
//
// One goroutine of the log's own writes batches; Close waits for it. Lock order:
// ioMu (held for a whole batch), then mu (never held during I/O). Waiting
// acquirers are served first come, first served, and take all their regions at
// once or none, so that they cannot wait for each other. While the first of them
// waits for room, no other Acquire succeeds, even if its regions are in the list:
// else a busy guest could keep every region in use for ever.
package activelog
