package spool

import (
	"errors"
	"fmt"
	"math"
	"sort"

	"kagami/ext4j/epoch"
)

// chain finds the segments that can hold records above applied, in log order.
// heads are the valid headers of segments in use, in any order; the result
// are indexes into it.
//
// A segment overrides everything older above its Prev. So, from the newest to
// the oldest, a segment counts only if its Prev is below that of all newer
// ones; and the log begins with the newest whose Prev is at or below applied.
// With none, records after applied are missing: the result is empty.
func chain(heads []header, applied epoch.LSN) ([]int, error) {
	order := make([]int, len(heads))
	for i := range order {
		order[i] = i
	}
	sort.Slice(order, func(a, b int) bool { return heads[order[a]].Number > heads[order[b]].Number })
	for k := 1; k < len(order); k++ {
		if n := heads[order[k]].Number; n == heads[order[k-1]].Number {
			return nil, fmt.Errorf("%w: two segments have number %d", ErrCorrupt, n)
		}
	}
	var log []int
	least := epoch.LSN(math.MaxUint64)
	for _, i := range order {
		h := &heads[i]
		if h.Prev >= least {
			continue
		}
		least = h.Prev
		log = append([]int{i}, log...)
		if h.Prev <= applied {
			return log, nil
		}
	}
	return nil, nil
}

// part is what the log holds in one segment.
type part struct {
	first epoch.LSN // 0: nothing
	last  epoch.LSN
	end   int64 // offset behind the record last
}

// logView is what walking the segments found. Everything up to close is the log.
type logView struct {
	parts   []part // of the segments given, cut at the last Close
	close   epoch.Pos
	info    epoch.CloseInfo
	closed  bool
	dropped int       // valid records after the last Close
	hint    epoch.LSN // the newest statement of what was durable, among the segments reached
	notes   []string
}

// tail is how many bytes behind the log's end must be cleared, so that nothing
// dropped now is ever taken for the next record: one header after a clean end,
// else everything that is left of the segment. newest says that no newer
// segment was found: such a one may have made records behind the end void.
func (v *logView) tail(newest bool) int64 {
	if newest && v.dropped == 0 && len(v.notes) == 0 {
		return epoch.HeaderSize
	}
	return math.MaxInt64 / 2
}

// walker reads the log from segments in the order chain gave.
type walker struct {
	v       logView
	pos     epoch.LSN // last valid record
	lineage epoch.UUID
	session uint64
	open    []part // parts including the partial epoch
	kept    int    // parts below it are as in open
}

// walk reads segments in log order. at gives the segment's scanner; name its file name for notes.
// An error is one of reading, or of records that were written but cannot be understood.
func walk(heads []header, at func(i int) *scanner, name func(i int) string) (logView, error) {
	w := walker{open: make([]part, len(heads))}
	w.v.parts = make([]part, len(heads))
	for i := range heads {
		h := &heads[i]
		if i > 0 && !w.follows(h, name(i)) {
			break
		}
		limit := epoch.LSN(math.MaxUint64)
		if i+1 < len(heads) {
			limit = heads[i+1].Prev
		}
		w.lineage, w.session = h.Lineage, h.Session
		w.v.hint = max(w.v.hint, h.Durable)
		sc := at(i)
		if err := w.segment(i, h, sc, limit); err != nil {
			return w.v, fmt.Errorf("segment %s at offset %d, LSN %d: %w", name(i), sc.off, w.pos+1, err)
		}
		w.remark(sc, limit, name(i))
	}
	return w.v, nil
}

// follows reports that the segment goes on where the log read so far ends.
func (w *walker) follows(h *header, name string) bool {
	switch {
	case h.Prev != w.pos:
		w.note("segment %s begins after LSN %d, but the log before it ends at %d", name, h.Prev, w.pos)
	case w.v.dropped > 0 && (h.Lineage != w.lineage || h.Session != w.session):
		w.note("segment %s begins another session inside an epoch", name)
	default:
		return true
	}
	return false
}

func (w *walker) note(format string, a ...any) {
	w.v.notes = append(w.v.notes, fmt.Sprintf(format, a...))
}

// segment reads one segment's records up to limit.
func (w *walker) segment(i int, h *header, sc *scanner, limit epoch.LSN) error {
	w.pos = h.Prev
	for want := h.First; want <= limit; want++ {
		rec, err := sc.next()
		if errors.Is(err, errEnd) {
			return nil
		}
		if err != nil {
			return err
		}
		if rec.LSN != want || rec.Lineage != h.Lineage || rec.Session != h.Session {
			return fmt.Errorf("%w: found record %d of session %d", errDamage, rec.LSN, rec.Session)
		}
		if err := w.take(i, &rec, sc.off); err != nil {
			return err
		}
	}
	return nil
}

func (w *walker) take(i int, rec *epoch.Record, end int64) error {
	w.pos = rec.LSN
	p := &w.open[i]
	if p.first == 0 {
		p.first = rec.LSN
	}
	p.last, p.end = rec.LSN, end
	w.v.dropped++
	if rec.Type != epoch.TypeClose {
		return nil
	}
	info, err := epoch.DecodeClose(rec.Payload)
	if err != nil {
		return fmt.Errorf("%w: %w", errDamage, err)
	}
	w.v.close = epoch.Pos{Lineage: rec.Lineage, Session: rec.Session, LSN: rec.LSN}
	w.v.info, w.v.closed, w.v.dropped = info, true, 0
	copy(w.v.parts[w.kept:i+1], w.open[w.kept:i+1])
	w.kept = i
	return nil
}

// remark notes a record that is damaged or torn where the log ends.
func (w *walker) remark(sc *scanner, limit epoch.LSN, name string) {
	if w.pos >= limit {
		return
	}
	if lsn, ok := sc.beyond(); ok {
		w.note("segment %s at offset %d: record %d is torn or damaged, although record %d is found behind it",
			name, sc.off, w.pos+1, lsn)
	}
}
