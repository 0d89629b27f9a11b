package spool

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"sync"

	"kagami/ext4j/epoch"
	"kagami/images"
)

// Errors a caller may test for.
var (
	// ErrFull: MaxBytes or the file system leaves no room; nothing was appended. Try again after Trim.
	ErrFull = errors.New("spool is full")
	// ErrNotReady: the next segment is being prepared; nothing was appended. Try
	// again after Options.Ready was called, which must be set.
	ErrNotReady = errors.New("spool segment is being prepared")
	// ErrCorrupt: a record that was durable cannot be read back as it was written.
	ErrCorrupt = errors.New("spool is damaged")
	// ErrTrimmed: a reader asks for records that Trim or Reset gave back.
	ErrTrimmed = errors.New("records are no longer in the spool")
	// ErrClosed: the spool was closed.
	ErrClosed = errors.New("spool is closed")
	// ErrOrder: a record is not the next one; nothing was appended.
	ErrOrder = errors.New("record is out of order")
)

// Defaults and bounds of Options, in bytes.
const (
	DefaultSegmentBytes = 64 << 20
	MinSegmentBytes     = 1 << 20
)

// Options of a spool.
type Options struct {
	FS    images.FS
	Dir   string // made by the caller (images.FS.MkdirAll)
	Group epoch.UUID
	// Replica is whose spool it is: segments of another replica are refused, as
	// those of another group are.
	Replica epoch.UUID
	// SegmentBytes is the size of new segments: 0 means DefaultSegmentBytes; at
	// least MinSegmentBytes, a multiple of 4096. Segments of another size that
	// are in use stay until they are trimmed.
	SegmentBytes int64
	// MaxBytes bounds all segments together, prepared ones included; at least two
	// segments. It must hold several epochs of the largest size: an epoch that
	// does not fit can never be applied.
	MaxBytes int64
	// Inflate decodes compressed payloads. Without one, Open fails when it finds
	// any, and Append takes only raw ones.
	Inflate epoch.Inflate

	// Ready is called when an Append that returned ErrNotReady may be tried
	// again. It must neither block nor call the spool. Without one, Append waits.
	Ready func()

	SmallSegments bool // tests: allow SegmentBytes below MinSegmentBytes, from 8192
	Inline        bool // tests: prepare and remove segments inside the calls instead of in a goroutine

	incarnation func() uint64 // tests: pins the bytes; nil is random
}

func (o *Options) check() error {
	if o.SegmentBytes == 0 {
		o.SegmentBytes = DefaultSegmentBytes
	}
	least := int64(MinSegmentBytes)
	if o.SmallSegments {
		least = 2 * headerBytes
	}
	switch {
	case o.SegmentBytes < least || o.SegmentBytes%headerBytes != 0:
		return fmt.Errorf("spool segments of %d bytes: want a multiple of %d, at least %d", o.SegmentBytes, headerBytes, least)
	case o.MaxBytes < 2*o.SegmentBytes:
		return fmt.Errorf("spool of %d bytes: want at least two segments, %d", o.MaxBytes, 2*o.SegmentBytes)
	case o.FS == nil || o.Dir == "" || o.Group.IsZero():
		return errors.New("spool needs a file system, a folder and a group")
	}
	if o.incarnation == nil {
		o.incarnation = randomUint64
	}
	return nil
}

func randomUint64() uint64 {
	var b [8]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint64(b[:])
}

// segment is one use of a slot. Its fields but slot, head and freed change
// only by the appender.
type segment struct {
	slot  *slot
	head  header
	end   int64     // bytes below it are written and final
	last  epoch.LSN // last record that counts; head.Prev when there is none
	dirty bool      // written since the last commit began
	freed bool      // given back; the slot may hold something else
}

// Spool is the open spool of one group.
type Spool struct {
	o        Options
	appendMu sync.Mutex // one Append, DropPartial or Reset at a time
	commitMu sync.Mutex // one Commit at a time; held while files are closed
	buf      []byte     // under appendMu

	mu     sync.Mutex // everything below
	cond   *sync.Cond // slots, err or closing changed
	wg     sync.WaitGroup
	live   []*segment // in log order
	cur    *segment   // takes the next record; nil: it begins a segment
	free   []*slot    // ready for use, the one freed first in front
	raw    []*slot    // must be filled before use
	ids    map[int]bool
	total  int64   // bytes of all slots
	busy   bool    // a slot is being filled or removed
	junk   []*slot // to be removed
	noSlot error   // why the last slot could not be made
	wanted bool    // an Append returned ErrNotReady
	number uint64
	base   epoch.LSN // the log holds what is above it
	fresh  bool      // nothing appended since Open or Reset, and nothing above base

	appended, closed, durable epoch.Pos

	err     error // final
	closing bool

	opened []images.File // by Open
	torn   []string      // segments with a torn header, found by Open
}

func (sp *Spool) isClosing() bool {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return sp.closing
}

// usable reports the final error, or ErrClosed.
func (sp *Spool) usable() error {
	if sp.err == nil && sp.closing {
		return ErrClosed
	}
	return sp.err
}

// fail makes an error final.
func (sp *Spool) fail(err error) error {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return sp.failLocked(err)
}

func (sp *Spool) failLocked(err error) error {
	if sp.err == nil {
		sp.err = fmt.Errorf("spool has failed: %w", err)
	}
	sp.cond.Broadcast()
	return sp.err
}

// Durable is the position of the last durable Close record; zero when the
// spool has seen none.
func (sp *Spool) Durable() epoch.Pos {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return sp.durable
}

// Appended is the position of the last record appended and not dropped; zero
// when the spool has seen none.
func (sp *Spool) Appended() epoch.Pos {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return sp.appended
}

// Usage is the number of bytes taken by segments in use, and the bound. It is
// an amount of space: a segment counts whole once a newer one was begun.
func (sp *Spool) Usage() (usedBytes, maxBytes int64) {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return sp.usedLocked(), sp.o.MaxBytes
}

func (sp *Spool) usedLocked() int64 {
	var n int64
	for _, g := range sp.live {
		if g == sp.cur {
			n += g.end
		} else {
			n += g.slot.size
		}
	}
	return n
}

// Err is the error that ended the spool, or nil.
func (sp *Spool) Err() error {
	sp.mu.Lock()
	defer sp.mu.Unlock()
	return sp.err
}

// Close waits for the background work and closes the files. It makes nothing
// durable; records that were not committed may or may not be found again.
func (sp *Spool) Close() error {
	sp.mu.Lock()
	if sp.closing {
		sp.mu.Unlock()
		return ErrClosed
	}
	sp.closing = true
	sp.cond.Broadcast()
	sp.mu.Unlock()
	sp.wg.Wait()
	sp.appendMu.Lock()
	defer sp.appendMu.Unlock()
	sp.commitMu.Lock()
	defer sp.commitMu.Unlock()
	sp.mu.Lock()
	defer sp.mu.Unlock()
	var errs []error
	for _, s := range sp.slots() {
		if err := s.file.Close(); err != nil {
			errs = append(errs, fmt.Errorf("close spool segment: %w", err))
		}
	}
	return errors.Join(errs...)
}

func (sp *Spool) slots() []*slot {
	all := slices.Concat(sp.free, sp.raw, sp.junk)
	for _, g := range sp.live {
		all = append(all, g.slot)
	}
	return all
}
