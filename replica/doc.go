// Package replica is the receiving side of a group: it puts records back into
// LSN order, spools them, acknowledges whole epochs once they are durable, and
// applies them to the images later.
//
// The path of a record, file by file: server.go and link.go (connections,
// frames, requests) → receive.go (order, spool) → commit.go (fdatasync, ack) →
// apply.go (redo onto the images). seal.go ends the stream for a failover.
//
// Invariants:
//
//   - applied ≤ durable ≤ received; durable and applied are Close records.
//   - An epoch is acknowledged only after its segments are durable.
//   - The images hold exactly the epochs up to applied, or, while an apply is
//     under way or was broken off, something that redo from applied+1 turns
//     into a whole epoch. The spool keeps what redo needs until the images and
//     the mark are durable.
//   - An epoch is applied only after all of it was read back, verified, and
//     space for it was reserved.
//   - Memory: records that wait for a gap to close are bounded by the window
//     that the source announced, itself bounded by Limits.WindowBytes.
//
// Lock order: Group.applying (held across an apply), switching (across an
// attach), committing (across an fsync of the spool), mu. Group.mu is held
// across spool appends (page cache) but never across an fsync.
package replica
