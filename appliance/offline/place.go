package offline

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"kagami/images"
)

var (
	// ErrRefused: a precondition does not hold.
	ErrRefused = errors.New("refused")
	// ErrInUse: somebody has the image open: QEMU, kagami, a loop device.
	ErrInUse = errors.New("in use")
	// ErrNotThere: no such image or partition.
	ErrNotThere = errors.New("not there")
)

// Place says where in an image the file system is.
type Place struct {
	Offset    int64 // its first byte
	Partition int   // number as Linux counts, from 1; 0: none, Offset counts
}

// span is where a file system is, in bytes of the image.
type span struct{ off, size int64 }

// find turns a place into bytes of an image of size bytes.
func (p Place) find(r io.ReaderAt, size int64) (span, error) {
	if p.Partition == 0 {
		if p.Offset < 0 || p.Offset >= size {
			return span{}, fmt.Errorf("%w: byte %d of an image of %d bytes", ErrNotThere, p.Offset, size)
		}
		return span{p.Offset, size - p.Offset}, nil
	}
	parts, scheme, err := images.Partitions(r, size)
	for _, part := range parts {
		if part.Number == p.Partition {
			return span{part.Start, part.Length}, nil
		}
	}
	switch {
	case err != nil:
		return span{}, fmt.Errorf("partition %d: %w: %w", p.Partition, ErrNotThere, err)
	case scheme == images.SchemeNone:
		return span{}, fmt.Errorf("%w: partition %d, the image has no partition table", ErrNotThere, p.Partition)
	}
	return span{}, fmt.Errorf("%w: partition %d; the %s table has: %s", ErrNotThere, p.Partition, scheme, numbers(parts))
}

// numbers lists the partitions there are.
func numbers(parts []images.Partition) string {
	var s []string
	for _, p := range parts {
		s = append(s, fmt.Sprint(p.Number))
	}
	if len(s) == 0 {
		return "none"
	}
	return strings.Join(s, ", ")
}

// noFileSystem explains that there is no ext4 at a place where it could have been expected.
func noFileSystem(r io.ReaderAt, size int64, p Place) error {
	if p == (Place{}) {
		if parts, scheme, _ := images.Partitions(r, size); len(parts) > 0 {
			return fmt.Errorf("%w: no ext2, ext3 or ext4 at the image's start, but a %s partition table: choose one of the partitions %s", ErrRefused, scheme, numbers(parts))
		}
	}
	return fmt.Errorf("%w: no ext2, ext3 or ext4 there", ErrRefused)
}

// opening names what kept an image from being opened.
func opening(err error) error {
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%w: %w", ErrNotThere, err)
	case errors.Is(err, images.ErrLocked):
		return fmt.Errorf("%w: %w", ErrInUse, err)
	}
	return err
}

// open opens and locks (or, for reading, only looks at) the image at path.
func open(fsys images.FS, path string) (*images.Image, error) {
	img, err := images.OpenImage(fsys, path, images.Want{})
	if err != nil {
		return nil, opening(err)
	}
	if dev, err := loopOf(path); err != nil || dev != "" {
		if err == nil {
			err = fmt.Errorf("%w: %s is on %s", ErrInUse, path, dev)
		}
		return nil, errors.Join(err, img.Close())
	}
	return img, nil
}
