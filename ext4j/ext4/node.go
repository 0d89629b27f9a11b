package ext4

import (
	"encoding/binary"
	"fmt"
	"time"
)

// RootInode is the number of the root directory.
const RootInode = 2

// More flags of an inode.
const (
	flagIndex   = 0x1000
	flagEAInode = 0x200000
)

// The kinds of files, in an inode's mode.
const (
	ModeKind    = 0xf000
	ModeFIFO    = 0x1000
	ModeChar    = 0x2000
	ModeDir     = 0x4000
	ModeBlock   = 0x6000
	ModeRegular = 0x8000
	ModeSymlink = 0xa000
	ModeSocket  = 0xc000
)

// Node is an inode with all that it says of its file. The methods that read its content are
// safe for concurrent use if the file system's reader is.
type Node struct {
	Inode
	UID, GID            uint32
	Atime, Mtime, Ctime time.Time
	Crtime              time.Time // when it was made; zero in inodes of 128 bytes
	Major, Minor        uint32    // of a device
	Blocks512           uint64    // as stat(2) counts them
	Generation          uint32
	fs                  *FS
	raw                 []byte // InodeSize bytes
	extra               int    // bytes of raw behind the first 128 that the inode knows of
	xattrBlock          uint64 // 0: none
}

// Node reads an inode and checks its checksum.
func (fs *FS) Node(n uint32) (*Node, error) {
	i, raw, err := fs.rawInode(n)
	if err != nil {
		return nil, err
	}
	d := &Node{Inode: i, fs: fs, raw: raw}
	if err := d.decode(); err != nil {
		return nil, fmt.Errorf("inode %d: %w", n, err)
	}
	return d, nil
}

// The layout of struct ext4_inode, beside what Inode knows:
//
//	0x02 u16 uid     0x08 u32 atime   0x0c u32 ctime   0x10 u32 mtime   0x18 u16 gid
//	0x1c u32 blocks  0x64 u32 generation               0x68 u32 xattr block
//	0x74 u16 blocks high   0x76 u16 xattr block high   0x78 u16 uid high   0x7a u16 gid high
//	0x80 u16 extra bytes   0x84 u32 ctime extra   0x88 u32 mtime extra   0x8c u32 atime extra
//	0x90 u32 crtime        0x94 u32 crtime extra
func (d *Node) decode() error {
	le, b := binary.LittleEndian, d.raw
	if len(b) > 128 {
		if d.extra = int(le.Uint16(b[0x80:])); d.extra > len(b)-128 || d.extra%4 != 0 {
			return fmt.Errorf("%w: %d extra bytes in an inode of %d", ErrCorrupt, d.extra, len(b))
		}
	}
	d.UID = uint32(le.Uint16(b[2:])) | uint32(le.Uint16(b[0x78:]))<<16
	d.GID = uint32(le.Uint16(b[0x18:])) | uint32(le.Uint16(b[0x7a:]))<<16
	d.Atime, d.Ctime, d.Mtime = d.time(0x08, 0x8c), d.time(0x0c, 0x84), d.time(0x10, 0x88)
	if d.has(0x94) {
		d.Crtime = d.time(0x90, 0x94)
	}
	d.Generation = le.Uint32(b[0x64:])
	d.xattrBlock = uint64(le.Uint32(b[0x68:]))
	if d.fs.Incompat&Bit64 != 0 {
		d.xattrBlock |= uint64(le.Uint16(b[0x76:])) << 32
	}
	d.Blocks512 = uint64(le.Uint32(b[0x1c:]))
	if d.fs.ROCompat&HugeFile != 0 {
		const hugeFile = 0x40000
		d.Blocks512 |= uint64(le.Uint16(b[0x74:])) << 32
		if d.Flags&hugeFile != 0 {
			d.Blocks512 *= uint64(d.fs.BlockSize) / 512
		}
	}
	if k := d.Mode & ModeKind; k == ModeChar || k == ModeBlock {
		d.device()
	}
	return nil
}

// has tells whether the 32-bit field at an offset behind the first 128 bytes is there.
func (d *Node) has(off int) bool { return off+4 <= 128+d.extra }

// time decodes seconds since 1970, with two more bits and nanoseconds where there are any.
func (d *Node) time(at, extra int) time.Time {
	le := binary.LittleEndian
	sec, ns := int64(int32(le.Uint32(d.raw[at:]))), int64(0)
	if d.has(extra) {
		e := le.Uint32(d.raw[extra:])
		sec, ns = sec+int64(e&3)<<32, int64(e>>2)
	}
	return time.Unix(sec, ns)
}

// device decodes the number of a device: the old form of 16 bits in the first word of the
// map, or the new one of 32 in the second.
func (d *Node) device() {
	le := binary.LittleEndian
	if old := le.Uint32(d.Block[:]); old != 0 {
		d.Major, d.Minor = old>>8&0xff, old&0xff
		return
	}
	v := le.Uint32(d.Block[4:])
	d.Major, d.Minor = v&0xfff00>>8, v&0xff|v>>12&0xfff00
}

// Dir, Regular file and Symlink report what kind of file it is.
func (d *Node) Dir() bool         { return d.Mode&ModeKind == ModeDir }
func (d *Node) RegularFile() bool { return d.Mode&ModeKind == ModeRegular }
func (d *Node) Symlink() bool     { return d.Mode&ModeKind == ModeSymlink }

// Encrypted reports that names or content are ciphertext.
func (d *Node) Encrypted() bool { return d.Flags&flagEncrypt != 0 }

// AttributeInode reports an inode that holds the value of an attribute: it has no name.
func (d *Node) AttributeInode() bool { return d.Flags&flagEAInode != 0 }

// Inline reports that the content, or its beginning, is in the inode.
func (d *Node) Inline() bool { return d.Flags&flagInline != 0 }
