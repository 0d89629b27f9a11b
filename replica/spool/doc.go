// Package spool is the replica's journal on disk: records in segment files,
// made durable by one fdatasync for all epochs that wait. README.md in this
// folder is the specification of the format and of recovery.
//
// Invariants:
//
//   - The log is dense in LSN. A segment's header says which LSN precedes its
//     first record; a segment begun later overrides everything older above that LSN.
//   - A segment is reused only after all its records were applied (Trim), were
//     never part of a whole epoch (DropPartial), or were discarded (Reset).
//   - A segment never takes records after recovery or after DropPartial; the
//     next record begins a new one. So nothing stale can follow a new record.
//   - An older segment is fdatasynced before a newer one, and Durable moves
//     only after all of them were.
//   - An error of fdatasync, fsync or a write is final: the spool has failed.
//
// Goroutines: one appender (Append, DropPartial), one committer (Commit), any
// number of readers (a Reader belongs to one goroutine), Trim from anywhere,
// and one goroutine of the spool's own that prepares and removes segments;
// Close waits for it.
//
// Lock order: appendMu, commitMu, mu. No I/O is done under mu.
package spool
