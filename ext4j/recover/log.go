package recover

import (
	"io"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// JournalLog is the journal of a file system as it stands.
type JournalLog struct {
	Super  jbd2.Superblock
	Blocks uint64 // of the journal
	Log    jbd2.Log
	// FastCommits reports that fast commits follow the log.
	FastCommits bool
}

// ReadLog reads the journal of a file system that was probed. Errors wrap ErrRefused or
// are those of reading. Memory is bounded as for Run.
func ReadLog(fs *ext4.FS) (JournalLog, error) {
	j, err := openJournal(fs)
	if err != nil {
		return JournalLog{}, err
	}
	l := JournalLog{Super: j.super, Blocks: j.bmap.Len()}
	if l.Log, err = jbd2.Scan(j.super.Journal(), j.read); err != nil {
		return l, asRefusal("journal", err)
	}
	if l.FastCommits, err = jbd2.FastPending(j.super, l.Log, j.read); err != nil {
		return l, asRefusal("journal", err)
	}
	return l, nil
}

// Probe is ext4.ProbeUnverified with refusals like Run's: a superblock with a wrong
// checksum is shown as it is.
func Probe(r io.ReaderAt, offset, size int64) (*ext4.FS, error) {
	fs, err := ext4.ProbeUnverified(r, offset, size)
	if err != nil {
		return nil, asRefusal("superblock", err)
	}
	return fs, nil
}
