package nbd

import (
	"fmt"
	"io"
	"testing"
)

// BenchmarkRequest measures requests of 4 KiB over a unix socket, with so
// many in flight. The device costs nothing but a copy. The client allocates
// nothing, so allocations are the server's.
func BenchmarkRequest(b *testing.B) {
	for _, cmd := range []command{cmdRead, cmdWrite} {
		for _, depth := range []int{1, 32} {
			for _, stall := range []bool{false, true} {
				mode := "inline"
				if stall {
					mode = "beside"
				}
				b.Run(fmt.Sprintf("%s/depth=%d/%s", cmd, depth, mode), func(b *testing.B) { benchRequest(b, cmd, depth, stall) })
			}
		}
	}
}

func benchRequest(b *testing.B, cmd command, depth int, stall bool) {
	const n = 4096
	d := &nullDevice{data: make([]byte, 64<<20), stall: stall}
	_, path := serve(b, Options{}, Export{Device: d})
	c := attach(b, path, "", false)
	r := request{cmd: cmd, offset: 8192, length: n}
	out, in := requestBytes(r, nil), make([]byte, simpleSize)
	if cmd == cmdWrite {
		out = requestBytes(r, make([]byte, n))
	} else {
		in = make([]byte, simpleSize+n)
	}
	b.SetBytes(n)
	b.ReportAllocs()
	for warm := range 2 {
		rounds := 2000
		if warm == 1 {
			b.ResetTimer()
			rounds = b.N
		}
		window := make(chan struct{}, depth)
		go func() {
			for range rounds {
				window <- struct{}{}
				if _, err := c.nc.Write(out); err != nil {
					return
				}
			}
		}()
		for range rounds {
			if _, err := io.ReadFull(c.nc, in); err != nil {
				b.Fatal(err)
			}
			<-window
		}
	}
	b.StopTimer()
}

type nullDevice struct {
	Device
	data  []byte
	stall bool
}

func (d *nullDevice) Size() int64                               { return int64(len(d.data)) }
func (d *nullDevice) Opened()                                   {}
func (d *nullDevice) Closed()                                   {}
func (d *nullDevice) WouldBlock() bool                          { return d.stall }
func (d *nullDevice) ReadAt(p []byte, off int64) error          { copy(p, d.data[off:]); return nil }
func (d *nullDevice) WriteAt(p []byte, off int64, _ bool) error { copy(d.data[off:], p); return nil }

// TestInlineAllocatesNothing holds what the benchmark shows.
func TestInlineAllocatesNothing(t *testing.T) {
	if raceEnabled {
		t.Log("not measured with -race, where sync.Pool drops at random")
		return
	}
	for _, cmd := range []command{cmdRead, cmdWrite} {
		d := &nullDevice{data: make([]byte, 1<<20)}
		_, path := serve(t, Options{}, Export{Device: d})
		c := attach(t, path, "", false)
		r := request{cmd: cmd, offset: 8192, length: 4096}
		out, in := requestBytes(r, payloadFor(r)), make([]byte, simpleSize)
		if cmd == cmdRead {
			in = make([]byte, simpleSize+4096)
		}
		n := testing.AllocsPerRun(2000, func() {
			if _, err := c.nc.Write(out); err != nil {
				t.Fatal(err)
			}
			if _, err := io.ReadFull(c.nc, in); err != nil {
				t.Fatal(err)
			}
		})
		if n != 0 {
			t.Errorf("%s: %v allocations per request", cmd, n)
		}
	}
}
