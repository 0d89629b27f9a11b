package replica

import (
	"errors"
	"fmt"
	"io"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/spool"
)

// applyTick is how often the apply loop looks at the age of what is spooled,
// and tries again after a full disk, of the images or of the spool.
const applyTick = 500 * time.Millisecond

// applyLoop redoes durable epochs onto the images by size and age, and at once
// when the spool runs short.
func (g *Group) applyLoop() {
	defer g.wg.Done()
	tick := time.NewTicker(applyTick)
	defer tick.Stop()
	for {
		select {
		case <-g.kick:
		case <-tick.C:
			if g.retryFull() != nil {
				return // the group has ended
			}
		}
		g.mu.Lock()
		stop, due := g.closing || g.err != nil, g.dueLocked()
		g.mu.Unlock()
		if stop {
			return
		}
		if due {
			// A full disk is retried at the next tick; any other failure
			// has ended the group or dropped the link, and said so.
			_ = g.applyNow()
		}
	}
}

// dueLocked decides whether to apply now.
func (g *Group) dueLocked() bool {
	if g.durable.LSN <= g.applied.LSN || g.sealed {
		g.since = time.Time{}
		return false
	}
	if g.since.IsZero() {
		g.since = time.Now()
	}
	used, limit := g.spool.Usage()
	return g.full || used >= min(g.o.Limits.ApplyBytes, limit/2) || time.Since(g.since) >= g.o.Limits.ApplyAge
}

// applyNow applies everything durable at this moment.
func (g *Group) applyNow() error {
	g.applying.Lock()
	defer g.applying.Unlock()
	return g.applyAll()
}

// applyAll applies batch after batch until nothing durable is left. The caller
// holds applying.
func (g *Group) applyAll() error {
	for {
		g.mu.Lock()
		from, to, err := g.applied.LSN, g.durable.LSN, g.err
		g.mu.Unlock()
		if err != nil || to <= from {
			return err
		}
		err = g.applyBatch(from + 1)
		g.noteApply(err)
		if err != nil {
			return err
		}
	}
}

// noteApply declares why apply is stuck, or that it no longer is.
func (g *Group) noteApply(err error) {
	text := ""
	if images.NoSpace(err) {
		text = "no space for the image: " + err.Error()
	} else if err != nil {
		text = err.Error()
	}
	g.mu.Lock()
	was := g.stalled
	g.stalled = text
	g.mu.Unlock()
	if text != was {
		if text == "" {
			text = "goes on"
		}
		g.o.Event("apply: " + text)
	}
}

// batch is a run of whole epochs.
type batch struct {
	end     epoch.Pos // its last Close record
	closeNs int64
	sync    bool // holds a SyncDone record
}

// applyBatch is the redo of one batch. The order makes a crash at any point
// harmless: the whole batch is read, verified and its space reserved; its end
// is made durable as what is being applied, unless an earlier try, broken off,
// meant to come further and may have written more; the images are written; they
// are made durable; the mark is made durable; only then may the spool reuse the
// segments.
func (g *Group) applyBatch(from epoch.LSN) error {
	began := time.Now()
	b, err := g.prepare(from)
	if err != nil {
		return g.applyFailed(err)
	}
	if b.end.LSN > g.redoing.Load().Pos.LSN {
		if err := g.redoing.Store(spool.Applied{Pos: b.end}); err != nil {
			return g.fail(fmt.Errorf("store what is being applied: %w", err))
		}
	}
	if err := g.redo(from, b.end.LSN); err != nil {
		return g.applyFailed(err)
	}
	for slot, img := range g.o.Images {
		if err := img.Datasync(); err != nil {
			return g.fail(fmt.Errorf("fdatasync of the image of disk %d: %w", slot, err))
		}
	}
	g.mu.Lock()
	done := g.appliedC || b.sync
	g.mu.Unlock()
	if err := g.mark.Store(spool.Applied{Pos: b.end, CloseTimeNs: b.closeNs, SyncDone: done}); err != nil {
		return g.fail(fmt.Errorf("store applied position: %w", err))
	}
	if err := g.spool.Trim(b.end.LSN); err != nil {
		return g.fail(fmt.Errorf("trim spool: %w", err))
	}
	g.measured(int64(b.end.LSN-from)+1, time.Since(began))
	return g.published(b, done)
}

// measured takes a batch of n records into account for the estimate of Status.ToApply: as much
// as all that came before.
func (g *Group) measured(n int64, took time.Duration) {
	per := took / time.Duration(n)
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.perRecord > 0 {
		per = (per + g.perRecord) / 2
	}
	g.perRecord = per
}

// published publishes the new position and lets waiting records into the room
// that the spool has won.
func (g *Group) published(b batch, done bool) error {
	g.mu.Lock()
	g.applied, g.appliedC, g.since = b.end, done, time.Time{}
	g.counters.Applies++
	return g.resume(&g.full)
}

// applyFailed decides what a failure before the mark means. A full disk is
// waited for. A spool that lost durable records cannot be repaired here: the
// images stay at the last whole epoch, and the source, told the position it
// fell back to, compares. Anything else ends the group.
func (g *Group) applyFailed(err error) error {
	if images.NoSpace(err) {
		return err
	}
	if !errors.Is(err, spool.ErrCorrupt) {
		return g.fail(err)
	}
	g.mu.Lock()
	sealed, applied := g.sealed, g.applied.LSN
	g.mu.Unlock()
	if sealed {
		return err
	}
	d := damage{Why: fmt.Sprintf("the spool was damaged, epochs after record %d are lost: %v", applied, err)}
	if to := g.redoing.Load().Pos.LSN; to > applied {
		d = damage{Why: fmt.Sprintf("%s: %v", tornText(applied, to), err), Torn: true}
	}
	// What a redo has written that stopped half-way is durable before anybody compares it:
	// it would count as equal, and no redo brings it back any more.
	if err := g.settleImages(); err != nil {
		return g.fail(err)
	}
	ch, rerr := g.fallBack(d)
	if rerr != nil {
		return g.fail(rerr)
	}
	g.o.Event(fmt.Sprintf("spool damaged, back to the last applied epoch: %v", err))
	if ch != nil {
		ch.Drop(err)
	}
	return err
}

// fallBack gives up what is spooled, after recording why. It returns the
// channel that it cut off, whose link the caller drops. The caller holds applying.
func (g *Group) fallBack(d damage) (*Channel, error) {
	g.switching.Lock()
	defer g.switching.Unlock()
	g.committing.Lock()
	defer g.committing.Unlock()
	if err := g.storeDamage(d); err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	ch := g.channel
	g.channel = nil
	clear(g.pending)
	g.waiting, g.full, g.unready = 0, false, false
	if err := g.spool.Reset(g.applied.LSN); err != nil {
		return nil, fmt.Errorf("reset damaged spool: %w", err)
	}
	g.durable, g.complete, g.commitAt = g.applied, g.appliedC, 0
	g.closedNs = g.mark.Load().CloseTimeNs
	g.expect, g.syncDone, g.closes = g.applied.LSN+1, 0, nil
	return ch, nil
}

// prepare reads whole epochs from the spool up to ApplyBytes (one epoch at
// least), which verifies them, and reserves the space they need.
func (g *Group) prepare(from epoch.LSN) (batch, error) {
	var b batch
	var bytes int64
	syncSeen := false
	for r := g.spool.NewReader(from); ; {
		rec, err := r.Next()
		if errors.Is(err, io.EOF) {
			if b.end.LSN == 0 {
				return b, fmt.Errorf("%w: record %d was durable and is not there", spool.ErrCorrupt, from)
			}
			return b, nil
		}
		if err != nil {
			return b, fmt.Errorf("read spool: %w", err)
		}
		if err := g.reserveFor(&rec); err != nil {
			return b, err
		}
		bytes += int64(len(rec.Payload)) + epoch.HeaderSize
		switch rec.Type {
		case epoch.TypeSyncDone:
			syncSeen = true
		case epoch.TypeClose:
			info, err := epoch.DecodeClose(rec.Payload)
			if err != nil {
				return b, fmt.Errorf("%w: record %d: %w", spool.ErrCorrupt, rec.LSN, err)
			}
			b = batch{end: epoch.Pos{Lineage: rec.Lineage, Session: rec.Session, LSN: rec.LSN}, closeNs: info.TimeNs, sync: syncSeen}
			if bytes >= g.o.Limits.ApplyBytes {
				return b, nil
			}
		}
	}
}

// reserveFor checks that a record fits its image and reserves its space.
func (g *Group) reserveFor(r *epoch.Record) error {
	if !r.Changes() {
		return nil
	}
	img, ok := g.o.Images[r.Disk]
	if !ok || r.End() > uint64(img.Size()) {
		return fmt.Errorf("%w: record %d does not fit disk %d", spool.ErrCorrupt, r.LSN, r.Disk)
	}
	if r.Type == epoch.TypeTrim {
		return nil
	}
	if err := img.Allocate(int64(r.Offset), int64(r.Length)); err != nil {
		return fmt.Errorf("reserve %d bytes at %d of disk %d: %w", r.Length, r.Offset, r.Disk, err)
	}
	return nil
}

// redo writes records [from, to] to the images, in order. Trims keep what is
// allocated until the end, so that a later write of the batch cannot run out of it.
func (g *Group) redo(from, to epoch.LSN) error {
	trims := trimSet{}
	r := g.spool.NewReader(from)
	for lsn := from; lsn <= to; lsn++ {
		rec, err := r.Next()
		if err != nil {
			return fmt.Errorf("read spool: %w", err)
		}
		if rec.LSN != lsn {
			return fmt.Errorf("%w: found record %d, expected %d", spool.ErrCorrupt, rec.LSN, lsn)
		}
		if err := g.redoOne(&rec, trims); err != nil {
			return err
		}
	}
	for slot, ranges := range trims {
		for _, t := range ranges {
			if err := g.o.Images[slot].Trim(t.off, t.end-t.off); err != nil {
				return fmt.Errorf("trim %d bytes at %d of disk %d: %w", t.end-t.off, t.off, slot, err)
			}
		}
	}
	return nil
}

func (g *Group) redoOne(r *epoch.Record, trims trimSet) error {
	off, n := int64(r.Offset), int64(r.Length)
	img := g.o.Images[r.Disk]
	var err error
	switch r.Type {
	case epoch.TypeWrite:
		trims.remove(r.Disk, off, off+n)
		_, err = img.WriteAt(r.Payload, off)
	case epoch.TypeZero:
		trims.remove(r.Disk, off, off+n)
		err = img.WriteZeroes(off, n, true)
	case epoch.TypeTrim:
		trims.add(r.Disk, off, off+n)
		err = clearData(img, off, n)
	}
	if err != nil {
		return fmt.Errorf("apply %s of %d bytes at %d to disk %d: %w", r.Type, n, off, r.Disk, err)
	}
	return nil
}

// clearData makes a range read as zeros. What is allocated stays so and what is
// a hole stays one: it takes no space, and gives none of what was reserved away.
func clearData(img Image, off, n int64) error {
	for end := off + n; off < end; {
		start, stop, err := img.NextData(off)
		if errors.Is(err, io.EOF) || err == nil && start >= end {
			return nil
		}
		if err != nil {
			return fmt.Errorf("find data: %w", err)
		}
		if stop = min(stop, end); stop <= off {
			return fmt.Errorf("find data: extent [%d, %d) does not move on from %d", start, stop, off)
		}
		if err := img.WriteZeroes(start, stop-start, true); err != nil {
			return err
		}
		off = stop
	}
	return nil
}

func isDamage(err error) bool { return errors.Is(err, spool.ErrCorrupt) }
