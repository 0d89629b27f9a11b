package nbd

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"runtime"
	"sync"
	"testing"
	"time"
)

// TestHalfSentHeaders: whatever the client breaks off in, the server ends the
// connection and is well.
func TestHalfSentHeaders(t *testing.T) {
	d := newRAM(t, 1<<20)
	_, path := serve(t, Options{}, Export{Device: d})
	witness := attach(t, path, "", true)
	r, p := write(0, []byte("never"), 0)
	whole := cat(be32(3), optionBytes(optStructured, nil), optionBytes(optGo, infoData("")), requestBytes(request{cmd: cmdRead, length: 1}, nil), requestBytes(r, p))
	for n := range len(whole) {
		nc, err := net.Dial("unix", path)
		must(t, err)
		must(t, nc.SetDeadline(time.Now().Add(testTimeout)))
		_, err = nc.Write(whole[:n])
		must(t, err)
		must(t, nc.(*net.UnixConn).CloseWrite())
		_, err = io.Copy(io.Discard, nc)
		if err != nil && !errors.Is(err, io.EOF) {
			var timeout net.Error
			if errors.As(err, &timeout) && timeout.Timeout() {
				t.Fatalf("not ended after %d bytes", n)
			}
		}
		must(t, nc.Close())
	}
	eventually(t, "all gone", func() bool { return d.clients() == 1 })
	for _, call := range d.take() {
		if call != "read 0+1" {
			t.Errorf("%s: a write whose payload did not arrive", call)
		}
	}
	witness.ok(read(0, 1))
}

func TestBadRequestMagic(t *testing.T) {
	d := newRAM(t, 4096)
	_, path := serve(t, Options{}, Export{Device: d})
	c := attach(t, path, "", true)
	c.write(bytes.Repeat([]byte{0x55}, requestSize))
	c.wantEnd()
	if calls := d.take(); len(calls) != 0 {
		t.Error(calls)
	}
}

// TestRefusedLargeWrite: some payload is skipped, a lot ends the connection.
func TestRefusedLargeWrite(t *testing.T) {
	d := newRAM(t, 4096)
	_, path := serve(t, Options{}, Export{Device: d})
	c := attach(t, path, "", true)
	if r := c.call(request{cmd: cmdWrite, length: maxDrain}, make([]byte, maxDrain)); r.errno != errInval {
		t.Fatalf("%+v", r)
	}
	c.ok(read(0, 1))
	c.send(request{cmd: cmdWrite, length: maxDrain + 1}, nil)
	c.wantEnd()
}

// TestDisconnectInPayload: nothing changes if the payload is one piece; a
// longer one leaves whole pieces at most, and never a reply.
func TestDisconnectInPayload(t *testing.T) {
	for _, stall := range []bool{false, true} {
		for _, length := range []int{1000, maxPiece, maxPiece + 1, 1 << 20} {
			d := newRAM(t, 2<<20)
			d.stall.Store(stall)
			_, path := serve(t, Options{}, Export{Device: d})
			c := attach(t, path, "", true)
			p := bytes.Repeat([]byte{9}, length)
			c.write(requestBytes(request{cmd: cmdWrite, length: uint32(length), flags: cmdFUA}, p[:length-1]))
			must(t, c.nc.Close())
			eventually(t, "gone", func() bool { return d.clients() == 0 })
			for _, call := range d.take() {
				if length <= maxPiece || call == "flush 0+0" {
					t.Errorf("%d bytes: %s", length, call)
				}
			}
		}
	}
}

// TestThousandIdleConnections: they come and stay silent, in the handshake or
// half-way into it. Others are served, and newcomers too; memory and
// goroutines stay bounded.
func TestThousandIdleConnections(t *testing.T) {
	d := newRAM(t, 1<<20)
	_, path := serve(t, Options{HandshakeTimeout: time.Hour}, Export{Device: d})
	c := attach(t, path, "", true)
	before := runtime.NumGoroutine()
	for i := range 1000 {
		nc, err := net.Dial("unix", path)
		must(t, err)
		t.Cleanup(func() { _ = nc.Close() })
		switch i % 3 {
		case 1:
			_, err = nc.Write(be32(3))
		case 2:
			_, err = nc.Write(cat(be32(3), be64(optionMagic), be32(uint32(optGo)), be32(maxOptionData)))
		}
		if err != nil && i < 900 { // an old one may have been evicted meanwhile
			must(t, err)
		}
		if i%100 == 0 {
			c.ok(write(0, []byte("alive"), cmdFUA))
		}
	}
	attach(t, path, "", true).ok(read(0, 5))
	eventually(t, "the oldest evicted", func() bool { return runtime.NumGoroutine() <= before+70 })
	c.ok(read(0, 5))
}

// TestStallingWriters: clients announce 32 MiB each, send a little and stall.
// That holds no memory of the budget, and does nobody harm.
func TestStallingWriters(t *testing.T) {
	d := newRAM(t, 64<<20)
	d.history, d.calls = nil, nil
	d.stall.Store(true)
	s, path := serve(t, Options{MaxMemory: 1, MaxClients: 50}, Export{Device: d})
	var before, after runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&before)
	for i := range 40 {
		c := attach(t, path, "", i%2 == 0)
		c.send(request{cmd: cmdWrite, length: MaxPayload}, make([]byte, maxPiece/2))
	}
	c := attach(t, path, "", false)
	p := make([]byte, 2<<20)
	for range 4 {
		c.ok(write(0, p, cmdFUA))
		c.ok(read(0, 2<<20)) // not fragmented: needs its turn of the budget
	}
	eventually(t, "the budget free, whatever the writers do", func() bool { return s.memory.try(MaxPayload) })
	s.memory.give(MaxPayload)
	runtime.GC()
	runtime.ReadMemStats(&after)
	if grown := int64(after.HeapAlloc) - int64(before.HeapAlloc); grown > 60<<20 {
		t.Errorf("heap grew by %d bytes", grown)
	}
}

// TestStalledDeviceDoesNotStarveOthers: one device is stalled and its clients
// have filled the common budget; another server goes on.
func TestStalledDeviceDoesNotStarveOthers(t *testing.T) {
	budget := NewBudget(0) // one large request
	stalled, well := newRAM(t, 64<<20), newRAM(t, 1<<20)
	stalled.history, stalled.calls = nil, nil
	release := make(chan struct{})
	stalled.stall.Store(true)
	stalled.hook = func(string, int64, int64) error { <-release; return nil }
	_, path := serve(t, Options{Budget: budget, MaxMemory: 1 << 30}, Export{Device: stalled})
	open := opener(t, release)
	_, path2 := serve(t, Options{Budget: budget}, Export{Device: well})
	hog := attach(t, path, "", true)
	go func() { // fills the budget, then blocks
		for i := range 200 {
			r, p := write(uint64(i*maxPiece), make([]byte, maxPiece), 0)
			if _, err := hog.nc.Write(requestBytes(r, p)); err != nil {
				return
			}
		}
	}()
	eventually(t, "budget exhausted", func() bool {
		ok := budget.sem.TryAcquire(maxPiece + requestCost)
		if ok {
			budget.sem.Release(maxPiece + requestCost)
		}
		return !ok
	})
	for _, stall := range []bool{false, true} {
		well.stall.Store(stall)
		c := attach(t, path2, "", true)
		for i := range 8 {
			c.ok(write(uint64(i), make([]byte, 512<<10), cmdFUA))
			c.readAll(request{cmd: cmdRead, length: 1 << 20})
		}
	}
	open()
}

// TestHogOfAPartLeavesTheRest: one VM's device is stalled, and its clients fill
// all that the VM may have, through two servers. Another VM's reads that must
// not be fragmented, which no reserve serves, go on.
func TestHogOfAPartLeavesTheRest(t *testing.T) {
	floor := int64(MaxPayload + maxHead + requestCost)
	whole := NewBudget(2 * floor)
	part := whole.Part(floor)
	release, well := make(chan struct{}), newRAM(t, 4<<20)
	var hogs []*client
	for range 2 {
		stalled := newRAM(t, 64<<20)
		stalled.history, stalled.calls = nil, nil
		stalled.stall.Store(true)
		stalled.hook = func(string, int64, int64) error { <-release; return nil }
		_, path := serve(t, Options{Budget: part}, Export{Device: stalled})
		hogs = append(hogs, attach(t, path, "", true))
	}
	open := opener(t, release)
	_, path := serve(t, Options{Budget: whole.Part(floor)}, Export{Device: well})
	for _, hog := range hogs {
		go func() { // fills the part, then blocks
			for i := range 200 {
				r, p := write(uint64(i*maxPiece), make([]byte, maxPiece), 0)
				if _, err := hog.nc.Write(requestBytes(r, p)); err != nil {
					return
				}
			}
		}()
	}
	eventually(t, "part exhausted", func() bool {
		ok := part.try(maxPiece + requestCost)
		if ok {
			part.give(maxPiece + requestCost)
		}
		return !ok
	})
	c := attach(t, path, "", false)
	for range 4 {
		c.ok(read(0, 4<<20))
	}
	open()
}

// TestLargeReadWaitsForBudget: it is served when memory comes back, and given
// up when the client goes.
func TestLargeReadWaitsForBudget(t *testing.T) {
	d := newRAM(t, 4<<20)
	s, path := serve(t, Options{MaxMemory: 1}, Export{Device: d})
	all := int64(MaxPayload + maxHead + requestCost)
	if !s.memory.try(all) {
		t.Fatal("memory is in use")
	}
	goes, stays := attach(t, path, "", false), attach(t, path, "", false)
	for _, c := range []*client{goes, stays} {
		c.send(request{cmd: cmdRead, length: 1 << 20}, nil)
	}
	small := attach(t, path, "", false)
	small.ok(read(0, 10)) // on the connection's reserve
	small.ok(request{cmd: cmdFlush}, nil)
	must(t, small.nc.Close())
	eventually(t, "both read the request", func() bool {
		n := uint64(0)
		for _, c := range s.Clients("") {
			n += c.Requests
		}
		return n == 2 && d.clients() == 2
	})
	must(t, goes.nc.Close())
	s.memory.give(all)
	if r := stays.receive(1 << 20); r.errno != 0 {
		t.Fatalf("%+v", r)
	}
	eventually(t, "gone", func() bool { return d.clients() == 1 })
	eventually(t, "memory given back", func() bool { return s.memory.try(all) }) // after the reply was sent
	last := attach(t, path, "", false)
	last.send(request{cmd: cmdRead, length: 1 << 20}, nil)
	eventually(t, "waiting", func() bool { return s.Clients("")[1].Requests == 1 })
	s.Close() // while it waits
	last.wantEnd()
}

// TestMaxInFlight: one connection cannot run more than so many requests.
func TestMaxInFlight(t *testing.T) {
	d := newRAM(t, 1<<20)
	release := make(chan struct{})
	d.hook = func(string, int64, int64) error { <-release; return nil }
	_, path := serve(t, Options{MaxInFlight: 8}, Export{Device: d})
	open := opener(t, release)
	c := attach(t, path, "", true)
	for range 100 {
		c.send(request{cmd: cmdFlush}, nil)
	}
	eventually(t, "8 running", func() bool { return len(d.callsNow()) == 8 })
	time.Sleep(20 * time.Millisecond)
	open()
	for range 100 {
		if r := c.receive(0); r.errno != 0 {
			t.Fatalf("%+v", r)
		}
	}
	if d.maxRun != 8 {
		t.Errorf("%d requests ran at once", d.maxRun)
	}
}

// TestClientThatNeverReads asks for gigabytes and reads nothing. It is
// dropped; others are not held up meanwhile.
func TestClientThatNeverReads(t *testing.T) {
	for _, stall := range []bool{false, true} {
		d := newRAM(t, 1<<20)
		d.history, d.calls = nil, nil
		d.stall.Store(stall)
		_, path := serve(t, Options{WriteTimeout: 400 * time.Millisecond}, Export{Device: d})
		rude, polite := attach(t, path, "", true), attach(t, path, "", true)
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			b := bytes.Repeat(requestBytes(request{cmd: cmdRead, length: 1 << 20}, nil), 1000)
			for {
				if _, err := rude.nc.Write(b); err != nil {
					return
				}
			}
		}()
		for waiting := true; waiting; {
			select {
			case <-ended:
				waiting = false
			default:
				polite.ok(write(0, []byte("polite"), cmdFUA))
			}
		}
		eventually(t, "rude client gone", func() bool { return d.clients() == 1 })
		polite.ok(read(0, 6))
	}
}

// TestRandomDisconnects: clients work at random and vanish at any moment;
// afterwards nothing is left of them.
func TestRandomDisconnects(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	d := newRAM(t, 4<<20)
	d.history, d.calls = nil, nil
	before := runtime.NumGoroutine()
	s, path := serve(t, Options{MaxInFlight: 4, MaxMemory: 1}, Export{Device: d})
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			for range 25 {
				randomSession(t, rnd, d, path)
			}
		})
	}
	wg.Wait()
	eventually(t, "all gone", func() bool { return d.clients() == 0 })
	if !s.memory.try(MaxPayload) {
		t.Error("part of the budget was not given back")
	} else {
		s.memory.give(MaxPayload)
	}
	s.Close()
	settle(t, before+1) // Serve's caller
}

func randomSession(t *testing.T, rnd *rand.Rand, d *ramDevice, path string) {
	c := attach(t, path, "", rnd.IntN(2) == 0)
	var b []byte
	for range 1 + rnd.IntN(20) {
		r := request{cmd: command(rnd.IntN(9)), flags: uint16(rnd.IntN(4)), length: uint32(rnd.IntN(1 << 19)), offset: uint64(rnd.IntN(1 << 20))}
		b = append(b, requestBytes(r, payloadFor(r))...)
	}
	d.stall.Store(rnd.IntN(2) == 0)
	part := b[:rnd.IntN(len(b))]
	go func() { _, _ = c.nc.Write(part) }() // may block until the close
	time.Sleep(time.Duration(rnd.IntN(5)) * time.Millisecond)
	if err := c.nc.Close(); err != nil {
		t.Error(err)
	}
}
