package sim

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"time"

	"kagami/appliance/ship"
	"kagami/ext4j"
	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
	"kagami/tests/fault"
)

// sourceState is what the source's daemon keeps durably about the group.
type sourceState struct {
	Session  uint64
	Complete bool
	Clean    *cleanState
	Compare  string // why everything must be compared, until it was
	Fenced   bool   // the other site was promoted
	Apart    uint64 // the session in which the source went on without the replica; 0: it did not
}

type cleanState struct {
	Pos   epoch.Pos
	Mtime map[uint32]int64
}

// source is one life of the source's daemon: what appliance/host does around
// ext4j and ship, in the same order (attach.go, source.go).
type source struct {
	w     *World
	fs    images.FS
	mu    sync.Mutex // state, and the file it comes from
	state sourceState
	imgs  []*images.Image
	log   *activelog.Log
	rec   *ext4j.Recorders
	maps  apartMaps // while the source is apart
	eng   *ext4j.Group
	disks []*ext4j.Disk
	link  *ship.Link

	cancel context.CancelFunc
	wg     sync.WaitGroup

	active     []ext4j.Range
	floor      activelog.Floor
	clean      *cleanState
	begun      bool
	unfinished *plan
	forgetful  string // of the mutant ForgetCompare: what should be durable
	base       epoch.Pos
}

const (
	sourceDir   = "/source"
	activeLog   = sourceDir + "/active.log"
	regionBytes = 64 << 10
)

func sourceImage(slot int) string { return fmt.Sprintf("%s/%d.raw", sourceDir, slot) }

func saveJSON(fsys images.FS, name string, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return images.WriteFileAtomic(fsys, name, b, 0o600)
}

func loadJSON(fsys images.FS, name string, v any) error {
	b, err := images.ReadFile(fsys, name, 1<<20)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return json.Unmarshal(b, v)
}

// startSource is a start of the daemon on what the file system holds.
func startSource(w *World, fsys *fault.FS) (*source, error) {
	s := &source{w: w, fs: mutateFS(w.mutant, fsys)}
	if err := loadJSON(s.fs, sourceDir+"/group.json", &s.state); err != nil {
		return nil, fmt.Errorf("load state: %w", err)
	}
	if err := s.openAll(); err != nil {
		s.shut()
		return nil, err
	}
	s.eng = ext4j.NewGroup(ext4j.Options{Eyes: w.eyes(), Recorder: mutateRecorder(w.mutant, s.rec), MaxExtent: int64(w.c.MaxRegions) * regionBytes / 4,
		Limits: ext4j.Limits{QueueBytes: w.c.QueueBytes, EpochBytes: w.c.EpochBytes, EpochAge: w.c.EpochAge}})
	s.eng.SetMode(w.mode())
	for slot, img := range s.imgs {
		s.disks = append(s.disks, s.eng.AddDisk(uint32(slot), &tracked{Image: img, w: w, slot: uint32(slot)}))
	}
	s.link = ship.NewLink(ship.Options{Dial: w.net.Dial, Peer: "replica", Site: "source", SiteID: epoch.UUID{11}, Release: "sim",
		Connections: w.c.Connections, InflightBytes: w.c.InflightBytes, Heartbeat: time.Second, Timeout: 5 * time.Second,
		Codec: w.codec, Compress: w.c.Compress})
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	if s.snapshot().Complete {
		w.protected.Store(true)
	}
	if s.snapshot().Fenced {
		w.note("source: is fenced")
		s.eng.Fail(ext4j.ErrGone)
		return s, nil
	}
	s.wg.Go(func() { s.link.Run(ctx) })
	s.wg.Go(func() { s.follow(ctx) })
	return s, nil
}

func (s *source) openAll() error {
	s.clean = s.snapshot().Clean
	for slot := range s.w.c.Disks {
		img, err := images.OpenImage(s.fs, sourceImage(slot), images.Want{Size: s.w.c.DiskBytes})
		if err != nil {
			return err
		}
		s.imgs = append(s.imgs, img)
		if err := s.checkUnchanged(uint32(slot), img); err != nil {
			return err
		}
	}
	o := activelog.Options{Group: groupID, RegionBytes: regionBytes, MaxRegions: s.w.c.MaxRegions}
	log, regions, err := activelog.Open(s.fs, activeLog, o)
	if errors.Is(err, activelog.ErrCorrupt) {
		// The reason to compare everything is durable before the file that gives it is gone.
		if err := s.mustCompare(err.Error()); err != nil {
			return err
		}
		if err := s.fs.Remove(activeLog); err != nil {
			return err
		}
		log, regions, err = activelog.Open(s.fs, activeLog, o)
	}
	if err != nil {
		return fmt.Errorf("open active log: %w", err)
	}
	s.log, s.active, s.floor = log, ranges(regions), log.Floor()
	if err := s.openApart(); err != nil {
		return err
	}
	return s.update(func(f *sourceState) {
		f.Clean = nil
		if s.w.mutant != ReuseSession {
			f.Session++
		} else {
			f.Session = max(f.Session, 1)
		}
	})
}

func (s *source) checkUnchanged(slot uint32, img *images.Image) error {
	if s.clean == nil {
		return img.Settle()
	}
	now, err := img.ModTime()
	if err != nil {
		return err
	}
	if s.clean.Mtime[slot] != now {
		return s.mustCompare("an image was changed")
	}
	return nil
}

// mustCompare records durably why everything must be compared; the first reason stays.
func (s *source) mustCompare(why string) error {
	if s.snapshot().Compare != "" || s.forgetful != "" {
		return nil
	}
	s.w.note("source: everything must be compared: %s", why)
	if s.w.mutant == ForgetCompare {
		s.forgetful = why
		return nil
	}
	return s.update(func(f *sourceState) { f.Compare = why })
}

func (s *source) snapshot() sourceState {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.state
}

func (s *source) update(f func(*sourceState)) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	next := s.state
	f(&next)
	if err := saveJSON(s.fs, sourceDir+"/group.json", next); err != nil {
		return err
	}
	s.state = next
	return nil
}

func ranges(regions []activelog.Region) []ext4j.Range {
	var out []ext4j.Range
	for _, r := range regions {
		out = append(out, ext4j.Range{Slot: r.Disk, Off: int64(r.Index) * regionBytes, Len: regionBytes})
	}
	return out
}

// drain is a clean stop's first half.
func (s *source) drain(ctx context.Context) error {
	pos, err := s.eng.Drain(ctx)
	if err != nil {
		return err
	}
	if pos.LSN == s.base.LSN {
		pos = s.base
	}
	mtime := map[uint32]int64{}
	for slot, img := range s.imgs {
		if mtime[uint32(slot)], err = img.ModTime(); err != nil {
			return err
		}
	}
	return s.update(func(f *sourceState) {
		if f.Complete {
			f.Clean = &cleanState{Pos: pos, Mtime: mtime}
		}
	})
}

// shut ends the process, whatever its state. Everything it still does fails if
// its file system has stopped.
func (s *source) shut() {
	if s.cancel != nil {
		s.cancel()
	}
	if s.eng != nil {
		s.eng.Close()
	}
	s.wg.Wait()
	if s.log != nil {
		_ = s.log.Close()
	}
	s.maps.close()
	for _, img := range s.imgs {
		_ = img.Close()
	}
}

// follow keeps the group attached until ctx ends.
func (s *source) follow(ctx context.Context) {
	for ctx.Err() == nil {
		sess, err := s.awaitLink(ctx)
		if err != nil {
			return
		}
		err = s.attached(ctx, sess)
		if ctx.Err() != nil || s.eng.Err() != nil {
			return
		}
		if fenced(err) {
			s.fence()
			return
		}
		s.w.note("source: detached: %v", err)
		pause := time.Second
		if errors.Is(err, errStuck) {
			pause = stuckGrace
		}
		if (s.eng.Stats().Alone || errors.Is(err, errStuck)) && s.goApart() != nil {
			return
		}
		if sleep(ctx, pause) != nil {
			return
		}
	}
}

func (s *source) attached(ctx context.Context, sess *ship.Session) error {
	resp, err := s.attach(ctx, sess)
	if err != nil {
		return err
	}
	p := s.plan(resp)
	if s.snapshot().Apart != 0 && !p.resumed {
		p = planApart(p)
	}
	if err := s.recordPlan(p); err != nil {
		return s.unwritten(err)
	}
	if p.raise {
		if resp, err = s.attach(ctx, sess); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	s.wg.Go(func() {
		select {
		case <-sess.Done():
			cancel(errLinkLost)
		case <-ctx.Done():
		}
	})
	if p.begin {
		var parted []ext4j.Range
		if s.snapshot().Apart != 0 {
			parted = s.rejoin()
		}
		s.base = resp.Pos
		s.eng.LimitHold(resp.SpoolBytes / 8)
		s.eng.Begin(lineage, s.snapshot().Session, resp.Pos.LSN+1, p.hold && s.w.mutant != NoHold)
		s.begun, s.unfinished = true, nil
		if p.active {
			p.scan = append(ranges(s.log.Regions()), p.scan...)
			p.scan = append(p.scan, parted...)
		}
		if err := s.tellBegin(p, resp.Pos); err != nil {
			return err
		}
	}
	s.wg.Go(func() { s.watchProgress(ctx, cancel) })
	s.w.note("source: attached in session %d at %v: %s: %s (%d ranges)", s.snapshot().Session, resp.Pos, p.what, p.why, len(p.scan))
	b := sess.Bind(&tap{s.eng, s.w.stream, s.w.fail, s.w.mutant}, resp.Channel, s.snapshot().Session, nil)
	defer b.Unbind()
	s.eng.OpenGate()
	if err := s.catchUp(ctx, sess, p); err != nil {
		return err
	}
	<-ctx.Done()
	return context.Cause(ctx)
}

// recordPlan makes durable, before anything of the plan is done, the session it
// raises and that it compares everything.
func (s *source) recordPlan(p plan) error {
	if p.whole {
		if err := s.mustCompare(p.why); err != nil {
			return err
		}
	}
	if !p.raise || s.w.mutant == ReuseSession {
		return nil
	}
	return s.update(func(f *sourceState) { f.Session++ })
}

// tellBegin tells the oracle of a session. What the images hold now, and what
// the session's stream brings, is what the replica must hold after a resync.
func (s *source) tellBegin(p plan, base epoch.Pos) error {
	var now [][]byte
	if p.what != "" {
		var err error
		if now, err = content(s.imgs); err != nil {
			return err
		}
	}
	if err := s.w.stream.Begin(s.snapshot().Session, base, now); err != nil {
		s.w.fail(err)
	}
	return nil
}

var errLinkLost = errors.New("link lost")

func (s *source) manifest() wire.Manifest {
	m := wire.Manifest{Name: groupName, ID: groupID, Lineage: lineage, Session: s.snapshot().Session, Window: s.w.c.QueueBytes}
	for slot := range s.w.c.Disks {
		m.Disks = append(m.Disks, wire.Disk{Slot: uint32(slot), ID: epoch.UUID{20, byte(slot)}, Name: fmt.Sprintf("vd%c", 'a'+slot), Size: s.w.c.DiskBytes, BlockSize: 512})
	}
	return m
}

func (s *source) attach(ctx context.Context, sess *ship.Session) (wire.AttachResponse, error) {
	var resp wire.AttachResponse
	err := sess.Call(ctx, wire.MethodAttach, wire.AttachRequest{Manifest: s.manifest(), Create: !s.snapshot().Complete}, &resp)
	return resp, err
}

// plan is what an attachment begins with.
type plan struct {
	what   string // "", "first sync", "resync"
	begin  bool
	raise  bool
	hold   bool
	scan   []ext4j.Range
	active bool // and what the active log names when the session has begun
	hashes bool
	whole  bool // until its end, nothing vouches for the replica
	why    string
	// resumed: the session goes on where the replica stands
	resumed bool
}

func (s *source) plan(resp wire.AttachResponse) plan {
	f := s.snapshot()
	switch {
	case s.begun && resp.Damaged == "" && s.eng.Resume(resp.Pos.LSN):
		return s.planResumed(f)
	case !f.Complete && resp.Fresh && !s.begun:
		return plan{begin: true, what: "first sync", why: "the replica is new"}
	case !f.Complete && resp.Complete && !resp.Torn:
		return s.planCompare("the replica knows of the end of the first sync, the source does not")
	case !f.Complete || !resp.Complete:
		return plan{begin: true, raise: s.begun, what: "first sync", hashes: true, whole: f.Complete, why: "the first sync is taken up again"}
	case resp.Damaged != "" && resp.Torn:
		return plan{begin: true, raise: s.begun, what: "first sync", hashes: true, whole: true, why: resp.Damaged}
	case resp.Damaged != "":
		return s.planCompare(resp.Damaged)
	case s.begun && s.unfinished != nil && resp.Pos.LSN >= s.eng.Stats().Ack:
		p := *s.unfinished
		p.raise, p.active = true, true
		return p
	case s.begun && f.Apart != 0 && f.Compare == "" && s.forgetful == "" && resp.Pos.LSN >= s.eng.Stats().Ack:
		return plan{scan: s.active}
	case s.begun:
		return s.planCompare(fmt.Sprintf("the replica went back to record %d", resp.Pos.LSN))
	case f.Compare != "" || s.forgetful != "":
		return s.planCompare(f.Compare + s.forgetful)
	case s.behindFloor(resp.Pos):
		return s.planCompare(fmt.Sprintf("the replica stands at %v and had acknowledged %v", resp.Pos, s.floor))
	case s.clean != nil && s.clean.Pos == resp.Pos && resp.Complete:
		return plan{begin: true, why: "both sites stopped at the same record"}
	case s.clean != nil:
		return s.planCompare("the clean mark is of another record")
	default:
		return plan{begin: true, hold: true, what: "resync", hashes: true, scan: s.active, why: "the source was not stopped cleanly"}
	}
}

func (s *source) behindFloor(p epoch.Pos) bool {
	f := s.floor
	return (p.Session < f.Session || p.Session == f.Session && p.LSN < f.LSN) && s.w.mutant != NoFloor
}

func (s *source) planResumed(f sourceState) plan {
	if f.Complete && f.Compare == "" || s.unfinished != nil {
		return plan{resumed: true, why: "everything unacknowledged is sent again"}
	}
	return plan{what: "first sync", hashes: true, why: "the first sync goes on"}
}

func (s *source) planCompare(why string) plan {
	return plan{begin: true, raise: s.begun, hold: true, what: "resync", hashes: true, whole: true, why: why, scan: s.eng.WholeRanges()}
}

func (s *source) catchUp(ctx context.Context, sess *ship.Session, p plan) error {
	if p.resumed && s.snapshot().Apart != 0 {
		return s.catchUpBacklog(ctx)
	}
	switch p.what {
	case "":
		if p.begin {
			s.log.Reached(activelog.Floor{Session: s.base.Session, LSN: s.base.LSN})
			s.log.Adopt(0) // both sites are equal: what an earlier life left there may leave without an acknowledgement
		}
		return s.endResumed(ctx)
	case "first sync":
		return s.firstSync(ctx, sess, p)
	default:
		return s.resync(ctx, sess, p)
	}
}

func (s *source) firstSync(ctx context.Context, sess *ship.Session, p plan) error {
	scan := s.eng.WholeRanges()
	var hasher ext4j.Hasher
	if p.hashes {
		hasher = s.hasher(sess)
	} else {
		var err error
		if scan, err = s.eng.AllocatedRanges(); err != nil {
			return err
		}
	}
	if err := s.eng.Scan(ctx, scan, hasher, nil); err != nil {
		return err
	}
	if _, err := s.eng.FinishScan(ctx); err != nil {
		return err
	}
	if err := s.equal(ctx); err != nil {
		return err
	}
	s.w.note("source: first sync in session %d has ended", s.snapshot().Session)
	return nil
}

func (s *source) resync(ctx context.Context, sess *ship.Session, p plan) error {
	s.unfinished = &p
	scan := p.scan
	if s.w.mutant == EarlyResync {
		scan = scan[:len(scan)/2]
	}
	if err := s.eng.Scan(ctx, scan, s.hasher(sess), nil); err != nil {
		return err
	}
	if _, err := s.eng.FinishScan(ctx); err != nil {
		return err
	}
	return s.resynced(ctx)
}

// endResumed ends a resync whose last records were on the way when the link was lost.
func (s *source) endResumed(ctx context.Context) error {
	if s.unfinished == nil {
		return nil
	}
	if err := s.eng.AwaitAcked(ctx); err != nil {
		return err
	}
	return s.resynced(ctx)
}

// equal notes that the replica holds all that the source does.
func (s *source) equal(ctx context.Context) error {
	f := s.snapshot()
	if err := s.together(ctx); err != nil {
		return err
	}
	if f.Compare != "" || !f.Complete || f.Apart != 0 {
		if err := s.update(func(f *sourceState) { f.Complete, f.Compare, f.Apart = true, "", 0 }); err != nil {
			return s.unwritten(err)
		}
		s.dropApart()
		s.w.protected.Store(true)
	}
	s.clean, s.unfinished, s.forgetful = nil, nil, ""
	s.releasePins()
	return nil
}

// unwritten ends an attachment whose state could not be made durable.
func (s *source) unwritten(err error) error {
	if !images.NoSpace(err) {
		s.eng.Fail(err)
	}
	return err
}

func (s *source) resynced(ctx context.Context) error {
	if err := s.equal(ctx); err != nil {
		return err
	}
	s.w.note("source: resync in session %d has ended", s.snapshot().Session)
	return nil
}

// releasePins lets the regions that an earlier life left in the active log leave it.
func (s *source) releasePins() {
	s.log.Adopt(s.eng.CloseMark())
	s.active = nil
}

func (s *source) hasher(sess *ship.Session) ext4j.Hasher {
	return func(ctx context.Context, slot uint32, offsets []int64) ([][]byte, error) {
		var resp wire.HashResponse
		err := sess.Call(ctx, wire.MethodHash, wire.HashRequest{Group: groupID, Session: s.snapshot().Session, Disk: slot, Chunk: ext4j.Chunk, Offsets: offsets}, &resp)
		if s.w.mutant == EqualByCRC && err == nil {
			s.equalByCRC(slot, offsets, resp.Sums)
		}
		return resp.Sums, err
	}
}

// tracked is a source's image that tells the history what changes.
type tracked struct {
	*images.Image
	w    *World
	slot uint32
}

func (i *tracked) WriteAt(p []byte, off int64) (int, error) {
	i.w.history.changing(i.slot, off, int64(len(p)), p)
	return i.Image.WriteAt(p, off)
}

func (i *tracked) WriteZeroes(off, n int64, noHole bool) error {
	i.w.history.changing(i.slot, off, n, nil)
	return i.Image.WriteZeroes(off, n, noHole)
}

func (i *tracked) Trim(off, n int64) error {
	i.w.history.changing(i.slot, off, n, nil)
	return i.Image.Trim(off, n)
}

func (i *tracked) Datasync() error {
	i.w.pause(5 * time.Millisecond)
	if i.w.mutant == FlushThere {
		return nil
	}
	return i.Image.Datasync()
}
