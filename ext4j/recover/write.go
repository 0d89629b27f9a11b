package recover

import (
	"bytes"
	"fmt"

	"kagami/ext4j/ext4"
)

// write carries out a job; the order is the one of the package's doc.
func (k *job) write(dev Device) error {
	w := writer{dev: dev, off: k.view.off}
	k.blocks(&w)
	w.sync("replayed blocks")
	w.superblock(&k.disk, &k.replay)
	if k.empty != k.journal.raw {
		w.put(k.empty[:sector], k.journalAt(), "the journal's superblock")
		// The next step syncs before it writes what could not be told from step 2
		// again; this sync keeps the steps apart all the same.
		w.sync("the journal's superblock")
	}
	w.superblock(&k.replay, &k.final)
	return w.err
}

// blocks writes the replayed blocks in rising order, the superblock's 1024 bytes left out.
func (k *job) blocks(w *writer) {
	b := make([]byte, k.view.blockSize)
	for _, block := range sortedBlocks(k.view.copies) {
		if w.err != nil {
			return
		}
		if err := k.view.content(k.view.copies[block], b); err != nil {
			w.err = err
			return
		}
		at, what := int64(block)*k.view.blockSize, fmt.Sprintf("block %d", block)
		if at > ext4.Offset || at+k.view.blockSize <= ext4.Offset {
			w.put(b, at, what)
			continue
		}
		w.put(b[:ext4.Offset-at], at, what)
		w.put(b[ext4.Offset+ext4.Size-at:], ext4.Offset+ext4.Size, what)
	}
}

// writer writes until the first error, which it keeps.
type writer struct {
	dev Device
	off int64
	err error
}

func (w *writer) put(p []byte, off int64, what string) {
	if w.err != nil || len(p) == 0 {
		return
	}
	if _, err := w.dev.WriteAt(p, w.off+off); err != nil {
		w.err = fmt.Errorf("write %s: %w", what, err)
	}
}

// sync makes all writes so far durable.
func (w *writer) sync(what string) {
	if w.err != nil {
		return
	}
	if err := w.dev.Datasync(); err != nil {
		w.err = fmt.Errorf("sync %s: %w", what, err)
	}
}

// superblock replaces one version of the superblock by the next: its second
// half, with the checksum, is durable before the first one is written.
func (w *writer) superblock(from, to *ext4.Raw) {
	if bytes.Equal(from[:], to[:]) {
		return
	}
	w.put(to[sector:], ext4.Offset+sector, "second half of the superblock")
	w.sync("second half of the superblock")
	w.put(to[:sector], ext4.Offset, "first half of the superblock")
	w.sync("first half of the superblock")
}
