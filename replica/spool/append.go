package spool

import (
	"fmt"

	"kagami/ext4j/epoch"
)

// Append writes the next record to the page cache; Commit makes it durable.
// rec.Payload is the raw payload, stored the payload under codec. The LSN
// must follow the last one; only the first append to an empty spool may have
// any LSN above applied. Lineage and session may change only between epochs.
//
// Errors: ErrFull, ErrNotReady and ErrOrder (wrapped) and those of an impossible record
// leave the spool as it was; any other is final.
func (sp *Spool) Append(rec *epoch.Record, codec uint8, stored []byte) error {
	sp.appendMu.Lock()
	defer sp.appendMu.Unlock()
	if err := sp.checkRecord(rec, codec, stored); err != nil {
		return fmt.Errorf("append record %d to spool: %w", rec.LSN, err)
	}
	g, err := sp.place(rec, int64(epoch.StoredSize(len(stored))))
	if err != nil {
		return fmt.Errorf("append record %d to spool: %w", rec.LSN, err)
	}
	sp.buf = rec.AppendStored(sp.buf[:0], codec, stored, g.head.seed())
	if _, err := g.slot.file.WriteAt(sp.buf, g.end); err != nil {
		return sp.fail(fmt.Errorf("write spool segment: %w", err))
	}
	sp.account(g, rec, int64(len(sp.buf)))
	return nil
}

// checkRecord refuses what recovery would not read back.
func (sp *Spool) checkRecord(rec *epoch.Record, codec uint8, stored []byte) error {
	if err := rec.Verify(); err != nil {
		return err
	}
	if rec.Type == epoch.TypeClose {
		if _, err := epoch.DecodeClose(rec.Payload); err != nil {
			return err
		}
	}
	if codec == epoch.CodecRaw && len(stored) != len(rec.Payload) ||
		codec != epoch.CodecRaw && sp.o.Inflate == nil || len(stored) > epoch.MaxPayload {
		return fmt.Errorf("%w: %d bytes stored under codec %d for %d", epoch.ErrCorrupt, len(stored), codec, len(rec.Payload))
	}
	return nil
}

// place returns the segment that takes the record, beginning one if needed.
func (sp *Spool) place(rec *epoch.Record, size int64) (*segment, error) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if err := sp.usable(); err != nil {
		return nil, err
	}
	if err := sp.checkOrder(rec); err != nil {
		return nil, err
	}
	if g := sp.cur; g != nil && g.end+size <= g.slot.size && g.head.Lineage == rec.Lineage && g.head.Session == rec.Session {
		return g, nil
	}
	if headerBytes+size > sp.o.SegmentBytes {
		return nil, fmt.Errorf("%w: record of %d bytes does not fit into a segment of %d", epoch.ErrCorrupt, size, sp.o.SegmentBytes)
	}
	return sp.begin(rec)
}

func (sp *Spool) checkOrder(rec *epoch.Record) error {
	prev := sp.prevLSN()
	switch partial := sp.appended != sp.closed; {
	case sp.fresh && rec.LSN > sp.base:
		return nil
	case rec.LSN != prev+1:
		return fmt.Errorf("%w: want %d", ErrOrder, prev+1)
	case partial && (rec.Lineage != sp.appended.Lineage || rec.Session != sp.appended.Session):
		return fmt.Errorf("%w: session %d begins inside an epoch of session %d", ErrOrder, rec.Session, sp.appended.Session)
	}
	return nil
}

// prevLSN is the LSN the next record follows.
func (sp *Spool) prevLSN() epoch.LSN { return max(sp.base, sp.appended.LSN) }

// begin starts a new segment with rec as its first record. Called with mu held;
// it gives mu up while it writes.
func (sp *Spool) begin(rec *epoch.Record) (*segment, error) {
	s, err := sp.takeSlot()
	if err != nil {
		return nil, err
	}
	sp.number++
	g := &segment{slot: s, end: headerBytes, last: sp.prevLSN(), dirty: true, head: header{
		Number: sp.number, Group: sp.o.Group, Replica: sp.o.Replica, Lineage: rec.Lineage, Session: rec.Session,
		Incarnation: sp.o.incarnation(), First: rec.LSN, Bytes: s.size,
		Durable: max(sp.durable.LSN, sp.base), Prev: sp.prevLSN()}}
	s.stale, s.number = true, sp.number
	// The header becomes durable with the first record, by the Commit that covers it.
	sp.cur = g
	sp.live = append(sp.live, g)
	sp.mu.Unlock()
	err = s.writeHeader(&g.head)
	sp.mu.Lock()
	if err != nil {
		return nil, sp.failLocked(err)
	}
	return g, nil
}

// account makes a written record part of the log.
func (sp *Spool) account(g *segment, rec *epoch.Record, size int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	g.end += size
	g.last, g.dirty = rec.LSN, true
	sp.fresh = false
	sp.appended = epoch.Pos{Lineage: rec.Lineage, Session: rec.Session, LSN: rec.LSN}
	if rec.Type == epoch.TypeClose {
		sp.closed = sp.appended
	}
}

// Commit makes durable what was appended before it began and returns the last
// durable Close. Appends go on meanwhile.
//
// Durability: segments are fdatasynced older first, each before the next, so
// that a durable segment never follows one that is not.
func (sp *Spool) Commit() (epoch.Pos, error) {
	sp.commitMu.Lock()
	defer sp.commitMu.Unlock()
	sp.mu.Lock()
	if err := sp.usable(); err != nil {
		defer sp.mu.Unlock()
		return sp.durable, err
	}
	target := sp.closed
	var dirty []*slot
	for _, g := range sp.live {
		if g.dirty {
			g.dirty = false
			dirty = append(dirty, g.slot)
		}
	}
	sp.mu.Unlock()
	for _, s := range dirty {
		if err := s.sync(); err != nil {
			return sp.Durable(), sp.fail(err)
		}
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.durable = target
	return target, sp.err
}

// DropPartial forgets the records after the last appended Close record; the
// next record begins a new segment, whose header makes the old ones void.
func (sp *Spool) DropPartial() error {
	sp.appendMu.Lock()
	defer sp.appendMu.Unlock()
	sp.mu.Lock()
	defer sp.mu.Unlock()
	if err := sp.usable(); err != nil {
		return err
	}
	if sp.appended == sp.closed {
		return nil
	}
	sp.appended, sp.cur = sp.closed, nil
	sp.fresh = sp.closed.LSN <= sp.base
	keep := max(sp.base, sp.closed.LSN)
	for n := len(sp.live); n > 0 && sp.live[n-1].head.Prev >= keep; n-- {
		sp.giveBack(sp.live[n-1])
		sp.live = sp.live[:n-1]
	}
	if n := len(sp.live); n > 0 {
		sp.live[n-1].last = keep
	}
	sp.tidy()
	return nil
}
