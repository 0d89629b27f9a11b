// Package ship carries records to a peer: records → frames → connections.
//
// A Link belongs to a peer, not to a group. It dials a control connection and
// N data connections, keeps them up, and shares them between all groups whose
// records go to that peer. Each time the control connection comes up there is
// a new Session; groups attach to it, and it ends with its control connection.
// A data connection that dies is dialled again within the session, and the
// frames it carried are handed out once more.
//
// The path of a record: Source.Take (scheduler.go: whose turn, how much is in
// flight) → encode.go (compression, frame) → sender.go (socket). Back:
// session.go reads acks and calls Source.Acked.
//
// Invariants: bytes in flight (sent, not yet received by the replica's spool)
// stay below Options.InflightBytes plus one frame. Beyond that only what was
// lost is sent again, because all the rest may be waiting for it; and a group
// whose spool is full does not count, and sends nothing more. A group never waits
// behind another's bulk data, because frames are small and groups take turns.
// Every goroutine of a session has ended when its Done channel is closed.
//
// Lock order: Session.mu may be held when a Source's lock is taken, never the
// other way round: Source.SetWake's function only signals.
package ship
