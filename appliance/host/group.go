package host

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
)

// group is one group at this site, whatever its role.
type group struct {
	d         *Daemon
	name      string
	dir       string
	op        tryLock // held by an operator's command
	comparing tryLock // held by a comparison with the replica

	mu       sync.Mutex
	file     *groupFile
	state    State
	reason   string
	since    time.Time
	events   []event // newest last, bounded
	images   map[uint32]*images.Image
	kept     []*images.Image // the VM's old files, locked
	src      *source         // role source or promoted, while started
	rep      *replica.Group  // role replica, while started
	sync     syncProgress
	alarms   map[string]string // by kind
	resuming bool              // a goroutine is about to resume the VM
	stopped  epoch.Pos         // replica: where its source stopped cleanly; zero while it runs, or if that is not known
	shipping bool              // a goroutine ships the VM's definition
	reship   bool              // and has to do so once more
	shipped  time.Time         // when it last began to
	gone     bool              // removed, or about to be: nothing is stored for it any more
	broken   error             // why the group's file cannot be used; never changes
	verified *verifyFile       // the last comparison; nil: there was none
}

// tryLock is a lock that nobody waits for.
type tryLock struct{ held atomic.Bool }

// TryLock reports whether the caller has the lock now.
func (l *tryLock) TryLock() bool { return l.held.CompareAndSwap(false, true) }

// Unlock gives it back.
func (l *tryLock) Unlock() { l.held.Store(false) }

// event is one entry of a group's history.
type event struct {
	At   time.Time
	Text string
}

const maxEvents = 100

// syncProgress is how far a first sync or resync is, bytes.
type syncProgress struct {
	What        string
	Done, Total int64
	Since       time.Time
}

func newGroup(d *Daemon, f *groupFile) *group {
	g := &group{d: d, name: f.Name, dir: filepath.Join(d.cfg.StateDir, "groups", f.Name), file: f, since: time.Now(),
		images: map[uint32]*images.Image{}, alarms: map[string]string{}}
	g.state = initialState(f)
	return g
}

// initialState is where a group begins when the daemon starts.
func initialState(f *groupFile) State {
	switch {
	case f.Phase == Recovering, f.Phase == Booting:
		return Promoting
	case f.Phase == Ending:
		return Leaving
	case f.Role == RoleReplica:
		return Waiting
	case f.Role == RolePromoted, f.Phase == Unprotecting:
		return Detached
	case f.Fenced != "":
		return Fenced
	default:
		return Stalled
	}
}

// input runs the state machine and records the transition.
func (g *group) input(in Input, reason string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	to, err := Next(g.state, in, true)
	if err != nil {
		g.noteLocked(slog.LevelWarn, fmt.Sprintf("%v (%s)", err, reason))
		return
	}
	if to == g.state && reason == g.reason {
		return
	}
	level := slog.LevelInfo
	if to == Failed {
		level = slog.LevelError
	}
	g.noteLocked(level, fmt.Sprintf("%s → %s: %s", g.state, to, reason))
	if to != g.state {
		g.since = time.Now()
	}
	g.state, g.reason = to, reason
}

func (g *group) note(text string) {
	g.mu.Lock()
	g.noteLocked(slog.LevelInfo, text)
	g.mu.Unlock()
}

// noteLocked adds to the group's history and to the log, there at a level.
func (g *group) noteLocked(level slog.Level, text string) {
	if len(g.events) >= maxEvents {
		g.events = append(g.events[:0], g.events[1:]...)
	}
	g.events = append(g.events, event{time.Now(), text})
	g.d.log.Log(context.Background(), level, text, "group", g.name)
}

// alarm raises, or with an empty text clears, an alarm of a kind.
func (g *group) alarm(kind, text string) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.alarms[kind] == text {
		return
	}
	if text == "" {
		delete(g.alarms, kind)
		g.noteLocked(slog.LevelInfo, "alarm over: "+kind)
		return
	}
	g.alarms[kind] = text
	g.noteLocked(slog.LevelWarn, "alarm: "+text)
}

// setStopped notes where a replica's source has stopped cleanly; zero: it runs.
func (g *group) setStopped(p epoch.Pos) {
	g.mu.Lock()
	g.stopped = p
	g.mu.Unlock()
}

// lacksNothing tells whether a replica has all that its source ever answered:
// it stopped cleanly at the position that the replica has.
func (g *group) lacksNothing(r replica.Status) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return !r.Attached && g.stopped != (epoch.Pos{}) && g.stopped.LSN == r.Durable && g.stopped.Lineage == r.Lineage
}

// fail ends the group's service until the daemon is restarted.
func (g *group) fail(err error) {
	g.alarm("failed", err.Error())
	g.input(Broken, err.Error())
}

func (g *group) current() State {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.state
}

// update changes the group file and makes the change durable before it is seen.
// The file of a group that is gone may be another group's.
func (g *group) update(change func(*groupFile)) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.gone {
		return fmt.Errorf("save state of group %s: it was removed", g.name)
	}
	next := *g.file
	next.Disks = append([]diskFile(nil), g.file.Disks...)
	change(&next)
	if err := next.save(g.d.fs, g.dir); err != nil {
		return err
	}
	g.file = &next
	return nil
}

// snapshot returns the present group file, which is never changed in place.
func (g *group) snapshot() *groupFile {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.file
}

// start begins what the group's role asks for.
func (g *group) start() error {
	f := g.snapshot()
	verified := loadVerified(g.d.fs, g.dir, f)
	g.mu.Lock()
	g.verified = verified
	g.mu.Unlock()
	if f.Role == RoleSource {
		g.alarmDiffers(verified)
	}
	switch {
	case g.broken != nil:
		return g.broken
	case g.current() == Undeclared: // serves nothing
		g.alarm(undeclaredAlarm, fmt.Sprintf("the config file does not declare %s any more, so it is not served: declare it again and restart the daemon, or end it with kagami forget %s", g.name, g.name))
		return nil
	case f.Phase == Ending:
		g.leave()
		return nil
	case f.Fenced != "": // serves nothing
		g.alarm(fencedAlarm, f.Fenced)
		g.keepSuperseded()
		return nil
	case f.Role == RoleReplica:
		return g.startReplica(false)
	case f.Role == RolePromoted:
		if f.Phase != "" && f.Phase != Unprotecting {
			g.brokenOff("the daemon ended")
		}
		return g.startPromoted()
	case f.Phase == Protecting:
		return g.settleProtect()
	case f.Phase == Unprotecting:
		g.alarm("unprotect", "unprotect was broken off, nothing of it is protected: run kagami unprotect "+g.name+" again")
		g.keepOld()
		return g.startAlone()
	default:
		g.keepOld()
		return g.startSource()
	}
}

// drain stops a source cleanly if it can within ctx.
func (g *group) drain(ctx context.Context) {
	g.mu.Lock()
	src := g.src
	g.mu.Unlock()
	if src == nil {
		return
	}
	if err := src.drain(ctx); err != nil {
		g.note(fmt.Sprintf("stopped without draining, the next start compares the active regions: %v", err))
	}
}

// stop ends everything of the group and closes its images.
func (g *group) stop() error {
	g.mu.Lock()
	src, rep := g.src, g.rep
	g.src, g.rep = nil, nil
	g.mu.Unlock()
	var errs []error
	if src != nil {
		errs = append(errs, src.stop())
	}
	if rep != nil {
		errs = append(errs, rep.Close(), g.leaveRestMarks())
	}
	errs = append(errs, g.closeImages())
	return errors.Join(errs...)
}

// leaveRestMarks marks a stopped replica's images, so that a change made
// while kagami does not run is noticed.
func (g *group) leaveRestMarks() error {
	g.mu.Lock()
	imgs := g.images
	g.mu.Unlock()
	var errs []error
	for _, img := range imgs {
		errs = append(errs, leaveRestMark(img))
	}
	return errors.Join(errs...)
}

func (g *group) closeImages() error {
	g.mu.Lock()
	imgs, kept := g.images, g.kept
	g.images, g.kept = map[uint32]*images.Image{}, nil
	g.mu.Unlock()
	var errs []error
	for _, img := range kept {
		errs = append(errs, img.Close())
	}
	for _, img := range imgs {
		errs = append(errs, img.Close())
	}
	return errors.Join(errs...)
}
