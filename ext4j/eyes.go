package ext4j

import (
	"context"
	"errors"
	"sync"
	"time"

	"kagami/ext4j/epoch"
	"kagami/ext4j/follow"
	"kagami/images"
)

// Eyes say what a group makes of what its guests' file systems write.
type Eyes struct {
	Follow bool // follow ext4 and its journal
	// LocalFlushes answers a FLUSH that promises nothing without waiting for the
	// replica; see package follow. It needs Follow.
	LocalFlushes bool
	// Mutant breaks one of package follow's rules; only tests set it.
	Mutant follow.Mutant
}

// eyes feed a disk's records to its follower, in the order of their LSNs: mu is
// held from before the record gets its number until the follower has seen it.
// LSNs are marks (Group.markLocked), which rise across sessions.
type eyes struct {
	d      *Disk
	local  bool
	mutant follow.Mutant

	mu   sync.Mutex
	f    *follow.Follower
	last follow.Commit // newest seen
	wake chan struct{} // one token: something is wanted
}

// openEyes begins to follow a disk, before any request is served.
func (d *Disk) openEyes(o Eyes) {
	d.eyes = &eyes{d: d, local: o.LocalFlushes, mutant: o.Mutant, wake: make(chan struct{}, 1)}
	d.eyes.renew(0)
	d.g.wg.Go(d.eyes.load)
}

// renew makes a new follower for the partitions that the disk has now. Whether
// what it makes of them is right shows in their superblocks: a table that
// cannot be read is only a reason to look for one file system on the whole disk.
func (e *eyes) renew(lsn epoch.LSN) {
	o := follow.Options{Size: e.d.img.Size(), Mutant: e.mutant}
	parts, _, err := images.Partitions(e.d.img, o.Size)
	if err == nil || errors.Is(err, images.ErrTable) {
		for _, p := range parts {
			o.Parts = append(o.Parts, follow.Range{Off: p.Start, Len: p.Length})
		}
	}
	e.f = follow.New(o)
	e.f.Reset(lsn)
	e.kick()
}

func (e *eyes) kick() {
	select {
	case e.wake <- struct{}{}:
	default:
	}
}

// append gives r its number and shows it to the follower. before is what its
// range held, or nil.
func (d *Disk) append(r epoch.Record, before []byte) epoch.LSN {
	if w := d.watch.Load(); w != nil {
		w.touch(int64(r.Offset), int64(r.Length))
	}
	e := d.eyes
	if e == nil {
		return d.g.append(r)
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	mark := d.g.append(r)
	if r.Flags&epoch.FlagResync != 0 {
		e.f.MustWait(mark) // no write of the guest: the replica lacks what was there before
		return mark
	}
	w := follow.Write{LSN: mark, Range: follow.Range{Off: int64(r.Offset), Len: int64(r.Length)}, Data: r.Payload, Before: before}
	if r.Type != epoch.TypeWrite {
		w.Kind = follow.Zeroes
	}
	e.f.Observe(w)
	if e.f.TableChanged() {
		e.renew(mark)
	}
	if e.f.Wanting() {
		e.kick()
	}
	return mark
}

// before reads what a range holds if the follower could make use of it. The
// caller holds the range lock. A failure to read is none: the record waits.
func (d *Disk) before(off, n int64) []byte {
	if d.eyes == nil || !d.eyes.follower().NeedsBefore(off, n) {
		return nil
	}
	p := make([]byte, n)
	if _, err := d.img.ReadAt(p, off); err != nil {
		return nil
	}
	return p
}

func (e *eyes) follower() *follow.Follower {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.f
}

// reset makes everything so far, and the commits seen, count for nothing: a new
// client or session.
func (e *eyes) reset() {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.f.Reset(e.d.g.lastMark())
	if e.f.Wanting() {
		e.kick()
	}
}

// newest is the mark of the newest record that a FLUSH that has arrived has to
// wait for; every record numbered by now has been judged.
func (e *eyes) newest() epoch.LSN {
	e.mu.Lock()
	defer e.mu.Unlock()
	if !e.local {
		return ^epoch.LSN(0)
	}
	return e.f.Newest()
}

// load reads what the follower wants, until the group ends. A range is locked
// from the reading until the follower has it, so that no write to it lies between.
func (e *eyes) load() {
	for {
		select {
		case <-e.d.g.ctx.Done():
			return
		case <-e.wake:
		}
		for e.d.g.ctx.Err() == nil {
			e.mu.Lock()
			f := e.f
			wants := f.Wants(16)
			e.mu.Unlock()
			if len(wants) == 0 {
				break
			}
			for _, w := range wants {
				e.loadOne(f, w)
			}
		}
	}
}

// loadRate bounds what is read for the follower, bytes per second: a guest can
// make it begin anew as often as it likes.
const loadRate = 128 << 20

func (e *eyes) loadOne(f *follow.Follower, w follow.Want) {
	l := e.d.locks.lock(w.Off, w.Len)
	p := make([]byte, w.Len)
	if _, err := e.d.img.ReadAt(p, w.Off); err != nil {
		p = nil // whoever reads it next learns why
	}
	e.mu.Lock()
	if e.f == f {
		f.Loaded(w, p)
	}
	e.mu.Unlock()
	e.d.locks.unlock(l)
	pause(e.d.g.ctx, time.Duration(w.Len)*time.Second/loadRate)
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// Seen is what is known of the file systems of a disk.
type Seen struct {
	follow.Status
	Commit follow.Commit // the newest transaction seen to commit; TID 0: none
}

// Seen returns a snapshot; false when the disk is not followed.
func (d *Disk) Seen() (Seen, bool) {
	e := d.eyes
	if e == nil {
		return Seen{}, false
	}
	e.mu.Lock()
	defer e.mu.Unlock()
	if c, _ := e.f.Commits(); len(c) > 0 {
		e.last = c[len(c)-1]
	}
	return Seen{Status: e.f.Status(), Commit: e.last}, true
}

// resetEyes is called when a session begins.
func (g *Group) resetEyes() {
	for _, d := range g.disks {
		if d.eyes != nil {
			d.eyes.reset()
		}
	}
}

// lastMark is the mark of the last record that was numbered, 0 before there is any:
// a client may come before the first session does.
func (g *Group) lastMark() epoch.LSN {
	g.mu.Lock()
	defer g.mu.Unlock()
	next := g.nextLocked()
	if next == 0 {
		return 0
	}
	return g.markLocked(next - 1)
}
