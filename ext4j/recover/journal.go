package recover

import (
	"errors"
	"fmt"
	"slices"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// MaxJournalBlocks is the length of the longest journal this package takes
// on, in blocks: it bounds memory at about 400 MB. mke2fs makes none with more
// than 1048576 blocks by itself.
const MaxJournalBlocks = 4 << 20

// journal is the file system's internal journal.
type journal struct {
	fs    *ext4.FS
	super jbd2.Superblock
	raw   [jbd2.SuperblockSize]byte
	bmap  *ext4.BlockMap
}

// openJournal finds the journal, maps its blocks and reads its superblock.
// Errors that are not of reading wrap ErrRefused.
func openJournal(fs *ext4.FS) (*journal, error) {
	if err := checkJournalKind(fs); err != nil {
		return nil, err
	}
	in, err := fs.Inode(fs.JournalInum)
	if err != nil {
		return nil, asRefusal("journal", err)
	}
	blocks := in.Size / uint64(fs.BlockSize)
	switch {
	case !in.Regular():
		return nil, refuse("inode %d is no journal: mode 0%o, %d links, flags 0x%x", in.Number, in.Mode, in.Links, in.Flags)
	case blocks < jbd2.MinBlocks || blocks > MaxJournalBlocks:
		return nil, refuse("the journal has %d blocks; from %d to %d can be recovered", blocks, jbd2.MinBlocks, MaxJournalBlocks)
	}
	j := &journal{fs: fs}
	if j.bmap, err = fs.MapInode(in, blocks); err != nil {
		return nil, asRefusal("journal", err)
	}
	if err := j.read(0, j.raw[:]); err != nil {
		return nil, fmt.Errorf("read the journal's superblock: %w", err)
	}
	if j.super, err = jbd2.DecodeSuperblock(j.raw[:]); err == nil {
		err = j.super.Check(fs.BlockSize, blocks)
	}
	if err != nil {
		return nil, asRefusal("journal superblock", err)
	}
	return j, nil
}

func checkJournalKind(fs *ext4.FS) error {
	switch {
	case fs.Compat&ext4.HasJournal == 0:
		return refuse("the file system needs recovery but has no journal")
	case fs.JournalInum == 0:
		return refuse("the journal is on another device (UUID %x)", fs.JournalUUID)
	case fs.JournalDev != 0:
		return refuse("the superblock names both an internal and an external journal")
	case fs.ROCompat.Unknown() != 0:
		return refuse("unknown read-only features: %v", fs.ROCompat.Unknown())
	}
	return nil
}

// asRefusal turns what a decoder found wrong into a refusal; errors of
// reading stay what they are.
func asRefusal(doing string, err error) error {
	for _, kind := range []error{ErrRefused, ext4.ErrCorrupt, ext4.ErrChecksum, ext4.ErrUnsupported, ext4.ErrNotExt4, jbd2.ErrCorrupt, jbd2.ErrUnsupported} {
		if !errors.Is(err, kind) {
			continue
		}
		if errors.Is(kind, ErrRefused) {
			return fmt.Errorf("%s: %w", doing, err)
		}
		return refuse("%s: %w", doing, err)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// read is the journal's jbd2.ReadBlock; p may be shorter than a block.
func (j *journal) read(logical uint32, p []byte) error {
	at, ok := j.bmap.Physical(uint64(logical))
	if !ok {
		return fmt.Errorf("%w: block %d is outside the journal", jbd2.ErrCorrupt, logical)
	}
	return j.fs.ReadBlock(at, p)
}

// sameIn checks that another state of the file system has its journal in the same place.
func (j *journal) sameIn(fs *ext4.FS) error {
	in, err := fs.Inode(j.fs.JournalInum)
	if err != nil {
		return err
	}
	m, err := fs.MapInode(in, j.bmap.Len())
	if err != nil {
		return err
	}
	if fs.BlockSize != j.fs.BlockSize || fs.JournalInum != j.fs.JournalInum || !slices.Equal(m.Runs(), j.bmap.Runs()) {
		return refuse("the journal would move")
	}
	return nil
}
