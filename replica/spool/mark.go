package spool

import (
	"kagami/ext4j/epoch"
	"kagami/images"
)

// Applied is what a Mark holds: how far the image is.
type Applied struct {
	Pos         epoch.Pos
	CloseTimeNs int64 // close time of that epoch at the source, ns since 1970
	SyncDone    bool  // the first sync's SyncDone record is at or below Pos
}

// Mark is the durable applied position: the file `applied`.
type Mark struct{}

// OpenMark opens the mark, making it (zero Applied) when there is none.
func OpenMark(fsys images.FS, path string) (*Mark, error) { return nil, errSkeleton }

// Load returns the stored position.
func (m *Mark) Load() Applied { return Applied{} }

// Store makes a durable. An error is final.
func (m *Mark) Store(a Applied) error { return errSkeleton }

// Close closes the file.
func (m *Mark) Close() error { return errSkeleton }
