package sim

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"time"
)

// Net is a network in memory between one dialling and one listening site.
// Connections behave like TCP: bytes arrive in order, after a delay; a write
// blocks when too much is under way; a cut holds everything back without
// telling anyone; a killed connection is reset at both ends.
type Net struct {
	mu       sync.Mutex
	rng      *rand.Rand
	delay    time.Duration // one way
	jitter   time.Duration // at most so much more, at random
	room     int           // bytes under way per direction before a write blocks
	cut      bool
	listener *listener
	conns    []*Conn // dialled and not closed, in pairs
	next     int
	began    time.Time
}

// NewNet makes a network whose random choices come from seed.
func NewNet(seed uint64, delay, jitter time.Duration, room int) *Net {
	return &Net{rng: rand.New(rand.NewPCG(seed, 0x6e6574)), delay: delay, jitter: jitter, room: room, began: time.Now()}
}

// Listen replaces the listener; the former one's Accept ends.
func (n *Net) Listen() net.Listener {
	l := &listener{n: n, queue: make(chan *Conn, 256), done: make(chan struct{})}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.listener = l
	return l
}

// Dial connects to the listener. While the network is cut it waits for ctx.
func (n *Net) Dial(ctx context.Context) (net.Conn, error) {
	for {
		n.mu.Lock()
		cut, l, delay := n.cut, n.listener, n.delayLocked()
		n.mu.Unlock()
		if !cut {
			if err := sleep(ctx, 2*delay); err != nil {
				return nil, fmt.Errorf("dial: %w", err)
			}
			if l == nil {
				return nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
			}
			if c, err := n.connect(l); err != nil || c != nil {
				return c, err
			}
		}
		if err := sleep(ctx, 50*time.Millisecond); err != nil {
			return nil, fmt.Errorf("dial: %w", err)
		}
	}
}

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-t.C:
		return nil
	}
}

// connect makes a pair of ends; nil when the network was cut meanwhile.
func (n *Net) connect(l *listener) (net.Conn, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cut {
		return nil, nil
	}
	there, back := newPipe(n), newPipe(n)
	n.next++
	a := &Conn{n: n, id: n.next, in: back, out: there}
	b := &Conn{n: n, id: n.next, in: there, out: back}
	a.peer, b.peer = b, a
	select {
	case <-l.done:
		return nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
	case l.queue <- b:
		n.conns = append(n.conns, a)
		return a, nil
	default:
		return nil, fmt.Errorf("dial: %w", syscall.ECONNREFUSED)
	}
}

func (n *Net) delayLocked() time.Duration {
	d := n.delay
	if n.jitter > 0 {
		d += time.Duration(n.rng.Int64N(int64(n.jitter)))
	}
	return d
}

// Cut stops, or with false resumes, all traffic. Nobody is told.
func (n *Net) Cut(cut bool) {
	n.mu.Lock()
	n.cut = cut
	conns := append([]*Conn(nil), n.conns...)
	n.mu.Unlock()
	for _, c := range conns {
		c.in.look()
		c.out.look()
	}
}

// Kill resets one connection at random; false when there is none.
func (n *Net) Kill() bool {
	n.mu.Lock()
	var c *Conn
	if len(n.conns) > 0 {
		c = n.conns[n.rng.IntN(len(n.conns))]
	}
	n.mu.Unlock()
	if c == nil {
		return false
	}
	c.Reset()
	return true
}

// killData resets a connection that is not the oldest: on a link, a data connection.
func (n *Net) killData() bool {
	n.mu.Lock()
	var c *Conn
	if len(n.conns) > 1 {
		c = n.conns[1+n.rng.IntN(len(n.conns)-1)]
	}
	n.mu.Unlock()
	if c == nil {
		return false
	}
	c.Reset()
	return true
}

// DropAll takes every connection away. With silent neither end is told, as
// when a machine loses its power; otherwise both are reset.
func (n *Net) DropAll(silent bool) {
	n.mu.Lock()
	conns := n.conns
	n.conns = nil
	n.mu.Unlock()
	for _, c := range conns {
		if silent {
			c.in.vanish()
			c.out.vanish()
		} else {
			c.Reset()
		}
	}
}

// Conns is the number of open connections.
func (n *Net) Conns() int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return len(n.conns)
}

func (n *Net) forget(id int) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for i, c := range n.conns {
		if c.id == id {
			n.conns = append(n.conns[:i:i], n.conns[i+1:]...)
			return
		}
	}
}

type listener struct {
	n     *Net
	queue chan *Conn
	done  chan struct{}
	once  sync.Once
}

func (l *listener) Accept() (net.Conn, error) {
	select {
	case <-l.done:
		return nil, net.ErrClosed
	case c := <-l.queue:
		return c, nil
	}
}

func (l *listener) Close() error {
	l.once.Do(func() {
		close(l.done)
		for {
			select {
			case c := <-l.queue:
				c.Reset()
			default:
				return
			}
		}
	})
	return nil
}

func (l *listener) Addr() net.Addr { return addr("listener") }

type addr string

func (addr) Network() string  { return "sim" }
func (a addr) String() string { return string(a) }

// Conn is one end of a connection.
type Conn struct {
	n       *Net
	id      int
	in, out *pipe
	peer    *Conn
}

var _ net.Conn = (*Conn)(nil)

// Read reads what has arrived.
func (c *Conn) Read(p []byte) (int, error) { return c.in.read(p) }

// Write sends p.
func (c *Conn) Write(p []byte) (int, error) { return c.out.write(p) }

// Close ends the connection: the other end reads what was sent, then io.EOF.
func (c *Conn) Close() error {
	c.n.forget(c.id)
	c.out.finish()
	c.in.abandon()
	return nil
}

// Reset breaks the connection at both ends at once.
func (c *Conn) Reset() {
	c.n.forget(c.id)
	c.in.breakNow(syscall.ECONNRESET)
	c.out.breakNow(syscall.ECONNRESET)
}

// LocalAddr names the connection.
func (c *Conn) LocalAddr() net.Addr { return addr(fmt.Sprintf("conn-%d", c.id)) }

// RemoteAddr names the connection.
func (c *Conn) RemoteAddr() net.Addr { return addr(fmt.Sprintf("conn-%d", c.id)) }

// SetDeadline bounds reads and writes.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline bounds reads.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.in.setDeadline(&c.in.readBy, t) }

// SetWriteDeadline bounds writes.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.out.setDeadline(&c.out.writeBy, t) }

// pipe is one direction of a connection.
type pipe struct {
	n    *Net
	mu   sync.Mutex
	cond *sync.Cond

	parts    []part // under way, in order
	size     int
	last     time.Time // when the newest part arrives
	finished bool      // the writer closed; io.EOF after the last part
	gone     bool      // the reader closed
	lost     bool      // nothing arrives any more
	err      error     // reset
	readBy   time.Time
	writeBy  time.Time
}

type part struct {
	at   time.Time
	data []byte
}

func newPipe(n *Net) *pipe {
	p := &pipe{n: n}
	p.cond = sync.NewCond(&p.mu)
	return p
}

// held is the number of bytes under way.
func (p *pipe) held() int {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.size
}

func (p *pipe) look() {
	p.mu.Lock()
	p.cond.Broadcast()
	p.mu.Unlock()
}

func (p *pipe) set(f func()) {
	p.mu.Lock()
	f()
	p.cond.Broadcast()
	p.mu.Unlock()
}

func (p *pipe) finish() { p.set(func() { p.finished = true }) }

// abandon is the reader's close. The writer learns it with its next write.
func (p *pipe) abandon() { p.set(func() { p.gone = true }) }

func (p *pipe) vanish() { p.set(func() { p.lost = true }) }

func (p *pipe) breakNow(err error) {
	p.set(func() {
		if p.err == nil {
			p.err, p.parts, p.size = err, nil, 0
		}
	})
}

func (p *pipe) setDeadline(which *time.Time, t time.Time) error {
	p.set(func() { *which = t })
	if !t.IsZero() {
		time.AfterFunc(time.Until(t), p.look)
	}
	return nil
}

func past(t time.Time) bool { return !t.IsZero() && !time.Now().Before(t) }

func (n *Net) isCut() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.cut
}

func (p *pipe) read(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for {
		cut := p.lost || p.n.isCut()
		switch {
		case p.gone:
			return 0, net.ErrClosed
		case p.err != nil:
			return 0, p.err
		case past(p.readBy):
			return 0, os.ErrDeadlineExceeded
		case !cut && len(p.parts) > 0 && past(p.parts[0].at):
			return p.arrive(b), nil
		case !cut && len(p.parts) == 0 && p.finished:
			return 0, io.EOF
		}
		p.cond.Wait()
	}
}

func (p *pipe) arrive(b []byte) int {
	n := copy(b, p.parts[0].data)
	if p.size -= n; n == len(p.parts[0].data) {
		p.parts = p.parts[1:]
	} else {
		p.parts[0].data = p.parts[0].data[n:]
	}
	p.cond.Broadcast()
	return n
}

func (p *pipe) write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	done := 0
	for done < len(b) {
		cut := p.lost || p.n.isCut()
		switch {
		case p.finished:
			return done, net.ErrClosed
		case p.err != nil:
			return done, p.err
		case p.gone && !cut:
			return done, syscall.EPIPE
		case past(p.writeBy):
			return done, os.ErrDeadlineExceeded
		case p.size < p.n.room:
			n := min(len(b)-done, p.n.room-p.size)
			p.send(append([]byte(nil), b[done:done+n]...))
			done += n
			continue
		}
		p.cond.Wait()
	}
	return done, nil
}

func (p *pipe) send(data []byte) {
	p.n.mu.Lock()
	at := time.Now().Add(p.n.delayLocked())
	p.n.mu.Unlock()
	if at.Before(p.last) {
		at = p.last
	}
	p.last = at
	p.parts = append(p.parts, part{at, data})
	p.size += len(data)
	time.AfterFunc(time.Until(at), p.look)
}
