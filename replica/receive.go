package replica

import (
	"errors"
	"fmt"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/spool"
	"kagami/replica/wire"
)

// Channel ties a group's stream to one link. Records that come over another
// channel are of an earlier attach and are ignored.
type Channel struct {
	// Ack sends an acknowledgement to the source. It must not block.
	Ack func(flags uint32, session uint64, received, durable, applied epoch.LSN)
	// Drop ends the link so that the source attaches again.
	Drop func(reason error)
}

// Attach makes ch the group's channel after checking that the source m
// describes is the one to follow. The partial epoch, if any, is dropped: the
// source sends it again or, in a new session, ships what replaces it.
func (g *Group) Attach(m wire.Manifest, resync bool, ch *Channel) (wire.AttachResponse, error) {
	g.switching.Lock()
	defer g.switching.Unlock()
	if err := g.admit(m); err != nil {
		return wire.AttachResponse{}, err
	}
	if err := g.endStream(); err != nil {
		return wire.AttachResponse{}, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.err != nil {
		return wire.AttachResponse{}, g.err
	}
	resp := wire.AttachResponse{Replica: g.o.Replica, Pos: g.durable, Applied: g.applied.LSN, Complete: g.complete,
		Fresh: g.fresh, Damaged: g.damaged.Why, Torn: g.damaged.Torn, SpoolBytes: g.o.Limits.SpoolBytes}
	resp.Pos.Lineage = g.lineage
	g.channel, g.window = ch, m.Window
	g.recovery = "" // what was not acknowledged is sent again; what was, and is lost, is in Damaged
	_ = resync      // this release treats both alike: the source decides when the epoch ends
	return resp, nil
}

// Detach ends the attachment over ch, if it is still the present one. What
// was received stays; the next attach sorts it out.
func (g *Group) Detach(ch *Channel) {
	g.mu.Lock()
	mine := g.channel == ch
	if mine {
		g.channel = nil
	}
	g.mu.Unlock()
	if mine && g.o.Left != nil {
		g.o.Left()
	}
}

// LetGo ends the present attachment and leaves its link alone: its source has said
// that it stops.
func (g *Group) LetGo() {
	g.mu.Lock()
	ch := g.channel
	g.mu.Unlock()
	if ch != nil {
		g.Detach(ch)
	}
}

// admit checks lineage, session and window, and makes a new session durable.
func (g *Group) admit(m wire.Manifest) error {
	g.mu.Lock()
	lineage, session, sealed, closing, err := g.lineage, g.session, g.sealed, g.closing, g.err
	refused := g.refused
	empty := g.durable.LSN == 0
	g.mu.Unlock()
	switch {
	case err != nil:
		return err
	case closing:
		return wire.Errorf(wire.CodeBusy, "group %s is being closed", m.Name)
	case sealed:
		return wire.Errorf(wire.CodeFenced, "%v", ErrFenced)
	case m.ID != g.o.ID:
		return wire.Errorf(wire.CodeConflict, "group %s has id %s here, %s at the source", m.Name, g.o.ID, m.ID)
	case m.Window <= 0 || m.Window > g.o.Limits.WindowBytes:
		return wire.Errorf(wire.CodeConflict, "the source wants a window of %d bytes, this site allows %d: lower queue_bytes there or raise it here", m.Window, g.o.Limits.WindowBytes)
	case lineage != m.Lineage && !(lineage.IsZero() && empty):
		return wire.Errorf(wire.CodeConflict, "this replica follows lineage %s, the source is of lineage %s", lineage, m.Lineage)
	case m.Session < session:
		return &wire.Error{Code: wire.CodeStale, Session: session,
			Message: fmt.Sprintf("session %d is over: this replica has seen session %d", m.Session, session)}
	case m.Session == session && lineage == m.Lineage:
		return refused
	}
	if err := g.o.Persist(m.Lineage, m.Session); images.NoSpace(err) {
		// Nothing of the session was taken: the source tries again.
		return wire.Errorf(wire.CodeNoSpace, "no space at the replica's site: make session %d durable: %v", m.Session, err)
	} else if err != nil {
		return g.fail(fmt.Errorf("make session %d durable: %w", m.Session, err))
	}
	g.mu.Lock()
	g.lineage, g.session, g.refused = m.Lineage, m.Session, nil
	g.mu.Unlock()
	return nil
}

// Refuse ends the stream over ch, which brought a record that this release does
// not support: no acknowledgement may ever cover it. The present session is
// refused from now on; a new one may do without such records.
func (g *Group) Refuse(ch *Channel, session uint64, why error) {
	g.mu.Lock()
	mine := g.channel == ch && session == g.session
	if mine {
		g.refused = wire.Errorf(wire.CodeVersion, "the replica cannot go on: %v: upgrade its site", why)
		g.ackLocked()
		g.channel = nil
	}
	g.mu.Unlock()
	if !mine {
		return
	}
	g.o.Event(fmt.Sprintf("the source sends what this site cannot take: %v", why))
	if g.o.Left != nil {
		g.o.Left()
	}
}

// endStream cuts off the present channel, makes every whole epoch durable and
// drops what lies behind the last one. The caller holds switching.
func (g *Group) endStream() error {
	g.mu.Lock()
	g.channel = nil
	clear(g.pending)
	g.waiting, g.full, g.unready = 0, false, false
	g.mu.Unlock()
	g.committing.Lock()
	defer g.committing.Unlock()
	if err := g.commitHeld(); err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.expect == g.durable.LSN+1 {
		return nil
	}
	if err := g.spool.DropPartial(); err != nil {
		return fmt.Errorf("drop partial epoch: %w", err)
	}
	g.expect, g.syncDone, g.closes = g.durable.LSN+1, 0, nil
	return nil
}

// Receive takes a run of consecutive records that came over ch. The group
// keeps their payloads. An error is a violation by the peer or the group's
// end; the caller drops the link.
func (g *Group) Receive(ch *Channel, session uint64, recs []epoch.Record) error {
	g.mu.Lock()
	if g.channel != ch || session != g.session {
		g.mu.Unlock()
		return nil
	}
	err := g.arrange(recs)
	g.mu.Unlock()
	if err != nil && !errors.Is(err, wire.ErrProtocol) {
		return g.fail(err)
	}
	return err
}

// arrange puts records in their place: old ones away, early ones aside, due
// ones into the spool, and after them whatever had waited for them.
func (g *Group) arrange(recs []epoch.Record) error {
	for len(recs) > 0 && recs[0].LSN < g.expect {
		recs = recs[1:]
		g.counters.Duplicates++
	}
	if len(recs) == 0 {
		g.ackLocked() // the source counts them as in flight until it hears of them
		return nil
	}
	if recs[0].LSN > g.expect || g.full || g.unready {
		return g.setAside(recs)
	}
	if err := g.store(recs); err != nil {
		return err
	}
	return g.storePending()
}

// setAside keeps records that cannot be spooled yet.
func (g *Group) setAside(recs []epoch.Record) error {
	first := recs[0].LSN
	if old, ok := g.pending[first]; ok && len(old) >= len(recs) {
		return nil
	} else if ok {
		g.waiting -= sizeOf(old)
	}
	g.pending[first] = recs
	if g.waiting += sizeOf(recs); g.waiting > 2*g.window+wire.MaxRawFrame {
		return fmt.Errorf("%w: %d bytes wait for record %d, the window is %d", wire.ErrProtocol, g.waiting, g.expect, g.window)
	}
	return nil
}

func sizeOf(recs []epoch.Record) (n int64) {
	for i := range recs {
		n += int64(len(recs[i].Payload)) + epoch.HeaderSize
	}
	return n
}

// storePending spools what has become due. After a connection was replaced,
// runs may overlap: any run that begins at or before expect is looked at.
func (g *Group) storePending() error {
	for !g.full && !g.unready {
		recs, ok := g.pending[g.expect]
		first := g.expect
		if !ok {
			if first, ok = g.overlapping(); !ok {
				return nil
			}
			recs = g.pending[first]
		}
		delete(g.pending, first)
		g.waiting -= sizeOf(recs)
		for len(recs) > 0 && recs[0].LSN < g.expect {
			recs = recs[1:]
		}
		if err := g.store(recs); err != nil {
			return err
		}
	}
	return nil
}

func (g *Group) overlapping() (epoch.LSN, bool) {
	for first := range g.pending {
		if first <= g.expect {
			return first, true
		}
	}
	return 0, false
}

// ackEvery is how many bytes may be spooled before the source hears of it
// even though no epoch ended; less when the source's window is small. In a
// resync, whose epoch does not end, the source may go on only when it hears.
const ackEvery = 256 << 10

// store appends due records to the spool. When it is full, or its next segment
// is not ready, the rest waits: not here, for the connection carries other
// groups' records too.
func (g *Group) store(recs []epoch.Record) error {
	for i := range recs {
		r := &recs[i]
		if err := g.plausible(r); err != nil {
			return err
		}
		err := g.spool.Append(r, epoch.CodecRaw, r.Payload)
		if errors.Is(err, spool.ErrFull) {
			g.full, g.short = true, ""
			if images.NoSpace(err) {
				g.short = err.Error()
			}
			g.ackLocked()
			g.nudge()
			return g.setAside(recs[i:])
		}
		if errors.Is(err, spool.ErrNotReady) {
			g.unready = true
			g.ackLocked()
			return g.setAside(recs[i:])
		}
		if err != nil {
			return fmt.Errorf("spool record %d: %w", r.LSN, err)
		}
		g.stored(r)
	}
	return nil
}

// plausible checks a record against the group: its lineage, disk and extent.
func (g *Group) plausible(r *epoch.Record) error {
	if r.Lineage != g.lineage {
		return fmt.Errorf("%w: record %d is of lineage %s, not %s", wire.ErrProtocol, r.LSN, r.Lineage, g.lineage)
	}
	if r.Type == epoch.TypeClose {
		if _, err := epoch.DecodeClose(r.Payload); err != nil {
			return fmt.Errorf("%w: record %d: %w", wire.ErrProtocol, r.LSN, err)
		}
	}
	if !r.Changes() {
		return nil
	}
	img, ok := g.o.Images[r.Disk]
	if !ok {
		return fmt.Errorf("%w: record %d is for disk %d, which the group does not have", wire.ErrProtocol, r.LSN, r.Disk)
	}
	if r.End() > uint64(img.Size()) {
		return fmt.Errorf("%w: record %d ends at byte %d of disk %d, which has %d", wire.ErrProtocol, r.LSN, r.End(), r.Disk, img.Size())
	}
	return nil
}

func (g *Group) stored(r *epoch.Record) {
	g.expect = r.LSN + 1
	g.fresh = false
	g.counters.Records++
	g.counters.Bytes += uint64(len(r.Payload))
	g.unacked += int64(len(r.Payload)) + epoch.HeaderSize
	switch r.Type {
	case epoch.TypeSyncDone:
		g.syncDone = r.LSN
	case epoch.TypeClose:
		info, _ := epoch.DecodeClose(r.Payload) // plausible has looked at it
		g.closes = append(g.closes, closeMark{r.LSN, info.TimeNs})
		g.counters.Epochs++
		g.commitAt = r.LSN
		g.cond.Broadcast()
	}
	if g.unacked >= min(ackEvery, g.window/4) {
		g.ackLocked()
	}
}

// ackLocked tells the source where the group stands.
func (g *Group) ackLocked() {
	g.unacked = 0
	if g.channel == nil {
		return
	}
	var flags uint32
	if g.full {
		flags |= wire.AckSpoolFull
	}
	if g.unready {
		flags |= wire.AckSpoolWaits
	}
	if g.refused != nil {
		flags |= wire.AckRefused
	}
	g.channel.Ack(flags, g.session, g.expect-1, g.durable.LSN, g.applied.LSN)
}
