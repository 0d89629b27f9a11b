// Package images holds partition images: raw files served as block devices,
// their partition tables, extents and identity.
//
// It also declares the one small interface (FS, File) through which every
// package of kagami touches a disk, so that tests can put a crashable fake
// (tests/fault) in its place. The package is a leaf: it imports nothing of
// kagami.
//
// Durability contract, honoured by OS and by the fakes alike:
//
//   - WriteAt, PunchHole, ZeroRange, Allocate and Truncate change what the
//     next ReadAt sees. They promise nothing about a crash: any part of them,
//     torn at 512-byte boundaries, may or may not survive.
//   - Datasync that returned nil makes every change completed before it began
//     durable, the file's size included. After a Datasync error the content of
//     the file is unknown: the caller must not use the file again.
//   - A created or renamed name is durable after SyncDir of its folder.
package images

import (
	"errors"
	"io/fs"
)

// ErrLocked is returned when another process holds an image open.
var ErrLocked = errors.New("in use by another process")

// File is one open file. All offsets and lengths are bytes; implementations
// are safe for concurrent use.
type File interface {
	// ReadAt reads len(p) bytes; past the end it returns io.EOF as io.ReaderAt does.
	ReadAt(p []byte, off int64) (int, error)
	// WriteAt writes len(p) bytes or returns an error with the count written.
	WriteAt(p []byte, off int64) (int, error)
	// Datasync is fdatasync(2). An error is final for this file.
	Datasync() error
	// DropCache makes later reads see what the disk has: after a failed fdatasync, by
	// this process or one before, the kernel takes pages for clean that never got there.
	// Changes that are not durable yet may be lost by it: Datasync comes first.
	DropCache() error
	// Truncate sets the size.
	Truncate(size int64) error
	// Size is the file's length in bytes.
	Size() (int64, error)
	// PunchHole makes [off, off+n) read as zeros and gives the space back.
	PunchHole(off, n int64) error
	// ZeroRange makes [off, off+n) read as zeros and keeps the space reserved.
	ZeroRange(off, n int64) error
	// Allocate reserves space for [off, off+n); content and size do not change.
	// It fails with ENOSPC when there is none.
	Allocate(off, n int64) error
	// NextData finds the first allocated extent that ends after off, clipped
	// to start at off or later. With none left it returns io.EOF.
	NextData(off int64) (start, end int64, err error)
	// Xattr reads an extended attribute; a missing one is (nil, nil).
	Xattr(name string) ([]byte, error)
	// SetXattr writes an extended attribute; durable after Datasync.
	SetXattr(name string, value []byte) error
	// ModTime is the time of the last change of content in ns since 1970.
	ModTime() (int64, error)
	// Lock takes an exclusive open-file-description lock on the whole file
	// (the kind QEMU's image locks conflict with), or returns ErrLocked.
	Lock() error
	// Close releases the file and its lock. It makes nothing durable.
	Close() error
}

// FS opens files by path.
type FS interface {
	// Open opens an existing file for reading and writing.
	Open(name string) (File, error)
	// Create makes a new file, failing with fs.ErrExist when it exists.
	Create(name string, perm fs.FileMode) (File, error)
	// Rename moves a file over another one, atomically. Durable after SyncDir.
	Rename(from, to string) error
	// Remove deletes a file. Durable after SyncDir.
	Remove(name string) error
	// ReadDir lists the names in a folder, sorted.
	ReadDir(dir string) ([]string, error)
	// MkdirAll makes a folder and its parents and makes each of them durable.
	MkdirAll(dir string, perm fs.FileMode) error
	// SyncDir is fsync(2) on a folder.
	SyncDir(dir string) error
	// Free is the space left for unprivileged users at dir, in bytes.
	Free(dir string) (int64, error)
}
