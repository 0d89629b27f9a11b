package nbd

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

const kib = 1 << 10

// eachMode runs a test with simple and structured replies, inline and beside
// the reader.
func eachMode(t *testing.T, f func(t *testing.T, structured, stall bool)) {
	for _, structured := range []bool{false, true} {
		for _, stall := range []bool{false, true} {
			t.Run(fmt.Sprintf("structured=%v stall=%v", structured, stall), func(t *testing.T) { f(t, structured, stall) })
		}
	}
}

func payloadFor(r request) []byte {
	if r.cmd != cmdWrite {
		return nil
	}
	return bytes.Repeat([]byte("payload"), int(r.length)/7+1)[:r.length]
}

// TestGone: nothing is answered, the connection ends.
func TestGone(t *testing.T) {
	for _, r := range []request{
		{cmd: cmdRead, length: 512}, {cmd: cmdRead, length: 2 << 20}, {cmd: cmdWrite, length: 512}, {cmd: cmdWrite, length: 2 << 20},
		{cmd: cmdWrite, length: 512, flags: cmdFUA}, {cmd: cmdFlush}, {cmd: cmdTrim, length: 512}, {cmd: cmdZeroes, length: 4 << 20},
		{cmd: cmdBlockStatus, length: 512},
	} {
		for _, stall := range []bool{false, true} {
			d := newRAM(t, 4<<20)
			d.stall.Store(stall)
			d.hook = func(string, int64, int64) error { return fmt.Errorf("detach: %w", ErrGone) }
			_, path := serve(t, Options{}, Export{Device: d})
			c := attach(t, path, "", true)
			// The server may end the connection before it has read all.
			_, _ = c.nc.Write(requestBytes(r, payloadFor(r)))
			c.wantEnd()
		}
	}
}

func TestCalls(t *testing.T) {
	eachMode(t, func(t *testing.T, structured, stall bool) {
		d := newRAM(t, 8<<20)
		d.stall.Store(stall)
		_, path := serve(t, Options{}, Export{Device: d})
		c := attach(t, path, "", structured)
		for _, x := range []struct {
			r    request
			want []string
		}{
			{request{cmd: cmdWrite, offset: 3, length: 5}, []string{"write 3+5"}},
			{request{cmd: cmdWrite, offset: 4096, length: 4096, flags: cmdFUA}, []string{"write-fua 4096+4096"}},
			{request{cmd: cmdWrite, offset: 4096, length: 256 * kib}, []string{"write 4096+262144"}},
			// Longer ones are cut where the next piece is aligned; FUA costs one flush.
			{request{cmd: cmdWrite, offset: 100, length: 300 * kib}, []string{"write 100+262044", "write 262144+45156"}},
			{request{cmd: cmdWrite, length: 300 * kib, flags: cmdFUA}, []string{"write 0+262144", "write 262144+45056", "flush 0+0"}},
			{request{cmd: cmdFlush}, []string{"flush 0+0"}},
			{request{cmd: cmdTrim, length: 8 << 20}, []string{"trim 0+8388608"}},
			{request{cmd: cmdTrim, offset: 7, length: 9, flags: cmdFUA}, []string{"trim-fua 7+9"}},
			{request{cmd: cmdZeroes, length: 8 << 20}, []string{"zero 0+8388608"}},
			{request{cmd: cmdZeroes, length: 512, flags: cmdNoHole}, []string{"zero-nohole 0+512"}},
			{request{cmd: cmdZeroes, length: 512, flags: cmdNoHole | cmdFUA}, []string{"zero-nohole-fua 0+512"}},
		} {
			c.ok(x.r, payloadFor(x.r))
			got := d.take()
			slices.Sort(got) // pieces beside the reader run in any order
			slices.Sort(x.want)
			if !reflect.DeepEqual(got, x.want) {
				t.Errorf("%+v: %v, want %v", x.r, got, x.want)
			}
		}
	})
}

// TestLargeWriteFails: no piece follows the one that failed, and no flush.
func TestLargeWriteFails(t *testing.T) {
	d := newRAM(t, 2<<20)
	d.hook = func(_ string, off, _ int64) error {
		if off >= maxPiece {
			return syscall.ENOSPC
		}
		return nil
	}
	_, path := serve(t, Options{}, Export{Device: d})
	c := attach(t, path, "", true)
	r := request{cmd: cmdWrite, length: 2 << 20, flags: cmdFUA}
	if got := c.call(r, payloadFor(r)); got.errno != errNoSpace {
		t.Errorf("%+v", got)
	}
	if got := d.take(); !slices.Equal(got, []string{"write 0+262144", "write 262144+262144"}) {
		t.Error(got)
	}
}

// readAll collects the chunks of one read and checks that they cover it once.
func (c *client) readAll(r request) []byte {
	c.t.Helper()
	cookie := c.send(r, nil)
	data := make([]byte, r.length)
	type span struct{ from, to int }
	var seen []span
	for {
		got := c.receive(int(r.length))
		if got.cookie != cookie || got.errno != 0 {
			c.t.Fatalf("reply to %d, want %d: error %d", got.cookie, cookie, got.errno)
		}
		at := 0
		if c.structured {
			at = int(got.offset - r.offset)
		}
		copy(data[at:], got.data)
		seen = append(seen, span{at, at + len(got.data)})
		if got.done {
			break
		}
		if r.df() {
			c.t.Fatal("fragmented in spite of DF")
		}
	}
	slices.SortFunc(seen, func(a, b span) int { return a.from - b.from })
	end := 0
	for _, s := range seen {
		if s.from != end {
			c.t.Fatalf("chunks %v", seen)
		}
		end = s.to
	}
	if end != len(data) {
		c.t.Fatalf("chunks %v", seen)
	}
	return data
}

// TestRandomContent writes and reads at random, against a plain array.
func TestRandomContent(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	eachMode(t, func(t *testing.T, structured, stall bool) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		const size = 5 << 20
		d, want := newRAM(t, size), make([]byte, size)
		d.history, d.calls = nil, nil
		d.stall.Store(stall)
		_, path := serve(t, Options{}, Export{Device: d})
		c := attach(t, path, "", structured)
		for i := range 120 {
			n := 1 << rnd.IntN(22)
			n += rnd.IntN(n)
			off := rnd.IntN(size - n)
			r := request{offset: uint64(off), length: uint32(n), flags: uint16(rnd.IntN(2)) * cmdFUA}
			switch r.cmd = []command{cmdRead, cmdWrite, cmdTrim, cmdZeroes}[rnd.IntN(4)]; r.cmd {
			case cmdRead:
				if structured && rnd.IntN(2) == 0 {
					r.flags |= cmdDF
				}
				if !bytes.Equal(c.readAll(r), want[off:off+n]) {
					t.Fatalf("step %d: %+v", i, r)
				}
			case cmdWrite:
				p := make([]byte, n)
				p[0], p[n-1] = byte(rnd.IntN(256)), byte(rnd.IntN(256))
				copy(want[off:], p)
				c.ok(r, p)
			default:
				clear(want[off : off+n])
				c.ok(r, nil)
			}
		}
		if !bytes.Equal(d.data, want) {
			t.Fatal("content differs at the end")
		}
	})
}

func TestLargestRequests(t *testing.T) {
	for _, structured := range []bool{false, true} {
		d := newRAM(t, MaxPayload+1)
		d.history, d.calls = nil, nil
		d.stall.Store(!structured)
		_, path := serve(t, Options{MaxMemory: 1}, Export{Device: d})
		c := attach(t, path, "", structured)
		r := request{cmd: cmdWrite, offset: 1, length: MaxPayload, flags: cmdFUA}
		p := payloadFor(r)
		c.ok(r, p)
		r.cmd = cmdRead
		if !bytes.Equal(c.readAll(r), p) {
			t.Fatal("content differs")
		}
	}
}

// TestHugeTrim: lengths of trim and zero go far beyond the payload's bound.
func TestHugeTrim(t *testing.T) {
	d := &hugeDevice{}
	_, path := serve(t, Options{}, Export{Device: d})
	c := attach(t, path, "", true)
	c.ok(request{cmd: cmdTrim, length: 1<<32 - 1}, nil)
	c.ok(request{cmd: cmdZeroes, offset: 1 << 60, length: 1<<32 - 1}, nil)
	if d.trimmed != 1<<32-1 || d.zeroed != 1<<32-1 {
		t.Fatal(d.trimmed, d.zeroed)
	}
	got := c.ok(request{cmd: cmdBlockStatus, length: 1<<32 - 1}, nil)
	if want := cat(be32(1), be32(1<<32-1), be32(3)); !bytes.Equal(got.data, want) {
		t.Fatalf("%x", got.data)
	}
}

type hugeDevice struct {
	Device
	trimmed, zeroed int64
}

func (d *hugeDevice) Size() int64                             { return 1 << 61 }
func (d *hugeDevice) Opened()                                 {}
func (d *hugeDevice) Closed()                                 {}
func (d *hugeDevice) WouldBlock() bool                        { return false }
func (d *hugeDevice) Trim(_, n int64, _ bool) error           { d.trimmed = n; return nil }
func (d *hugeDevice) WriteZeroes(_, n int64, _, _ bool) error { d.zeroed = n; return nil }
func (d *hugeDevice) Extents(_, _ int64) ([]Extent, error) {
	return []Extent{{1 << 40, true, true}}, nil
}

func TestBlockStatus(t *testing.T) {
	for _, stall := range []bool{false, true} {
		d := newRAM(t, 1<<20)
		d.stall.Store(stall)
		d.data[8192] = 1
		d.data[1<<20-1] = 1
		_, path := serve(t, Options{}, Export{Device: d})
		c := attach(t, path, "", true)
		hole, data := be32(3), be32(0)
		for _, x := range []struct {
			off   uint64
			n     uint32
			flags uint16
			want  []byte
		}{
			{0, 1 << 20, 0, cat(be32(8192), hole, be32(4096), data, be32(1<<20-12288-4096), hole, be32(4096), data)},
			{0, 1 << 20, cmdReqOne, cat(be32(8192), hole)},
			{100, 8192, 0, cat(be32(8092), hole, be32(100), data)},
			{8192, 1, 0, cat(be32(1), data)},
		} {
			got := c.ok(request{cmd: cmdBlockStatus, offset: x.off, length: x.n, flags: x.flags}, nil)
			if want := cat(be32(baseAllocationID), x.want); !bytes.Equal(got.data, want) || got.kind != chunkBlockStatus {
				t.Errorf("%+v: %x, want %x", x, got.data, want)
			}
		}
	}
}

func TestMerge(t *testing.T) {
	h, d := func(n int64) Extent { return Extent{n, true, true} }, func(n int64) Extent { return Extent{n, false, false} }
	for _, c := range []struct {
		in   []Extent
		n    int64
		want []Extent
	}{
		{nil, 5, []Extent{}},
		{[]Extent{h(3), h(4), d(1)}, 100, []Extent{h(7), d(1)}},
		{[]Extent{h(3), d(40), h(1)}, 10, []Extent{h(3), d(7)}},
		{[]Extent{h(10), h(1)}, 10, []Extent{h(10)}},
		{[]Extent{h(0), d(1)}, 10, []Extent{}},
		{[]Extent{h(1), d(-1), h(5)}, 10, []Extent{h(1)}},
		{[]Extent{{1, true, false}, {1, false, true}, h(1)}, 10, []Extent{{1, true, false}, {1, false, true}, h(1)}},
	} {
		if got := merge(c.in, c.n); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%v: %v, want %v", c.in, got, c.want)
		}
	}
}

// TestManyExtents: a reply is bounded; the client asks on.
func TestManyExtents(t *testing.T) {
	d := &checkered{newRAM(t, 64<<20)}
	d.history, d.calls = nil, nil
	_, path := serve(t, Options{}, Export{Device: d})
	c := attach(t, path, "", true)
	got := c.ok(request{cmd: cmdBlockStatus, length: 64 << 20}, nil)
	if len(got.data) != 4+maxDescriptors*descriptorSize {
		t.Fatal(len(got.data))
	}
}

// checkered has a hole in every other block.
type checkered struct{ *ramDevice }

func (d *checkered) Extents(_, n int64) (runs []Extent, err error) {
	for i := range n / 4096 {
		runs = append(runs, Extent{4096, i%2 == 0, i%2 == 0})
	}
	return runs, nil
}

// TestOutOfOrder: a stalled flush holds up nothing else.
func TestOutOfOrder(t *testing.T) {
	eachMode(t, func(t *testing.T, structured, stall bool) {
		d := newRAM(t, 1<<20)
		d.stall.Store(stall)
		release := make(chan struct{})
		d.hook = func(op string, _, _ int64) error {
			if op == "flush" || strings.HasSuffix(op, "-fua") {
				<-release
			}
			return nil
		}
		_, path := serve(t, Options{}, Export{Device: d})
		open := opener(t, release)
		c := attach(t, path, "", structured)
		waiting := map[uint64]bool{
			c.send(request{cmd: cmdFlush}, nil): true, c.send(request{cmd: cmdWrite, flags: cmdFUA, length: 1}, []byte{1}): true,
			c.send(request{cmd: cmdTrim, flags: cmdFUA, length: 1}, nil): true, c.send(request{cmd: cmdZeroes, flags: cmdFUA, length: 1}, nil): true,
		}
		for range 10 {
			c.ok(write(512, []byte("hello"), 0))
			c.ok(read(512, 5))
		}
		open()
		for len(waiting) > 0 {
			if r := c.receive(0); !waiting[r.cookie] || r.errno != 0 {
				t.Fatalf("%+v", r)
			} else {
				delete(waiting, r.cookie)
			}
		}
	})
}

// TestRepliesGoOutFirst: the reader has to wait for room to run a request; the
// replies it has collected do not wait with it.
func TestRepliesGoOutFirst(t *testing.T) {
	d := newRAM(t, 1<<20)
	release := make(chan struct{})
	d.hook = func(op string, _, _ int64) error {
		if op == "flush" {
			<-release
		}
		return nil
	}
	_, path := serve(t, Options{MaxInFlight: 1}, Export{Device: d})
	open := opener(t, release)
	c := attach(t, path, "", true)
	flush := requestBytes(request{cmd: cmdFlush, cookie: 1}, nil)
	c.write(cat(flush, requestBytes(request{cmd: cmdWrite, cookie: 2, length: 1}, []byte{1}), flush))
	if r := c.receive(0); r.cookie != 2 || r.errno != 0 {
		t.Fatalf("%+v", r)
	}
	open()
	for range 2 {
		if r := c.receive(0); r.cookie != 1 || r.errno != 0 {
			t.Fatalf("%+v", r)
		}
	}
}

// TestDisconnect: DISC ends the connection after what is running was answered.
func TestDisconnect(t *testing.T) {
	d := newRAM(t, 1<<20)
	release := make(chan struct{})
	d.hook = func(op string, _, _ int64) error {
		if op == "flush" {
			<-release
		}
		return nil
	}
	_, path := serve(t, Options{}, Export{Device: d})
	open := opener(t, release)
	c := attach(t, path, "", true)
	cookie := c.send(request{cmd: cmdFlush}, nil)
	c.ok(write(0, []byte("x"), 0))
	w := c.send(request{cmd: cmdWrite, length: 1}, []byte("y")) // its reply is in the batch when DISC comes
	c.send(request{cmd: cmdDisc}, nil)
	if r := c.receive(0); r.cookie != w {
		t.Fatalf("%+v", r)
	}
	if d.clients() != 1 {
		t.Fatal("closed with a request running")
	}
	open()
	if r := c.receive(0); r.cookie != cookie || r.errno != 0 {
		t.Fatalf("%+v", r)
	}
	c.wantEnd()
	eventually(t, "Closed", func() bool { return d.clients() == 0 })
}
