package nbd

import (
	"errors"
	"sync"
)

// task is a request, or a piece of a write, that runs beside the reader.
type task struct {
	c      *conn
	r      request
	buf    *buffer // payload of a write; room for the reply else
	large  *largeWrite
	off    int64 // of the payload
	charge int64
}

var tasks = sync.Pool{New: func() any { return new(task) }}

// start runs r, with its payload if it is a write, in a goroutine of its own.
func (c *conn) start(r request, payload []byte) error {
	if r.mutates() {
		if err := c.beginChange(); err != nil {
			return err
		}
	}
	t, err := c.prepare(r, payload)
	if err != nil {
		if r.mutates() {
			c.endChange()
		}
		return err
	}
	go t.run()
	return nil
}

// prepare admits a task and gives it its memory. A copy is taken of payload.
func (c *conn) prepare(r request, payload []byte) (*task, error) {
	need := c.taskMemory(r, len(payload))
	charge, err := c.admit(int64(need))
	if err != nil {
		return nil, err
	}
	t := tasks.Get().(*task)
	*t = task{c: c, r: r, buf: getBuffer(need), off: int64(r.offset), charge: charge}
	t.buf.b = append(t.buf.b, payload...)
	return t, nil
}

// taskMemory is the size of the buffer a task needs, bytes.
func (c *conn) taskMemory(r request, payload int) int {
	switch {
	case r.cmd == cmdBlockStatus:
		return statusSize
	case r.cmd == cmdRead && c.fragments(r):
		return int(min(r.length, maxPiece))
	case r.cmd == cmdRead:
		return int(r.length)
	}
	return max(payload, maxAnswerSize)
}

// finish gives back what prepare took.
func (t *task) finish() {
	c, charge := t.c, t.charge
	t.buf.release()
	*t = task{}
	tasks.Put(t)
	c.discharge(charge)
}

func (t *task) run() {
	defer t.finish()
	c, r := t.c, t.r
	switch {
	case t.large != nil:
		t.large.done(t, t.write(false))
	case r.cmd == cmdRead:
		t.read()
	case r.cmd == cmdBlockStatus:
		t.status()
	default:
		var err error
		if r.cmd == cmdWrite {
			err = t.write(r.fua())
		} else {
			err = c.apply(r)
		}
		if r.mutates() {
			c.endChange()
		}
		t.answer(err)
	}
}

// write hands the payload to the device.
func (t *task) write(fua bool) error {
	return t.c.exp.Device.WriteAt(t.buf.b, t.off, fua)
}

// answer sends the reply without data. ErrGone is not answered but ends the
// connection. A connection that is lost needs none.
func (t *task) answer(err error) {
	if errors.Is(err, ErrGone) {
		t.c.drop(err)
		return
	}
	t.buf.b = appendAnswer(t.buf.b[:0], t.c.limits.structured, t.r, err)
	t.send(t.buf.b)
}

// send sends a reply. Its error has ended the connection, which says so.
func (t *task) send(b []byte) bool { return t.c.send(b) == nil }

func (t *task) status() {
	runs, err := t.c.extents(t.r)
	if err != nil {
		t.answer(err)
		return
	}
	t.send(appendBlockStatus(t.buf.b[:0], t.r, runs))
}

// read answers a read: in pieces, or in one where it must not be fragmented.
func (t *task) read() {
	c, r := t.c, t.r
	if r.length == 0 {
		t.answer(nil)
		return
	}
	head := dataHead(c.limits.structured)
	for off, left := int64(r.offset), int64(r.length); left > 0; {
		n := left
		if c.fragments(r) {
			n = pieceLen(off, left)
		}
		b := t.buf.b[:head+int(n)]
		if err := t.fill(b[head:], off); err != nil {
			t.answer(err)
			return
		}
		putDataHead(b[:head], c.limits.structured, r, off, int(n), n == left)
		if !t.send(b) {
			return
		}
		off, left = off+n, left-n
	}
	c.stats.read.Add(uint64(r.length))
}

// fill reads p from the device, piece by piece.
func (t *task) fill(p []byte, off int64) error {
	for len(p) > 0 {
		n := pieceLen(off, int64(len(p)))
		if err := t.c.exp.Device.ReadAt(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return nil
}
