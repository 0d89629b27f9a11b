package nbd

import (
	"errors"
	"io"
)

const (
	smallInput = 16 << 10
	largeInput = maxPiece + 4096
)

// input is a connection's read buffer. It is small until the client sends
// more at a time.
type input struct {
	src      io.Reader
	buf      []byte
	pos, end int
	// large allows a buffer of largeInput bytes; busy asks for it, since one
	// read has filled the small one.
	large, busy bool
	// idle is called before each read from src: whatever waits to be sent must
	// go out, for the client may be waiting for it.
	idle func() error
}

func newInput(src io.Reader) *input {
	return &input{src: src, buf: make([]byte, smallInput), idle: func() error { return nil }}
}

// peek returns the next n bytes, at most smallInput, or largeInput if large is set, without consuming them.
// They stay valid until the next peek. The end of the input before the first
// of them is io.EOF, later io.ErrUnexpectedEOF.
func (in *input) peek(n int) ([]byte, error) {
	for in.end-in.pos < n {
		if err := in.fill(n); err != nil {
			if errors.Is(err, io.EOF) && in.end > in.pos {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
	}
	return in.buf[in.pos : in.pos+n], nil
}

func (in *input) consume(n int) { in.pos += n }

// skip consumes n bytes that nobody wants.
func (in *input) skip(n int64) error {
	for n > 0 {
		k := min(n, int64(smallInput))
		if _, err := in.peek(int(k)); err != nil {
			return err
		}
		in.consume(int(k))
		n -= k
	}
	return nil
}

// fill reads more, having made room for n bytes from pos on.
func (in *input) fill(n int) error {
	if err := in.idle(); err != nil {
		return err
	}
	if in.pos == in.end {
		in.pos, in.end = 0, 0
	}
	if n > len(in.buf) || in.busy && in.large && len(in.buf) < largeInput {
		buf := make([]byte, largeInput)
		in.end = copy(buf, in.buf[in.pos:in.end])
		in.pos, in.buf = 0, buf
	} else if in.pos+n > len(in.buf) {
		in.end = copy(in.buf, in.buf[in.pos:in.end])
		in.pos = 0
	}
	for range 100 {
		k, err := in.src.Read(in.buf[in.end:])
		in.end += k
		in.busy = in.busy || in.end == len(in.buf)
		if k > 0 {
			return nil
		}
		if err != nil {
			return err
		}
	}
	return io.ErrNoProgress
}
