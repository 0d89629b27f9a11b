package nbd

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"
	"time"
)

// TestFlushAcrossConnections: what one connection was told is written is
// durable once another one's FLUSH is answered; FUA makes its own write durable.
func TestFlushAcrossConnections(t *testing.T) {
	d := newRAM(t, 1<<20)
	_, path := serve(t, Options{}, Export{Device: d})
	a, b := attach(t, path, "", true), attach(t, path, "", false)
	if a.flags&txMultiConn == 0 {
		t.Fatal("CAN_MULTI_CONN is not announced")
	}
	a.ok(write(0, []byte("one"), 0))
	if !allZero(d.crash()) {
		t.Fatal("the test's disk has no volatile cache")
	}
	b.ok(request{cmd: cmdFlush}, nil)
	if got := d.crash(); string(got[:3]) != "one" {
		t.Fatalf("%q", got[:3])
	}
	a.ok(write(0, []byte("two"), 0))
	b.ok(write(512, []byte("fua"), cmdFUA))
	if got := d.crash(); string(got[:3]) != "one" || string(got[512:515]) != "fua" {
		t.Fatalf("%q %q", got[:3], got[512:515])
	}
	a.ok(request{cmd: cmdTrim, offset: 512, length: 3, flags: cmdFUA}, nil)
	b.ok(request{cmd: cmdZeroes, length: 3, flags: cmdFUA}, nil)
	if !allZero(d.crash()) {
		t.Fatal("trim or zero with FUA did not survive")
	}
	if got := b.ok(read(0, 3)); !allZero(got.data) {
		t.Fatalf("%q", got.data)
	}
}

// TestFlushRandom lets connections write, each to its own area, and flush at
// random. After each answered flush or FUA the crashed disk must hold what had been
// answered to all of them before the flush was sent.
func TestFlushRandom(t *testing.T) {
	seed := uint64(time.Now().UnixNano())
	t.Logf("seed %d", seed)
	const area, workers = 16 << 10, 4
	d := newRAM(t, area*workers)
	_, path := serve(t, Options{}, Export{Device: d})

	var mu sync.Mutex // guards answered: what each area must at least hold
	answered := make([]uint32, workers)
	var wg sync.WaitGroup
	for w := range workers {
		c := attach(t, path, "", w%2 == 0)
		wg.Go(func() {
			rnd := rand.New(rand.NewPCG(seed, uint64(w)))
			for n := uint32(1); n <= 150; n++ {
				if rnd.IntN(20) == 0 {
					d.stall.Store(!d.stall.Load())
				}
				flags := uint16(0)
				if rnd.IntN(4) == 0 {
					flags = cmdFUA
				}
				c.ok(write(uint64(w*area), bytes.Repeat(be32(n), area/4), flags))
				mu.Lock()
				answered[w] = n
				want := append([]uint32(nil), answered...)
				mu.Unlock()
				switch {
				case flags != 0:
					wantDurable(t, d.crash(), w, want[w], area)
				case rnd.IntN(3) == 0:
					c.ok(request{cmd: cmdFlush}, nil)
					left := d.crash()
					for w := range workers {
						wantDurable(t, left, w, want[w], area)
					}
				}
			}
		})
	}
	wg.Wait()
}

// wantDurable checks that an area holds version n or a later one.
func wantDurable(t *testing.T, left []byte, w int, n uint32, area int) {
	t.Helper()
	if got := left[w*area : w*area+4]; bytes.Compare(got, be32(n)) < 0 {
		t.Errorf("area %d holds %x, %x was durable", w, got, be32(n))
	}
}

// TestLargeFUA: a write longer than a piece is durable as a whole.
func TestLargeFUA(t *testing.T) {
	for _, stall := range []bool{false, true} {
		d := newRAM(t, 2<<20)
		d.stall.Store(stall)
		_, path := serve(t, Options{}, Export{Device: d})
		p := bytes.Repeat([]byte{7}, 1<<20)
		attach(t, path, "", true).ok(write(100, p, cmdFUA))
		if got := d.crash(); !bytes.Equal(got[100:100+1<<20], p) {
			t.Fatal("part of a FUA write is not durable")
		}
	}
}

// stalledWrite makes the first write at an offset hang until release is
// called. It must be called after serve, so that the server can end.
func stalledWrite(t *testing.T, d *ramDevice, at int64) (reached chan struct{}, release func()) {
	reached = make(chan struct{})
	released := make(chan struct{})
	release = sync.OnceFunc(func() { close(released) })
	t.Cleanup(release)
	var once sync.Once
	d.hook = func(op string, off, _ int64) error {
		if off == at && (op == "write" || op == "write-fua") {
			hang := false
			once.Do(func() { hang = true })
			if hang {
				close(reached)
				<-released
			}
		}
		return nil
	}
	return reached, release
}

// TestLostWriteComesFirst: the write of a client that is gone must not land on
// top of what its successor wrote. The successor waits for it, even when the
// server has not seen yet that the first one hung up, and the write is
// followed by others in its input.
func TestLostWriteComesFirst(t *testing.T) {
	for _, stall := range []bool{false, true} { // beside the reader, or the reader itself hangs
		for _, length := range []int{512, 512 << 10} {
			d := newRAM(t, 2<<20)
			d.stall.Store(stall)
			s, path := serve(t, Options{}, Export{Device: d})
			reached, release := stalledWrite(t, d, 0)
			first := attach(t, path, "", true)
			sent := make(chan struct{})
			go func() { // the socket may not take all of it
				defer close(sent)
				r, p := write(0, bytes.Repeat([]byte("old"), length/3+1)[:length], 0)
				_, _ = first.nc.Write(requestBytes(r, p))
				r, p = write(1<<20, []byte("old as well"), 0)
				_, _ = first.nc.Write(requestBytes(r, p))
			}()
			<-reached
			time.Sleep(5 * time.Millisecond)
			must(t, first.nc.Close())

			<-sent
			second := attach(t, path, "", true)
			second.send(write(0, []byte("new"), 0))
			second.send(write(1<<20, []byte("new too"), 0))
			eventually(t, "the hang-up is seen", func() bool { return s.lost() == 1 })
			if d.clients() != 1 {
				t.Fatal("the second client is attached while the first one's write is running")
			}
			release()
			for range 2 {
				if r := second.receive(0); r.errno != 0 {
					t.Fatalf("%+v", r)
				}
			}
			for off, want := range map[uint64]string{0: "new", 1 << 20: "new too"} {
				if got := second.ok(read(off, uint32(len(want)))); string(got.data) != want {
					t.Errorf("%q, want %q", got.data, want)
				}
			}
			if calls := d.take(); !stall && slices.Contains(calls, "write 1048576+11") {
				t.Errorf("a request was begun after the hang-up was seen: %v", calls)
			}
			must(t, second.nc.Close())
			eventually(t, "both gone", func() bool { return d.clients() == 0 })
		}
	}
}

// lost counts the connections that may begin no more requests.
func (s *Server) lost() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.byName {
		for c := range e.conns {
			if c.whyGone() != nil {
				n++
			}
		}
	}
	return n
}

// TestLiveWriteHoldsUpNobody: the same with a first client that is alive.
func TestLiveWriteHoldsUpNobody(t *testing.T) {
	d := newRAM(t, 1<<20)
	_, path := serve(t, Options{}, Export{Device: d})
	reached, release := stalledWrite(t, d, 0)
	first := attach(t, path, "", true)
	first.send(write(0, []byte("one"), cmdFUA))
	<-reached
	second := attach(t, path, "", true)
	second.ok(write(512, []byte("two"), 0))
	release()
	if r := first.receive(0); r.errno != 0 {
		t.Fatalf("%+v", r)
	}
}

// TestLostFlushHoldsUpNobody: a flush may hang for as long as the link is
// down; it changes nothing.
func TestLostFlushHoldsUpNobody(t *testing.T) {
	d := newRAM(t, 1<<20)
	release, reached := make(chan struct{}), make(chan struct{})
	d.hook = func(op string, _, _ int64) error {
		if op == "flush" {
			close(reached)
			<-release
		}
		return nil
	}
	_, path := serve(t, Options{}, Export{Device: d})
	open := opener(t, release)
	first := attach(t, path, "", true)
	for _, cmd := range []command{cmdWrite, cmdTrim, cmdZeroes} { // changes that are over, in each way
		for _, r := range []request{{cmd: cmd, length: 512}, {cmd: cmd, length: 512, flags: cmdFUA}, {cmd: cmd, length: 512 << 10}} {
			first.ok(r, payloadFor(r))
		}
	}
	first.send(request{cmd: cmdFlush}, nil)
	<-reached
	must(t, first.nc.Close())
	second := attach(t, path, "", true)
	second.ok(write(512, []byte("two"), 0))
	if n := d.clients(); n != 2 {
		t.Errorf("%d clients: Closed while a flush is running?", n)
	}
	open()
	eventually(t, "Closed", func() bool { return d.clients() == 1 })
}
