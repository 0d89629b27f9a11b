package offline

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"kagami/ext4j/ext4"
	"kagami/ext4j/recover"
	"kagami/images"
)

// Info is what the superblocks of a file system say, as they stand: of a file system that
// needs recovery, before it.
type Info struct {
	Image       string   `json:"image"`
	Offset      int64    `json:"offset"`
	UUID        string   `json:"uuid"`
	Label       string   `json:"label"`
	Features    []string `json:"features"`
	State       string   `json:"state"`
	ChecksumOK  bool     `json:"checksum_ok"` // the superblock's own; true if it has none
	BlockSize   uint32   `json:"block_size"`
	Blocks      uint64   `json:"blocks"`
	FreeBlocks  uint64   `json:"free_blocks"`
	Inodes      uint32   `json:"inodes"`
	FreeInodes  uint32   `json:"free_inodes"`
	InodeSize   uint32   `json:"inode_size"`
	Groups      uint32   `json:"groups"`
	ClusterSize uint32   `json:"cluster_size"`
	Recovery    bool     `json:"needs_recovery"`
	Orphans     bool     `json:"orphans"`
	Journal     *Journal `json:"journal,omitempty"`
	// NoJournal says why the journal is not shown.
	NoJournal string `json:"no_journal,omitempty"`
}

// Journal is what the journal's superblock says.
type Journal struct {
	Inode    uint32 `json:"inode"`
	Blocks   uint64 `json:"blocks"`
	Features string `json:"features"`
	Start    uint32 `json:"start"` // block where the log begins, 0: it is empty
	Sequence uint32 `json:"sequence"`
	Errno    int32  `json:"errno"`
}

// look opens an image for reading and finds a file system in it.
func look(path string, at Place, inUse bool) (*images.Image, *ext4.FS, int64, error) {
	img, err := openToLook(path, inUse)
	if err != nil {
		return nil, nil, 0, err
	}
	where, err := at.find(img, img.Size())
	if err == nil {
		var fs *ext4.FS
		if fs, err = recover.Probe(img, where.off, where.size); err == nil {
			return img, fs, where.off, nil
		}
		err = told(err, img, at)
	}
	return nil, nil, 0, errors.Join(err, img.Close())
}

func openToLook(path string, inUse bool) (*images.Image, error) {
	if !inUse {
		return open(images.ReadOnly{}, path)
	}
	img, err := images.OpenImage(images.ReadOnly{InUse: true}, path, images.Want{})
	return img, opening(err)
}

// ReadInfo reads the superblocks. inUse allows an image that somebody else uses.
func ReadInfo(path string, at Place, inUse bool) (Info, error) {
	img, fs, off, err := look(path, at, inUse)
	if err != nil {
		return Info{}, err
	}
	raw := fs.Raw()
	i := Info{Image: path, Offset: off, UUID: uuid(fs.UUID), Label: fs.Label, State: state(fs), ChecksumOK: raw.ChecksumOK(), BlockSize: fs.BlockSize, Blocks: fs.Blocks,
		FreeBlocks: fs.FreeBlocks, Inodes: fs.Inodes, FreeInodes: fs.FreeInodes, InodeSize: fs.InodeSize, Groups: fs.Groups, ClusterSize: fs.ClusterBlocks * fs.BlockSize,
		Recovery: fs.Incompat&ext4.Recover != 0, Orphans: fs.LastOrphan != 0 || fs.ROCompat&ext4.OrphanPresent != 0}
	for _, s := range []string{fs.Compat.String(), fs.Incompat.String(), fs.ROCompat.String()} {
		i.Features = append(i.Features, strings.Fields(s)...)
	}
	i.Journal, i.NoJournal = journalOf(fs)
	return i, img.Close()
}

func journalOf(fs *ext4.FS) (*Journal, string) {
	if fs.Compat&ext4.HasJournal == 0 {
		return nil, "there is none"
	}
	l, err := recover.ReadLog(fs)
	if l.Blocks == 0 && err != nil {
		return nil, err.Error()
	}
	return &Journal{Inode: fs.JournalInum, Blocks: l.Blocks, Features: l.Super.Features.String(), Start: l.Super.Start, Sequence: uint32(l.Super.Sequence), Errno: l.Super.Errno}, ""
}

func state(fs *ext4.FS) string {
	var s []string
	if fs.State&ext4.StateValid != 0 {
		s = append(s, "clean")
	} else {
		s = append(s, "not clean")
	}
	if fs.State&ext4.StateErrors != 0 {
		s = append(s, "with errors")
	}
	return strings.Join(s, " ")
}

func uuid(u [16]byte) string {
	return fmt.Sprintf("%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
}

// LogOf is the log of a journal, transaction by transaction.
type LogOf struct {
	Image        string        `json:"image"`
	Journal      Journal       `json:"journal"`
	Transactions []Transaction `json:"transactions"`
	End          string        `json:"end"`     // why it ends
	EndTID       uint32        `json:"end_tid"` // the first transaction that is not in it
	FastCommits  bool          `json:"fast_commits"`
}

// Transaction is one committed transaction. Blocks are those of the file system.
type Transaction struct {
	TID     uint32    `json:"tid"`
	Time    time.Time `json:"time"`
	First   uint32    `json:"first"` // block of the journal
	Last    uint32    `json:"last"`  // its commit block
	Sum     string    `json:"checksum"`
	Revokes uint64    `json:"revokes"`
	Blocks  []uint64  `json:"blocks"`
}

// ReadLog reads the journal's log. inUse allows an image that somebody else uses.
func ReadLog(path string, at Place, inUse bool) (LogOf, error) {
	img, fs, _, err := look(path, at, inUse)
	if err != nil {
		return LogOf{}, err
	}
	l, err := recover.ReadLog(fs)
	if err != nil {
		return LogOf{}, errors.Join(told(err, img, at), img.Close())
	}
	out := LogOf{Image: path, End: l.Log.End.String(), EndTID: uint32(l.Log.EndTID), FastCommits: l.FastCommits, Transactions: []Transaction{},
		Journal: Journal{fs.JournalInum, l.Blocks, l.Super.Features.String(), l.Super.Start, uint32(l.Super.Sequence), l.Super.Errno}}
	for _, tr := range l.Log.Transactions {
		t := Transaction{TID: uint32(tr.TID), Time: tr.Commit.Time().UTC(), First: tr.First, Last: tr.Last, Sum: tr.Sum.String(), Revokes: tr.Revoked}
		for _, e := range tr.Blocks {
			t.Blocks = append(t.Blocks, e.Block)
		}
		out.Transactions = append(out.Transactions, t)
	}
	return out, img.Close()
}
