package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"strings"

	"kagami/ext4j"
	"kagami/ext4j/changemap"
	"kagami/ext4j/epoch"
	"kagami/images"
)

// changes is the record of changes of a promoted group: one grow-only map per
// disk (ext4j.Recorder). It says what a failback has to ship.
type changes map[uint32]*changemap.Map

func (c changes) Acquire(_ context.Context, disk uint32, off, n int64) error {
	return c[disk].Mark(off, n)
}

func (c changes) Release(uint32, int64, int64, epoch.LSN) {}
func (c changes) Begin(uint64, epoch.LSN, epoch.LSN)      {}
func (c changes) Acked(epoch.LSN)                         {}
func (c changes) SyncBegin(uint32) uint64                 { return 0 }
func (c changes) SyncEnd(uint32, uint64)                  {}
func (c changes) NeedsRoom() <-chan struct{}              { return nil }

func (c changes) close() error {
	var errs []error
	for _, m := range c {
		errs = append(errs, m.Close())
	}
	return errors.Join(errs...)
}

// startPromoted serves a promoted group: from its images, without a replica,
// every change recorded.
func (g *group) startPromoted() error {
	f := g.snapshot()
	if err := g.update(func(f *groupFile) { f.Session++ }); err != nil {
		return err
	}
	s := &source{g: g, limits: g.d.limits(g.name), synced: make(chan struct{})}
	if err := s.openImages(f); err != nil {
		return errors.Join(err, g.closeImages())
	}
	maps, err := g.openChanges(f)
	if err != nil {
		return errors.Join(err, maps.close(), g.closeImages())
	}
	s.changes = maps
	if err := s.serveDetached(maps, maps.close); err != nil {
		return err
	}
	g.d.wg.Go(func() { g.beside(g.d.ctx, s) }) // not the source's: it may end it
	return nil
}

// startAlone serves a source that is about to end, without a replica and
// without a record of changes.
func (g *group) startAlone() error {
	s := &source{g: g, limits: g.d.limits(g.name), synced: make(chan struct{})}
	if err := s.openImages(g.snapshot()); err != nil {
		return errors.Join(err, g.closeImages())
	}
	return s.serveDetached(unrecorded{}, func() error { return nil })
}

// serveDetached begins to serve without a replica.
func (s *source) serveDetached(rec ext4j.Recorder, closeRec func() error) error {
	s.close = closeRec
	s.eng = ext4j.NewGroup(ext4j.Options{Recorder: rec, Detached: true,
		Limits: ext4j.Limits{QueueBytes: s.limits.QueueBytes, EpochBytes: s.limits.EpochBytes, EpochAge: s.limits.EpochAge}})
	f := s.g.snapshot()
	s.eng.Begin(f.Lineage, f.Session, 1, false)
	s.eng.OpenGate()
	s.markSynced()
	if err := s.begin(); err != nil {
		return errors.Join(err, s.g.closeImages())
	}
	return nil
}

// openChanges opens the map of each disk. At the first start it makes them: an
// attempt that was broken off has served nothing. That they exist is durable in
// the group file before anything is served: a map that cannot be read later was
// lost, and all of its disk counts as changed.
func (g *group) openChanges(f *groupFile) (changes, error) {
	maps := changes{}
	for _, d := range f.Disks {
		m, err := g.openMap(f, &d)
		if err != nil {
			return maps, fmt.Errorf("record of changes of disk %s: %w", d.Name, err)
		}
		maps[d.Slot] = m
	}
	g.alarm("changes", g.snapshot().ChangesLost)
	if f.Changes {
		return maps, nil
	}
	return maps, g.update(func(f *groupFile) { f.Changes = true })
}

// origin says which changes the record of a promoted group's disk is about.
func (f *groupFile) origin(d *diskFile) changemap.Origin {
	return changemap.Origin{Group: f.ID, Disk: d.ID, DiskBytes: d.Size, RegionBytes: regionBytes, Lineage: f.Lineage, Fork: f.Past[len(f.Past)-1]}
}

func (g *group) openMap(f *groupFile, d *diskFile) (*changemap.Map, error) {
	path, o := g.mapPath(d), f.origin(d)
	if !f.Changes {
		return changemap.Create(g.d.fs, path, o, false)
	}
	m, err := changemap.Open(g.d.fs, path, o)
	if !lost(err) {
		return m, err
	}
	// The loss is durable before the full map that takes its place.
	why := fmt.Sprintf("the record of changes of disk %s was lost, all of the disk counts as changed: %v", d.Name, err)
	if err := g.update(func(f *groupFile) { f.ChangesLost = strings.TrimPrefix(f.ChangesLost+"; "+why, "; ") }); err != nil {
		return nil, err
	}
	return g.replaceMap(path, o)
}

// replaceMap puts a full map in the place of one that was lost.
func (g *group) replaceMap(path string, o changemap.Origin) (*changemap.Map, error) {
	if err := g.d.fs.Rename(path, path+".damaged"); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("put what is left of it aside: %w", err)
	}
	return changemap.Create(g.d.fs, path, o, true)
}

// diskDevice lets the journal replay write through the group's own path, so
// that the record of changes sees it.
type diskDevice struct {
	disk *ext4j.Disk
	img  *images.Image
}

func (v diskDevice) ReadAt(p []byte, off int64) (int, error) { return v.img.ReadAt(p, off) }

func (v diskDevice) WriteAt(p []byte, off int64) (int, error) {
	if err := v.disk.WriteAt(p, off, false); err != nil {
		return 0, err
	}
	return len(p), nil
}

func (v diskDevice) Datasync() error { return v.disk.Flush() }
