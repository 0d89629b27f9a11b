package nbd

import (
	"errors"
	"fmt"
	"io"
)

// maxDrain is how much payload of a refused write is read and dropped; a
// write of more ends the connection.
const maxDrain = 2 * MaxPayload

// besideFrom is the length from which a zero, trim or block status may take
// so long that it must not hold up the reader, bytes.
const besideFrom = 1 << 20

// transmit serves requests until DISC (nil), an error, or the end of input.
func (c *conn) transmit() error {
	if size := c.exp.Device.Size(); size != c.limits.size {
		return fmt.Errorf("export was resized from %d to %d bytes during the handshake", c.limits.size, size)
	}
	c.in.idle = c.flushOut
	for {
		p, err := c.in.peek(requestSize)
		if errors.Is(err, io.EOF) {
			return errHungUp
		}
		if err != nil {
			return fmt.Errorf("read request: %w", err)
		}
		r, err := decodeRequest(p)
		if err != nil {
			return err
		}
		c.in.consume(requestSize)
		c.stats.requests.Add(1)
		if r.cmd == cmdDisc {
			return nil
		}
		if err := c.handle(r); err != nil {
			return err
		}
	}
}

// handle serves one request, or starts it. An error ends the connection.
func (c *conn) handle(r request) error {
	if err := c.limits.check(r); err != nil {
		if r.cmd == cmdWrite {
			if r.length > maxDrain {
				return err
			}
			if err := c.in.skip(int64(r.length)); err != nil {
				return fmt.Errorf("read payload of a refused write: %w", noEOF(err))
			}
		}
		return c.answer(r, err)
	}
	switch {
	case r.cmd == cmdWrite && r.length > maxPiece:
		return c.writeLarge(r)
	case r.cmd == cmdWrite:
		return c.writeSmall(r)
	case c.mayBlock(r):
		return c.start(r, nil)
	case r.cmd == cmdRead:
		return c.readInline(r)
	case r.cmd == cmdBlockStatus:
		return c.statusInline(r)
	}
	return c.change(r, func() error { return c.apply(r) })
}

// mayBlock says whether r has to run beside the reader.
func (c *conn) mayBlock(r request) bool {
	switch r.cmd {
	case cmdFlush:
		return true
	case cmdRead:
		// What must not be fragmented is charged to the budget: see read.
		if r.length > maxPiece && !c.fragments(r) {
			return true
		}
	case cmdTrim, cmdZeroes, cmdBlockStatus:
		if r.length > besideFrom {
			return true
		}
	}
	return r.mutates() && r.fua() || c.exp.Device.WouldBlock()
}

// fragments says whether a read may be answered in several chunks.
func (c *conn) fragments(r request) bool { return c.limits.structured && !r.df() }

// apply hands a request without payload, and without data in its reply, to the device.
func (c *conn) apply(r request) error {
	dev, off, n, fua := c.exp.Device, int64(r.offset), int64(r.length), r.fua()
	switch r.cmd {
	case cmdFlush:
		return dev.Flush()
	case cmdTrim:
		return dev.Trim(off, n, fua)
	}
	return dev.WriteZeroes(off, n, r.flags&cmdNoHole != 0, fua)
}

// change runs a request that changes the device in the reader, and answers it.
func (c *conn) change(r request, do func() error) error {
	if err := c.beginChange(); err != nil {
		return err
	}
	err := do()
	c.endChange()
	return c.answer(r, err)
}

// answer puts the reply to r into the batch. ErrGone is not answered: it ends
// the connection.
func (c *conn) answer(r request, err error) error {
	if errors.Is(err, ErrGone) {
		return err
	}
	b, rerr := c.reserve(maxAnswerSize)
	if rerr != nil {
		return rerr
	}
	c.commit(len(appendAnswer(b[:0], c.limits.structured, r, err)))
	return nil
}

// writeSmall serves a write that fits into the input buffer. Inline, it goes
// to the device from there.
func (c *conn) writeSmall(r request) error {
	n := int(r.length)
	p, err := c.in.peek(n)
	if err != nil {
		return fmt.Errorf("read payload: %w", noEOF(err))
	}
	c.stats.written.Add(uint64(n))
	if !c.mayBlock(r) {
		if err := c.beginChange(); err != nil {
			return err
		}
		err := c.exp.Device.WriteAt(p, int64(r.offset), false)
		c.endChange()
		c.in.consume(n)
		return c.answer(r, err)
	}
	err = c.start(r, p)
	c.in.consume(n)
	return err
}

// readInline reads straight into the batch.
func (c *conn) readInline(r request) error {
	if r.length == 0 {
		return c.answer(r, nil)
	}
	head := dataHead(c.limits.structured)
	for off, left := int64(r.offset), int64(r.length); left > 0; {
		n := pieceLen(off, left)
		b, err := c.reserve(head + int(n))
		if err != nil {
			return err
		}
		if err := c.exp.Device.ReadAt(b[head:], off); err != nil {
			return c.answer(r, err)
		}
		putDataHead(b[:head], c.limits.structured, r, off, int(n), n == left)
		c.commit(len(b))
		off, left = off+n, left-n
	}
	c.stats.read.Add(uint64(r.length))
	return nil
}

func (c *conn) statusInline(r request) error {
	runs, err := c.extents(r)
	if err != nil {
		return c.answer(r, err)
	}
	b, err := c.reserve(statusSize)
	if err != nil {
		return err
	}
	c.commit(len(appendBlockStatus(b[:0], r, runs)))
	return nil
}

// statusSize is the size of the largest reply to block status.
const statusSize = chunkSize + 4 + maxDescriptors*descriptorSize

func (c *conn) extents(r request) ([]Extent, error) {
	runs, err := c.exp.Device.Extents(int64(r.offset), int64(r.length))
	if err != nil {
		return nil, err
	}
	if runs = merge(runs, int64(r.length)); len(runs) == 0 {
		return nil, refuse(errIO, "the device does not know its extents")
	}
	return runs, nil
}
