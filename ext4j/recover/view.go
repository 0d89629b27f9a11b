package recover

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"kagami/ext4j/jbd2"
)

// view reads the file system with the journal's copies, and then some patches
// of bytes, laid over it. Offsets count from the start of the file system. It is safe
// for concurrent use if its reader is.
type view struct {
	r         io.ReaderAt
	off, size int64
	blockSize int64
	journal   *journal
	copies    map[uint64]copyOf
	patches   []patch
}

// patch replaces bytes.
type patch struct {
	off  int64
	data []byte
}

func newView(r io.ReaderAt, off, size int64, blockSize uint32) *view {
	return &view{r: r, off: off, size: size, blockSize: int64(blockSize)}
}

// ReadAt implements io.ReaderAt.
func (v *view) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 {
		return 0, errors.New("negative offset")
	}
	if off >= v.size {
		return 0, io.EOF
	}
	short := int64(len(p)) > v.size-off
	if short {
		p = p[:v.size-off]
	}
	for n := 0; n < len(p); {
		at := off + int64(n)
		part := p[n:min(int64(len(p)), int64(n)+v.blockSize-at%v.blockSize)]
		if err := v.readPart(part, at); err != nil {
			return n, err
		}
		n += len(part)
	}
	v.patch(p, off)
	if short {
		return len(p), io.EOF
	}
	return len(p), nil
}

// readPart reads within one block.
func (v *view) readPart(p []byte, off int64) error {
	c, ok := v.copies[uint64(off/v.blockSize)]
	if !ok {
		n, err := v.r.ReadAt(p, v.off+off)
		if n == len(p) {
			return nil
		}
		if err == nil || errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	b := make([]byte, v.blockSize)
	if err := v.content(c, b); err != nil {
		return err
	}
	copy(p, b[off%v.blockSize:])
	return nil
}

// content reads the journal's copy of a block as it must be written home.
func (v *view) content(c copyOf, b []byte) error {
	if err := v.journal.read(c.logical, b); err != nil {
		return fmt.Errorf("read block %d of the journal: %w", c.logical, err)
	}
	if c.escaped {
		binary.BigEndian.PutUint32(b, jbd2.Magic)
	}
	return nil
}

// patch applies what patches there are to p, read from off.
func (v *view) patch(p []byte, off int64) {
	for _, t := range v.patches {
		lo, hi := max(t.off, off), min(t.off+int64(len(t.data)), off+int64(len(p)))
		if lo < hi {
			copy(p[lo-off:hi-off], t.data[lo-t.off:])
		}
	}
}
