package spool

import (
	"errors"

	"kagami/ext4j/epoch"
	"kagami/images"
)

// Errors a caller may test for.
var (
	// ErrFull: MaxBytes or the file system leaves no room; nothing was appended. Try again after Trim.
	ErrFull = errors.New("spool is full")
	// ErrCorrupt: a record that was durable cannot be read back as it was written.
	ErrCorrupt = errors.New("spool is damaged")
	// ErrTrimmed: a reader asks for records that Trim or Reset gave back.
	ErrTrimmed = errors.New("records are no longer in the spool")
	// ErrClosed: the spool was closed.
	ErrClosed = errors.New("spool is closed")
)

// Options of a spool.
type Options struct {
	FS           images.FS
	Dir          string // made by the caller (images.FS.MkdirAll)
	Group        epoch.UUID
	SegmentBytes int64 // default 64 MiB, at least 1 MiB, a multiple of 4096
	MaxBytes     int64 // bound of the folder, at least 2 segments
	Inflate      epoch.Inflate

	SmallSegments bool // tests: allow SegmentBytes below 1 MiB
	Inline        bool // tests: prepare and remove segments inside the calls instead of in a goroutine
}

// Recovery is what Open found.
type Recovery struct {
	// Durable is the last whole epoch found (LSN of its Close record); zero when the spool holds none.
	// It may be older than applied: then the spool holds nothing to apply.
	Durable   epoch.Pos
	LastClose epoch.CloseInfo
	Closed    bool // a whole epoch was found: Durable and LastClose are set
	// DroppedRecords counts valid records after Durable that were dropped as a partial epoch.
	DroppedRecords int
	// Lost, when not 0: records up to this LSN had been durable and are not there any more.
	Lost epoch.LSN
	// Note says in words what was found at the tail; "" when clean.
	Note string
}

// Spool is the open spool of one group.
type Spool struct{}

// Reader reads the records of durable, closed epochs in LSN order.
type Reader struct{}

var errSkeleton = errors.New("spool: not built")

// Open recovers the spool in o.Dir. applied is the LSN of the last applied epoch.
func Open(o Options, applied epoch.LSN) (*Spool, Recovery, error) { return nil, Recovery{}, errSkeleton }

// Append writes the next record to the page cache; Commit makes it durable.
// rec.Payload is the raw payload, stored the payload under codec.
func (s *Spool) Append(rec *epoch.Record, codec uint8, stored []byte) error { return errSkeleton }

// Commit makes durable what was appended before it began and returns the last durable Close.
func (s *Spool) Commit() (epoch.Pos, error) { return epoch.Pos{}, errSkeleton }

// DropPartial forgets the records after the last appended Close record.
func (s *Spool) DropPartial() error { return errSkeleton }

// Durable is the position of the last durable Close record.
func (s *Spool) Durable() epoch.Pos { return epoch.Pos{} }

// Appended is the position of the last record appended and not dropped.
func (s *Spool) Appended() epoch.Pos { return epoch.Pos{} }

// NewReader makes a reader whose first record is from.
func (s *Spool) NewReader(from epoch.LSN) *Reader { return nil }

// Next returns the next record, or io.EOF when it is not (yet) part of a durable closed epoch; it may be called again later.
// The payload is the caller's to keep.
func (r *Reader) Next() (epoch.Record, error) { return epoch.Record{}, errSkeleton }

// Trim gives back segments all of whose records are at or below applied.
func (s *Spool) Trim(applied epoch.LSN) error { return errSkeleton }

// Reset discards everything; the next record may have any LSN above applied. No Append, Commit or Reader may run at the same time.
func (s *Spool) Reset(applied epoch.LSN) error { return errSkeleton }

// Usage is the number of bytes taken by segments in use, and the bound.
func (s *Spool) Usage() (usedBytes, maxBytes int64) { return 0, 0 }

// Close waits for the background work and closes the files. It makes nothing durable.
func (s *Spool) Close() error { return errSkeleton }
