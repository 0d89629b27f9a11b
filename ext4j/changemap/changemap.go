// Package changemap is the durable record of the regions of one disk that
// changed since a position: what a promoted group, which has no replica, will
// have to ship when it gets one. It only grows.
//
// A file holds a header block of 4096 bytes and then one bit per region, the
// lowest region in the lowest bit of the first byte:
//
//	 0  8 B  "KAGAMICM"       8 u32 version 1      12 u32 zero
//	16 16 B  disk UUID       32 u64 disk size, bytes
//	40 u64   region size, bytes
//	4092 u32 CRC32C of bytes 0..4092
//
// All integers are little-endian. The bits carry no checksum and are written in
// place: they only ever go from 0 to 1, so a write torn by a crash leaves each
// byte old or new, and both are right: a bit that is set too early names a
// region that is compared in vain, and one that is not set yet belongs to a
// Mark that has not returned. Every write of a block holds all bits that were
// ever set in it, so that order does not matter either. What this does not
// protect against is rot of the bits.
//
// Invariant: when Mark has returned nil, its regions' bits are durable; until
// then nothing may be written to them.
//
// Open writes what it read again before its fdatasync: the last process may have
// been killed before its own, or have seen it fail, after which the kernel
// takes the blocks for clean although they never reached the disk.
package changemap

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"io/fs"
	"math/bits"
	"path/filepath"
	"sync"

	"kagami/ext4j/epoch"
	"kagami/images"
)

const (
	blockBytes = 4096
	version    = 1
	magic      = "KAGAMICM"
	// maxRegions bounds the map's size in memory: 32 MiB of bits.
	maxRegions = 1 << 28
)

// ErrCorrupt: the header is damaged or of another disk; every region must be
// taken as changed.
var ErrCorrupt = errors.New("record of changes is damaged")

// ErrClosed: the map was closed.
var ErrClosed = errors.New("record of changes is closed")

var table = crc32.MakeTable(crc32.Castagnoli)

// Map is an open record of changes. It is safe for concurrent use.
type Map struct {
	f      images.File
	region int64
	size   int64

	mu      sync.Mutex
	cond    *sync.Cond
	durable []byte         // bits known to be durable
	wanted  []byte         // bits that somebody waits for, durable ones included
	dirty   map[int64]bool // blocks of wanted that differ from durable
	busy    bool           // a commit runs
	err     error          // final
}

// Open opens the map of a disk, making it empty when the file is missing.
// Sizes are bytes.
func Open(fsys images.FS, path string, disk epoch.UUID, diskSize, regionBytes int64) (*Map, error) {
	if diskSize <= 0 || regionBytes <= 0 || (diskSize-1)/regionBytes >= maxRegions {
		return nil, fmt.Errorf("record of changes of a disk of %d bytes in regions of %d: out of bounds", diskSize, regionBytes)
	}
	m := &Map{region: regionBytes, size: diskSize, dirty: map[int64]bool{}}
	m.cond = sync.NewCond(&m.mu)
	n := ((diskSize-1)/regionBytes)/8 + 1
	n = (n + blockBytes - 1) / blockBytes * blockBytes
	m.durable, m.wanted = make([]byte, n), make([]byte, n)
	head := header(disk, diskSize, regionBytes)
	f, err := fsys.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		// Complete and durable, or not there at all; full of zeros, so that later commits only overwrite.
		if err := images.WriteFileAtomic(fsys, path, append(head[:blockBytes:blockBytes], make([]byte, n)...), 0o600); err != nil {
			return nil, fmt.Errorf("make record of changes: %w", err)
		}
		f, err = fsys.Open(path)
	}
	if err != nil {
		return nil, fmt.Errorf("open record of changes: %w", err)
	}
	m.f = f
	if err := m.load(fsys, path, head); err != nil {
		return nil, errors.Join(fmt.Errorf("read record of changes %s: %w", path, err), f.Close())
	}
	return m, nil
}

func header(disk epoch.UUID, diskSize, regionBytes int64) []byte {
	b := make([]byte, blockBytes)
	copy(b, magic)
	binary.LittleEndian.PutUint32(b[8:], version)
	copy(b[16:], disk[:])
	binary.LittleEndian.PutUint64(b[32:], uint64(diskSize))
	binary.LittleEndian.PutUint64(b[40:], uint64(regionBytes))
	binary.LittleEndian.PutUint32(b[blockBytes-4:], crc32.Checksum(b[:blockBytes-4], table))
	return b
}

// load reads the map and makes durable what it read, its name included.
func (m *Map) load(fsys images.FS, path string, head []byte) error {
	if err := m.f.Lock(); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if err := fsys.SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("fsync folder: %w", err)
	}
	b := make([]byte, blockBytes+len(m.durable))
	if n, err := m.f.ReadAt(b, 0); errors.Is(err, io.EOF) {
		return fmt.Errorf("%w: %d bytes of %d", ErrCorrupt, n, len(b))
	} else if err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if string(b[:blockBytes]) != string(head) {
		return fmt.Errorf("%w: its header is damaged or describes another disk", ErrCorrupt)
	}
	if _, err := m.f.WriteAt(b, 0); err != nil {
		return fmt.Errorf("rewrite: %w", err)
	}
	if err := m.f.Datasync(); err != nil {
		return fmt.Errorf("fdatasync: %w", err)
	}
	copy(m.durable, b[blockBytes:])
	copy(m.wanted, m.durable)
	return nil
}

// Mark returns when every region of [off, off+n) is durable in the map. A
// range that is there already costs no I/O; marks that wait at the same time
// share one fdatasync.
func (m *Map) Mark(off, n int64) error {
	if off < 0 || n <= 0 || n > m.size-off {
		return fmt.Errorf("mark %d bytes at %d as changed: the disk has %d", n, off, m.size)
	}
	first, last := off/m.region, (off+n-1)/m.region
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := first; i <= last; i++ {
		if m.durable[i/8]&(1<<(i%8)) == 0 {
			m.wanted[i/8] |= 1 << (i % 8)
			m.dirty[i/8/blockBytes] = true
		}
	}
	for m.err == nil && !m.hasLocked(first, last) {
		if m.busy {
			m.cond.Wait()
			continue
		}
		m.commitLocked()
	}
	return m.err
}

func (m *Map) hasLocked(first, last int64) bool {
	for i := first; i <= last; i++ {
		if m.durable[i/8]&(1<<(i%8)) == 0 {
			return false
		}
	}
	return true
}

// commitLocked writes the blocks that hold wanted bits and makes them durable.
// It lets go of the lock during I/O; bits wanted meanwhile are the next one's.
func (m *Map) commitLocked() {
	blocks := make(map[int64][]byte, len(m.dirty))
	for b := range m.dirty {
		blocks[b] = append([]byte(nil), m.wanted[b*blockBytes:(b+1)*blockBytes]...)
	}
	clear(m.dirty)
	m.busy = true
	m.mu.Unlock()
	err := m.write(blocks)
	m.mu.Lock()
	m.busy = false
	if err == nil {
		for b, bits := range blocks {
			copy(m.durable[b*blockBytes:], bits)
		}
	} else if m.err == nil {
		m.err = fmt.Errorf("record of changes has failed: %w", err)
	}
	m.cond.Broadcast()
}

func (m *Map) write(blocks map[int64][]byte) error {
	for b, bits := range blocks {
		if _, err := m.f.WriteAt(bits, blockBytes+b*blockBytes); err != nil {
			return fmt.Errorf("write record of changes: %w", err)
		}
	}
	if err := m.f.Datasync(); err != nil {
		return fmt.Errorf("fdatasync record of changes: %w", err)
	}
	return nil
}

// Regions lists the changed regions, ascending.
func (m *Map) Regions() []uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []uint64
	for i, b := range m.durable {
		for ; b != 0; b &= b - 1 {
			out = append(out, uint64(i*8+bits.TrailingZeros8(b)))
		}
	}
	return out
}

// Count is the number of changed regions.
func (m *Map) Count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	n := 0
	for _, b := range m.durable {
		n += bits.OnesCount8(b)
	}
	return n
}

// Close ends the map: marks that wait fail with ErrClosed. It makes nothing durable.
func (m *Map) Close() error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if errors.Is(m.err, ErrClosed) {
		return ErrClosed
	}
	m.err = errors.Join(ErrClosed, m.err)
	m.cond.Broadcast()
	for m.busy {
		m.cond.Wait()
	}
	if err := m.f.Close(); err != nil {
		return fmt.Errorf("close record of changes: %w", err)
	}
	return nil
}
