package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"kagami/appliance/ship"
	"kagami/ext4j"
	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
)

// The life of a source beside its replica:
//
//	1. wait for the link; attach: the replica says where it stands
//	2. decide (plan): go on, send again, first sync, or resync
//	3. bind the stream to the link; for 'first sync' and 'resync', scan
//	4. wait for the link's end; the group is stalled; back to 1
//
// Every resync begins with a session made durable, so that no LSN of a session
// ever names two contents.

// errSuperseded ends a source for good.
var errSuperseded = errors.New("superseded by a promotion at the other site")

// follow keeps the group attached until ctx ends.
func (s *source) follow(ctx context.Context) {
	var sess *ship.Session
	var err error
	for rest := time.Duration(0); ; rest = restAfter(s, err) {
		if sess, err = s.awaitLink(ctx, sess, rest); err != nil {
			return // ctx has ended, or the group
		}
		err = s.attached(ctx, sess)
		if ctx.Err() != nil || s.eng.Err() != nil {
			return
		}
		s.noteRefusal(err)
		if errors.Is(err, errSuperseded) {
			s.fence(err)
			return
		}
		if errors.Is(err, errStuck) {
			s.away = time.Time{} // clients have waited long enough
		}
		if !s.wentOn() {
			s.g.input(LinkLost, err.Error())
		}
	}
}

// restAfter is the pause after an attachment that ended so, if its session goes on.
func restAfter(s *source, err error) time.Duration {
	switch {
	case errors.Is(err, errNoRoom):
		return noRoomPause
	case errors.Is(err, errStuck), images.NoSpace(err):
		return s.g.d.pause.stuck
	}
	return time.Second
}

// attached is one attachment from its beginning to its end, whose reason it returns.
func (s *source) attached(ctx context.Context, sess *ship.Session) error {
	resp, err := s.attachNewest(ctx, sess)
	if err != nil {
		return err
	}
	if err := s.g.vouch(); err != nil {
		return s.unwritten(err)
	}
	p := s.plan(resp)
	if s.g.snapshot().Apart != nil && !p.resumed {
		p = planApart(p)
	}
	if err := s.recordPlan(p); err != nil {
		return s.unwritten(err)
	}
	s.g.alarm(noSpaceAlarm, "")
	if p.raise {
		if resp, err = s.attach(ctx, sess); err != nil {
			return err
		}
	}
	s.fitSpool(resp.SpoolBytes)
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
		p = s.beginSession(p, resp)
	}
	s.wg.Go(func() { s.watchProgress(ctx, cancel) }) // from here on a group that is apart has lost its backlog
	f := s.g.snapshot()
	b := sess.Bind(s.eng, resp.Channel, f.Session, func(a wire.Ack) {
		if a.Flags&wire.AckRefused != 0 {
			cancel(errRefused)
		}
		s.onAck(a)
	})
	defer b.Unbind()
	s.setBinding(b)
	defer s.setBinding(nil)
	defer s.wasAttached(time.Now())
	s.eng.OpenGate()
	if err := s.catchUp(ctx, sess, p, resp); err != nil {
		return err
	}
	if p.what == "first sync" {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-s.filled:
		}
		if err := s.endFirstSync(ctx); err != nil {
			return err
		}
	}
	s.g.reshipDomain()
	<-ctx.Done()
	return context.Cause(ctx)
}

// beginSession begins the plan's session where the replica stands, and returns
// the plan with all that has to be scanned. A resync that was broken off is no
// more: this session does what it had to do.
func (s *source) beginSession(p plan, resp wire.AttachResponse) plan {
	f := s.g.snapshot()
	var parted []ext4j.Range
	if f.Apart != nil {
		parted = s.rejoin()
	}
	s.setBase(resp.Pos)
	s.eng.LimitHold(resp.SpoolBytes / clientsShare)
	s.eng.Begin(f.Lineage, f.Session, resp.Pos.LSN+1, p.hold)
	s.begun, s.unfinished = true, nil
	if p.active {
		p.scan = union(p.scan, union(parted, ranges(s.log.Regions())))
	}
	return p
}

// union is every range of both, once.
func union(a, b []ext4j.Range) []ext4j.Range {
	out := slices.Concat(a, b)
	slices.SortFunc(out, func(x, y ext4j.Range) int {
		return cmp.Or(cmp.Compare(x.Slot, y.Slot), cmp.Compare(x.Off, y.Off), cmp.Compare(x.Len, y.Len))
	})
	return slices.Compact(out)
}

// recordPlan makes durable, before anything of the plan is done, the session it
// raises or begins and that it compares everything: a plan that is broken off is
// then not mistaken for one that was carried out.
func (s *source) recordPlan(p plan) error {
	f := s.g.snapshot()
	begins := p.begin && (p.raise || f.Begun != f.Session)
	if !begins && (!p.whole || f.Compare == p.why) {
		return nil
	}
	return s.g.update(func(f *groupFile) {
		if p.raise {
			f.Session++
		}
		if begins {
			f.Begun = f.Session
		}
		if p.whole {
			f.Compare = p.why
		}
	})
}

// noteRefusal keeps a peer's refusal for the command that waits for it. What
// passes by itself is none.
func (s *source) noteRefusal(err error) {
	if !refuses(err) {
		return
	}
	select {
	case s.refused <- err:
	default:
	}
}

var (
	errLinkLost = errors.New("link lost")
	errRefused  = errors.New("the replica takes no more of this stream") // the next attach says why
)

func (s *source) attach(ctx context.Context, sess *ship.Session) (wire.AttachResponse, error) {
	var resp wire.AttachResponse
	f := s.g.snapshot()
	req := wire.AttachRequest{Manifest: f.manifest(s.limits.QueueBytes), Create: !f.Complete}
	s.asked.Store(true)
	err := sess.Call(ctx, wire.MethodAttach, req, &resp)
	var werr *wire.Error
	if errors.As(err, &werr) && werr.Code == wire.CodeFenced {
		return resp, fmt.Errorf("%w: %s", errSuperseded, werr.Message)
	}
	if werr != nil && werr.Code == wire.CodeStale && s.begun {
		err = wire.Errorf(wire.CodeConflict, "the replica has seen session %d, this source is at session %d: another daemon replicates from a copy of this group's state, stop one of the two", werr.Session, f.Session)
	}
	if err == nil {
		err = checkAttached(f, resp)
	}
	if err == nil {
		err = s.follows(activelog.Follower{Lineage: f.Lineage, Replica: resp.Replica})
	}
	if err == nil || refuses(err) {
		s.g.alarm(noReplica, errorText(err))
	}
	return resp, err
}

// maxPosition bounds the sessions and LSNs that a replica may name, so that
// what is counted on from there does not wrap.
const maxPosition = 1 << 62

// checkAttached looks at what becomes a number to go on from here.
func checkAttached(f *groupFile, resp wire.AttachResponse) error {
	p := resp.Pos
	switch {
	case p.LSN != 0 && p.Lineage != f.Lineage:
		return wire.Errorf(wire.CodeConflict, "the replica follows lineage %s, this source is of lineage %s", p.Lineage, f.Lineage)
	case p.LSN > maxPosition || p.Session > maxPosition:
		return wire.Errorf(wire.CodeConflict, "the replica says that it is at record %d of session %d, which cannot be", p.LSN, p.Session)
	case resp.SpoolBytes <= 0:
		return wire.Errorf(wire.CodeConflict, "the replica says that its spool holds %d bytes, which cannot be", resp.SpoolBytes)
	}
	return nil
}

// attachNewest attaches in a session above all that the replica has seen. One
// that is not below this start's, before this start has begun one, or whose records
// it has although it was never begun here, means that the state here is an older one
// that was put back: it does not know what has changed since, so everything is compared.
func (s *source) attachNewest(ctx context.Context, sess *ship.Session) (wire.AttachResponse, error) {
	resp, err := s.attach(ctx, sess)
	seen := resp.Pos.Session
	if werr := (*wire.Error)(nil); errors.As(err, &werr) && werr.Code == wire.CodeStale {
		seen = werr.Session
	} else if err != nil {
		return resp, err
	}
	f := s.g.snapshot()
	if s.begun || seen > maxPosition || seen < f.Session && resp.Pos.Session <= f.Begun {
		return resp, err
	}
	// Durable before the replica hears of the session, as in recordPlan.
	err = s.g.update(func(f *groupFile) {
		if f.Compare == "" {
			f.Compare = fmt.Sprintf("the replica has seen session %d, which this source does not know of: its state is an older one that was put back", seen)
		}
		f.Session = max(f.Session, seen+1)
	})
	if err != nil {
		return resp, s.unwritten(err)
	}
	return s.attach(ctx, sess)
}

// noSpaceAlarm is the alarm that this site has no space for what it must note.
const noSpaceAlarm = "state"

// unwritten ends an attachment whose state could not be made durable. With no space for it
// the group is as it was, and it is tried again; any other error is final.
func (s *source) unwritten(err error) error {
	if images.NoSpace(err) {
		s.g.alarm(noSpaceAlarm, fmt.Sprintf("no space for the state of this group, which is tried again: %v", err))
		return err
	}
	s.eng.Fail(err)
	return err
}

// noReplica is the alarm that the other site does not follow this source,
// although it can be reached: what has returned may not be safe there any more.
const noReplica = "replica"

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// refuses tells whether an error is a peer's refusal that does not pass by itself.
func refuses(err error) bool {
	var werr *wire.Error
	return errors.As(err, &werr) && werr.Code != wire.CodeBusy
}

// plan is what an attachment begins with.
type plan struct {
	what   string // "", "first sync", "resync"
	begin  bool   // a session begins
	raise  bool   // and its number must be raised first
	hold   bool   // until the scan ends there is one epoch
	scan   []ext4j.Range
	active bool // and what the active log names when the session has begun: what the queue held is dropped then
	hashes bool // compare before shipping
	whole  bool // until its end, nothing vouches for the replica
	why    string
	// resumed: the session goes on where the replica stands, everything since is sent.
	resumed bool
}

// plan decides what brings the replica up to date. It is the least that is
// certainly enough.
func (s *source) plan(resp wire.AttachResponse) plan {
	f := s.g.snapshot()
	switch {
	case s.begun && !s.replaced && resp.Damaged == "" && s.eng.Resume(resp.Pos.LSN):
		return s.planResumed(f, resp)
	case !f.Complete && s.empty && !s.begun && resp.Fresh:
		return plan{begin: true, what: "first sync", why: "the block copy fills both images"}
	case !f.Complete && resp.Fresh && !s.begun:
		return plan{begin: true, what: "first sync", why: "the replica is new"}
	case !f.Complete && resp.Complete && !resp.Torn:
		// The end of the first sync was not noted here. The replica has a point that can be
		// booted, which a first sync, epoch by epoch, would take away.
		return s.planCompare("the replica knows of the end of the first sync, this source does not")
	case !f.Complete && f.Delta:
		return s.planDelta(f, resp)
	case !f.Complete || !resp.Complete:
		return plan{begin: true, raise: s.begun, what: "first sync", hashes: true, whole: f.Complete, scan: s.eng.WholeRanges(), why: "the first sync is taken up again by comparing"}
	case resp.Damaged != "" && resp.Torn:
		return s.planRebuild(resp.Damaged)
	case resp.Damaged != "":
		return s.planCompare(resp.Damaged)
	case s.replaced:
		return s.planCompare(f.Compare)
	case s.begun && s.unfinished != nil && resp.Pos.LSN >= s.eng.Stats().Ack:
		p := *s.unfinished
		p.raise, p.active = true, true
		return p
	case s.begun && f.Apart != nil && f.Compare == "" && resp.Pos.LSN >= s.eng.Stats().Ack:
		return plan{scan: s.active}
	case s.begun:
		return s.planCompare(fmt.Sprintf("the replica went back to record %d, it had acknowledged %d", resp.Pos.LSN, s.eng.Stats().Ack))
	case f.Compare != "":
		return s.planCompare(f.Compare)
	case s.otherFloor(resp):
		return s.planCompare("the active log was kept for another replica")
	case s.behindFloor(resp.Pos):
		return s.planCompare(fmt.Sprintf("the replica stands at record %d of session %d and had acknowledged more", resp.Pos.LSN, resp.Pos.Session))
	case s.clean != nil && s.clean.Pos == resp.Pos && resp.Complete:
		return plan{begin: true, why: "both sites stopped at the same record"}
	case s.clean != nil:
		return s.planCompare(fmt.Sprintf("the source stopped cleanly at record %d, the replica is at %d", s.clean.Pos.LSN, resp.Pos.LSN))
	default:
		return plan{begin: true, hold: true, what: "resync", hashes: true, scan: s.active, why: "the source was not stopped cleanly"}
	}
}

// behindFloor tells whether the replica is before a position that regions have
// left the active log for.
func (s *source) behindFloor(p epoch.Pos) bool {
	f := s.floor
	return p.Session < f.Session || p.Session == f.Session && p.LSN < f.LSN
}

// planResumed goes on with the session; a first sync that the lost link broke
// off compares what is there and goes on.
func (s *source) planResumed(f *groupFile, resp wire.AttachResponse) plan {
	switch {
	case f.Complete && f.Compare == "" || s.unfinished != nil:
		return plan{resumed: true, why: "everything unacknowledged is sent again"}
	case s.empty:
		return plan{what: "first sync", why: "the block copy goes on"}
	case f.Delta:
		p := s.planDelta(f, resp)
		p.begin, p.raise = false, false
		return p
	}
	return plan{what: "first sync", hashes: true, scan: s.eng.WholeRanges(), why: "the first sync goes on"}
}

// planDelta brings a returned replica up to date: as a first sync does, beside the
// clients, but only where the two sites may differ.
func (s *source) planDelta(f *groupFile, resp wire.AttachResponse) plan {
	p := plan{begin: true, raise: s.begun, what: "first sync", hashes: true, active: true}
	scan, whole := s.deltaRanges(f, resp)
	if whole != "" {
		p.scan, p.why = s.eng.WholeRanges(), "the returned site is compared as a whole: "+whole
		return p
	}
	p.scan, p.why = scan, "the returned site is compared where it may differ"
	return p
}

// planRebuild repairs a replica that has no point to keep: as a first sync
// does, beside the clients, in as many epochs as it takes.
func (s *source) planRebuild(why string) plan {
	return plan{begin: true, raise: s.begun, what: "first sync", hashes: true, whole: true, scan: s.eng.WholeRanges(), why: why}
}

func (s *source) planCompare(why string) plan {
	return plan{begin: true, raise: s.begun, hold: true, what: "resync", hashes: true, whole: true, why: why, scan: s.eng.WholeRanges()}
}

// catchUp runs the scan that the plan asks for and declares the group's state.
func (s *source) catchUp(ctx context.Context, sess *ship.Session, p plan, resp wire.AttachResponse) error {
	switch {
	case p.resumed && s.g.snapshot().Apart != nil:
		return s.catchUpBacklog(ctx, p)
	case p.what == "":
		if p.begin {
			// Both sites are alike: what the log still names may leave it. Nothing
			// of this session needs to be acknowledged for that, but what the
			// replica had when it began does.
			s.log.Reached(activelog.Floor{Session: resp.Pos.Session, LSN: resp.Pos.LSN})
			s.log.Adopt(0)
		}
		s.g.input(Attached, p.why)
		s.markSynced()
		return s.endResumed(ctx)
	case p.what == "first sync" && s.empty && !p.hashes:
		s.g.input(SyncBegun, p.why)
		s.markSynced()
		return nil // a block copy fills the images
	case p.what == "first sync":
		s.g.input(SyncBegun, p.why)
		return s.firstSync(ctx, sess, p)
	default:
		s.g.input(ResyncBegun, p.why)
		return s.resync(ctx, sess, p, resp.SpoolBytes)
	}
}

// firstSync copies what a declared image holds while its clients write on.
func (s *source) firstSync(ctx context.Context, sess *ship.Session, p plan) error {
	s.markSynced()
	ranges := p.scan
	var hasher ext4j.Hasher
	if p.hashes {
		hasher = s.hasher(sess)
	} else {
		var err error
		if ranges, err = s.eng.AllocatedRanges(); err != nil {
			return err
		}
	}
	return s.scan(ctx, p.what, ranges, hasher, func() {})
}

// endFirstSync makes the copy complete at the replica, then here: from now on
// the group is protected.
func (s *source) endFirstSync(ctx context.Context) error {
	if _, err := s.eng.FinishScan(ctx); err != nil {
		return fmt.Errorf("end of first sync: %w", err)
	}
	if err := s.equal(ctx); err != nil {
		return err
	}
	s.g.input(SyncEnded, "the replica is a complete copy")
	closeOnce(s.complete) // last: whoever waits for it then sees a protected group
	return nil
}

// resync brings regions that may differ to the replica as one epoch. FLUSHes
// wait for its end. An epoch that would not fit the replica's spool is given
// up: the replica keeps its old point, and the alarm says what to do.
func (s *source) resync(ctx context.Context, sess *ship.Session, p plan, spool int64) error {
	s.unfinished = &p
	budget, began := uint64(resyncRoom(spool)), s.scanned()
	scanCtx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	err := s.scan(scanCtx, p.what, p.scan, s.hasher(sess), func() {
		if s.scanned()-began > budget {
			cancel(fmt.Errorf("%w: more than %d bytes differ; raise spool_bytes at site %s", errNoRoom, budget, s.g.snapshot().Peer))
		}
	})
	if errors.Is(err, errNoRoom) {
		s.g.alarm("resync", err.Error())
	}
	if err != nil {
		return err
	}
	s.g.alarm("resync", "")
	if _, err := s.eng.FinishScan(ctx); err != nil {
		return fmt.Errorf("end of resync: %w", err)
	}
	if err := s.equal(ctx); err != nil {
		return err
	}
	s.g.input(ResyncEnded, fmt.Sprintf("both sites are equal again (%s)", p.why))
	s.markSynced()
	closeOnce(s.complete)
	return nil
}

// scanned is what scans have put into the stream, bytes as the replica's spool
// holds them.
func (s *source) scanned() uint64 {
	e := s.eng.Stats()
	return e.ResyncBytes + e.ResyncRecords*epoch.HeaderSize
}

// endResumed ends a resync whose last records were on the way when the link
// was lost: they are sent again, nothing else is missing.
func (s *source) endResumed(ctx context.Context) error {
	if s.unfinished == nil {
		return nil
	}
	if err := s.eng.AwaitAcked(ctx); err != nil {
		return fmt.Errorf("end of resync: %w", err)
	}
	if err := s.equal(ctx); err != nil {
		return err
	}
	closeOnce(s.complete)
	return nil
}

// equal notes that the replica holds all that this source does: it has acknowledged the
// end of a first sync, or of a resync, whose reason is no more, nor is one that this
// one took the place of.
func (s *source) equal(ctx context.Context) error {
	f := s.g.snapshot()
	if f.Apart != nil {
		if err := s.eng.Rejoin(ctx); err != nil {
			return fmt.Errorf("wait for the replica again: %w", err)
		}
	}
	if f.Compare != "" || !f.Complete || f.Apart != nil {
		err := s.g.update(func(f *groupFile) {
			f.Complete, f.Compare, f.Delta, f.Changes, f.ChangesLost = true, "", false, false, ""
			f.Apart, f.Required = nil, f.Required&^featureApart
			if f.Phase == Protecting {
				f.Phase = ""
			}
		})
		if err != nil {
			return s.unwritten(err)
		}
		if f.Delta {
			s.g.dropChanges(f)
		}
		if f.Apart != nil {
			s.eng.Together() // whoever changed the policy meanwhile has seen the old file
			s.dropApart(f)
		}
	}
	s.empty, s.clean, s.unfinished, s.replaced = false, nil, nil, false
	s.releasePins()
	return nil
}

// clientsShare is the part of the replica's spool, 1/clientsShare, that clients
// may fill during a resync; resync leaves that much free.
const clientsShare = 8

var errNoRoom = errors.New("the resync does not fit the replica's spool")

// noRoomPause is the time between two attempts of a resync that did not fit.
const noRoomPause = time.Minute

// releasePins lets the regions that an earlier life of the daemon left in the
// active log leave it in the usual way: the resync has covered them.
func (s *source) releasePins() {
	s.log.Adopt(s.eng.CloseMark()) // the resync's own, or a later one
	s.active = nil
}

func (s *source) scan(ctx context.Context, what string, ranges []ext4j.Range, h ext4j.Hasher, look func()) error {
	s.g.setProgress(what, 0, 0)
	defer s.g.setProgress("", 0, 0)
	pace := pacer(s.limits.ResyncRate)
	return s.eng.Scan(ctx, ranges, h, func(done, total int64) {
		s.g.setProgress(what, done, total)
		if pace != nil && !s.eng.ClientsWait() {
			_ = pace(ctx, ext4j.Chunk) // the scan sees the end of ctx
		}
		look()
	})
}

// hasher asks the replica over the present session.
func (s *source) hasher(sess *ship.Session) ext4j.Hasher {
	f := s.g.snapshot()
	return func(ctx context.Context, slot uint32, offsets []int64) ([][]byte, error) {
		var resp wire.HashResponse
		err := sess.Call(ctx, wire.MethodHash, wire.HashRequest{Group: f.ID, Session: f.Session, Disk: slot, Chunk: ext4j.Chunk, Offsets: offsets}, &resp)
		return resp.Sums, err
	}
}

// fence stops a source that must not serve any more: its clients get no
// answer, and it does not come back by itself.
func (s *source) fence(why error) {
	if err := s.g.update(func(f *groupFile) { f.Fenced = why.Error(); f.Clean = nil }); err != nil {
		s.g.note(fmt.Sprintf("could not record that the group is fenced: %v", err))
	}
	s.eng.Fail(ext4j.ErrGone)
	s.g.alarm(apartAlarm, "")
	s.g.alarm(fencedAlarm, why.Error())
	s.g.input(Superseded, why.Error()) // last: whoever sees the state sees that nothing is served, and why
}

// fencedAlarm is the alarm of a source that was superseded, over restarts.
const fencedAlarm = "fenced"

func (s *source) markSynced() { closeOnce(s.synced) }

// closeOnce closes a channel that only one goroutine closes, perhaps again.
func closeOnce(c chan struct{}) {
	select {
	case <-c:
	default:
		close(c)
	}
}

// setBase notes where the session began.
func (s *source) setBase(p epoch.Pos) {
	s.mu.Lock()
	s.base = p
	s.mu.Unlock()
}

func (s *source) setBinding(b *ship.Binding) {
	s.mu.Lock()
	s.binding = b
	s.mu.Unlock()
}

func (s *source) onAck(a wire.Ack) {
	s.mu.Lock()
	was := s.last.Flags & wire.AckSpoolFull
	s.last = a
	s.mu.Unlock()
	if now := a.Flags & wire.AckSpoolFull; now != was {
		text := ""
		if now != 0 {
			text = "the replica's spool is full, or its disk: writes wait until there is room; kagami status at site " + s.g.snapshot().Peer + " says which"
		}
		s.g.alarm("spool", text)
	}
}

func (g *group) setProgress(what string, done, total int64) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sync.What != what {
		g.sync.Since = time.Now()
	}
	g.sync.What, g.sync.Done, g.sync.Total = what, done, total
}

var _ ship.Source = (*ext4j.Group)(nil)
