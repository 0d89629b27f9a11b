package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"sync/atomic"
	"time"

	"kagami/appliance/config"
	"kagami/appliance/ship"
	"kagami/ext4j"
	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
)

// source is the serving side of a group while it is started: the ext4j group,
// its exports, and, unless the group was promoted, the goroutine that keeps it
// attached to its replica.
type source struct {
	g       *group
	limits  config.Limits
	eng     *ext4j.Group
	exports []*export
	link    *ship.Link // nil: promoted, no replica
	log     *activelog.Log
	rec     *ext4j.Recorders // the log, or while the group is apart, its maps
	close   func() error     // closes the record of changes
	changes changes          // promoted: the record of changes
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	// What the goroutine in attach.go knows; no other touches it.
	active     []ext4j.Range      // may differ from before this start
	floor      activelog.Floor    // what the replica has acknowledged at least, as of an earlier life
	follower   activelog.Follower // whose floor that is
	clean      *cleanMark         // the last stop left nothing to resync
	begun      bool               // the ext4j group has a session
	unfinished *plan              // a resync that was broken off
	empty      bool               // images made just now: a block copy will fill them
	replaced   bool               // the replica is another one than this life began with, and not compared yet
	away       time.Time          // when the replica was attached last, or this life began

	asked    atomic.Bool   // the peer was asked to attach, and may have a replica
	refused  chan error    // the peer's refusals; one is kept
	filled   chan struct{} // closed when a first sync may end: no block copy is under way
	complete chan struct{} // closed when the first sync has ended
	poke     chan struct{} // has one token when the policy was changed, or the backlog is full or lost

	mu      sync.Mutex
	binding *ship.Binding
	base    epoch.Pos     // where the replica stood when the session began
	synced  chan struct{} // closed when the group is attached and complete or may be filled
	last    wire.Ack
	maps    changes // while the group is apart
}

// startSource opens a source's images and record of changes, raises the
// session and begins to serve. Requests wait until the replica is attached.
func (g *group) startSource() error {
	s, err := g.openSource(false)
	if err != nil {
		return err
	}
	if err := s.begin(); err != nil {
		return errors.Join(err, g.closeImages())
	}
	return nil
}

// openSource prepares a source with a replica. fresh says that its images were
// just made and are empty.
func (g *group) openSource(fresh bool) (*source, error) {
	f := g.snapshot()
	link := g.d.links[f.Peer]
	if link == nil {
		return nil, fmt.Errorf("group %s replicates to site %q, which is not among the peers of the config file", g.name, f.Peer)
	}
	s := &source{g: g, limits: g.d.limits(g.name), link: link, clean: f.Clean, empty: fresh, synced: make(chan struct{}),
		refused: make(chan error, 1), filled: make(chan struct{}), complete: make(chan struct{}), poke: make(chan struct{}, 1), away: time.Now()}
	if !fresh {
		s.allFilled()
	}
	if err := s.openImages(f); err != nil {
		return nil, errors.Join(err, g.closeImages())
	}
	if err := s.openLog(f); err != nil {
		return nil, errors.Join(err, g.closeImages())
	}
	// The session is durable, and the clean mark gone, before the first write.
	if err := g.update(func(f *groupFile) { f.Session++; f.Clean = nil }); err != nil {
		return nil, errors.Join(err, s.closeRecords(), g.closeImages())
	}
	eyes := ext4j.Eyes{Follow: g.d.cfg.Ext4.Follow, LocalFlushes: g.d.cfg.Ext4.LocalFlushes}
	s.eng = ext4j.NewGroup(ext4j.Options{Recorder: s.rec, MaxExtent: s.maxExtent(), Eyes: eyes, Limits: ext4j.Limits{
		QueueBytes: s.limits.QueueBytes, EpochBytes: s.limits.EpochBytes, EpochAge: s.limits.EpochAge}})
	s.eng.SetMode(g.policy().engine(s.limits.QueueBytes))
	s.close = s.closeRecords
	return s, nil
}

// openImages opens, locks and checks the images. An image that is not the one
// the group knew, or that changed since a clean stop, is served, but all of it
// is compared.
func (s *source) openImages(f *groupFile) error {
	for _, d := range f.Disks {
		if err := s.openImage(&d); err != nil {
			return fmt.Errorf("image of disk %s: %w", d.Name, err)
		}
	}
	return nil
}

func (s *source) openImage(d *diskFile) error {
	img, err := images.OpenImage(s.g.d.fs, d.Image, images.Want{Size: d.Size, Identity: d.ID.String()})
	foreign := errors.Is(err, images.ErrIdentity)
	if foreign {
		img, err = images.OpenImage(s.g.d.fs, d.Image, images.Want{Size: d.Size})
	}
	if err != nil {
		return err
	}
	s.g.mu.Lock()
	s.g.images[d.Slot] = img
	s.g.mu.Unlock()
	if !foreign {
		return s.checkUnchanged(img, d)
	}
	if err := s.g.mustCompare(fmt.Sprintf("image %s was replaced by a file that kagami did not make", d.Image)); err != nil {
		return err
	}
	// From now on it is this disk's.
	if err := img.SetAttr(images.IdentityAttr, []byte(d.ID.String())); err != nil {
		return err
	}
	return img.Settle()
}

func (s *source) checkUnchanged(img *images.Image, d *diskFile) error {
	if s.clean == nil {
		if s.empty {
			return nil
		}
		return img.Settle()
	}
	now, err := img.ModTime()
	if err != nil {
		return err
	}
	if was, ok := s.clean.Mtime[d.Slot]; ok && was == now {
		return nil
	}
	return s.g.mustCompare(fmt.Sprintf("image %s was changed while kagami did not run", d.Image))
}

// mustCompare records why the two sites have to be compared as a whole: durably,
// because what tells it may be gone at the next start. The first reason stays.
func (g *group) mustCompare(why string) error {
	if g.snapshot().Compare != "" {
		return nil
	}
	return g.update(func(f *groupFile) { f.Compare = why })
}

const regionBytes = 1 << 20

// openLog opens the active log. A log that cannot be read, or that is missing
// although the group has served, costs a compare of everything.
func (s *source) openLog(f *groupFile) error {
	path := s.g.dir + "/active.log"
	if err := s.mustHaveLog(path, f); err != nil {
		return err
	}
	o := activelog.Options{Group: f.ID, RegionBytes: regionBytes, MaxRegions: int(s.limits.ActiveLogBytes / regionBytes)}
	log, regions, err := activelog.Open(s.g.d.fs, path, o)
	if errors.Is(err, activelog.ErrCorrupt) {
		if err := s.g.mustCompare(err.Error()); err != nil {
			return err
		}
		if err := s.g.d.fs.Rename(path, path+".damaged"); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("put damaged active log aside: %w", err)
		}
		log, regions, err = activelog.Open(s.g.d.fs, path, o)
	}
	if err != nil {
		return err
	}
	s.log, s.active, s.floor, s.follower = log, ranges(regions), log.Floor(), log.Follower()
	if f.Apart == nil {
		s.rec = ext4j.NewRecorders(log, nil)
		return nil
	}
	if s.maps, err = s.g.openApart(f); err != nil {
		return errors.Join(err, log.Close())
	}
	s.rec = ext4j.NewRecorders(log, s.maps)
	return nil
}

// closeRecords closes the active log and the maps of a group that is apart.
func (s *source) closeRecords() error { return errors.Join(s.log.Close(), s.apartMaps().close()) }

// mustHaveLog looks for the log of a group that has served before. Opening a
// missing one makes an empty one, which would say that nothing differs.
func (s *source) mustHaveLog(path string, f *groupFile) error {
	if f.Session == 0 {
		return nil
	}
	old, err := s.g.d.fs.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return s.g.mustCompare("the active log is missing")
	}
	if err != nil {
		return fmt.Errorf("open active log: %w", err)
	}
	return old.Close()
}

// ranges are the bytes that regions stand for.
func ranges(regions []activelog.Region) []ext4j.Range {
	out := make([]ext4j.Range, 0, len(regions))
	for _, r := range regions {
		out = append(out, ext4j.Range{Slot: r.Disk, Off: int64(r.Index) * regionBytes, Len: regionBytes})
	}
	return out
}

// begin adds the disks and exports and starts the goroutine that attaches.
func (s *source) begin() error {
	if err := s.serve(); err != nil {
		return errors.Join(err, s.stop())
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	s.g.mu.Lock()
	s.g.src = s
	s.g.mu.Unlock()
	if s.link != nil {
		s.wg.Go(func() { s.follow(ctx) })
	}
	s.wg.Go(func() { s.watch(ctx) })
	return nil
}

// serve puts every disk behind its socket. Requests wait for the gate.
func (s *source) serve() error {
	f, memory := s.g.snapshot(), s.g.d.nbdMemory.Part(nbdGroupMemory)
	for _, d := range f.Disks {
		s.g.mu.Lock()
		img := s.g.images[d.Slot]
		s.g.mu.Unlock()
		x, err := newExport(s.g.d, memory, s.g.name, d, s.eng.AddDisk(d.Slot, img), img)
		if err != nil {
			return fmt.Errorf("export disk %s: %w", d.Name, err)
		}
		s.exports = append(s.exports, x)
	}
	return nil
}

// watch turns the ext4j group's failure into the group's.
func (s *source) watch(ctx context.Context) {
	<-s.eng.Done()
	if ctx.Err() == nil {
		if err := s.eng.Err(); err != nil && !errors.Is(err, ext4j.ErrGone) {
			s.g.fail(err)
		}
	}
}

// drain lets everything reach the replica and writes the clean mark.
func (s *source) drain(ctx context.Context) error {
	if s.link == nil {
		return s.eng.SyncImages()
	}
	pos, err := s.eng.Drain(ctx)
	if err != nil {
		return err
	}
	s.mu.Lock()
	if pos.LSN == s.base.LSN {
		pos = s.base // nothing was written: the replica's last record is of an earlier session
	}
	s.mu.Unlock()
	mtime := map[uint32]int64{}
	s.g.mu.Lock()
	imgs := s.g.images
	s.g.mu.Unlock()
	for slot, img := range imgs {
		if mtime[slot], err = img.ModTime(); err != nil {
			return fmt.Errorf("read time of image %s: %w", img.Path(), err)
		}
	}
	err = s.g.update(func(f *groupFile) {
		if f.Complete && f.Fenced == "" {
			f.Clean = &cleanMark{Pos: pos, Mtime: mtime}
		}
	})
	if err != nil {
		return err
	}
	s.tellStop(ctx, pos)
	return nil
}

// stopPatience is how long a stopping source waits for the replica to have
// heard that nothing is missing.
const stopPatience = 2 * time.Second

// tellStop lets the replica know that nothing is missing there, which only
// shows in the RPO of a failover.
func (s *source) tellStop(ctx context.Context, pos epoch.Pos) {
	if !s.link.Status().Connected {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, stopPatience)
	defer cancel()
	sess, err := s.link.Session(ctx)
	if err == nil {
		err = sess.Call(ctx, wire.MethodStop, wire.StopRequest{Group: s.g.snapshot().ID, Pos: pos}, nil)
	}
	if err != nil {
		s.g.note(fmt.Sprintf("site %s could not be told that everything is there: %v", s.g.snapshot().Peer, err))
	}
}

// stop ends the service: clients are dropped without an answer, so that they
// come back to the next daemon.
func (s *source) stop() error {
	if s.cancel != nil {
		s.cancel()
	}
	s.drop()
	s.eng.Close()
	s.wg.Wait()
	return s.close()
}

// drop drops every client and whatever it waits for, for good; what is left of
// the service ends with stop.
func (s *source) drop() {
	s.eng.Fail(ext4j.ErrGone)
	for _, x := range s.exports {
		x.close()
	}
}

// ready waits until the group is attached and its gate open. A replica's
// site that refuses the group ends the wait.
func (s *source) ready(ctx context.Context) error {
	peer, patience := s.g.snapshot().Peer, 2*s.g.d.pause.link
	wait, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	select {
	case <-wait.Done():
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return failure("unreachable", fmt.Sprintf("site %s did not take the replica within %v: %s", peer, patience, s.g.status().Reason),
			fmt.Sprintf("see kagami status, and the log of the daemon at site %s", peer))
	case <-s.eng.Done():
		return s.eng.Err()
	case err := <-s.refused:
		return fromPeer(peer, err)
	case <-s.synced:
		return nil
	}
}

// caughtUp returns when the replica has everything that was written before the call.
func (s *source) caughtUp(ctx context.Context) error {
	done := make(chan error, 1)
	s.wg.Go(func() { // ends with the group, if not before
		var err error
		for _, d := range s.g.snapshot().Disks {
			err = errors.Join(err, s.eng.Disk(d.Slot).Flush())
		}
		done <- err
	})
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case err := <-done:
		return err
	}
}

// allFilled says that no block copy is under way any more: the VM runs from
// the exports, and a first sync may end.
func (s *source) allFilled() { close(s.filled) }
