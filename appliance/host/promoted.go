package host

import (
	"context"
	"errors"
	"fmt"

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
	return s.serveDetached(maps, maps.close)
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

// openChanges opens the map of each disk, making it at the first start.
func (g *group) openChanges(f *groupFile) (changes, error) {
	maps := changes{}
	for _, d := range f.Disks {
		m, err := changemap.Open(g.d.fs, fmt.Sprintf("%s/changes-%d.map", g.dir, d.Slot), d.ID, d.Size, regionBytes)
		if err != nil {
			return maps, fmt.Errorf("open record of changes of disk %s: %w", d.Name, err)
		}
		maps[d.Slot] = m
	}
	return maps, nil
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
