package wan

import "math/rand/v2"

// Stats counts what happened in one direction, in packets and bytes as they
// are on the wire: a train of segments counts as its segments.
type Stats struct {
	InPackets   int64 `json:"in_packets"`
	InBytes     int64 `json:"in_bytes"`
	OutPackets  int64 `json:"out_packets"`
	OutBytes    int64 `json:"out_bytes"`
	DropLoss    int64 `json:"drop_loss"`    // packets lost by chance
	DropQueue   int64 `json:"drop_queue"`   // packets that found the queue full
	DropCut     int64 `json:"drop_cut"`     // packets that met a cut line
	DropLimit   int64 `json:"drop_limit"`   // packets beyond the memory limit of an unlimited line
	DropDevice  int64 `json:"drop_device"`  // packets that the receiving device refused
	QueuedBytes int64 `json:"queued_bytes"` // waiting for the line now
	QueuedMax   int64 `json:"queued_max"`   // the most that ever waited
	LineBytes   int64 `json:"line_bytes"`   // on the line now
}

type packet struct {
	buf      []byte // with its virtio_net_hdr
	size     int64  // bytes on the wire
	segments int64
	at       int64 // queue: arrival; line: delivery, ns
}

// pipe is one direction as a pure state machine: packets enter, wait in a
// bounded queue for the line, occupy it for size/rate, travel for the delay,
// and come out in order. Times are ns of one monotonic clock that the caller
// reads. A pipe is not safe for concurrent use.
type pipe struct {
	params  Params
	limit   int64 // bytes in queue and line together
	rng     *rand.Rand
	cut     bool
	queue   fifo[packet]
	line    fifo[packet]
	free    int64 // when the line can take the next packet
	lastDue int64
	stats   Stats
}

func newPipe(p Params, limit int64, seed uint64) *pipe {
	return &pipe{params: p, limit: limit, rng: rand.New(rand.NewPCG(seed, 0x77616e))}
}

// enqueue takes one packet at the entrance. It may keep buf.
func (p *pipe) enqueue(now int64, buf []byte) {
	size, segs := wireSize(buf)
	p.stats.InPackets += int64(segs)
	p.stats.InBytes += int64(size)
	if p.cut {
		p.stats.DropCut += int64(segs)
		return
	}
	p.serve(now)
	t, isTrain := parseTrain(buf)
	if !isTrain || segs == 1 {
		if p.lose() {
			p.stats.DropLoss++
			return
		}
		p.admit(now, packet{buf: buf, size: int64(size), segments: 1, at: now})
		return
	}
	p.enqueueTrain(now, buf, t)
}

// enqueueTrain drops lost segments out of a train and admits the runs between
// them, in pieces that take the line at most a millisecond.
func (p *pipe) enqueueTrain(now int64, buf []byte, t train) {
	n, piece := t.segments(), p.piece(int64(t.headers+t.mss))
	first := 0
	for i := range n {
		if p.lose() {
			p.stats.DropLoss++
			p.admitRun(now, buf, t, first, i)
			first = i + 1
		} else if i+1-first == piece {
			p.admitRun(now, buf, t, first, i+1)
			first = i + 1
		}
	}
	p.admitRun(now, buf, t, first, n)
}

// piece is the number of segments of the given size that take a millisecond
// of the line, at least one.
func (p *pipe) piece(size int64) int {
	if p.params.Rate == 0 {
		return 1 << 16
	}
	return int(max(1, p.params.Rate/8/1000/size))
}

// admitRun admits segments [i, j): those that fit, as a router drops the tail
// of a burst.
func (p *pipe) admitRun(now int64, buf []byte, t train, i, j int) {
	fit := j
	if !p.idle(now) {
		room := max(0, p.params.queueLimit()-p.stats.QueuedBytes) // the limit may have been lowered
		fit = min(j, i+int(room/int64(t.headers+t.mss)))
		p.stats.DropQueue += int64(j - fit)
	}
	if fit <= i {
		return
	}
	if i != 0 || fit != t.segments() {
		buf = t.slice(buf, i, fit)
	}
	size, segs := wireSize(buf)
	p.admit(now, packet{buf: buf, size: int64(size), segments: int64(segs), at: now})
}

// idle reports that the next packet need not wait for the line.
func (p *pipe) idle(now int64) bool {
	return p.params.Rate == 0 || (p.queue.len() == 0 && p.free <= now)
}

func (p *pipe) lose() bool { return p.params.Loss > 0 && p.rng.Float64() < p.params.Loss }

// admit queues a packet or drops it when the queue or the memory is full.
func (p *pipe) admit(now int64, k packet) {
	switch {
	case p.stats.QueuedBytes+p.stats.LineBytes+k.size > p.limit:
		p.stats.DropLimit += k.segments
		return
	case !p.idle(now) && p.stats.QueuedBytes+k.size > p.params.queueLimit():
		p.stats.DropQueue += k.segments
		return
	case !p.idle(now):
		p.stats.QueuedMax = max(p.stats.QueuedMax, p.stats.QueuedBytes+k.size)
	}
	p.stats.QueuedBytes += k.size
	p.queue.push(k)
	p.serve(now)
}

// serve moves packets whose turn has come from the queue to the line. It may
// be called late: a packet's times do not depend on when.
func (p *pipe) serve(now int64) {
	for p.queue.len() > 0 && (p.free <= now || p.params.Rate == 0) {
		k := p.queue.pop()
		start := max(p.free, k.at)
		p.free = start
		if p.params.Rate > 0 {
			p.free += int64(float64(k.size) * 8e9 / float64(p.params.Rate))
		}
		p.lastDue = max(p.lastDue, p.free+int64(p.params.Delay)+p.jitter())
		k.at = p.lastDue
		p.stats.QueuedBytes -= k.size
		p.stats.LineBytes += k.size
		p.line.push(k)
	}
}

func (p *pipe) jitter() int64 {
	if p.params.Jitter == 0 {
		return 0
	}
	return p.rng.Int64N(int64(p.params.Jitter) + 1)
}

// deliver takes the next packet that is due at the far end.
func (p *pipe) deliver(now int64) ([]byte, bool) {
	p.serve(now)
	if p.line.len() == 0 || p.line.front().at > now {
		return nil, false
	}
	k := p.line.pop()
	p.stats.LineBytes -= k.size
	p.stats.OutPackets += k.segments
	p.stats.OutBytes += k.size
	return k.buf, true
}

// next is when deliver will have something; ok is false when the pipe is empty.
func (p *pipe) next() (at int64, ok bool) {
	switch {
	case p.line.len() > 0:
		return p.line.front().at, true
	case p.queue.len() > 0:
		return p.free, true
	}
	return 0, false
}

// setCut cuts or mends the line. What is under way is lost.
func (p *pipe) setCut(cut bool) {
	p.cut = cut
	if !cut {
		return
	}
	for p.queue.len() > 0 {
		p.stats.DropCut += p.queue.pop().segments
	}
	for p.line.len() > 0 {
		p.stats.DropCut += p.line.pop().segments
	}
	p.stats.QueuedBytes, p.stats.LineBytes, p.free, p.lastDue = 0, 0, 0, 0
}

// set changes the parameters for packets that have not reached the line yet;
// those on it keep their time.
func (p *pipe) set(now int64, q Params) {
	p.serve(now)
	p.params = q
}

// fifo is a queue; its memory is bounded by the longest it ever was.
type fifo[T any] struct {
	items []T
	head  int
}

func (f *fifo[T]) len() int { return len(f.items) - f.head }
func (f *fifo[T]) front() T { return f.items[f.head] }
func (f *fifo[T]) push(v T) { f.items = append(f.items, v) }

func (f *fifo[T]) pop() T {
	var zero T
	v := f.items[f.head]
	f.items[f.head] = zero
	if f.head++; f.head*2 >= len(f.items) {
		n := copy(f.items, f.items[f.head:])
		clear(f.items[n:])
		f.items, f.head = f.items[:n], 0
	}
	return v
}
