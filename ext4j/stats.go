package ext4j

import (
	"time"

	"kagami/ext4j/epoch"
)

// Stats is a snapshot of a group's counters and state. Bytes are bytes.
type Stats struct {
	Records, Epochs  uint64
	Writes, Zeros    uint64
	WrittenBytes     uint64 // payload of guest writes
	ZeroedBytes      uint64 // of zeros and trims
	ResyncBytes      uint64 // payload shipped by first sync and resync
	ResyncRecords    uint64 // in so many records
	Flushes, Stalls  uint64
	LocalFlushes     uint64 // of Flushes, those that promised nothing the replica did not have
	QueueBytes       int64
	QueueRecords     int
	UnackedFlushes   int
	Next, Ack, Close epoch.LSN // next LSN to give; acknowledged; last Close record
	Session          uint64
	Lag              time.Duration // RPO: age of the oldest record that is not acknowledged; 0: there is none
	Waiting          int           // requests and scans that wait for room in the queue
	Apart            bool          // see GoApart
	Alone            bool          // FLUSHes are answered by this site alone
	Overflow         bool          // see Group.Overflow: the replica gets all of it later, in order
	BacklogBytes     int64         // records that are not in the queue, on disk or on their way there
	BacklogFull      bool          // there is no room for more of them
	Bounded          bool          // async: the replica lacks as much as it may, and clients wait
	Ready            bool          // the gate is open
	Resyncing        bool
}

func (s *Stats) count(r *epoch.Record) {
	s.Records++
	switch {
	case r.Flags&epoch.FlagResync != 0:
		s.ResyncRecords++
		s.ResyncBytes += uint64(len(r.Payload))
	case r.Type == epoch.TypeWrite:
		s.Writes++
		s.WrittenBytes += uint64(len(r.Payload))
	case r.Type == epoch.TypeZero || r.Type == epoch.TypeTrim:
		s.Zeros++
		s.ZeroedBytes += r.Length
	}
}

// ClientsWait tells whether a resync is under way that clients' FLUSHes wait for.
func (g *Group) ClientsWait() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.hold && !g.alone
}

// Stats returns a snapshot.
func (g *Group) Stats() Stats {
	g.mu.Lock()
	defer g.mu.Unlock()
	s := g.stats
	s.QueueBytes, s.QueueRecords, s.UnackedFlushes = g.q.bytes, len(g.q.recs), g.flushes
	if o := g.over; o != nil {
		s.Overflow, s.BacklogBytes, s.BacklogFull = true, o.stored+o.bytes, o.full
	}
	s.Next, s.Ack, s.Close, s.Session = g.nextLocked(), g.acked, g.closed, g.session
	s.Ready, s.Resyncing = g.gate == gateOpen && g.err == nil, g.hold
	s.Waiting, s.Apart, s.Alone = g.waiting, g.apart, g.alone
	if !g.detached && (s.Next > s.Ack+1 || !g.behind.IsZero()) {
		s.Lag = g.lagLocked()
		s.Bounded = g.bounded > 0
	}
	return s
}
