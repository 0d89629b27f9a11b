// Package activelog is the source's durable list of regions that may differ
// between the sites.
package activelog

import (
	"context"
	"errors"

	"kagami/ext4j/epoch"
	"kagami/images"
)

// Errors a caller may test for.
var (
	// ErrCorrupt: the set cannot be known; every region must be taken as active.
	ErrCorrupt = errors.New("active log is damaged")
	// ErrTooLarge: one Acquire touches more regions than MaxRegions.
	ErrTooLarge = errors.New("request touches more regions than the active log holds")
	// ErrClosed: the log was closed.
	ErrClosed = errors.New("active log is closed")
)

// Options of an active log.
type Options struct {
	Group       epoch.UUID
	RegionBytes int64 // default 1 MiB, a power of two from 4096
	MaxRegions  int   // bound of the set, at least 1
}

// Region is one region of one disk.
type Region struct {
	Disk  uint32 // slot in the group, below 65536
	Index uint64 // offset / RegionBytes
}

// Log is an open active log.
type Log struct{}

var errSkeleton = errors.New("activelog: not built")

// Open opens the log, creating it when the file is missing, and returns the recovered set.
// Recovered regions stay until Clear.
func Open(fs images.FS, path string, o Options) (*Log, []Region, error) { return nil, nil, errSkeleton }

// Acquire returns when every region of [off, off+n) is durable in the log and
// pinned. A goroutine must not call it while it holds a pin.
func (l *Log) Acquire(ctx context.Context, disk uint32, off, n int64) error { return errSkeleton }

// Release undoes one Acquire of the same range: the pwrites returned, last is the newest record of the range (0: none).
func (l *Log) Release(disk uint32, off, n int64, last epoch.LSN) {}

// Acked says that the replica acknowledged everything at or below lsn.
func (l *Log) Acked(lsn epoch.LSN) {}

// SyncBegin is called before an fdatasync of the disk's image starts.
func (l *Log) SyncBegin(disk uint32) (token uint64) { return 0 }

// SyncEnd is called after it returned without error.
func (l *Log) SyncEnd(disk uint32, token uint64) {}

// NeedsRoom receives when acquirers wait for regions to leave: the owner
// closes the open epoch and runs an fdatasync (with SyncBegin and SyncEnd) of
// every disk. It receives again as long as that can help.
func (l *Log) NeedsRoom() <-chan struct{} { return nil }

// Pressure reports that acquirers wait for regions to leave.
func (l *Log) Pressure() bool { return false }

// Regions is a snapshot of the set, sorted.
func (l *Log) Regions() []Region { return nil }

// Clear makes the empty set durable. It fails when a region is pinned.
func (l *Log) Clear() error { return errSkeleton }

// Err is the error that ended the log, or nil.
func (l *Log) Err() error { return nil }

// Close fails the waiting acquirers with ErrClosed and closes the file. It makes nothing durable.
func (l *Log) Close() error { return nil }
