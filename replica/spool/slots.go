package spool

import (
	"errors"
	"fmt"
	"path"
	"strconv"
	"strings"
	"syscall"

	"kagami/images"
)

// How many free, prepared segments the spool makes ahead, and keeps.
const (
	prepareAhead = 1
	keepFree     = 4
)

// Sizes of zero-filling, in bytes: one write, and the most that is not yet synced.
const (
	fillPiece = 1 << 20
	fillSync  = 16 << 20
)

// slot is one segment file. What it holds changes with every use.
type slot struct {
	id    int
	path  string
	file  images.File
	size  int64 // of the segment
	ready bool  // it was written full once; else it must be filled before use
	stale bool  // it may hold the valid header of an earlier use

	number uint64 // of that use
}

func (s *slot) name() string { return path.Base(s.path) }

// writeHeader overwrites the header. It is not durable.
func (s *slot) writeHeader(h *header) error {
	if _, err := s.file.WriteAt(h.encode(), 0); err != nil {
		return fmt.Errorf("write header of spool segment: %w", err)
	}
	return nil
}

func (s *slot) sync() error {
	if err := s.file.Datasync(); err != nil {
		return fmt.Errorf("fsync spool segment: %w", err)
	}
	return nil
}

// void makes the segment durably free: after it, nothing in it is ever read again.
func (sp *Spool) void(s *slot) error {
	if err := s.writeHeader(sp.freeHeader(s)); err != nil {
		return err
	}
	s.stale = false
	return s.sync()
}

func (sp *Spool) freeHeader(s *slot) *header {
	return &header{Group: sp.o.Group, Replica: sp.o.Replica, Bytes: s.size}
}

func slotPath(dir string, id int) string { return path.Join(dir, fmt.Sprintf("%08d.seg", id)) }

// slotID reads a segment's file name; other files are none of ours.
func slotID(name string) (int, bool) {
	base, ok := strings.CutSuffix(name, ".seg")
	id, err := strconv.Atoi(base)
	return id, ok && err == nil && len(base) == 8 && id >= 0
}

// fill writes a segment full of zeros, then the header of a free one.
//
// Durability: the content is durable before the header that vouches for it;
// the folder is synced last, so that a durable name always shows a file whose
// header was decided. A crash in between leaves a slot without a valid header,
// which is filled again.
func (sp *Spool) fill(s *slot) error {
	if err := s.file.Allocate(0, s.size); err != nil && !errors.Is(err, syscall.EOPNOTSUPP) {
		return fmt.Errorf("reserve spool segment: %w", err)
	}
	zeros := make([]byte, min(fillPiece, s.size))
	for off := int64(0); off < s.size; off += int64(len(zeros)) {
		if sp.isClosing() {
			return ErrClosed
		}
		zeros = zeros[:min(int64(len(zeros)), s.size-off)]
		if _, err := s.file.WriteAt(zeros, off); err != nil {
			return fmt.Errorf("fill spool segment: %w", err)
		}
		if (off+int64(len(zeros)))%fillSync == 0 {
			if err := s.sync(); err != nil {
				return err
			}
		}
	}
	if err := s.sync(); err != nil {
		return err
	}
	if err := sp.void(s); err != nil {
		return err
	}
	s.ready = true
	return sp.syncDir()
}

func (sp *Spool) syncDir() error {
	if err := sp.o.FS.SyncDir(sp.o.Dir); err != nil {
		return fmt.Errorf("fsync spool folder: %w", err)
	}
	return nil
}

// remove gives a slot's file back. The folder is synced at once: a name that
// came back later would show a segment the spool knows nothing of.
func (sp *Spool) remove(s *slot) error {
	if err := s.file.Close(); err != nil {
		return fmt.Errorf("close spool segment: %w", err)
	}
	if err := sp.o.FS.Remove(s.path); err != nil {
		return fmt.Errorf("remove spool segment: %w", err)
	}
	return sp.syncDir()
}

// keeper is the background goroutine: it fills segments ahead and removes
// what is too many.
func (sp *Spool) keeper() {
	defer sp.wg.Done()
	sp.mu.Lock()
	defer sp.mu.Unlock()
	for sp.err == nil && !sp.closing {
		switch {
		case sp.busy:
			sp.cond.Wait()
		case sp.removeOne():
		case len(sp.free) < prepareAhead && sp.noSlot == nil && sp.canPrepare():
			sp.prepare()
		default:
			sp.cond.Wait()
		}
	}
}

// tidy has the keeper remove what is too many. Called with mu held; inline it
// gives mu up meanwhile.
func (sp *Spool) tidy() {
	sp.slotsChanged()
	for sp.o.Inline && sp.err == nil && sp.removeOne() {
	}
}

// removeOne removes one slot that is not worth keeping, or returns false.
func (sp *Spool) removeOne() bool {
	if n := len(sp.free); n > keepFree || n > 0 && sp.total > sp.o.MaxBytes {
		sp.junk = append(sp.junk, sp.free[0])
		sp.free = sp.free[1:]
	}
	if len(sp.junk) == 0 {
		return false
	}
	s := sp.junk[0]
	sp.junk = sp.junk[1:]
	sp.drop(s)
	return true
}

// giveBack makes a segment's slot free for reuse, or for removal when it has
// not the size of new segments.
func (sp *Spool) giveBack(g *segment) {
	g.freed = true
	sp.release(g.slot)
}

func (sp *Spool) release(s *slot) {
	switch {
	case s.size != sp.o.SegmentBytes:
		sp.junk = append(sp.junk, s)
	case s.ready:
		sp.free = append(sp.free, s)
	default:
		sp.raw = append(sp.raw, s)
	}
}

// canPrepare reports that there is a slot to fill or room for another one.
func (sp *Spool) canPrepare() bool {
	return len(sp.raw) > 0 || sp.total+sp.o.SegmentBytes <= sp.o.MaxBytes
}

// prepare fills one slot. When no file can be made or there is no space, that
// is remembered for the next Append; any other error is final.
func (sp *Spool) prepare() {
	sp.busy = true
	s, err := sp.rawSlot()
	if err == nil {
		sp.mu.Unlock()
		err = sp.fill(s)
		sp.mu.Lock()
	}
	sp.busy = false
	switch {
	case s == nil:
		sp.noSlot = err
	case images.NoSpace(err):
		sp.noSlot = err
		sp.drop(s)
	default:
		sp.release(s)
		if err != nil && !errors.Is(err, ErrClosed) {
			_ = sp.failLocked(err) // takeSlot returns it
		}
	}
	sp.slotsChanged()
}

// slotsChanged has those look again who wait for a slot. Called with mu held.
func (sp *Spool) slotsChanged() {
	sp.cond.Broadcast()
	if sp.wanted {
		sp.wanted = false
		sp.o.Ready()
	}
}

// rawSlot takes a slot that must be filled, making a file if there is none.
// Called with mu held; it gives mu up while it works.
func (sp *Spool) rawSlot() (*slot, error) {
	if n := len(sp.raw); n > 0 {
		s := sp.raw[n-1]
		sp.raw = sp.raw[:n-1]
		return s, nil
	}
	id := 0
	for sp.ids[id] {
		id++
	}
	s := &slot{id: id, path: slotPath(sp.o.Dir, id), size: sp.o.SegmentBytes}
	sp.mu.Unlock()
	err := s.create(sp.o.FS)
	sp.mu.Lock()
	if err != nil {
		return nil, err
	}
	sp.ids[id], sp.total = true, sp.total+s.size
	return s, nil
}

func (s *slot) create(fsys images.FS) error {
	f, err := fsys.Create(s.path, 0o600)
	if err != nil {
		return fmt.Errorf("create spool segment: %w", err)
	}
	if err := f.Lock(); err != nil {
		_ = f.Close() // the error of the lock is the one to report
		return fmt.Errorf("lock spool segment %s: %w", s.path, err)
	}
	s.file = f
	return nil
}

// drop removes a slot's file. Called with mu held; it gives mu up while it
// works. commitMu is held meanwhile, because a commit may be about to sync what
// the slot held before.
func (sp *Spool) drop(s *slot) {
	sp.busy = true
	sp.mu.Unlock()
	sp.commitMu.Lock()
	err := sp.remove(s)
	sp.commitMu.Unlock()
	sp.mu.Lock()
	sp.busy = false
	delete(sp.ids, s.id)
	sp.total -= s.size
	if err != nil {
		_ = sp.failLocked(err) // every later call returns it
	}
	sp.slotsChanged()
}

// takeSlot returns a slot ready for use. While one is being filled it waits, or
// with Ready returns ErrNotReady. Called with mu held.
func (sp *Spool) takeSlot() (*slot, error) {
	for {
		switch {
		case sp.usable() != nil:
			return nil, sp.usable()
		case len(sp.free) > 0:
			s := sp.free[0]
			sp.free = sp.free[1:]
			sp.cond.Broadcast() // the keeper prepares the next one
			return s, nil
		case sp.noSlot != nil:
			return nil, sp.takeNoSlot()
		case sp.busy && sp.o.Ready == nil:
			sp.cond.Wait()
		case !sp.busy && !sp.canPrepare():
			return nil, fmt.Errorf("%w: %d of %d bytes in use", ErrFull, sp.usedLocked(), sp.o.MaxBytes)
		case sp.o.Inline:
			sp.prepare()
		case sp.o.Ready != nil:
			sp.wanted = true
			sp.cond.Broadcast()
			return nil, ErrNotReady
		default:
			sp.cond.Broadcast()
			sp.cond.Wait()
		}
	}
}

// takeNoSlot returns why no slot could be made and lets the keeper try again.
func (sp *Spool) takeNoSlot() error {
	err := sp.noSlot
	sp.noSlot = nil
	sp.cond.Broadcast()
	if images.NoSpace(err) {
		return fmt.Errorf("%w: %w", ErrFull, err)
	}
	return err
}
