package nbd

import (
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
)

// ramOp is one change, and whether it would survive a crash.
type ramOp struct {
	off     int64
	p       []byte
	durable bool
}

// ramDevice is a disk with a volatile cache. With history it remembers every
// change, so that crash can tell exactly what FLUSH and FUA have made durable.
// It fails the test when the server breaks the contract of Device.
type ramDevice struct {
	t     testing.TB
	stall atomic.Bool // WouldBlock
	// hook runs before each call, without locks; an error is the call's result.
	hook func(op string, off, n int64) error

	mu      sync.Mutex
	data    []byte
	history []*ramOp // nil: not kept
	calls   []string // nil: not kept
	opened  int
	closed  int
	running int
	maxRun  int
	size    int64 // lie about the size when not 0
}

func newRAM(t testing.TB, size int) *ramDevice {
	return &ramDevice{t: t, data: make([]byte, size), history: []*ramOp{}, calls: []string{}}
}

func (d *ramDevice) Size() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.size != 0 {
		return d.size
	}
	return int64(len(d.data))
}

func (d *ramDevice) WouldBlock() bool { return d.stall.Load() }

func (d *ramDevice) Opened() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.opened++
}

func (d *ramDevice) Closed() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.closed++
	if d.closed > d.opened || d.closed == d.opened && d.running > 0 {
		d.t.Errorf("closed %d times, opened %d times, %d requests running", d.closed, d.opened, d.running)
	}
}

// clients is how many are attached.
func (d *ramDevice) clients() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.opened - d.closed
}

// begin and end surround every call.
func (d *ramDevice) begin(op string, off, n int64) error {
	d.mu.Lock()
	if d.opened == d.closed {
		d.t.Errorf("%s without a client", op)
	}
	if off < 0 || n < 0 || off+n > int64(len(d.data)) || n > maxPiece && (op == "read" || op == "write") {
		d.t.Errorf("%s of %d bytes at %d", op, n, off)
	}
	d.running++
	d.maxRun = max(d.maxRun, d.running)
	if d.calls != nil {
		d.calls = append(d.calls, fmt.Sprintf("%s %d+%d", op, off, n))
	}
	d.mu.Unlock()
	if d.hook != nil {
		return d.hook(op, off, n)
	}
	return nil
}

func (d *ramDevice) end() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.running--
}

func (d *ramDevice) ReadAt(p []byte, off int64) error {
	defer d.end()
	if err := d.begin("read", off, int64(len(p))); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	copy(p, d.data[off:])
	return nil
}

func (d *ramDevice) WriteAt(p []byte, off int64, fua bool) error {
	return d.change(opName("write", fua), p, off, int64(len(p)), fua)
}

func (d *ramDevice) WriteZeroes(off, n int64, noHole, fua bool) error {
	op := "zero"
	if noHole {
		op = "zero-nohole"
	}
	return d.change(opName(op, fua), nil, off, n, fua)
}

func (d *ramDevice) Trim(off, n int64, fua bool) error {
	return d.change(opName("trim", fua), nil, off, n, fua)
}

func opName(op string, fua bool) string {
	if fua {
		return op + "-fua"
	}
	return op
}

func (d *ramDevice) change(op string, p []byte, off, n int64, fua bool) error {
	defer d.end()
	if err := d.begin(op, off, n); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if p == nil {
		clear(d.data[off : off+n])
	} else {
		copy(d.data[off:], p)
	}
	if d.history != nil {
		d.history = append(d.history, &ramOp{off, append([]byte(nil), d.data[off:off+n]...), fua})
	}
	return nil
}

// Flush makes durable what had been changed when it was called, not more.
func (d *ramDevice) Flush() error {
	d.mu.Lock()
	before := len(d.history)
	d.mu.Unlock()
	defer d.end()
	if err := d.begin("flush", 0, 0); err != nil {
		return err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, op := range d.history[:before] {
		op.durable = true
	}
	return nil
}

// Extents calls each block of 4096 bytes a hole when it holds zeros.
func (d *ramDevice) Extents(off, n int64) ([]Extent, error) {
	defer d.end()
	if err := d.begin("extents", off, n); err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var runs []Extent
	for n > 0 {
		k := min(n, 4096-off%4096)
		hole := allZero(d.data[off-off%4096 : min(off-off%4096+4096, int64(len(d.data)))])
		runs = append(runs, Extent{Length: k, Hole: hole, Zero: hole})
		off, n = off+k, n-k
	}
	return runs, nil
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// crash returns what is left after a power loss of the meanest kind.
func (d *ramDevice) crash() []byte {
	d.mu.Lock()
	defer d.mu.Unlock()
	left := make([]byte, len(d.data))
	for _, op := range d.history {
		if op.durable {
			copy(left[op.off:], op.p)
		}
	}
	return left
}

// take returns the calls since the last time.
func (d *ramDevice) take() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	calls := d.calls
	d.calls = []string{}
	return calls
}
