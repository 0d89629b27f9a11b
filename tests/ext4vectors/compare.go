package ext4vectors

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"kagami/ext4j/ext4"
	"kagami/images"
)

// Diff is a byte of two images that differs.
type Diff struct {
	Off          int64
	Ours, Theirs byte
}

// differ compares two images of one size byte for byte, holes read as zeros, and
// returns at most limit differences.
func differ(a, b *images.Image, limit int) (all []Diff, err error) {
	const step = 64 << 10
	p, q := make([]byte, step), make([]byte, step)
	for off := int64(0); off < a.Size(); off += step {
		if next, err := nextData(a, b, off); err != nil {
			return nil, err
		} else if next >= off+step {
			off = next/step*step - step
			continue
		}
		n := min(step, a.Size()-off)
		if _, err := a.ReadAt(p[:n], off); err != nil {
			return nil, err
		}
		if _, err := b.ReadAt(q[:n], off); err != nil {
			return nil, err
		}
		if bytes.Equal(p[:n], q[:n]) {
			continue
		}
		for i := range p[:n] {
			if p[i] != q[i] && len(all) < limit {
				all = append(all, Diff{off + int64(i), p[i], q[i]})
			}
		}
	}
	return all, nil
}

// nextData is where the first data of either image begins, from off on.
func nextData(a, b *images.Image, off int64) (int64, error) {
	next := a.Size()
	for _, img := range []*images.Image{a, b} {
		start, _, err := img.NextData(off)
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if err == nil {
			next = min(next, start)
		}
	}
	return next, nil
}

// field is a named part of a structure, in bytes from its start.
type field struct {
	off, end int64
	name     string
}

// superFields are fields of the superblock (fs/ext4/ext4.h, struct ext4_super_block).
var superFields = []field{
	{0x0c, 0x10, "s_free_blocks_count"}, {0x10, 0x14, "s_free_inodes_count"}, {0x30, 0x34, "s_wtime"},
	{0x3a, 0x3c, "s_state"}, {0x60, 0x64, "s_feature_incompat"}, {0x178, 0x180, "s_kbytes_written"},
	{0x274, 0x275, "s_wtime_hi"}, {0x3fc, 0x400, "s_checksum"},
}

// journalFields are fields of the journal's superblock (include/linux/jbd2.h, journal_superblock_t).
var journalFields = []field{
	{0x18, 0x1c, "j_sequence"}, {0x1c, 0x20, "j_start"}, {0x20, 0x24, "j_errno"}, {0x58, 0x5c, "j_head"}, {0xfc, 0x100, "j_checksum"},
}

// layout is where the two superblocks of an image are, in bytes; journal is -1 when
// it cannot be found.
type layout struct{ super, journal, block int64 }

func layoutOf(img *images.Image) (layout, error) {
	l := layout{super: 1024, journal: -1}
	fs, err := ext4.ProbeUnverified(img, 0, img.Size())
	if err != nil {
		return l, err
	}
	l.block = int64(fs.BlockSize)
	if ino, err := fs.Inode(8); err == nil {
		if m, err := fs.MapInode(ino, 1); err == nil {
			if b, ok := m.Physical(0); ok {
				l.journal = int64(b) * l.block
			}
		}
	}
	return l, nil
}

// name says which field a byte belongs to, or which block.
func (l layout) name(off int64) string {
	in := func(at int64, fields []field, what string) string {
		i := slices.IndexFunc(fields, func(f field) bool { return at >= f.off && at < f.end })
		if i >= 0 {
			return fields[i].name
		}
		return fmt.Sprintf("%s, byte %#x", what, at)
	}
	switch {
	case off >= l.super && off < l.super+1024:
		return in(off-l.super, superFields, "superblock")
	case l.journal >= 0 && off >= l.journal && off < l.journal+1024:
		return in(off-l.journal, journalFields, "journal superblock")
	}
	return fmt.Sprintf("block %d", off/l.block)
}

// places names all fields and blocks with a difference, sorted.
func (l layout) places(diffs []Diff) []string {
	seen := map[string]bool{}
	for _, d := range diffs {
		seen[l.name(d.Off)] = true
	}
	return slices.Sorted(maps.Keys(seen))
}
