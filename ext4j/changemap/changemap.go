// Package changemap is the durable record of the regions of one disk that
// changed since a position: what a promoted group, which has no replica, will
// have to ship when it gets one. It only grows.
//
// A file holds a header block of 4096 bytes and then one bit per region, the
// lowest region in the lowest bit of the first byte:
//
//	   0  8 B  "KAGAMICM"
//	   8  u32  version 1
//	  12  u32  required feature bits, 0; an unknown one is refused
//	  16  u32  optional feature bits, 0; ignored and kept
//	  20  u32  zero
//	  24  16 B group
//	  40  16 B disk
//	  56  u64  disk size, bytes
//	  64  u64  region size, bytes
//	  72  16 B lineage that made the changes
//	  88  16 B, u64, u64: lineage, session and LSN of the fork, since which they were made
//	4092  u32  CRC32C of bytes 0..4092
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

// ErrCorrupt: the map is damaged or of something else; every region must be
// taken as changed.
var ErrCorrupt = errors.New("record of changes is damaged")

// ErrClosed: the map was closed.
var ErrClosed = errors.New("record of changes is closed")

var table = crc32.MakeTable(crc32.Castagnoli)

// Origin says what a map records: the changes of one disk, made in Lineage
// since it began at Fork, the last position of the lineage before.
type Origin struct {
	Group       epoch.UUID
	Disk        epoch.UUID
	DiskBytes   int64
	RegionBytes int64
	Lineage     epoch.UUID
	Fork        epoch.Pos
}

func (o *Origin) check() error {
	if o.DiskBytes <= 0 || o.RegionBytes <= 0 || (o.DiskBytes-1)/o.RegionBytes >= maxRegions {
		return fmt.Errorf("record of changes of a disk of %d bytes in regions of %d: out of bounds", o.DiskBytes, o.RegionBytes)
	}
	return nil
}

func (o *Origin) regions() int64 { return (o.DiskBytes-1)/o.RegionBytes + 1 }

// bitBytes is the size of the bits on disk: whole blocks.
func (o *Origin) bitBytes() int64 {
	return ((o.regions()+7)/8 + blockBytes - 1) / blockBytes * blockBytes
}

// Map is an open record of changes. It is safe for concurrent use.
type Map struct {
	f images.File
	o Origin

	mu      sync.Mutex
	cond    *sync.Cond
	durable []byte         // bits known to be durable
	wanted  []byte         // bits that somebody waits for, durable ones included
	dirty   map[int64]bool // blocks of wanted that differ from durable
	busy    bool           // a commit runs
	err     error          // final
}

// Create makes the map, in the place of any that is there, and opens it: empty
// or, if full, with every region changed.
func Create(fsys images.FS, path string, o Origin, full bool) (*Map, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	b := append(o.header(0), make([]byte, o.bitBytes())...)
	if full {
		for i := range o.regions() {
			b[blockBytes+i/8] |= 1 << (i % 8)
		}
	}
	// Complete and durable, or not there at all; as long as it will ever be, so that later commits only overwrite.
	if err := images.WriteFileAtomic(fsys, path, b, 0o600); err != nil {
		return nil, fmt.Errorf("make record of changes: %w", err)
	}
	return Open(fsys, path, o)
}

// Open opens the map of o. It must be there: one that is missing has been lost,
// and everything counts as changed, as with ErrCorrupt.
func Open(fsys images.FS, path string, o Origin) (*Map, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	m := &Map{o: o, dirty: map[int64]bool{}, durable: make([]byte, o.bitBytes()), wanted: make([]byte, o.bitBytes())}
	m.cond = sync.NewCond(&m.mu)
	f, err := fsys.Open(path)
	if err != nil {
		return nil, fmt.Errorf("open record of changes: %w", err)
	}
	m.f = f
	if err := m.load(fsys, path); err != nil {
		return nil, errors.Join(fmt.Errorf("read record of changes %s: %w", path, err), f.Close())
	}
	return m, nil
}

func (o *Origin) header(optional uint32) []byte {
	b := make([]byte, blockBytes)
	le := binary.LittleEndian
	copy(b, magic)
	le.PutUint32(b[8:], version)
	le.PutUint32(b[16:], optional)
	copy(b[24:], o.Group[:])
	copy(b[40:], o.Disk[:])
	le.PutUint64(b[56:], uint64(o.DiskBytes))
	le.PutUint64(b[64:], uint64(o.RegionBytes))
	copy(b[72:], o.Lineage[:])
	copy(b[88:], o.Fork.Lineage[:])
	le.PutUint64(b[104:], o.Fork.Session)
	le.PutUint64(b[112:], uint64(o.Fork.LSN))
	seal(b)
	return b
}

func seal(b []byte) {
	binary.LittleEndian.PutUint32(b[blockBytes-4:], crc32.Checksum(b[:blockBytes-4], table))
}

// checkHeader tells whether a header is o's. An error other than ErrCorrupt says
// that a later release wrote it.
func (o *Origin) checkHeader(b []byte) error {
	le := binary.LittleEndian
	if string(b[:8]) != magic || crc32.Checksum(b[:blockBytes-4], table) != le.Uint32(b[blockBytes-4:]) {
		return fmt.Errorf("%w: its header is damaged", ErrCorrupt)
	}
	if v := le.Uint32(b[8:]); v != version {
		return fmt.Errorf("it has version %d, this release reads %d", v, version)
	}
	if f := le.Uint32(b[12:]); f != 0 {
		return fmt.Errorf("it needs features %#x that this release does not have", f)
	}
	if string(b) != string(o.header(le.Uint32(b[16:]))) {
		return fmt.Errorf("%w: it is of another group, disk or lineage", ErrCorrupt)
	}
	return nil
}

// load reads the map and makes durable what it read, its name included.
func (m *Map) load(fsys images.FS, path string) error {
	if err := m.f.Lock(); err != nil {
		return fmt.Errorf("lock: %w", err)
	}
	if err := fsys.SyncDir(filepath.Dir(path)); err != nil {
		return fmt.Errorf("fsync folder: %w", err)
	}
	b := make([]byte, blockBytes+len(m.durable))
	n, err := m.f.ReadAt(b, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read: %w", err)
	}
	if err := m.o.checkHeader(b[:blockBytes]); err != nil {
		return err
	}
	if n < len(b) {
		return fmt.Errorf("%w: %d bytes of %d", ErrCorrupt, n, len(b))
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
	if off < 0 || n <= 0 || n > m.o.DiskBytes-off {
		return fmt.Errorf("mark %d bytes at %d as changed: the disk has %d", n, off, m.o.DiskBytes)
	}
	first, last := off/m.o.RegionBytes, (off+n-1)/m.o.RegionBytes
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
