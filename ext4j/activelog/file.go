package activelog

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"

	"kagami/images"
)

// maxFileBytes bounds what is read as an active log.
const maxFileBytes = 64 << 20

// file is the log on disk. It belongs to whoever holds Log.ioMu.
type file struct {
	f          images.File
	proto      block // generation, snapshot, group and region bytes of the current half
	half       int   // the current one
	halfBlocks int
	next       int      // number of the next block in it
	follower   Follower // of the next write
	floor      Floor    // likewise
}

func snapshotBlocks(regions int) int { return max(1, (regions+blockEntries-1)/blockEntries) }

// halfBlocksFor is the size of a half: a snapshot and room for batches.
func halfBlocksFor(regions int) int { return 6*snapshotBlocks(regions) + 16 }

// openFile opens or makes the log and returns the recovered set.
func openFile(fsys images.FS, name string, o Options) (*file, []key, error) {
	f, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		if err = create(fsys, name, protoOf(o, halfBlocksFor(o.MaxRegions), 1, Follower{}, Floor{}, nil), nil); err == nil {
			f, err = fsys.Open(name)
		}
	}
	if err != nil {
		return nil, nil, err
	}
	d, set, err := recoverFile(fsys, name, f, o)
	if err != nil {
		_ = f.Close() // the error of recovery is the one to report
		return nil, nil, err
	}
	return d, set, nil
}

// create makes a whole log under another name, durable, and renames it: a file
// of the right name always holds a complete snapshot.
func create(fsys images.FS, name string, proto block, set []key) error {
	b := make([]byte, 2*int(proto.half)*blockBytes)
	copy(b, batch(proto, nil, set))
	return images.WriteFileAtomic(fsys, name, b, 0o600)
}

// recoverFile reads the log, makes durable what it read, and begins a new generation.
//
// Durability, in this order: the file's name; the blocks that count, written
// again in place (see the package's doc); the new snapshot in the other half.
func recoverFile(fsys images.FS, name string, f images.File, o Options) (*file, []key, error) {
	if err := f.Lock(); err != nil {
		return nil, nil, fmt.Errorf("lock: %w", err)
	}
	if err := fsys.SyncDir(path.Dir(name)); err != nil {
		return nil, nil, fmt.Errorf("fsync folder: %w", err)
	}
	p, err := readAll(f)
	if err != nil {
		return nil, nil, err
	}
	s, err := replay(p)
	if err != nil {
		return nil, nil, err
	}
	if s.group != o.Group {
		return nil, nil, fmt.Errorf("it belongs to group %s", s.group)
	}
	if s.region != uint64(o.RegionBytes) {
		return nil, nil, fmt.Errorf("its regions have %d bytes, configured are %d", s.region, o.RegionBytes)
	}
	set := slices.Sorted(maps.Keys(s.set))
	d := &file{f: f, follower: s.follower, floor: s.floor, half: s.half, halfBlocks: len(p) / 2 / blockBytes, next: s.blocks}
	if want := halfBlocksFor(max(o.MaxRegions, len(set))); d.halfBlocks != want {
		return resize(fsys, name, f, protoOf(o, want, s.generation+1, s.follower, s.floor, set), set)
	}
	at := s.half * len(p) / 2
	if err := d.write(p[at:at+s.blocks*blockBytes], 0); err != nil {
		return nil, nil, err
	}
	d.proto.generation = s.generation
	return d, set, d.begin(o, set)
}

func readAll(f images.File) ([]byte, error) {
	size, err := f.Size()
	if err != nil {
		return nil, fmt.Errorf("size: %w", err)
	}
	if size == 0 || size%(2*blockBytes) != 0 || size > maxFileBytes {
		return nil, fmt.Errorf("%w: file of %d bytes", ErrCorrupt, size)
	}
	p := make([]byte, size)
	if _, err := f.ReadAt(p, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read: %w", err)
	}
	return p, nil
}

// resize replaces the log by one for another number of regions.
func resize(fsys images.FS, name string, old images.File, proto block, set []key) (*file, []key, error) {
	if err := create(fsys, name, proto, set); err != nil {
		return nil, nil, err
	}
	f, err := fsys.Open(name)
	if err != nil {
		return nil, nil, err
	}
	if err := f.Lock(); err != nil {
		_ = f.Close() // the error of the lock is the one to report
		return nil, nil, fmt.Errorf("lock: %w", err)
	}
	_ = old.Close() // it has no name any more
	return &file{f: f, follower: proto.follower, floor: proto.floor, proto: proto, halfBlocks: int(proto.half),
		next: snapshotBlocks(len(set))}, set, nil
}

// protoOf is the first block of a generation that begins with set, without its entries.
func protoOf(o Options, halfBlocks int, generation uint64, f Follower, floor Floor, set []key) block {
	return block{half: uint32(halfBlocks), generation: generation, snapshot: uint32(snapshotBlocks(len(set))), group: o.Group, regionBytes: uint64(o.RegionBytes), follower: f, floor: floor}
}

// begin makes the other half the current one, with set as its snapshot.
//
// Durability: until the fdatasync returns, the half left behind counts; it is
// durable and not touched.
func (d *file) begin(o Options, set []key) error {
	proto := protoOf(o, d.halfBlocks, d.proto.generation+1, d.follower, d.floor, set)
	b := batch(proto, nil, set)
	d.half = 1 - d.half
	if err := d.write(b, 0); err != nil {
		return err
	}
	d.proto, d.next = proto, len(b)/blockBytes
	return nil
}

// append writes a batch, or all as a new snapshot when there is no room for it.
func (d *file) append(o Options, removals, additions []key, all func() []key) error {
	p := d.proto
	p.follower, p.floor = d.follower, d.floor
	p.number, p.batch = uint32(d.next), uint32(d.next)
	b := batch(p, removals, additions)
	if d.next+len(b)/blockBytes > d.halfBlocks {
		return d.begin(o, all())
	}
	if err := d.write(b, d.next); err != nil {
		return err
	}
	d.next += len(b) / blockBytes
	return nil
}

// write writes blocks at a place of the current half and makes them durable.
func (d *file) write(b []byte, number int) error {
	if _, err := d.f.WriteAt(b, int64(d.half*d.halfBlocks+number)*blockBytes); err != nil {
		return fmt.Errorf("write active log: %w", err)
	}
	if err := d.f.Datasync(); err != nil {
		return fmt.Errorf("fsync active log: %w", err)
	}
	return nil
}
