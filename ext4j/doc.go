// Package ext4j is the journaling layer on the source host: it orders guest
// writes, gives each an LSN, forms epochs, keeps the record of what may differ
// between the sites, and holds records until the replica has acknowledged them.
//
// A Group is the ordered stream of one VM's disks; a Disk is one of them and
// serves as the device behind an NBD export. Nothing here knows connections:
// package ship takes records out of the Group (Take) and brings
// acknowledgements back (Acked).
//
// Invariants:
//
//   - LSNs are dense: acked < every queued LSN < next, none is missing.
//   - A record enters the queue after its pwrite returned and before the
//     guest's request is answered, both under the disk's range lock, so that
//     overlapping writes are applied and shipped in one order.
//   - A region is durable in the record of changes before its first pwrite.
//   - A FLUSH is answered only after (a) an fdatasync of the disk that began
//     after the FLUSH arrived and (b) the acknowledgement of a Close record
//     whose LSN is higher than that of every write answered before it; or, in
//     place of (b), of every one of these writes of which package follow cannot
//     show that it promises nothing. Which of the two it was, Stats counts.
//   - (session, LSN) never names two contents.
//
// Lock order: a pin in the record of changes, then rangeLock, then eyes.mu, then
// Group.mu. eyes.mu is held while a record gets its LSN and the follower sees it, so
// that it sees the disk's records in that order.
// Nobody waits for a pin while holding a range: in a resync regions leave a full
// record only at the resync's end, and the scan needs the ranges to get there.
// Group.mu is never held during I/O.
package ext4j
