package raw

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"sync"
	"syscall"
)

// ErrDisconnected is wrapped by the error of a request whose reply never came:
// it may or may not have taken effect.
var ErrDisconnected = errors.New("the connection to the NBD server is gone")

// maxInFlight bounds the requests of one client; further callers wait.
const maxInFlight = 128

// Client is one connection to an NBD export. Its methods may be called by many
// goroutines at once; each keeps one request in flight. A server's error reply
// is returned as an error that wraps its syscall.Errno.
//
// One goroutine reads replies; it ends when the connection does, and Close and
// Kill wait for it. Lock order: send, then mu.
type Client struct {
	Info Info

	conn  net.Conn
	slots chan struct{}
	done  chan struct{} // closed when the reader has ended
	send  sync.Mutex    // one request on the socket at a time

	mu      sync.Mutex
	next    uint64
	waiting map[uint64]*request
	broken  error
}

type request struct {
	into  []byte // of a read
	reply chan error
}

// Dial connects to an export. network and address are as in package net
// ("unix" and a path, "tcp" and host:port).
func Dial(ctx context.Context, network, address, export string) (*Client, error) {
	conn, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, fmt.Errorf("connect to the NBD server: %w", err)
	}
	c, err := NewClient(ctx, conn, export)
	if err != nil {
		return nil, fmt.Errorf("NBD handshake on %s: %w", address, err)
	}
	return c, nil
}

// NewClient does the handshake on a connection; it owns conn from then on,
// whatever it returns.
func NewClient(ctx context.Context, conn net.Conn, export string) (*Client, error) {
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	info, err := Negotiate(conn, export)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	c := &Client{Info: info, conn: conn, slots: make(chan struct{}, maxInFlight), done: make(chan struct{}),
		waiting: map[uint64]*request{}}
	go c.read()
	return c, nil
}

// read hands replies to those who wait for them until the connection ends.
func (c *Client) read() {
	defer close(c.done)
	for {
		if err := c.readReply(); err != nil {
			c.fail(err)
			return
		}
	}
}

func (c *Client) readReply() error {
	var h [16]byte
	if _, err := io.ReadFull(c.conn, h[:]); err != nil {
		return fmt.Errorf("read a reply: %w", err)
	}
	be := binary.BigEndian
	if m := be.Uint32(h[:]); m != magicSimple {
		return fmt.Errorf("a reply begins with %08x", m)
	}
	cookie := be.Uint64(h[8:])
	r := c.take(cookie)
	if r == nil {
		return fmt.Errorf("a reply to request %d, which is not waiting", cookie)
	}
	// From here on nobody else answers r.
	if code := be.Uint32(h[4:]); code != 0 {
		r.reply <- fmt.Errorf("the NBD server answered: %w", syscall.Errno(code))
		return nil
	}
	if _, err := io.ReadFull(c.conn, r.into); err != nil {
		err = fmt.Errorf("read data: %w", err)
		r.reply <- fmt.Errorf("%w: %w", ErrDisconnected, err)
		return err
	}
	r.reply <- nil
	return nil
}

// take removes a waiting request.
func (c *Client) take(cookie uint64) *request {
	c.mu.Lock()
	defer c.mu.Unlock()
	r := c.waiting[cookie]
	delete(c.waiting, cookie)
	return r
}

// fail ends every waiting and later request.
func (c *Client) fail(cause error) {
	c.conn.Close()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken == nil {
		c.broken = fmt.Errorf("%w: %w", ErrDisconnected, cause)
	}
	for cookie, r := range c.waiting {
		r.reply <- c.broken
		delete(c.waiting, cookie)
	}
}

func (c *Client) register(r *request) (uint64, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.broken != nil {
		return 0, c.broken
	}
	c.next++
	c.waiting[c.next] = r
	return c.next, nil
}

// do sends one request and waits for its reply.
func (c *Client) do(cmd, flags uint16, off, n int64, data, into []byte) error {
	if off < 0 || n < 0 || n > 1<<32-1 {
		return fmt.Errorf("request of %d bytes at %d: %w", n, off, syscall.EINVAL)
	}
	c.slots <- struct{}{}
	defer func() { <-c.slots }()
	r := &request{into: into, reply: make(chan error, 1)}
	cookie, err := c.register(r)
	if err != nil {
		return err
	}
	if err := c.transmit(cmd, flags, cookie, off, n, data); err != nil {
		c.fail(err)
	}
	return <-r.reply
}

func (c *Client) transmit(cmd, flags uint16, cookie uint64, off, n int64, data []byte) error {
	be := binary.BigEndian
	h := be.AppendUint32(make([]byte, 0, 28), magicReq)
	h = be.AppendUint16(h, flags)
	h = be.AppendUint16(h, cmd)
	h = be.AppendUint64(h, cookie)
	h = be.AppendUint64(h, uint64(off))
	h = be.AppendUint32(h, uint32(n))
	c.send.Lock()
	defer c.send.Unlock()
	bufs := net.Buffers{h, data}
	if _, err := bufs.WriteTo(c.conn); err != nil {
		return fmt.Errorf("send a request: %w", err)
	}
	return nil
}

// ReadAt fills p.
func (c *Client) ReadAt(p []byte, off int64) (int, error) {
	if err := c.do(cmdRead, 0, off, int64(len(p)), nil, p); err != nil {
		return 0, err
	}
	return len(p), nil
}

// Write writes p; with fua its reply promises durability.
func (c *Client) Write(p []byte, off int64, fua bool) error {
	return c.do(cmdWrite, fuaFlag(fua), off, int64(len(p)), p, nil)
}

// Zero makes [off, off+n) read as zeros; noHole asks to keep the space.
func (c *Client) Zero(off, n int64, noHole, fua bool) error {
	f := fuaFlag(fua)
	if noHole {
		f |= flagNoHole
	}
	return c.do(cmdZeroes, f, off, n, nil, nil)
}

// Trim discards [off, off+n).
func (c *Client) Trim(off, n int64, fua bool) error {
	return c.do(cmdTrim, fuaFlag(fua), off, n, nil, nil)
}

// Flush makes every write that was answered before it durable.
func (c *Client) Flush() error { return c.do(cmdFlush, 0, 0, 0, nil, nil) }

func fuaFlag(fua bool) uint16 {
	if fua {
		return flagFUA
	}
	return 0
}

// Close says goodbye and waits for the connection's end. No request may be
// under way.
func (c *Client) Close() error {
	err := c.transmit(cmdDisc, 0, 0, 0, 0, nil)
	c.Kill()
	return err
}

// Kill drops the connection at once, as a crashed client does. Requests under
// way fail with ErrDisconnected.
func (c *Client) Kill() {
	c.conn.Close()
	<-c.done
}
