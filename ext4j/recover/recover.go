package recover

import (
	"errors"
	"fmt"
	"io"

	"kagami/ext4j/ext4"
)

// ErrRefused marks what this package does not do, because it could not do it
// exactly. The error's text says why; nothing was written.
var ErrRefused = errors.New("refused")

func refuse(format string, args ...any) error {
	return fmt.Errorf("%w: %w", ErrRefused, fmt.Errorf(format, args...))
}

// Device is the image, or device, that holds the file system.
type Device interface {
	io.ReaderAt
	io.WriterAt
	// Datasync makes all writes before it durable. Its error is final.
	Datasync() error
}

// Options change what Run does.
type Options struct {
	// DryRun reads, checks and reports, and writes nothing.
	DryRun bool
}

// Run replays the journal of the file system that takes the size bytes of dev from
// offset on. The caller must be its only user. With needs_recovery clear there is
// nothing to do, which is no error. ext4.ErrNotExt4 and errors that wrap ErrRefused
// mean that nothing was written; other errors are those of dev, after which Run may be
// repeated.
func Run(dev Device, offset, size int64, opts Options) (Report, error) {
	job, rep, err := plan(dev, offset, size)
	if err != nil || job == nil || opts.DryRun {
		return rep, err
	}
	return rep, job.write(dev)
}

// View gives the file system as Run would leave it, without writing: the
// bytes [0, size) of the reader are those of [offset, offset+size) after Run. It
// holds what must be replayed as a map, 50 bytes or so for each journaled
// block, and reads r when it is read.
func View(r io.ReaderAt, offset, size int64) (io.ReaderAt, Report, error) {
	job, rep, err := plan(r, offset, size)
	if err != nil {
		return nil, rep, err
	}
	if job == nil {
		return io.NewSectionReader(r, offset, size), rep, nil
	}
	return job.view, rep, nil
}

// plan finds out what must be written. Without an error and with nothing to do, job is nil.
func plan(r io.ReaderAt, offset, size int64) (*job, Report, error) {
	if offset%sector != 0 {
		return nil, Report{}, refuse("the file system starts at byte %d, within a sector", offset)
	}
	fs, err := ext4.ProbeUnverified(r, offset, size)
	if errors.Is(err, ext4.ErrNotExt4) {
		return nil, Report{}, err
	}
	if err != nil {
		return nil, Report{}, asRefusal("superblock", err)
	}
	rep := Report{UUID: fs.UUID, Label: fs.Label, Needed: fs.Incompat&ext4.Recover != 0}
	if !rep.Needed {
		err := checkClean(fs)
		describe(&rep, fs)
		return nil, rep, err
	}
	j, err := openJournal(fs)
	if err != nil {
		return nil, rep, err
	}
	job := &job{fs: fs, journal: j, rep: &rep, view: newView(r, offset, size, fs.BlockSize)}
	if err := job.prepare(size); err != nil {
		return nil, rep, err
	}
	return job, rep, nil
}

// checkClean looks at a file system without needs_recovery. The kernel would
// ignore its journal and e2fsck replay it if there is anything in it.
func checkClean(fs *ext4.FS) error {
	raw := fs.Raw()
	if !raw.ChecksumOK() {
		return refuse("%w of the superblock", ext4.ErrChecksum)
	}
	if fs.Compat&ext4.HasJournal == 0 || fs.JournalInum == 0 {
		return nil
	}
	if j, err := openJournal(fs); err == nil && j.super.Start != 0 {
		return refuse("the file system is marked clean, but its journal holds transactions from %d on: the kernel would drop them, e2fsck replay them", j.super.Sequence)
	}
	return nil
}

// describe fills in what a superblock says about the recovered file system.
func describe(rep *Report, fs *ext4.FS) {
	rep.FreeBlocks, rep.FreeInodes = fs.FreeBlocks, fs.FreeInodes
	rep.Orphans = fs.LastOrphan != 0 || fs.ROCompat&ext4.OrphanPresent != 0
}
