package wan

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// maxSleep bounds how long a writer sleeps without looking whether it should
// stop.
const maxSleep = 5 * time.Millisecond

// direction forwards what leaves one side. mu covers pipe and stopped.
type direction struct {
	from, to *os.File
	start    time.Time
	memory   int64
	wake     chan struct{} // capacity 1: something entered an empty pipe, or stop
	done     sync.WaitGroup

	mu      sync.Mutex
	pipe    *pipe
	stopped bool
	err     error
}

func newDirection(l *Link, s Side) *direction {
	return &direction{
		from: l.tun[s], to: l.tun[s.Peer()], start: l.start, memory: l.config.Memory,
		wake: make(chan struct{}, 1),
		pipe: newPipe(l.config.Params[s], l.config.Memory, l.config.Seed*2+uint64(s)),
	}
}

func (d *direction) run() {
	d.done.Go(d.read)
	d.done.Go(d.write)
}

// stop asks both goroutines to end; the reader does when its device is closed.
func (d *direction) stop() {
	d.mu.Lock()
	d.stopped = true
	d.mu.Unlock()
	d.poke()
}

// wait returns when both have ended, with what made one end early.
func (d *direction) wait() error {
	d.done.Wait()
	return d.err
}

func (d *direction) poke() {
	select {
	case d.wake <- struct{}{}:
	default:
	}
}

func (d *direction) now() int64 { return int64(time.Since(d.start)) }

// read moves packets from the device into the pipe.
func (d *direction) read() {
	big := make([]byte, maxPacket)
	for {
		n, err := d.from.Read(big)
		if err != nil {
			d.ended(err)
			return
		}
		buf := getBuffer(n)
		copy(buf, big[:n])
		d.mu.Lock()
		_, busy := d.pipe.next()
		d.pipe.enqueue(d.now(), buf)
		d.mu.Unlock()
		if !busy {
			d.poke()
		}
	}
}

// ended keeps the error of a device that was not closed by Close.
func (d *direction) ended(err error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.stopped || !errors.Is(err, fs.ErrClosed) {
		d.err = fmt.Errorf("read %s: %w", device, err)
	}
}

// write moves packets from the pipe to the other device when they are due. It
// sleeps in nanosleep(2) on a thread of its own, because the runtime's timers
// are only good to a millisecond.
func (d *direction) write() {
	runtime.LockOSThread() // never unlocked: the thread's timer slack goes with it
	// Without the smaller slack the line is 50 µs longer, nothing else.
	_ = unix.Prctl(unix.PR_SET_TIMERSLACK, 1, 0, 0, 0)
	for {
		buf, sleep, stopped := d.take()
		switch {
		case stopped:
			return
		case buf != nil:
			d.send(buf)
		case sleep < 0:
			<-d.wake
		default:
			ts := unix.NsecToTimespec(int64(min(sleep, maxSleep)))
			_ = unix.Nanosleep(&ts, nil) // an early return only looks again
		}
	}
}

// take returns a packet that is due, or how long to sleep; below 0 until woken.
func (d *direction) take() (buf []byte, sleep time.Duration, stopped bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	if buf, ok := d.pipe.deliver(now); ok {
		return buf, 0, d.stopped
	}
	at, ok := d.pipe.next()
	if !ok {
		return nil, -1, d.stopped
	}
	return nil, time.Duration(max(0, at-now)), d.stopped
}

func (d *direction) send(buf []byte) {
	if _, err := d.to.Write(buf); err != nil {
		_, segs := wireSize(buf)
		d.mu.Lock()
		d.pipe.stats.DropDevice += int64(segs)
		d.mu.Unlock()
	}
	putBuffer(buf)
}

func (d *direction) setCut(cut bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.pipe.setCut(cut)
}

func (d *direction) params() Params {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.pipe.params
}

func (d *direction) change(f func(*Params)) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	p := d.pipe.params
	f(&p)
	if err := p.check(d.memory); err != nil {
		return err
	}
	d.pipe.set(d.now(), p)
	return nil
}

func (d *direction) stats() Stats {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.pipe.stats
}

const (
	smallBuffer = 2 << 10
	largeFrom   = 32 << 10
)

// Buffers of the two sizes that make up nearly all traffic: acknowledgements
// and single segments, and long trains.
var small, large = sync.Pool{New: func() any { return new([smallBuffer]byte) }},
	sync.Pool{New: func() any { return new([maxPacket]byte) }}

func getBuffer(n int) []byte {
	switch {
	case n <= smallBuffer:
		return small.Get().(*[smallBuffer]byte)[:n]
	case n >= largeFrom:
		return large.Get().(*[maxPacket]byte)[:n]
	}
	return make([]byte, n)
}

// putBuffer takes back a buffer of a pool; others are left to the garbage collector.
func putBuffer(b []byte) {
	switch cap(b) {
	case smallBuffer:
		small.Put((*[smallBuffer]byte)(b[:smallBuffer]))
	case maxPacket:
		large.Put((*[maxPacket]byte)(b[:maxPacket]))
	}
}
