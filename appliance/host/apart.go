package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"kagami/appliance/config"
	"kagami/appliance/ship"
	"kagami/ext4j"
	"kagami/ext4j/changemap"
	"kagami/ext4j/epoch"
)

// A source whose policy on link loss is `continue` goes on without its replica
// (apart), and comes back to it by a resync:
//
//	1. records of changes exist, one map per disk: durable
//	2. the group's file says that it is apart: durable; from here on what may differ
//	   is what the active log or the maps name
//	3. ext4j answers FLUSHes by the local image alone; its records go to the backlog on
//	   disk (keepBacklog), or are dropped where there is none
//	4. changes are recorded in the maps; what waits for room in the log goes there
//	5. the replica is attached: a session is raised, durable (recordPlan), and changes
//	   are recorded in the log again
//	6. what log and maps name is compared and shipped, as one epoch; FLUSHes are still
//	   answered alone
//	7. the replica has acknowledged its end: FLUSHes wait for the replica again; the
//	   file says so, durable; the maps are removed
//
// With a backlog that holds all that was written since, 5 to 7 are others (catchUpBacklog):
//
//	5. the replica is attached: the session goes on, the backlog is sent in order, while
//	   FLUSHes are still answered alone and more is added to it
//	6. it is empty: changes are recorded in the log again; FLUSHes wait for the
//	   replica again; the images are made durable, for the log does not name
//	   what the maps do; the replica has acknowledged all that was written by then
//	7. the file says so, durable; the maps are removed
//
// A backlog that is full while the replica is away, or that cannot be written or read, is
// given up: the records are dropped, and a resync it is.
//
// A daemon that ends in 2 to 7 goes on apart when it starts, without a backlog. A link that is
// lost in 5 or 6 leads to 3; the maps only grow.
//
// To serve without having heard of the other site is only safe while the VM that
// is served cannot have been failed over for good reason: while it runs. So a group
// goes apart only if this host has not been started since it was last attached, or
// an operator says so (groupFile.Boot).

// apartFile is a group that goes on without its replica.
type apartFile struct {
	SinceNs int64  `json:"since_ns"` // since when the replica may lack something, ns since 1970
	Session uint64 `json:"session"`  // that it was parted in; the maps bear it
}

// featureApart: the file's Apart counts. A release that does not know it would
// leave out of a resync what the maps name.
const featureApart = 1

// apartAlarm is the alarm of a group that goes on without its replica.
const apartAlarm = "apart"

func (g *group) apartPath(d *diskFile) string {
	return filepath.Join(g.dir, fmt.Sprintf("apart-%d.map", d.Slot))
}

// apartOrigin says which changes a map is about: those made since a session of this
// lineage.
func (f *groupFile) apartOrigin(d *diskFile, session uint64) changemap.Origin {
	return changemap.Origin{Group: f.ID, Disk: d.ID, DiskBytes: d.Size, RegionBytes: regionBytes, Lineage: f.Lineage,
		Fork: epoch.Pos{Lineage: f.Lineage, Session: session}}
}

// makeApart makes empty maps, in the place of any that an earlier time has left.
func (g *group) makeApart(f *groupFile) (changes, error) {
	maps := changes{}
	for _, d := range f.Disks {
		m, err := changemap.Create(g.d.fs, g.apartPath(&d), f.apartOrigin(&d, f.Session), false)
		if err != nil {
			return nil, errors.Join(fmt.Errorf("record of changes of disk %s: %w", d.Name, err), maps.close())
		}
		maps[d.Slot] = m
	}
	return maps, nil
}

// openApart opens the maps of a group that is apart. One that cannot be read was lost:
// all of its disk counts as changed, and everything is compared.
func (g *group) openApart(f *groupFile) (changes, error) {
	maps := changes{}
	for _, d := range f.Disks {
		path, o := g.apartPath(&d), f.apartOrigin(&d, f.Apart.Session)
		m, err := changemap.Open(g.d.fs, path, o)
		if lost(err) {
			if err := g.mustCompare(fmt.Sprintf("the record of what changed on disk %s without the replica was lost: %v", d.Name, err)); err != nil {
				return nil, errors.Join(err, maps.close())
			}
			m, err = g.replaceMap(path, o)
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("record of changes of disk %s: %w", d.Name, err), maps.close())
		}
		maps[d.Slot] = m
	}
	return maps, nil
}

// dropApart ends the time apart, after the file has said so. Maps that stay are debris:
// the next time makes new ones in their place.
func (s *source) dropApart(f *groupFile) {
	s.mu.Lock()
	maps := s.maps
	s.maps = nil
	s.mu.Unlock()
	if err := maps.close(); err != nil {
		s.g.note(fmt.Sprintf("while closing the records of changes: %v", err))
	}
	s.g.removeApart(f)
	s.g.alarm(apartAlarm, "")
}

func (g *group) removeApart(f *groupFile) {
	for _, d := range f.Disks {
		if err := ignoreNotExist(g.d.fs.Remove(g.apartPath(&d))); err != nil {
			g.note(fmt.Sprintf("a record of changes that nobody needs stays: %v", err))
		}
	}
}

// mayContinue tells whether the group goes on when its replica is away.
func (s *source) mayContinue() bool { return s.g.mayContinue(s.g.snapshot()) }

func (g *group) mayContinue(f *groupFile) bool {
	return g.d.policyOf(f).onLoss == config.LossContinue && f.Phase == "" && f.Fenced == "" && f.Boot == g.d.bootID
}

// alone lets FLUSHes of a group that is apart, or comes back, be answered or wait, as its
// policy says now. One that is neither answers none alone, and nobody makes it: equal
// ends that after the file has said so.
func (s *source) alone() (may bool) {
	s.g.mu.Lock()
	defer s.g.mu.Unlock()
	may = s.g.mayContinue(s.g.file)
	if s.g.file.Apart != nil {
		s.eng.Alone(may)
	}
	return may
}

// vouch notes that this source may serve for as long as this host runs: its
// replica was attached, or an operator said so.
func (g *group) vouch() error {
	if g.snapshot().Boot == g.d.bootID {
		return nil
	}
	return g.update(func(f *groupFile) { f.Boot = g.d.bootID })
}

// apartDue is when the group has to go apart, if it does: at once where its clients are
// not waiting for the replica as it is, else after a pause, in which the link may come back.
func (s *source) apartDue() (in time.Duration, due bool) {
	st := s.eng.Stats()
	if st.Apart || st.Overflow && !st.BacklogFull || s.eng.Shut() || !s.mayContinue() {
		return 0, false
	}
	if st.Alone && !st.Overflow {
		return 0, true
	}
	return max(0, time.Until(s.away.Add(s.g.d.pause.apart))), true
}

// wasAttached notes the end of an attachment, unless it was too short to count: attempts
// that fail one after another do not put off what is due.
func (s *source) wasAttached(since time.Time) {
	if time.Since(since) > s.g.d.pause.apart {
		s.away = time.Now()
	}
}

// wentOn tells that clients do not wait for the replica.
func (s *source) wentOn() bool { return onItsOwn(s.eng.Stats()) && s.mayContinue() }

// onItsOwn tells whether a group has gone on without its replica, with a backlog or without.
func onItsOwn(st ext4j.Stats) bool { return st.Apart || st.Overflow }

// awaitLink waits for a session with the replica's site, and lets the group go apart
// meanwhile when that is due. In the last session, if that goes on, nothing is tried
// before a rest. Its error is the end of ctx, or of the group.
func (s *source) awaitLink(ctx context.Context, last *ship.Session, rest time.Duration) (*ship.Session, error) {
	for end := time.Now().Add(rest); ; {
		s.settleAlone()
		in, due := s.apartDue()
		if due && in == 0 {
			s.goApart()
			continue
		}
		if !due {
			in = time.Hour // as good as for ever: then it looks again
		}
		sess, err := s.look(ctx, in, last, time.Until(end))
		if ctx.Err() != nil || s.eng.Err() != nil {
			return nil, cmp.Or(s.eng.Err(), context.Cause(ctx))
		}
		if err == nil && sess != nil {
			return sess, nil
		}
	}
}

// look waits for a session for at most so long, and not longer than until the policy
// is changed; if the last one goes on, it first rests. nil: it has not come to that.
func (s *source) look(ctx context.Context, in time.Duration, last *ship.Session, rest time.Duration) (*ship.Session, error) {
	wait, cancel := context.WithTimeout(ctx, in)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case <-wait.Done():
		case <-s.poke:
			cancel()
		}
	}()
	defer func() { <-ended }()
	defer cancel()
	if last != nil && rest > 0 {
		select {
		case <-wait.Done():
			return nil, nil
		case <-last.Done():
		case <-time.After(rest):
		}
	}
	return s.link.Session(wait)
}

// settleAlone lets FLUSHes of a group that is apart be answered or wait, as its policy says now.
func (s *source) settleAlone() {
	if !onItsOwn(s.eng.Stats()) {
		return
	}
	may := s.alone()
	if may && s.g.current() != Disconnected {
		s.g.input(WentOn, s.apartText())
	} else if !may && s.g.current() == Disconnected {
		s.g.input(LinkLost, "the policy on link loss is to stall")
	}
}

func (s *source) apartText() string {
	return fmt.Sprintf("site %s is away, the group goes on without it", s.g.snapshot().Peer)
}

// goApart is steps 1 to 4. What keeps it from the first two is an alarm, and tried again.
func (s *source) goApart() {
	if s.g.snapshot().Apart == nil {
		if err := s.part(); err != nil {
			s.g.alarm(apartAlarm, fmt.Sprintf("cannot go on without site %s: %v", s.g.snapshot().Peer, err))
			s.away = time.Now()
			return
		}
	}
	f := s.g.snapshot()
	if !s.keepBacklog(f) {
		s.eng.GoApart(f.Lineage, f.Session, time.Unix(0, f.Apart.SinceNs))
	}
	s.rec.GoApart(s.apartMaps())
	s.eng.OpenGate()
	s.markSynced()
	s.g.alarm(apartAlarm, fmt.Sprintf("not protected since %s: site %s is away, and the group goes on without it", time.Unix(0, f.Apart.SinceNs).UTC().Format(time.RFC3339), f.Peer))
	s.alone() // the policy may have changed meanwhile
	s.settleAlone()
}

// part is steps 1 and 2.
func (s *source) part() error {
	maps, err := s.g.makeApart(s.g.snapshot())
	if err != nil {
		return err
	}
	since := time.Now().Add(-s.eng.Stats().Lag)
	err = s.g.update(func(f *groupFile) {
		f.Apart, f.Required = &apartFile{SinceNs: since.UnixNano(), Session: f.Session}, f.Required|featureApart
	})
	if err != nil {
		return errors.Join(err, maps.close())
	}
	s.mu.Lock()
	s.maps = maps
	s.mu.Unlock()
	return nil
}

func (s *source) apartMaps() changes {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.maps
}

// rejoin is step 5's second half: nothing is recorded in the maps after it, unless the
// group goes apart again, so that what it returns is all that they name.
func (s *source) rejoin() []ext4j.Range {
	s.rec.Together()
	var out []ext4j.Range
	for slot, m := range s.apartMaps() {
		for _, run := range join(slot, m.Regions(), 1) {
			out = append(out, runRange(run))
		}
	}
	return out
}

// planApart extends the plan of an attachment for a group that is apart: its session is
// raised, since the one it has numbers records that nobody got, and all that may
// differ is covered.
func planApart(p plan) plan {
	if p.what == "" {
		p.what, p.hold, p.hashes, p.why = "resync", true, true, "the group went on without the replica"
	} else if !p.whole {
		p.why += "; the group went on without the replica"
	}
	p.begin, p.raise, p.active = true, true, true
	return p
}

// mayDiffer are the regions that the replica may hold otherwise.
func (s *source) mayDiffer() map[uint32][]uint64 {
	all := regionsOf(s.log.Regions())
	for slot, m := range s.apartMaps() {
		all[slot] = mergeRegions(all[slot], m.Regions())
	}
	return all
}

// apartRegions reads the maps of a stopped group that is apart.
func (g *group) apartRegions(f *groupFile) (whole string, all map[uint32][]uint64, err error) {
	all = map[uint32][]uint64{}
	if f.Apart == nil {
		return "", all, nil
	}
	for _, d := range f.Disks {
		regions, err := readMap(g.d.fs, g.apartPath(&d), f.apartOrigin(&d, f.Apart.Session))
		if lost(err) {
			return err.Error(), nil, nil
		} else if err != nil {
			return "", nil, err
		}
		all[d.Slot] = regions
	}
	return "", all, nil
}

// errStuck: the replica is attached, and nothing comes of it.
var errStuck = errors.New("the replica does not take what it is sent")

// watchProgress ends an attachment that keeps clients waiting without any progress, if
// they need not wait: the replica's spool is full, say, or its disk hangs.
func (s *source) watchProgress(ctx context.Context, cancel context.CancelCauseFunc) {
	tick := time.NewTicker(s.g.d.pause.stuck / 8)
	defer tick.Stop()
	type progress struct {
		session, resynced uint64
		received, acked   epoch.LSN
	}
	var was progress
	since := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		e := s.eng.Stats()
		if e.Apart {
			cancel(errBacklogLost) // nothing that is sent now counts
			return
		}
		s.mu.Lock()
		now := progress{e.Session, e.ResyncBytes, s.last.Received, e.Ack}
		s.mu.Unlock()
		if now != was || e.UnackedFlushes == 0 && e.Waiting == 0 || !s.mayContinue() {
			was, since = now, time.Now()
		} else if time.Since(since) >= s.g.d.pause.stuck {
			cancel(errStuck)
			return
		}
	}
}
