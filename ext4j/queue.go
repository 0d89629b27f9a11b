package ext4j

import (
	"slices"

	"kagami/ext4j/epoch"
)

// queue holds the records that the replica has not acknowledged, in LSN order
// without gaps. It is pure; Group.mu guards it.
//
// Invariant: base ≤ cursor ≤ base+len(recs); every span in again lies in
// [base, cursor).
type queue struct {
	recs   []epoch.Record // recs[0] has LSN base
	base   epoch.LSN
	cursor epoch.LSN // the next record that was never handed out
	again  []span    // handed out, then lost with a connection; ascending
	bytes  int64     // memory held, see cost
	closes int       // Close records: without any, nothing that is held can be acknowledged
}

// span is the LSNs [first, last].
type span struct{ first, last epoch.LSN }

// recordOverhead is what one record costs in memory beside its payload, bytes, rounded up.
const recordOverhead = 160

func cost(r *epoch.Record) int64 { return int64(len(r.Payload)) + recordOverhead }

// reset empties the queue; the next record pushed has LSN next.
func (q *queue) reset(next epoch.LSN) { *q = queue{base: next, cursor: next} }

func (q *queue) next() epoch.LSN { return q.base + epoch.LSN(len(q.recs)) }

func (q *queue) push(r epoch.Record) {
	q.recs = append(q.recs, r)
	q.count(&r, 1)
}

func (q *queue) count(r *epoch.Record, by int) {
	q.bytes += int64(by) * cost(r)
	if r.Type == epoch.TypeClose {
		q.closes += by
	}
}

// at returns the record with an LSN in [base, next).
func (q *queue) at(l epoch.LSN) *epoch.Record { return &q.recs[l-q.base] }

// drop forgets records up to and including last.
func (q *queue) drop(last epoch.LSN) {
	if last < q.base {
		return
	}
	n := min(int(last-q.base)+1, len(q.recs))
	for i := range n {
		q.count(&q.recs[i], -1)
		q.recs[i] = epoch.Record{}
	}
	q.recs = q.recs[n:]
	q.base += epoch.LSN(n)
	q.cursor = max(q.cursor, q.base)
	q.trimAgain()
	if len(q.recs) == 0 {
		q.recs = nil // let the backing array go
	}
}

func (q *queue) trimAgain() {
	q.again = slices.DeleteFunc(q.again, func(s span) bool { return s.last < q.base })
	if len(q.again) > 0 && q.again[0].first < q.base {
		q.again[0].first = q.base
	}
}

// take hands out consecutive records, lost ones first: at least one if there
// is any, then more while their payloads stay within budget bytes and their number within limit.
func (q *queue) take(budget, limit int) []epoch.Record {
	first, end := q.cursor, q.next()
	if len(q.again) > 0 {
		first, end = q.again[0].first, q.again[0].last+1
	}
	n := 0
	for l := first; l < end && n < limit; l++ {
		budget -= len(q.at(l).Payload) + epoch.HeaderSize
		if n > 0 && budget < 0 {
			break
		}
		n++
	}
	if n == 0 {
		return nil
	}
	if len(q.again) == 0 {
		q.cursor += epoch.LSN(n)
	} else if q.again[0].first += epoch.LSN(n); q.again[0].first > q.again[0].last {
		q.again = slices.Delete(q.again, 0, 1)
	}
	i := int(first - q.base)
	return slices.Clone(q.recs[i : i+n])
}

// requeue marks records that were handed out as lost on the way.
func (q *queue) requeue(first, last epoch.LSN) {
	first, last = max(first, q.base), min(last, q.cursor-1)
	if first > last {
		return
	}
	q.again = append(q.again, span{first, last})
	slices.SortFunc(q.again, func(a, b span) int { return int(int64(a.first) - int64(b.first)) })
	merged := q.again[:1]
	for _, s := range q.again[1:] {
		if m := &merged[len(merged)-1]; s.first <= m.last+1 {
			m.last = max(m.last, s.last)
		} else {
			merged = append(merged, s)
		}
	}
	q.again = merged
}

// rewind makes every record be handed out again.
func (q *queue) rewind() { q.cursor, q.again = q.base, nil }

// unsent reports whether take would return something.
func (q *queue) unsent() bool { return len(q.again) > 0 || q.cursor < q.next() }
