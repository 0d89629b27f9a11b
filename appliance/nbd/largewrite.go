package nbd

import (
	"errors"
	"fmt"
	"sync"
)

// largeWrite is a write of more than maxPiece bytes. Its pieces go to the
// device as they arrive; who finishes last answers.
type largeWrite struct {
	c *conn
	r request

	mu   sync.Mutex
	left int   // pieces in the device, and the reader while it reads more
	err  error // the first one; no piece begins after it
}

// writeLarge reads the payload and hands it out.
func (c *conn) writeLarge(r request) error {
	if err := c.beginChange(); err != nil {
		return err
	}
	w := &largeWrite{c: c, r: r, left: 1}
	err := w.receive()
	last := w.leave(err)
	switch {
	case err != nil: // the connection ends; pieces still in the device see to endChange
		if last {
			c.endChange()
		}
		return err
	case last && r.fua() && w.err == nil:
		return w.startFlush()
	case last:
		c.endChange()
		return c.answer(r, w.err)
	}
	return nil
}

func (w *largeWrite) receive() error {
	c := w.c
	for off, left := int64(w.r.offset), int64(w.r.length); left > 0; {
		n := pieceLen(off, left)
		p, err := c.in.peek(int(n))
		if err != nil {
			return fmt.Errorf("read payload: %w", noEOF(err))
		}
		if err := w.piece(p, off); err != nil {
			return err
		}
		c.in.consume(int(n))
		c.stats.written.Add(uint64(n))
		off, left = off+n, left-n
	}
	return nil
}

// piece hands one piece to the device, inline if that cannot block. An error
// of the device is kept for the answer; one that is returned ends the connection.
func (w *largeWrite) piece(p []byte, off int64) error {
	c := w.c
	if err := c.whyGone(); err != nil {
		return err
	}
	switch {
	case w.failed():
		return nil
	case c.exp.Device.WouldBlock():
		t, err := c.prepare(w.r, p)
		if err != nil {
			return err
		}
		t.large, t.off = w, off
		w.enter()
		go t.run()
	default:
		w.enter()
		err := c.exp.Device.WriteAt(p, off, false)
		w.leave(err)
		if errors.Is(err, ErrGone) {
			return err
		}
	}
	return nil
}

func (w *largeWrite) failed() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err != nil
}

func (w *largeWrite) enter() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.left++
}

// leave notes how a piece ended and tells whether it was the last.
func (w *largeWrite) leave(err error) (last bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
	}
	w.left--
	return w.left == 0
}

// done ends a piece that ran beside the reader.
func (w *largeWrite) done(t *task, err error) {
	if !w.leave(err) {
		return
	}
	w.finish(t)
}

// finish answers the write. FUA is a flush after the last piece: it covers
// all of them, and costs one wait.
func (w *largeWrite) finish(t *task) {
	err := w.err // no piece is left that could set it
	if err == nil && w.r.fua() {
		err = w.c.exp.Device.Flush()
	}
	w.c.endChange()
	t.answer(err)
}

// startFlush finishes a write with FUA whose last piece was written inline.
func (w *largeWrite) startFlush() error {
	t, err := w.c.prepare(w.r, nil)
	if err != nil {
		w.c.endChange()
		return err
	}
	go func() {
		defer t.finish()
		w.finish(t)
	}()
	return nil
}
