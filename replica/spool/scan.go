package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"kagami/ext4j/epoch"
)

// readAhead is how much a scanner reads at once, in bytes.
const readAhead = 1 << 20

var (
	// errEnd: there is no valid record at the scanner's offset.
	errEnd = errors.New("no valid record")
	// errDamage: the stored sum fits, so that the bytes were written here as
	// they are, but they make no record this release understands.
	errDamage    = errors.New("record cannot be understood")
	errNoInflate = errors.New("no decoder for compressed payloads is configured")
)

// scanner walks the records of one segment over any io.ReaderAt. It is
// pure: its memory is bounded by readAhead and epoch.MaxPayload, whatever the
// bytes say. Payloads alias memory that is never written again.
type scanner struct {
	r       io.ReaderAt
	seed    uint32
	inflate epoch.Inflate
	off     int64 // of the next record
	end     int64 // no byte at or after it is read
	buf     []byte
	start   int64 // offset of buf[0]
}

func newScanner(r io.ReaderAt, h *header, end int64, inflate epoch.Inflate) *scanner {
	if inflate == nil {
		inflate = func(uint8, []byte, int) ([]byte, error) { return nil, errNoInflate }
	}
	return &scanner{r: r, seed: h.seed(), inflate: inflate, off: headerBytes, end: end}
}

// next returns the record at off and moves behind it. Without one it returns
// errEnd (wrapped, with the reason) and stays; errDamage likewise; any other
// error is one of reading.
func (s *scanner) next() (epoch.Record, error) {
	w, err := s.window(epoch.HeaderSize)
	if err != nil {
		return epoch.Record{}, err
	}
	rec, n, err := epoch.DecodeStored(w, s.seed, s.inflate)
	if errors.Is(err, epoch.ErrShort) {
		if w, err = s.window(epoch.HeaderSize + epoch.MaxPayload); err != nil {
			return epoch.Record{}, err
		}
		rec, n, err = epoch.DecodeStored(w, s.seed, s.inflate)
	}
	switch {
	case err == nil:
		s.off += int64(n)
		return rec, nil
	case !errors.Is(err, epoch.ErrShort) && sumFits(w, s.seed):
		return epoch.Record{}, fmt.Errorf("%w: %w", errDamage, err)
	}
	return epoch.Record{}, fmt.Errorf("%w: %w", errEnd, err)
}

// window returns at least n bytes from off on, fewer only where the segment ends.
func (s *scanner) window(n int) ([]byte, error) {
	have := s.start + int64(len(s.buf)) - s.off
	if have < int64(n) && s.off+max(have, 0) < s.end {
		b := make([]byte, min(max(int64(n), readAhead), s.end-s.off))
		k, err := s.r.ReadAt(b, s.off)
		if err != nil && !errors.Is(err, io.EOF) {
			return nil, fmt.Errorf("read at %d: %w", s.off, err)
		}
		s.buf, s.start = b[:k], s.off
	}
	return s.buf[min(s.off-s.start, int64(len(s.buf))):], nil
}

// sumFits reports that b begins with a record that was written whole: its
// stored sum is right, and so are the last bytes of its header, which the sum
// does not cover. The layout is that of epoch.
func sumFits(b []byte, seed uint32) bool {
	if len(b) < epoch.HeaderSize || binary.LittleEndian.Uint64(b[88:]) != 0 {
		return false
	}
	n := binary.LittleEndian.Uint32(b[76:])
	if n > epoch.MaxPayload || len(b) < epoch.HeaderSize+int(n) {
		return false
	}
	sum := crc32.Update(crc32.Update(seed, castagnoli, b[:84]), castagnoli, b[epoch.HeaderSize:epoch.HeaderSize+int(n)])
	return sum == binary.LittleEndian.Uint32(b[84:])
}

var recordMagic = []byte("KREC") // as stored: 0x4345524b, little-endian

// beyond looks for a valid record after the place where the log ends: a sign
// that bytes before it were torn or damaged. It tries a bounded number of
// places, because guests can write things that look like records.
func (s *scanner) beyond() (epoch.LSN, bool) {
	f := *s
	for tries := 0; tries < 256; {
		f.off++
		w, err := f.window(epoch.HeaderSize)
		if err != nil || len(w) < epoch.HeaderSize {
			return 0, false
		}
		i := bytes.Index(w, recordMagic)
		if i < 0 {
			f.off += int64(len(w) - len(recordMagic))
			continue
		}
		f.off += int64(i)
		tries++
		if rec, err := f.peek(); err == nil {
			return rec.LSN, true
		}
	}
	return 0, false
}

func (s *scanner) peek() (epoch.Record, error) {
	off := s.off
	rec, err := s.next()
	s.off = off
	return rec, err
}
