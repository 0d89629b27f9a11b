package nbd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"sync/atomic"
	"time"
)

// Reasons why a connection ends that callers of drop give.
var (
	errClosing  = errors.New("server is closing")
	errRemoved  = errors.New("export was removed")
	errEvicted  = errors.New("too many connections in the handshake")
	errHungUp   = errors.New("client hung up")
	errFinished = errors.New("client has disconnected")
)

// conn is one connection. The reader goroutine owns all fields that are not
// said to be guarded.
type conn struct {
	srv *Server
	nc  net.Conn
	in  *input
	id  uint64
	// since is when the connection was accepted.
	since time.Time

	// Set by the handshake, then constant.
	noZeroes bool
	exp      *export
	limits   limits
	metaFor  *export // whose base:allocation is set

	out *buffer // batch of whole replies, not yet sent; nil when empty

	ctx    context.Context // ends with drop
	cancel context.CancelCauseFunc
	ended  chan struct{} // closed when nothing of the connection is left

	tasks sync.WaitGroup // requests beside the reader

	mu       sync.Mutex
	room     sync.Cond     // on mu: a task has ended, or gone was set
	gone     error         // why no new request may begin
	running  int           // tasks beside the reader
	changing int           // writes, zeroes and trims in progress
	quiet    chan struct{} // closed when gone is set and changing is 0
	isQuiet  bool

	wmu      sync.Mutex // held across a write to the socket
	deadline time.Time  // guarded by wmu: of writes

	stats struct{ requests, read, written atomic.Uint64 }
}

func newConn(s *Server, nc net.Conn, id uint64) *conn {
	c := &conn{srv: s, nc: nc, in: newInput(nc), id: id, since: time.Now(), ended: make(chan struct{}), quiet: make(chan struct{})}
	c.room.L = &c.mu
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	return c
}

// serve runs the connection from beginning to end and returns why it ended,
// nil if as the protocol has it.
func (c *conn) serve() error {
	err := c.handshake()
	if err == nil && c.exp != nil {
		err = c.attached()
	}
	c.drop(errors.Join(err, errFinished))
	return err
}

// attached is the connection's life from entering to leaving transmission.
func (c *conn) attached() error {
	if err := c.awaitLost(); err != nil {
		return err
	}
	dev := c.exp.Device
	dev.Opened()
	defer dev.Closed()
	defer c.tasks.Wait()
	err := c.transmit()
	if err != nil {
		c.drop(err)
		return err
	}
	// DISC: what is running may end and be answered.
	c.retire(errFinished)
	return c.flushOut()
}

// awaitLost waits until no change from a lost connection to the same export is
// running (see Invariants in the package's doc).
func (c *conn) awaitLost() error {
	for _, o := range c.srv.others(c) {
		if o.whyGone() == nil {
			if !hungUp(o.nc) {
				continue
			}
			o.drop(errHungUp)
		}
		select {
		case <-o.quiet:
		case <-c.ctx.Done():
			return context.Cause(c.ctx)
		}
	}
	return nil
}

// drop ends the connection hard: the socket is closed, nothing more is
// answered. Running requests are left to return. Any goroutine may call it.
func (c *conn) drop(why error) {
	c.retire(why)
	c.cancel(why)
	_ = c.nc.Close() // a socket that was closed before says so; nothing is lost
}

// retire lets no new request begin.
func (c *conn) retire(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone == nil {
		c.gone = why
	}
	c.checkQuietLocked()
	c.room.Broadcast()
}

func (c *conn) checkQuietLocked() {
	if c.gone != nil && c.changing == 0 && !c.isQuiet {
		c.isQuiet = true
		close(c.quiet)
	}
}

// whyGone is nil as long as new requests may begin.
func (c *conn) whyGone() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.gone
}

// beginChange is called before a request that changes the device is given to
// it; endChange when it has returned. In between a client that comes after
// this one is lost has to wait.
func (c *conn) beginChange() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.gone != nil {
		return c.gone
	}
	c.changing++
	return nil
}

func (c *conn) endChange() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.changing--
	c.checkQuietLocked()
}

// admit waits until a request that holds n bytes may run beside the reader,
// and returns what it was charged. Only the reader calls it, so that running
// can only fall meanwhile.
func (c *conn) admit(n int64) (charge int64, err error) {
	n += requestCost
	c.mu.Lock()
	defer c.mu.Unlock()
	for waited := false; ; waited = true {
		if c.gone != nil {
			return 0, c.gone
		}
		if c.running < c.srv.opts.MaxInFlight && c.srv.memory.try(n) {
			break
		}
		if !waited { // what waits to be sent must not wait with us
			c.mu.Unlock()
			err = c.flushOut()
			c.mu.Lock()
			if err != nil {
				return 0, err
			}
			continue
		}
		if c.running == 0 { // own reserve, or a turn of the budget
			if n, err = c.admitAlone(n); err != nil {
				return 0, err
			}
			break
		}
		c.room.Wait()
	}
	c.running++
	c.tasks.Add(1)
	return n, nil
}

// admitAlone admits a request of a connection that has none running, although
// the budget is exhausted.
func (c *conn) admitAlone(n int64) (charge int64, err error) {
	if n <= maxPiece+maxHead+requestCost {
		return 0, nil
	}
	c.mu.Unlock()
	err = c.srv.memory.wait(c.ctx, n)
	c.mu.Lock()
	if err != nil {
		return 0, fmt.Errorf("wait for memory: %w", context.Cause(c.ctx))
	}
	return n, nil
}

// discharge ends what admit began.
func (c *conn) discharge(charge int64) {
	c.srv.memory.give(charge)
	c.mu.Lock()
	c.running--
	c.room.Signal()
	c.mu.Unlock()
	c.tasks.Done()
}

// send writes whole replies to the socket. An error ends the connection, for
// part of a reply may have been sent.
func (c *conn) send(b []byte) error {
	c.wmu.Lock()
	defer c.wmu.Unlock()
	// Moving the deadline costs as much as a small write: do it now and then.
	timeout := c.srv.opts.WriteTimeout
	if now := time.Now(); c.deadline.Sub(now) < timeout/2 {
		c.deadline = now.Add(timeout)
		if err := c.nc.SetWriteDeadline(c.deadline); err != nil {
			return c.sendFailed(err)
		}
	}
	if _, err := c.nc.Write(b); err != nil {
		return c.sendFailed(err)
	}
	return nil
}

func (c *conn) sendFailed(err error) error {
	err = fmt.Errorf("send reply: %w", err)
	c.drop(err)
	return err
}

// flushOut sends the batch.
func (c *conn) flushOut() error {
	if c.out == nil {
		return nil
	}
	out := c.out
	c.out = nil
	err := c.send(out.b)
	out.release()
	return err
}

// reserve returns n bytes, at most maxPiece+maxHead, at the end of the batch;
// they belong to it once committed.
func (c *conn) reserve(n int) ([]byte, error) {
	if c.out != nil && len(c.out.b)+n > cap(c.out.b) {
		if err := c.flushOut(); err != nil {
			return nil, err
		}
	}
	if c.out == nil {
		c.out = getBuffer(maxPiece)
	}
	at := len(c.out.b)
	return c.out.b[at : at+n], nil
}

func (c *conn) commit(n int) { c.out.b = c.out.b[:len(c.out.b)+n] }

func (c *conn) info() Client {
	c.mu.Lock()
	running := c.running
	c.mu.Unlock()
	return Client{
		ID: c.id, Since: c.since, PID: peerPID(c.nc), Running: running,
		Requests: c.stats.requests.Load(), Read: c.stats.read.Load(), Written: c.stats.written.Load(),
	}
}
