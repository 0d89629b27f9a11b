package ext4j

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"kagami/ext4j/epoch"
)

// queueModel is the queue as its doc says it, in the most naive form: one
// state per record.
type queueModel struct {
	base  epoch.LSN
	recs  []epoch.Record
	state []byte // of each record: 'n' never handed out, 's' sent, 'l' lost
}

func (m *queueModel) take(budget, limit int) (out []epoch.Record) {
	want := byte('n')
	for _, s := range m.state {
		if s == 'l' {
			want = 'l'
			break
		}
	}
	for i := range m.recs {
		size := len(m.recs[i].Payload) + epoch.HeaderSize
		if m.state[i] != want {
			if len(out) > 0 {
				break
			}
			continue
		}
		if len(out) >= limit || len(out) > 0 && budget < size {
			break
		}
		budget -= size
		m.state[i] = 's'
		out = append(out, m.recs[i])
	}
	return out
}

func (m *queueModel) drop(last epoch.LSN) {
	for len(m.recs) > 0 && m.base <= last {
		m.recs, m.state, m.base = m.recs[1:], m.state[1:], m.base+1
	}
}

func (m *queueModel) requeue(first, last epoch.LSN) {
	for i := range m.recs {
		if l := m.base + epoch.LSN(i); m.state[i] == 's' && first <= l && l <= last {
			m.state[i] = 'l'
		}
	}
}

func (m *queueModel) rewind() {
	for i := range m.state {
		m.state[i] = 'n'
	}
}

// check compares the queue with the model and with its own invariants.
func (m *queueModel) check(q *queue) error {
	var bytes int64
	unsent := false
	for i := range m.recs {
		bytes += cost(&m.recs[i])
		unsent = unsent || m.state[i] != 's'
	}
	switch {
	case q.base != m.base || len(q.recs) != len(m.recs):
		return fmt.Errorf("holds %d records from %d, want %d from %d", len(q.recs), q.base, len(m.recs), m.base)
	case q.bytes != bytes:
		return fmt.Errorf("counts %d bytes, want %d", q.bytes, bytes)
	case q.unsent() != unsent:
		return fmt.Errorf("unsent is %v", q.unsent())
	case q.cursor < q.base || q.cursor > q.next():
		return fmt.Errorf("cursor %d outside [%d, %d]", q.cursor, q.base, q.next())
	}
	for i, s := range q.again {
		if s.first > s.last || s.first < q.base || s.last >= q.cursor || i > 0 && s.first <= q.again[i-1].last+1 {
			return fmt.Errorf("spans %v with base %d, cursor %d", q.again, q.base, q.cursor)
		}
	}
	for i := range q.recs {
		if q.recs[i].LSN != q.base+epoch.LSN(i) {
			return fmt.Errorf("record %d is at %d", q.recs[i].LSN, q.base+epoch.LSN(i))
		}
	}
	return nil
}

func sameRun(a, b []epoch.Record) bool {
	if len(a) != len(b) {
		return false
	}
	for i := range a {
		if a[i].LSN != b[i].LSN {
			return false
		}
	}
	return true
}

func TestQueueAgainstModel(t *testing.T) {
	for seed := range uint64(300) {
		rng := rand.New(rand.NewPCG(seed, 1))
		var q queue
		start := epoch.LSN(1 + rng.Uint64N(1000))
		q.reset(start)
		m := &queueModel{base: start}
		for step := range 300 {
			what := stepQueue(rng, &q, m)
			if err := m.check(&q); err != nil {
				t.Fatalf("seed %d, step %d, after %s: %v", seed, step, what, err)
			}
		}
	}
}

func stepQueue(rng *rand.Rand, q *queue, m *queueModel) string {
	near := func() epoch.LSN { return m.base + epoch.LSN(rng.IntN(len(m.recs)+4)) - min(m.base, 2) }
	switch rng.IntN(10) {
	case 0, 1, 2:
		r := epoch.Record{LSN: q.next(), Payload: make([]byte, rng.IntN(1000))}
		q.push(r)
		m.recs, m.state = append(m.recs, r), append(m.state, 'n')
		return "push"
	case 3, 4, 5:
		budget, limit := rng.IntN(3000), 1+rng.IntN(5)
		got, want := q.take(budget, limit), m.take(budget, limit)
		if !sameRun(got, want) {
			return fmt.Sprintf("take(%d, %d) gave %d records, want %d: DIFFERS %v", budget, limit, len(got), len(want), mustDiffer(m))
		}
		return "take"
	case 6, 7:
		first := near()
		last := first + epoch.LSN(rng.IntN(6))
		q.requeue(first, last)
		m.requeue(first, last)
		return fmt.Sprintf("requeue(%d, %d)", first, last)
	case 8:
		last := near()
		q.drop(last)
		m.drop(last)
		return fmt.Sprintf("drop(%d)", last)
	default:
		if rng.IntN(10) == 0 {
			q.rewind()
			m.rewind()
			return "rewind"
		}
		return "nothing"
	}
}

// mustDiffer spoils the model so that the check that follows fails.
func mustDiffer(m *queueModel) string {
	m.base += 1 << 40
	return "take"
}

// TestQueueTakeIsACopy: what was handed out does not change when the queue
// drops it meanwhile.
func TestQueueTakeIsACopy(t *testing.T) {
	var q queue
	q.reset(1)
	for l := epoch.LSN(1); l <= 3; l++ {
		q.push(epoch.Record{LSN: l, Payload: []byte{byte(l)}})
	}
	run := q.take(1<<20, 10)
	q.drop(3)
	for i, r := range run {
		if r.LSN != epoch.LSN(i+1) || len(r.Payload) != 1 {
			t.Errorf("record %d became %+v", i+1, r)
		}
	}
	if q.next() != 4 || q.bytes != 0 || q.unsent() {
		t.Errorf("after all was dropped: next %d, %d bytes", q.next(), q.bytes)
	}
}
