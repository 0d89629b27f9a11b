// Package backlog is the part of a group's queue that is on disk: a first-in-first-out
// of records, while the replica is away and the group goes on without it (policy
// `continue`). It keeps their order, and so the history: what is sent later ends in
// the same epochs, each of which the replica can stop at.
//
// It promises nothing about a crash, and nothing is ever synced: what may differ between the
// sites is in the maps beside it (ext4j.Recorders), and a daemon that starts anew
// compares that. So the file has no name from its creation on, and its space is free
// as soon as the daemon ends, however it ends. For the same reason it has no version:
// nobody reads it but the process that wrote it.
//
// The file is a ring. Records are in stored form (ext4j/epoch), one after another; one
// that meets the end goes on at the beginning. What is read is checked by both sums of each
// record and by its LSN, which follows on from the one before: a block that the disk did not
// keep is an error, never another content.
//
// A Backlog is for one goroutine.
package backlog

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"kagami/ext4j/epoch"
	"kagami/images"
)

// ErrFull: the limit, or the space that has to stay free beside it, is reached.
var ErrFull = errors.New("the backlog is full")

// seed is the stored sums' seed: what one of these files holds is no spool.
const seed = 0x4b474c4f // "OLGK"

const (
	oneRecord  = epoch.HeaderSize + epoch.MaxPayload
	leastLimit = 1 << 20
	checkBytes = 16 << 20 // the file grows by so much between two looks at the free space
)

// Options make a Backlog.
type Options struct {
	Path  string // of the file, while it has a name
	Limit int64  // bytes
	Keep  int64  // bytes that stay free on its file system
}

// Backlog is a queue of records in a file.
type Backlog struct {
	o          Options
	fs         images.FS
	f          images.File
	head, tail int64     // bytes ever taken and put; the ring's places are these modulo o.Limit
	checked    int64     // of the file: there was space for so much
	next, last epoch.LSN // the record at the head, if any; the last one that was put
	buf        []byte
}

// Create makes an empty one.
func Create(fsys images.FS, o Options) (*Backlog, error) {
	if o.Limit < leastLimit {
		return nil, fmt.Errorf("a backlog of %d bytes is too small: at least %d", o.Limit, leastLimit)
	}
	// A power loss may have brought back the name of one that there was.
	if err := fsys.Remove(o.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("remove an old backlog: %w", err)
	}
	f, err := fsys.Create(o.Path, 0o600)
	if err != nil {
		return nil, fmt.Errorf("create backlog: %w", err)
	}
	if err := fsys.Remove(o.Path); err != nil {
		return nil, errors.Join(fmt.Errorf("take the backlog's name away: %w", err), f.Close())
	}
	return &Backlog{o: o, fs: fsys, f: f}, nil
}

// Bytes is what the records in it take.
func (b *Backlog) Bytes() int64 { return b.tail - b.head }

// Append puts records behind the others: all of them, or with ErrFull none. After
// another error the backlog is not to be used any more.
func (b *Backlog) Append(recs []epoch.Record) error {
	buf := b.buf[:0]
	for i := range recs {
		r := &recs[i]
		if b.Bytes() > 0 || i > 0 {
			if r.LSN != b.last+epoch.LSN(i)+1 {
				return fmt.Errorf("backlog: record %d does not follow on from %d", r.LSN, b.last+epoch.LSN(i))
			}
		} else {
			b.next, b.last = r.LSN, r.LSN-1
		}
		buf = r.AppendStored(buf, epoch.CodecRaw, r.Payload, seed)
	}
	b.buf = buf[:0]
	if err := b.room(int64(len(buf))); err != nil {
		return err
	}
	if err := b.each(b.tail, buf, b.f.WriteAt); err != nil {
		return fmt.Errorf("write backlog: %w", err)
	}
	b.tail += int64(len(buf))
	b.last += epoch.LSN(len(recs))
	return nil
}

// room tells whether n more bytes fit, in the ring and on the file system.
func (b *Backlog) room(n int64) error {
	if b.Bytes()+n > b.o.Limit {
		return ErrFull
	}
	end := min(b.tail+n, b.o.Limit)
	if end <= b.checked {
		return nil
	}
	free, err := b.fs.Free(filepath.Dir(b.o.Path))
	if err != nil {
		return fmt.Errorf("look for space for the backlog: %w", err)
	}
	if free < b.o.Keep+max(end-b.checked, checkBytes) {
		return fmt.Errorf("%w: %d bytes are free on its file system, and %d have to stay so", ErrFull, free, b.o.Keep)
	}
	b.checked = max(end, min(b.checked+checkBytes, b.o.Limit))
	return nil
}

// each does one step for each of the two parts that p has in the ring.
func (b *Backlog) each(at int64, p []byte, step func([]byte, int64) (int, error)) error {
	for len(p) > 0 {
		off := at % b.o.Limit
		n := min(int64(len(p)), b.o.Limit-off)
		if _, err := step(p[:n], off); err != nil {
			return err
		}
		at, p = at+n, p[n:]
	}
	return nil
}

// Next takes records from the front: one at least, and more while they are no more than limit
// bytes; none when it is empty. After an error the backlog is not to be used any more.
func (b *Backlog) Next(limit int64) ([]epoch.Record, error) {
	p := make([]byte, min(b.Bytes(), max(limit, oneRecord)))
	if err := b.each(b.head, p, b.f.ReadAt); err != nil {
		return nil, fmt.Errorf("read backlog: %w", err)
	}
	var out []epoch.Record
	for len(p) > 0 {
		r, n, err := epoch.DecodeStored(p, seed, nil)
		if errors.Is(err, epoch.ErrShort) && len(out) > 0 {
			break
		}
		if err == nil && len(out) > 0 && int64(n) > limit {
			break
		}
		limit -= int64(n)
		if err != nil {
			return nil, fmt.Errorf("read backlog: record %d: %w", b.next, err)
		}
		if r.LSN != b.next {
			return nil, fmt.Errorf("read backlog: %w: record %d is where %d should be", epoch.ErrCorrupt, r.LSN, b.next)
		}
		out, p = append(out, r), p[n:]
		b.head, b.next = b.head+int64(n), b.next+1
	}
	return out, nil
}

// Close ends it; what it holds is gone.
func (b *Backlog) Close() error { return b.f.Close() }
