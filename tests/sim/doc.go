// Package sim runs both sites of a group in one process, in fake time: a guest
// that writes at random to two disks, the source (ext4j, active log, ship), a
// network in memory, and the replica (server, spool, apply), each site on a
// crashable file system (tests/fault). Everything that is random comes from a
// seed; processes are killed, power fails, the link is cut and connections die
// at any moment, and the oracle says whether the guarantees held:
//
//   - whatever a power loss at the replica leaves is, after Seal, the state of
//     the source's disks at one Close record, the same for all disks, and not
//     older than the last FLUSH that was answered;
//   - what an answered FLUSH covers survives a power loss of the source;
//   - once the faults end, both sites hold the same bytes;
//   - a (session, LSN) never names two contents, and LSNs follow the order in
//     which requests were answered.
//
// A run happens inside a testing/synctest bubble. The seed fixes what happens
// and when, but goroutines run in parallel: the same seed may take another
// interleaving, so a failure may need several attempts to show again
// (-seed=N -tries=M).
package sim
