package wan

import (
	"bytes"
	"encoding/binary"
	"math"
	"math/rand/v2"
	"testing"
	"time"
)

const ms = int64(time.Millisecond)

// plain makes a packet that is no train, with a number in it.
func plain(size int, number uint32) []byte {
	b := make([]byte, vnetLen+size)
	b[vnetLen] = 0x45
	binary.BigEndian.PutUint32(b[vnetLen+size-4:], number)
	return b
}

func number(b []byte) uint32 { return binary.BigEndian.Uint32(b[len(b)-4:]) }

// drain delivers everything, stepping the clock to what next says.
func drain(t *testing.T, p *pipe) (out [][]byte, at []int64) {
	t.Helper()
	for {
		now, ok := p.next()
		if !ok {
			return out, at
		}
		for {
			b, ok := p.deliver(now)
			if !ok {
				break
			}
			out, at = append(out, b), append(at, now)
		}
	}
}

func TestDelayAndSerialisation(t *testing.T) {
	// 1250 bytes at 100 Mbit/s take 100 µs of the line.
	p := newPipe(Params{Delay: 10 * time.Millisecond, Rate: 100e6}, 1<<20, 1)
	for i := range 5 {
		p.enqueue(0, plain(1250, uint32(i)))
	}
	p.enqueue(50*ms, plain(1250, 5))
	out, at := drain(t, p)
	if len(out) != 6 {
		t.Fatalf("%d packets came out, want 6", len(out))
	}
	for i, b := range out {
		want := int64(i+1)*100_000 + 10*ms
		if i == 5 {
			want = 60*ms + 100_000
		}
		if number(b) != uint32(i) || at[i] != want {
			t.Errorf("packet %d came out as number %d at %d ns, want %d", i, number(b), at[i], want)
		}
	}
}

func TestQueueDropsTheTail(t *testing.T) {
	p := newPipe(Params{Rate: 1e6, Queue: 5000}, 1<<20, 1)
	for i := range 20 {
		p.enqueue(0, plain(1000, uint32(i)))
	}
	out, _ := drain(t, p)
	// One on the line and five that wait.
	if len(out) != 6 || p.stats.DropQueue != 14 || p.stats.QueuedMax != 5000 {
		t.Fatalf("%d came out, %+v", len(out), p.stats)
	}
	for i, b := range out {
		if number(b) != uint32(i) {
			t.Errorf("packet %d is number %d: not the tail was dropped", i, number(b))
		}
	}
}

func TestCutLosesWhatIsUnderWay(t *testing.T) {
	p := newPipe(Params{Delay: 10 * time.Millisecond, Rate: 1e6}, 1<<20, 1)
	for range 10 {
		p.enqueue(0, plain(1000, 1))
	}
	p.setCut(true)
	p.enqueue(1, plain(1000, 2))
	if out, _ := drain(t, p); len(out) != 0 || p.stats.DropCut != 11 {
		t.Fatalf("%d packets passed a cut line, %+v", len(out), p.stats)
	}
	p.setCut(false)
	p.enqueue(20*ms, plain(1000, 3))
	if out, at := drain(t, p); len(out) != 1 || number(out[0]) != 3 || at[0] != 20*ms+8*ms+10*ms {
		t.Fatalf("after mending: %d packets at %v", len(out), at)
	}
}

func TestMemoryLimitHoldsWithoutRate(t *testing.T) {
	p := newPipe(Params{Delay: time.Second}, 10_000, 1)
	for range 100 {
		p.enqueue(0, plain(1000, 1))
	}
	if p.stats.LineBytes != 10_000 || p.stats.DropLimit != 90 {
		t.Fatalf("%+v", p.stats)
	}
}

func TestRateChangeReachesWaitingPackets(t *testing.T) {
	p := newPipe(Params{Rate: minRate}, 1<<20, 1)
	for range 10 {
		p.enqueue(0, plain(1000, 1))
	}
	p.set(0, Params{Rate: 1e9})
	_, at := drain(t, p)
	// The first was on the line (1 s at 8 kbit/s), the others go at the new rate.
	if last := at[len(at)-1]; last != int64(time.Second)+9*8000 {
		t.Fatalf("the last of %d packets came out after %v", len(at), time.Duration(last))
	}
}

func TestLossIsAProbabilityPerSegment(t *testing.T) {
	const n, loss = 2000, 0.05
	p := newPipe(Params{Loss: loss}, 1<<30, 7)
	var sent int64
	for i := range n {
		b := makeTrain(t, i%2 == 1, 1448, 20*1448, uint32(i), tcpPSH)
		_, segs := wireSize(b)
		sent += int64(segs)
		p.enqueue(0, b)
	}
	sigma := math.Sqrt(float64(sent) * loss * (1 - loss))
	if d := math.Abs(float64(p.stats.DropLoss) - float64(sent)*loss); d > 5*sigma {
		t.Fatalf("%d of %d segments lost, expected %.0f ± %.0f", p.stats.DropLoss, sent, float64(sent)*loss, 5*sigma)
	}
	out, _ := drain(t, p)
	var got int64
	for _, b := range out {
		_, segs := wireSize(b)
		got += int64(segs)
	}
	if got+p.stats.DropLoss != sent || p.stats.OutPackets != got {
		t.Fatalf("%d sent, %d lost, %d arrived; %+v", sent, p.stats.DropLoss, got, p.stats)
	}
}

// TestPipeConservesPackets does random things and checks after each that every
// packet is accounted for, in order, and inside the limits.
func TestPipeConservesPackets(t *testing.T) {
	for seed := range uint64(200) {
		rng := rand.New(rand.NewPCG(seed, 1))
		const limit = 1 << 20
		p := newPipe(Params{}, limit, seed)
		var now int64
		var next, seen uint32
		for range 400 {
			now += rng.Int64N(2 * ms)
			switch rng.IntN(20) {
			case 0:
				p.setCut(rng.IntN(2) == 0)
			case 1:
				p.set(now, Params{
					Delay: time.Duration(rng.Int64N(20 * ms)), Jitter: time.Duration(rng.Int64N(5 * ms)),
					Rate: []int64{0, 1e6, 1e8}[rng.IntN(3)], Queue: 1000 + rng.Int64N(1<<18), Loss: rng.Float64() * 0.2,
				})
			case 2, 3, 4:
				p.enqueue(now, makeTrain(t, rng.IntN(2) == 0, 1+rng.IntN(1448), 1+rng.IntN(40000), 0, 0))
			case 5, 6, 7, 8, 9:
				for b, ok := p.deliver(now); ok; b, ok = p.deliver(now) {
					if binary.NativeEndian.Uint16(b[6:]) != 0 {
						continue // of a train
					}
					if n := number(b); n <= seen {
						t.Fatalf("seed %d: packet %d after %d", seed, n, seen)
					} else {
						seen = n
					}
				}
			default:
				next++
				p.enqueue(now, plain(40+rng.IntN(1400), next))
			}
			checkConservation(t, seed, p, limit)
		}
	}
}

func checkConservation(t *testing.T, seed uint64, p *pipe, limit int64) {
	t.Helper()
	var held, bytesQueued, bytesLine int64
	for i := p.queue.head; i < len(p.queue.items); i++ {
		held += p.queue.items[i].segments
		bytesQueued += p.queue.items[i].size
	}
	for i := p.line.head; i < len(p.line.items); i++ {
		held += p.line.items[i].segments
		bytesLine += p.line.items[i].size
		if i > p.line.head && p.line.items[i].at < p.line.items[i-1].at {
			t.Fatalf("seed %d: the line is out of order", seed)
		}
	}
	s := p.stats
	if s.InPackets != s.OutPackets+s.DropLoss+s.DropQueue+s.DropCut+s.DropLimit+held {
		t.Fatalf("seed %d: packets are missing: %+v, %d held", seed, s, held)
	}
	if s.QueuedBytes != bytesQueued || s.LineBytes != bytesLine || bytesQueued+bytesLine > limit {
		t.Fatalf("seed %d: %+v, but %d bytes queued and %d on the line", seed, s, bytesQueued, bytesLine)
	}
}

func TestFIFO(t *testing.T) {
	rng := rand.New(rand.NewPCG(3, 3))
	var f fifo[int]
	var model []int
	for i := range 10000 {
		if rng.IntN(2) == 0 || len(model) == 0 {
			f.push(i)
			model = append(model, i)
		} else if got := f.pop(); got != model[0] {
			t.Fatalf("popped %d, want %d", got, model[0])
		} else {
			model = model[1:]
		}
		if f.len() != len(model) || len(f.items) > 2*len(model)+1 {
			t.Fatalf("%d items in a slice of %d, want %d", f.len(), len(f.items), len(model))
		}
	}
}

// makeTrain makes a TSO packet as the kernel would.
func makeTrain(t *testing.T, v6 bool, mss, payload int, seq uint32, flags byte) []byte {
	t.Helper()
	ipLen, tcpLen := 20, 32
	b := make([]byte, vnetLen)
	b[0], b[1] = 1, gsoTCPv4
	if v6 {
		ipLen, b[1] = 40, gsoTCPv6
	}
	if payload <= mss {
		b[1] = gsoNone
	} else {
		binary.NativeEndian.PutUint16(b[4:], uint16(mss))
	}
	binary.NativeEndian.PutUint16(b[2:], uint16(ipLen+tcpLen))
	binary.NativeEndian.PutUint16(b[6:], uint16(ipLen))
	binary.NativeEndian.PutUint16(b[8:], 16)
	ip := make([]byte, ipLen+tcpLen, ipLen+tcpLen+payload)
	if v6 {
		ip[0], ip[6], ip[7] = 0x60, protoTCP, 64
		copy(ip[8:], bytes.Repeat([]byte{0xfd, 7}, 16))
		binary.BigEndian.PutUint16(ip[4:], uint16(tcpLen+payload))
	} else {
		ip[0], ip[8], ip[9] = 0x45, 64, protoTCP
		copy(ip[12:], []byte{10, 98, 0, 1, 10, 98, 0, 2})
		binary.BigEndian.PutUint16(ip[2:], uint16(ipLen+tcpLen+payload))
		binary.BigEndian.PutUint16(ip[4:], 0xfffe)
	}
	tcp := ip[ipLen:]
	binary.BigEndian.PutUint32(tcp[4:], seq)
	tcp[12], tcp[13] = byte(tcpLen/4)<<4, 0x10|flags
	for i := range payload {
		ip = append(ip, byte(uint32(i)+seq))
	}
	return append(b, ip...)
}
