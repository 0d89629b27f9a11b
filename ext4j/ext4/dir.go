package ext4

import (
	"errors"
	"fmt"
)

// Entry is a name in a directory. Bytes of the name are as a guest wrote them, but for NUL and '/', which
// no name has.
type Entry struct {
	Inode uint32
	Name  string
	Type  byte // as the entry says (DT_… of the format); 0: it does not
}

// ReadDir visits the names of a directory in the order in which they are stored, "." and ".."
// included. Blocks that are nodes of an index hold none. A wrong checksum is ErrChecksum.
func (d *Node) ReadDir(yield func(Entry) error) error {
	if !d.Dir() {
		return fmt.Errorf("inode %d is no directory", d.Number)
	}
	if d.Size/uint64(d.fs.BlockSize) > d.fs.Blocks {
		return fmt.Errorf("%w: directory %d has %d bytes", ErrCorrupt, d.Number, d.Size)
	}
	if d.Inline() {
		return d.inlineDir(yield)
	}
	bs := int64(d.fs.BlockSize)
	return d.Data(func(off int64, p []byte) error {
		for at := int64(0); at+bs <= int64(len(p)); at += bs {
			if err := d.dirBlock((off+at)/bs, p[at:at+bs], yield); err != nil {
				return fmt.Errorf("directory %d, block %d: %w", d.Number, (off+at)/bs, err)
			}
		}
		return nil
	})
}

// dirBlock is one block of a directory: entries, each
//
//	0 u32 inode, 0: unused   4 u16 length   6 u8 length of the name   7 u8 type   8 name
//
// With metadata_csum a leaf ends in one of 12 bytes that is none: inode 0, type 0xde, and the block's CRC-32C. Index nodes
// look like a block of one unused entry; a root like one of "." and "..".
func (d *Node) dirBlock(n int64, b []byte, yield func(Entry) error) error {
	if err := d.dirSum(n, b); err != nil {
		return err
	}
	return d.entries(b, true, yield)
}

func (d *Node) entries(b []byte, wide bool, yield func(Entry) error) error {
	for off := 0; off < len(b); {
		if off+8 > len(b) {
			return fmt.Errorf("%w: an entry at byte %d", ErrCorrupt, off)
		}
		e := b[off:]
		length := d.fs.recLen(le.Uint16(e[4:]), wide)
		if length < 8 || length%4 != 0 || length > len(e) || int(e[6])+8 > length {
			return fmt.Errorf("%w: an entry of %d bytes at byte %d, with a name of %d", ErrCorrupt, length, off, e[6])
		}
		if ino := le.Uint32(e); ino != 0 {
			x := Entry{Inode: ino, Name: string(e[8 : 8+int(e[6])])}
			if d.fs.Incompat&Filetype != 0 {
				x.Type = e[7]
			}
			if err := checkName(x, d); err != nil {
				return err
			}
			if err := yield(x); err != nil {
				return err
			}
		}
		off += length
	}
	return nil
}

func checkName(x Entry, d *Node) error {
	if x.Name == "" || x.Inode > d.fs.Inodes {
		return fmt.Errorf("%w: the name %q stands for inode %d", ErrCorrupt, x.Name, x.Inode)
	}
	for i := range len(x.Name) {
		if c := x.Name[i]; (c == 0 || c == '/') && !d.Encrypted() {
			return fmt.Errorf("%w: the name %q", ErrCorrupt, x.Name)
		}
	}
	return nil
}

// recLen decodes the length of an entry, which has 16 bits also in blocks of 64 KiB
// (ext4_rec_len_from_disk).
func (fs *FS) recLen(v uint16, wide bool) int {
	switch {
	case !wide || fs.BlockSize < 65536:
		return int(v)
	case v == 65535 || v == 0:
		return int(fs.BlockSize)
	}
	return int(v&65532) | int(v&3)<<16
}

// inlineDir is a directory in its inode: the number of its parent, entries up to the
// map's end, more in the attribute system.data.
func (d *Node) inlineDir(yield func(Entry) error) error {
	parent := le.Uint32(d.Block[:])
	if parent == 0 || parent > d.fs.Inodes {
		return fmt.Errorf("%w: directory %d has the parent %d", ErrCorrupt, d.Number, parent)
	}
	if err := errors.Join(yield(Entry{Inode: d.Number, Name: "."}), yield(Entry{Inode: parent, Name: ".."})); err != nil {
		return err
	}
	if err := d.entries(d.Block[4:], false, yield); err != nil {
		return fmt.Errorf("directory %d: %w", d.Number, err)
	}
	if d.Size <= uint64(len(d.Block)) {
		return nil
	}
	more, err := d.inlineRest()
	if err == nil {
		err = d.entries(more, false, yield)
	}
	if err != nil {
		return fmt.Errorf("directory %d: %w", d.Number, err)
	}
	return nil
}

// dirSum checks the checksum of a directory's block: of a leaf at its end, of a
// node of the index behind the room for its entries (ext4_dirblock_csum, ext4_dx_csum).
func (d *Node) dirSum(n int64, b []byte) error {
	if d.fs.ROCompat&MetadataCsum == 0 {
		return nil
	}
	bad := fmt.Errorf("%w of block %d of directory %d", ErrChecksum, n, d.Number)
	if at := d.indexAt(n, b); at > 0 {
		limit, used := int(le.Uint16(b[at:])), int(le.Uint16(b[at+2:]))
		tail := at + 8*limit
		if used > limit || tail+8 > len(b) {
			return fmt.Errorf("%w: an index of %d entries, room for %d", ErrCorrupt, used, limit)
		}
		sum := crc32c(crc32c(d.seed, b[:at+8*used]), b[tail:tail+4])
		if le.Uint32(b[tail+4:]) != crc32c(sum, []byte{0, 0, 0, 0}) {
			return bad
		}
		return nil
	}
	tail := b[len(b)-12:]
	if le.Uint32(tail) != 0 || le.Uint16(tail[4:]) != 12 || tail[6] != 0 || tail[7] != 0xde {
		return fmt.Errorf("%w: block %d of directory %d has no room for a checksum", ErrCorrupt, n, d.Number)
	}
	if le.Uint32(tail[8:]) != crc32c(d.seed, b[:len(b)-12]) {
		return bad
	}
	return nil
}

// indexAt is where the index entries of a block begin; 0: it is a leaf.
func (d *Node) indexAt(n int64, b []byte) int {
	if d.Flags&flagIndex == 0 {
		return 0
	}
	first := d.fs.recLen(le.Uint16(b[4:]), true)
	if n == 0 {
		const root, info = 24, 8 // "." and "..", then what describes the index
		if first == 12 && d.fs.recLen(le.Uint16(b[16:]), true) == len(b)-12 && le.Uint32(b[root:]) == 0 && b[root+5] == info {
			return root + info
		}
		return 0
	}
	if le.Uint32(b) == 0 && first == len(b) && b[6] == 0 && b[7] == 0 {
		return 8
	}
	return 0
}
