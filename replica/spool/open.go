package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"sort"
	"strings"
	"sync"

	"kagami/ext4j/epoch"
)

// Recovery is what Open found.
type Recovery struct {
	// Durable is the last whole epoch found (LSN of its Close record); zero when
	// the spool holds none. It may be older than applied: then the spool holds
	// nothing to apply.
	Durable   epoch.Pos
	LastClose epoch.CloseInfo
	Closed    bool // a whole epoch was found: Durable and LastClose are set
	// DroppedRecords counts valid records after Durable that were dropped as a partial epoch.
	DroppedRecords int
	// Lost, when not 0: records up to this LSN had been durable, and some above
	// Durable and applied are not there any more.
	Lost epoch.LSN
	// Note says in words what is wrong with the log; "" when nothing is. A partial
	// epoch at its end is not: nobody was told that it is durable.
	Note string
}

// Open recovers the spool in o.Dir, which must exist. applied is the LSN of
// the last applied epoch (Mark.Load), 0 for none; what is at or below it is
// not looked for. When Open returns, what Recovery reports is durable.
//
// An error means that the spool must not be used as it is: it cannot be read,
// belongs to another group, is in use, or holds what this release does not understand.
func Open(o Options, applied epoch.LSN) (*Spool, Recovery, error) {
	if err := o.check(); err != nil {
		return nil, Recovery{}, fmt.Errorf("open spool: %w", err)
	}
	sp := &Spool{o: o, ids: map[int]bool{}, base: applied, fresh: true}
	sp.cond = sync.NewCond(&sp.mu)
	rec, err := sp.recover(applied)
	if err != nil {
		for _, f := range sp.opened {
			_ = f.Close() // the error of recovery is the one to report
		}
		return nil, Recovery{}, fmt.Errorf("open spool %s: %w", o.Dir, err)
	}
	if !o.Inline {
		sp.wg.Add(1)
		go sp.keeper()
	}
	return sp, rec, nil
}

// recover finds the log, makes it durable, and makes everything else void.
//
// Durability, in this order: the names of the folder; the log, rewritten where
// it may not have reached the disk; the headers of all other segments, so that
// nothing dropped now can ever be read as a continuation later. That includes
// those that read as free or as nothing: what is read may not have reached the
// disk either, and an older header come back.
func (sp *Spool) recover(applied epoch.LSN) (Recovery, error) {
	if err := sp.syncDir(); err != nil {
		return Recovery{}, err
	}
	used, err := sp.openSlots()
	if err != nil {
		return Recovery{}, err
	}
	var heads []header
	var free int
	for _, g := range used {
		if sp.number = g.head.Number; sp.number == 0 {
			free++
		} else {
			heads = append(heads, g.head)
		}
	}
	order, err := chain(heads, applied)
	if err != nil {
		return Recovery{}, err
	}
	log := make([]*segment, len(order))
	for k, i := range order {
		log[k] = used[free+i]
	}
	view, err := sp.walk(log)
	if err != nil {
		return Recovery{}, err
	}
	if err := sp.adopt(used, log, &view, applied); err != nil {
		return Recovery{}, err
	}
	if len(sp.torn) > 0 {
		view.notes = append(view.notes, "torn or damaged header in segment "+strings.Join(sp.torn, ", "))
	}
	return report(heads, len(log), &view, applied), nil
}

// openSlots opens and locks all segment files. It returns those with a valid
// header, in the order of their numbers; the others are put into their lists.
func (sp *Spool) openSlots() ([]*segment, error) {
	names, err := sp.o.FS.ReadDir(sp.o.Dir)
	if err != nil {
		return nil, fmt.Errorf("list spool folder: %w", err)
	}
	var used []*segment
	for _, n := range names {
		id, ok := slotID(n)
		if !ok {
			continue
		}
		g, err := sp.openSlot(id)
		if err != nil {
			return nil, fmt.Errorf("segment %s: %w", n, err)
		}
		if g != nil {
			used = append(used, g)
		}
	}
	sort.Slice(used, func(a, b int) bool { return used[a].head.Number < used[b].head.Number })
	return used, nil
}

// openSlot opens a segment file; the result is nil when it has no valid header.
func (sp *Spool) openSlot(id int) (*segment, error) {
	f, err := sp.o.FS.Open(slotPath(sp.o.Dir, id))
	if err != nil {
		return nil, fmt.Errorf("open: %w", err)
	}
	sp.opened = append(sp.opened, f)
	s := &slot{id: id, path: slotPath(sp.o.Dir, id), file: f}
	g := &segment{slot: s}
	if err := f.Lock(); err != nil {
		return nil, fmt.Errorf("lock: %w", err)
	}
	if s.size, err = f.Size(); err != nil {
		return nil, fmt.Errorf("size: %w", err)
	}
	sp.ids[id] = true
	sp.total += s.size
	var torn bool
	g.head, torn, err = readHeader(f)
	if torn {
		sp.torn = append(sp.torn, s.name())
	}
	switch {
	case errors.Is(err, errNoHeader):
		sp.release(s)
		return nil, nil
	case err != nil:
		return nil, err
	case g.head.Group != sp.o.Group || g.head.Replica != sp.o.Replica:
		return nil, fmt.Errorf("%w: it belongs to replica %s of group %s", ErrCorrupt, g.head.Replica, g.head.Group)
	}
	s.ready = s.size == g.head.Bytes
	s.stale, s.number = true, g.head.Number
	return g, nil
}

// readHeader reads a segment's header; torn says that there is something, but no header.
func readHeader(r io.ReaderAt) (h header, torn bool, err error) {
	b := make([]byte, headerBytes)
	n, err := r.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return header{}, false, fmt.Errorf("read header: %w", err)
	}
	h, err = decodeHeader(b[:n])
	return h, errors.Is(err, errNoHeader) && bytes.Count(b, []byte{0}) != len(b), err
}

func (sp *Spool) walk(log []*segment) (logView, error) {
	heads := make([]header, len(log))
	for i, g := range log {
		heads[i] = g.head
	}
	return walk(heads,
		func(i int) *scanner { return newScanner(log[i].slot.file, &heads[i], heads[i].Bytes, sp.o.Inflate) },
		func(i int) string { return log[i].slot.name() })
}

// adopt keeps the segments that hold records above applied and makes the others free.
func (sp *Spool) adopt(used, log []*segment, v *logView, applied epoch.LSN) error {
	if err := sp.clearRaw(); err != nil {
		return err
	}
	sp.appended, sp.closed, sp.durable = v.close, v.close, v.close
	keep := map[*segment]bool{}
	for i, g := range log {
		if p := v.parts[i]; p.first != 0 && v.close.LSN > applied && p.last > applied {
			g.last, g.end = p.last, p.end
			sp.live = append(sp.live, g)
			keep[g] = true
		}
	}
	sp.fresh = len(sp.live) == 0
	for i, g := range sp.live {
		tail := int64(0)
		if i == len(sp.live)-1 {
			tail = v.tail(g == log[len(log)-1])
		}
		if err := g.harden(v.hint, tail); err != nil {
			return err
		}
	}
	for _, g := range used {
		if !keep[g] {
			if err := sp.void(g.slot); err != nil {
				return err
			}
			sp.release(g.slot)
		}
	}
	sp.mu.Lock()
	defer sp.mu.Unlock()
	sp.tidy()
	return sp.err
}

// clearRaw clears the headers of slots that must be filled before use.
func (sp *Spool) clearRaw() error {
	for _, s := range slices.Concat(sp.raw, sp.junk) {
		if _, err := s.file.WriteAt(make([]byte, headerBytes), 0); err != nil {
			return fmt.Errorf("clear header of spool segment: %w", err)
		}
		if err := s.sync(); err != nil {
			return err
		}
	}
	return nil
}

// harden makes a segment of the log durable. What is above hint may never have
// reached the disk, although it can be read: the last process may have been
// killed before the fdatasync, or have seen it fail, after which the kernel
// takes the pages for clean. So it is written again before it is synced. The
// given number of bytes behind the log's end is cleared.
func (g *segment) harden(hint epoch.LSN, tail int64) error {
	f := g.slot.file
	b := make([]byte, min(readAhead, g.slot.size))
	for off := int64(0); g.last > hint && off < g.end; {
		n := min(int64(len(b)), g.end-off)
		if _, err := f.ReadAt(b[:n], off); err != nil {
			return fmt.Errorf("read spool segment: %w", err)
		}
		if _, err := f.WriteAt(b[:n], off); err != nil {
			return fmt.Errorf("rewrite spool segment: %w", err)
		}
		off += n
	}
	clear(b)
	for off := g.end; off < min(g.end+tail, g.slot.size); {
		n := min(int64(len(b)), g.end+tail-off, g.slot.size-off)
		if _, err := f.WriteAt(b[:n], off); err != nil {
			return fmt.Errorf("clear end of spool segment: %w", err)
		}
		off += n
	}
	return g.slot.sync()
}

// report puts what was found into words.
func report(heads []header, inLog int, v *logView, applied epoch.LSN) Recovery {
	r := Recovery{Durable: v.close, LastClose: v.info, Closed: v.closed, DroppedRecords: v.dropped}
	notes := v.notes
	known := epoch.LSN(0)
	for _, h := range heads {
		known = max(known, h.Durable)
	}
	if found := max(v.close.LSN, applied); known > found {
		r.Lost = known
		notes = append(notes, fmt.Sprintf("records %d to %d had been durable and are lost", found+1, known))
	}
	if inLog == 0 && len(heads) > 0 {
		notes = append(notes, fmt.Sprintf("no segment holds the record after LSN %d", applied))
	}
	r.Note = strings.Join(notes, "; ")
	return r
}
