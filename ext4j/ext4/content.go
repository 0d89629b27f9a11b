package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// pieceBytes is what Data reads at once, at most.
const (
	pieceBytes    = 1 << 20
	dirPieceBytes = 64 << 10 // of a directory
)

// errEnough ends a walk that has what it wanted.
var errEnough = errors.New("enough")

// Data visits the content of a regular file, or of anything else that has blocks, in order: the pieces
// that are not holes, at most 1 MiB each, up to its size. A piece is valid until yield returns.
// Encrypted content is ErrUnsupported.
func (d *Node) Data(yield func(off int64, p []byte) error) error {
	if d.Encrypted() && (d.RegularFile() || d.Symlink()) {
		return fmt.Errorf("%w: inode %d is encrypted", ErrUnsupported, d.Number)
	}
	if d.Inline() {
		p, err := d.inline()
		if err != nil || len(p) == 0 {
			return err
		}
		return yield(0, p)
	}
	if d.Size > d.fs.maxFile(d.Flags&flagExtents != 0) {
		return fmt.Errorf("%w: inode %d has %d bytes, more than a file can have", ErrCorrupt, d.Number, d.Size)
	}
	bs, piece := uint64(d.fs.BlockSize), uint64(pieceBytes)
	if d.Dir() {
		piece = dirPieceBytes // a walk has one for each level
	}
	var buf []byte
	err := d.Runs(func(r Run) error {
		for r.Len > 0 {
			off := r.Logical * bs
			if off >= d.Size {
				return errEnough // what lies behind the end
			}
			n := min(r.Len, max(1, piece/bs), (d.Size-off+bs-1)/bs)
			if want := int(n * bs); cap(buf) < want {
				buf = make([]byte, want)
			}
			p := buf[:n*bs]
			if err := readFull(d.fs.r, p, d.fs.off+int64(r.Physical*bs)); err != nil {
				return fmt.Errorf("read block %d: %w", r.Physical, err)
			}
			if err := yield(int64(off), p[:min(uint64(len(p)), d.Size-off)]); err != nil {
				return err
			}
			r.Logical, r.Physical, r.Len = r.Logical+n, r.Physical+n, r.Len-n
		}
		return nil
	}, nil)
	if errors.Is(err, errEnough) {
		return nil
	}
	return err
}

// maxFile is the largest size of a file, bytes (ext4_max_size, ext4_max_bitmap_size).
func (fs *FS) maxFile(extents bool) uint64 {
	bs := uint64(fs.BlockSize)
	if extents {
		return (1<<32 - 1) * bs
	}
	n := bs / 4
	return min((12+n+n*n+n*n*n)*bs, (1<<32-1)*bs)
}

// content is all of a small thing: a symbolic link's target, a large attribute's value. limit bounds it, bytes.
func (d *Node) content(limit uint64) ([]byte, error) {
	if d.Size > limit {
		return nil, fmt.Errorf("%w: inode %d has %d bytes, at most %d were expected", ErrCorrupt, d.Number, d.Size, limit)
	}
	out := make([]byte, d.Size)
	err := d.Data(func(off int64, p []byte) error { copy(out[off:], p); return nil })
	return out, err
}

// inline is the content that is in the inode: the map's 60 bytes, then the attribute system.data.
func (d *Node) inline() ([]byte, error) {
	out := append([]byte(nil), d.Block[:]...)
	if d.Size > uint64(len(out)) {
		more, err := d.inlineRest()
		if err != nil {
			return nil, err
		}
		out = append(out, more...)
	}
	if d.Size > uint64(len(out)) {
		return nil, fmt.Errorf("%w: inode %d has %d bytes, of which %d are in it", ErrCorrupt, d.Number, d.Size, len(out))
	}
	return out[:d.Size], nil
}

// fastSymlink reports a symbolic link whose target is in the inode.
func (d *Node) fastSymlink() bool {
	if !d.Symlink() || d.Inline() {
		return false
	}
	attr := uint64(0)
	if d.xattrBlock != 0 {
		attr = uint64(d.fs.ClusterBlocks) * uint64(d.fs.BlockSize) / 512
	}
	if d.Flags&flagEAInode != 0 || d.fs.Incompat&EAInode != 0 { // blocks of attribute inodes may be charged to it
		return d.Size < 60
	}
	return d.Blocks512 == attr
}

// Readlink is a symbolic link's target.
func (d *Node) Readlink() (string, error) {
	if !d.Symlink() {
		return "", fmt.Errorf("inode %d is no symbolic link", d.Number)
	}
	if d.Encrypted() {
		return "", fmt.Errorf("%w: inode %d is encrypted", ErrUnsupported, d.Number)
	}
	if d.fastSymlink() {
		if d.Size >= 60 {
			return "", fmt.Errorf("%w: the target of link %d has %d bytes in an inode", ErrCorrupt, d.Number, d.Size)
		}
		return string(d.Block[:d.Size]), nil
	}
	p, err := d.content(uint64(d.fs.BlockSize))
	return string(p), err
}

// ReadAt reads a part of a regular file, as io.ReaderAt does; holes are zeros.
func (d *Node) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || uint64(off) >= d.Size {
		return 0, io.EOF
	}
	var eof error
	if left := d.Size - uint64(off); uint64(len(p)) > left {
		p, eof = p[:left], io.EOF
	}
	clear(p)
	err := d.Data(func(at int64, b []byte) error {
		if at >= off+int64(len(p)) {
			return errEnough
		}
		if end := at + int64(len(b)); end > off {
			from := max(off, at)
			copy(p[from-off:], b[from-at:])
		}
		return nil
	})
	if err != nil && !errors.Is(err, errEnough) {
		return 0, err
	}
	return len(p), eof
}

var le = binary.LittleEndian
