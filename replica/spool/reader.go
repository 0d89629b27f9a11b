package spool

import (
	"errors"
	"fmt"
	"io"

	"kagami/ext4j/epoch"
)

// Reader reads the records of durable, closed epochs in LSN order. It belongs
// to one goroutine.
type Reader struct {
	sp   *Spool
	next epoch.LSN
	seg  *segment
	sc   *scanner
	read epoch.LSN // the last record the scanner returned
}

// NewReader makes a reader whose first record is from, or, where the log
// begins anew above it, the first one after.
func (sp *Spool) NewReader(from epoch.LSN) *Reader { return &Reader{sp: sp, next: max(1, from)} }

// Next returns the next record, or io.EOF when it is not (yet) part of a
// durable closed epoch; it may be called again later. The payload is the
// caller's to keep. ErrCorrupt (wrapped, naming file, offset and LSN) says
// that a durable record is damaged; ErrTrimmed that it was given back.
func (r *Reader) Next() (epoch.Record, error) {
	seg, end, err := r.locate()
	if err != nil {
		return epoch.Record{}, err
	}
	if seg != r.seg {
		r.seg, r.read = seg, seg.head.First-1
		r.sc = newScanner(seg.slot.file, &seg.head, end, r.sp.o.Inflate)
	}
	r.sc.end = end
	for {
		rec, err := r.sc.next()
		if err == nil {
			err = r.check(&rec)
		}
		if err != nil {
			return epoch.Record{}, r.explain(err)
		}
		r.read = rec.LSN
		if rec.LSN == r.next {
			r.next++
			return rec, nil
		}
	}
}

// locate finds the segment that holds the next record and how far it may be read.
func (r *Reader) locate() (*segment, int64, error) {
	r.sp.mu.Lock()
	defer r.sp.mu.Unlock()
	if err := r.sp.usable(); err != nil {
		return nil, 0, err
	}
	if r.next > r.sp.durable.LSN {
		return nil, 0, io.EOF
	}
	for _, g := range r.sp.live {
		if g.head.Prev < r.next && r.next <= g.last {
			r.next = max(r.next, g.head.First)
			return g, g.end, nil
		}
	}
	return nil, 0, fmt.Errorf("read spool at LSN %d: %w", r.next, ErrTrimmed)
}

func (r *Reader) check(rec *epoch.Record) error {
	h := &r.seg.head
	if rec.LSN != r.read+1 || rec.Lineage != h.Lineage || rec.Session != h.Session {
		return fmt.Errorf("%w: found record %d of session %d", errDamage, rec.LSN, rec.Session)
	}
	return nil
}

// explain tells damage from a segment that was given back while it was read.
func (r *Reader) explain(err error) error {
	r.sp.mu.Lock()
	freed := r.seg.freed
	r.sp.mu.Unlock()
	name, off, lsn := r.seg.slot.name(), r.sc.off, r.read+1
	r.seg = nil
	switch {
	case freed:
		return fmt.Errorf("read spool at LSN %d: %w", r.next, ErrTrimmed)
	case errors.Is(err, errEnd) || errors.Is(err, errDamage):
		return fmt.Errorf("%w: segment %s at offset %d, record %d: %w", ErrCorrupt, name, off, lsn, err)
	}
	return fmt.Errorf("read spool segment %s: %w", name, err)
}
