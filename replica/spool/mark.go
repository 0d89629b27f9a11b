package spool

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path"
	"sync"

	"kagami/ext4j/epoch"
	"kagami/images"
)

const (
	markMagic   = "KAGAMIAP"
	markVersion = 1
	markSlot    = 4096 // bytes of one slot; there are two
	flagSynced  = 1 << 0
)

// Owner is the replica whose positions a Mark holds. A mark of another one
// says nothing about its images.
type Owner struct {
	Group   epoch.UUID
	Replica epoch.UUID
}

// Applied is what a Mark holds: how far the image is.
type Applied struct {
	Pos         epoch.Pos
	CloseTimeNs int64 // close time of that epoch at the source, ns since 1970
	SyncDone    bool  // the first sync's SyncDone record is at or below Pos
}

// Mark is the durable applied position, the file `applied`: two slots, written
// in turn, of which the valid one with the higher counter counts. The slot that
// counts is never changed, so one of them is always whole. README.md has
// the layout. It is safe for concurrent use.
type Mark struct {
	mu      sync.Mutex
	file    images.File
	owner   Owner
	now     Applied
	counter uint64
	slot    int // that holds now
	err     error
}

// OpenMark opens the owner's mark, making one that says "nothing applied" when
// there is none. ErrCorrupt (wrapped) says that neither slot is valid: how far the
// image is cannot be known. The mark of another owner is refused.
func OpenMark(fsys images.FS, name string, owner Owner) (*Mark, error) {
	f, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		// Written under another name and renamed when durable: a file of the
		// right name always holds a valid slot.
		b := append(encodeMark(owner, Applied{}, 1), make([]byte, markSlot)...)
		if err = images.WriteFileAtomic(fsys, name, b, 0o600); err == nil {
			f, err = fsys.Open(name)
		}
	}
	if err != nil {
		return nil, fmt.Errorf("open applied mark: %w", err)
	}
	m := &Mark{file: f, owner: owner}
	if err := m.recover(fsys, name); err != nil {
		_ = f.Close() // the error of recovery is the one to report
		return nil, fmt.Errorf("open applied mark %s: %w", name, err)
	}
	return m, nil
}

// recover reads both slots and makes durable the one that counts: its last
// writer may have been killed before the fdatasync, or have seen it fail. The
// other slot, which was durable before, is left alone meanwhile.
func (m *Mark) recover(fsys images.FS, name string) error {
	if err := m.file.Lock(); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return fmt.Errorf("fsync folder: %w", err)
	}
	b := make([]byte, 2*markSlot)
	if _, err := m.file.ReadAt(b, 0); err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read: %w", err)
	}
	for i := range 2 {
		owner, a, n, err := decodeMark(b[i*markSlot : (i+1)*markSlot])
		if errors.Is(err, errNoHeader) {
			continue
		}
		if err != nil {
			return err
		}
		if owner != m.owner {
			return fmt.Errorf("it belongs to replica %s of group %s, not to %s of %s", owner.Replica, owner.Group, m.owner.Replica, m.owner.Group)
		}
		if n > m.counter {
			m.now, m.counter, m.slot = a, n, i
		}
	}
	if m.counter == 0 {
		return fmt.Errorf("%w: neither slot of the applied mark is valid", ErrCorrupt)
	}
	return m.write(m.now, m.counter, m.slot)
}

func (m *Mark) write(a Applied, counter uint64, slot int) error {
	if _, err := m.file.WriteAt(encodeMark(m.owner, a, counter), int64(slot)*markSlot); err != nil {
		return fmt.Errorf("write applied mark: %w", err)
	}
	if err := m.file.Datasync(); err != nil {
		return fmt.Errorf("fsync applied mark: %w", err)
	}
	return nil
}

// Load returns the position stored last; zero when nothing was applied.
func (m *Mark) Load() Applied {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.now
}

// Store makes a durable. The image must be durable up to a before. An error is
// final: every later Store returns it, and Load the position before.
func (m *Mark) Store(a Applied) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err != nil {
		return m.err
	}
	if err := m.write(a, m.counter+1, 1-m.slot); err != nil {
		m.err = err
		return err
	}
	m.now, m.counter, m.slot = a, m.counter+1, 1-m.slot
	return nil
}

// Close closes the file.
func (m *Mark) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.err == nil {
		m.err = ErrClosed
	}
	if err := m.file.Close(); err != nil {
		return fmt.Errorf("close applied mark: %w", err)
	}
	return nil
}

func encodeMark(o Owner, a Applied, counter uint64) []byte {
	b := make([]byte, markSlot)
	le := binary.LittleEndian
	copy(b, markMagic)
	le.PutUint32(b[8:], markVersion)
	if a.SyncDone {
		le.PutUint32(b[20:], flagSynced)
	}
	le.PutUint64(b[24:], counter)
	copy(b[32:], o.Group[:])
	copy(b[48:], o.Replica[:])
	copy(b[64:], a.Pos.Lineage[:])
	le.PutUint64(b[80:], a.Pos.Session)
	le.PutUint64(b[88:], uint64(a.Pos.LSN))
	le.PutUint64(b[96:], uint64(a.CloseTimeNs))
	sealBlock(b)
	return b
}

// decodeMark reads a slot. errNoHeader means that it is torn or was never written.
func decodeMark(b []byte) (Owner, Applied, uint64, error) {
	var o Owner
	if string(b[:8]) != markMagic || !blockSealed(b) {
		return o, Applied{}, 0, errNoHeader
	}
	le := binary.LittleEndian
	if v := le.Uint32(b[8:]); v != markVersion {
		return o, Applied{}, 0, fmt.Errorf("applied mark version %d is not known to this release", v)
	}
	if f := le.Uint32(b[12:]); f != 0 {
		return o, Applied{}, 0, fmt.Errorf("applied mark needs features %#x, not known to this release", f)
	}
	flags := le.Uint32(b[20:])
	if flags&^flagSynced != 0 {
		return o, Applied{}, 0, fmt.Errorf("applied mark has flags %#x, not known to this release", flags)
	}
	a := Applied{SyncDone: flags&flagSynced != 0, CloseTimeNs: int64(le.Uint64(b[96:])),
		Pos: epoch.Pos{Session: le.Uint64(b[80:]), LSN: epoch.LSN(le.Uint64(b[88:]))}}
	copy(o.Group[:], b[32:48])
	copy(o.Replica[:], b[48:64])
	copy(a.Pos.Lineage[:], b[64:80])
	return o, a, le.Uint64(b[24:]), nil
}
