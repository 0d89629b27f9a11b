package ext4

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"strings"
)

// FS is a file system whose superblock was read and found possible. It is
// read-only and safe for concurrent use if its reader is.
type FS struct {
	r    io.ReaderAt
	off  int64
	raw  Raw
	seed uint32 // of all metadata checksums but the superblock's

	BlockSize      uint32 // bytes, 1 KiB to 64 KiB
	ClusterBlocks  uint32 // blocks in a cluster; 1 without bigalloc
	Blocks         uint64
	FreeBlocks     uint64 // as the superblock has it; seldom journaled
	Inodes         uint32
	FreeInodes     uint32 // as the superblock has it; seldom journaled
	FirstDataBlock uint32 // 1 with 1 KiB blocks (but for bigalloc), else 0
	BlocksPerGroup uint32
	InodesPerGroup uint32
	InodeSize      uint32 // bytes
	DescSize       uint32 // bytes of a group descriptor
	Groups         uint32
	firstMetaBg    uint32
	backupBgs      [2]uint32

	Compat   Compat
	Incompat Incompat
	ROCompat ROCompat
	State    State

	UUID  [16]byte
	Label string // bytes up to the first NUL; not necessarily text

	JournalInum uint32 // 0: none, or external
	JournalDev  uint32
	JournalUUID [16]byte // of an external journal
	LastOrphan  uint32   // head of the list of orphaned inodes, 0: none
	OrphanInum  uint32   // inode of the orphan file, 0: none
}

// Probe reads the superblock of the file system that takes the size bytes of r
// from off on. It returns ErrNotExt4, or an error that wraps ErrUnsupported
// (unknown incompatible features, external journal), ErrCorrupt (values out of range) or ErrChecksum,
// or one of reading.
func Probe(r io.ReaderAt, off, size int64) (*FS, error) {
	fs, err := ProbeUnverified(r, off, size)
	if err != nil {
		return nil, err
	}
	if !fs.raw.ChecksumOK() {
		return nil, fmt.Errorf("%w of the superblock", ErrChecksum)
	}
	return fs, nil
}

// ProbeUnverified is Probe without the superblock's own checksum, for a
// superblock that may have been written in part.
func ProbeUnverified(r io.ReaderAt, off, size int64) (*FS, error) {
	if off < 0 || size < Offset+Size || off > 1<<62-size {
		return nil, fmt.Errorf("%w: %d bytes", ErrNotExt4, size)
	}
	fs := &FS{r: r, off: off}
	if err := readFull(r, fs.raw[:], off+Offset); err != nil {
		return nil, fmt.Errorf("read superblock: %w", err)
	}
	if binary.LittleEndian.Uint16(fs.raw[offMagic:]) != 0xef53 {
		return nil, ErrNotExt4
	}
	f, err := decode(&fs.raw)
	if err != nil {
		return nil, err
	}
	fs.setFeatures(f)
	if err := fs.checkFeatures(f); err != nil {
		return nil, err
	}
	if err := fs.setGeometry(f, size); err != nil {
		return nil, err
	}
	fs.setIdentity(f)
	return fs, nil
}

func (fs *FS) setFeatures(f *fields) {
	fs.Compat, fs.Incompat, fs.ROCompat = Compat(f.SFeatureCompat), Incompat(f.SFeatureIncompat), ROCompat(f.SFeatureRoCompat)
	fs.State = State(f.SState)
}

func (fs *FS) setIdentity(f *fields) {
	fs.UUID, fs.JournalUUID = f.SUuid, f.SJournalUuid
	fs.Label, _, _ = strings.Cut(string(f.SVolumeName[:]), "\x00")
	fs.JournalInum, fs.JournalDev, fs.LastOrphan = f.SJournalInum, f.SJournalDev, f.SLastOrphan
	if fs.Compat&OrphanFile != 0 {
		fs.OrphanInum = binary.LittleEndian.Uint32(fs.raw[offOrphanFile:])
	}
	fs.seed = crc32c(^uint32(0), fs.UUID[:])
	if fs.Incompat&CsumSeed != 0 {
		fs.seed = f.SChecksumSeed
	}
}

// QuotaProject is the inode of the project quota, which has no name; 0: there is none.
func (fs *FS) QuotaProject() uint32 {
	const at = 0x26c
	if fs.ROCompat&Project == 0 {
		return 0
	}
	return le.Uint32(fs.raw[at:])
}

// Raw is the superblock as it stands on disk.
func (fs *FS) Raw() Raw { return fs.raw }

// ReadBlock fills p, at most one block long, with the start of block n.
func (fs *FS) ReadBlock(n uint64, p []byte) error {
	return fs.readIn(n, 0, p)
}

// readIn fills p with what block n has from byte at on; at+len(p) is at most a block.
func (fs *FS) readIn(n, at uint64, p []byte) error {
	if n >= fs.Blocks {
		return fmt.Errorf("%w: block %d of %d", ErrCorrupt, n, fs.Blocks)
	}
	if err := readFull(fs.r, p, fs.off+int64(n)*int64(fs.BlockSize)+int64(at)); err != nil {
		return fmt.Errorf("read block %d: %w", n, err)
	}
	return nil
}

// readFull reads all of p; a source that ends early is io.ErrUnexpectedEOF.
func readFull(r io.ReaderAt, p []byte, off int64) error {
	n, err := r.ReadAt(p, off)
	switch {
	case n == len(p):
		return nil
	case err == nil || errors.Is(err, io.EOF):
		return io.ErrUnexpectedEOF
	}
	return err
}
