// Package fault is a file system in memory that can lose its power.
//
// FS implements images.FS exactly as images documents it, and keeps for every
// file two contents: what the next read sees, and what a power loss leaves for
// certain. In between lies the list of changes not yet made durable.
//
//   - Crash is a power loss. Each file keeps its durable content plus a part of
//     its pending changes chosen at random, torn at 512-byte boundaries; each
//     folder keeps its durable names plus a prefix of the pending creates,
//     renames and removes. It returns the machine after the restart.
//   - Kill is the death of the process: the page cache survives, so what was
//     read before is read again, but it is no more durable than it was.
//   - StopAfter makes the n-th step from now, and everything later, fail with
//     ErrStopped, so that a test can crash or kill at any step.
//   - Inject makes chosen operations fail: an fsync with EIO (after which the
//     pending changes of the file are dropped at random, although reads may go
//     on showing them), a short write, anything.
//   - SetCapacity bounds the space; FlipBit is bit rot.
//
// A step is an operation that changes or syncs something; reads are no steps.
// All random choices come from the seed, so a run in one goroutine repeats
// exactly. FS and File are safe for concurrent use. One mutex (disk.mu) guards
// everything and is never held while a hook runs.
package fault
