package host

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kagami/appliance/control"
	"kagami/qmp"
	"kagami/replica/wire"
)

// undoPatience bounds what has to be asked of libvirt before a failed protect
// can be undone.
const undoPatience = time.Minute

// takeBack undoes a protect that failed, at both sites, and returns the error
// to report. src is nil when the group was never served.
func (d *Daemon) takeBack(g *group, src *source, cause error, emit func(control.Event)) error {
	say(emit, "undo", "taking everything back: %s", text(cause))
	if src == nil { // libvirt and the peer have not heard of it
		if err := d.end(g, ending{purge: true}, emit); err != nil {
			return because(cause, "and not all of it could be taken back: %s", text(err))
		}
		return cause
	}
	if err := d.undo(g, ending{purge: true, tell: src.asked.Load()}, d.runsOn(g), emit); err != nil {
		return d.halfDone(g, cause, err)
	}
	return cause
}

// runsOn tells whether the group's VM has run without a break, as far as can be
// seen: then what it runs from is what it ever ran from.
func (d *Daemon) runsOn(g *group) bool {
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	hv, err := d.virt()
	if err != nil {
		return false
	}
	st, err := hv.State(ctx, g.domainName())
	return err == nil && st.Active()
}

// undo moves what runs from the exports back to plain files and ends the group.
// ranOn: the VM has run on since protect began. If not, a disk that is not
// attached may have been, and its image may hold what no other file does: it is
// put aside, not removed.
func (d *Daemon) undo(g *group, how ending, ranOn bool, emit func(control.Event)) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	if err := g.cancelCopies(ctx); err != nil {
		return err
	}
	moved, err := d.attachedDisks(ctx, g)
	if err != nil {
		return err
	}
	if len(moved) > 0 {
		files, err := g.filesFor(nil)
		if err != nil {
			return err
		}
		if err := d.detachDisks(d.ctx, g, files, emit); err != nil {
			return err
		}
	}
	if !ranOn {
		if err := g.saveImages(moved, emit); err != nil {
			return err
		}
	}
	return d.end(g, how, emit)
}

// saveImages puts the images of disks aside that may have pivoted and were not
// moved back.
func (g *group) saveImages(moved []string, emit func(control.Event)) error {
	for _, disk := range g.snapshot().Disks {
		if !disk.Pivoted || slices.Contains(moved, disk.Name) {
			continue
		}
		aside, err := g.d.moveAside(disk.Image)
		if err != nil {
			return err
		}
		if aside == "" {
			continue
		}
		if err := g.d.fs.SyncDir(filepath.Dir(aside)); err != nil {
			return fmt.Errorf("put %s aside: %w", disk.Image, err)
		}
		text := fmt.Sprintf("disk %s of %s may have run from kagami for a moment: its image is kept as %s; if %s lacks what the guest wrote last, it is there", disk.Name, g.name, aside, disk.Kept)
		say(emit, "warning", "%s", text)
		g.d.log.Warn(text, "group", g.name)
	}
	return nil
}

// halfDone is the end of a protect that could not be undone: the VM goes on,
// on the disks that it has, and the operator is told the way back.
func (d *Daemon) halfDone(g *group, cause, undo error) error {
	g.alarm("protect", fmt.Sprintf("protect was broken off (%s) and not taken back (%s): %s is not protected", text(cause), text(undo), g.name))
	return failure("half-done", fmt.Sprintf("%s; not all of it could be taken back: %s", text(cause), text(undo)), fmt.Sprintf("kagami unprotect %s moves its disks back to plain files", g.name))
}

// settleProtect brings a protect that the end of an earlier daemon broke off
// to one of its two ends. If the VM runs from all exports, it goes on: the
// first sync is taken up again by comparing. Else it is taken back. What
// libvirt cannot tell now is looked at when it can (see superviseVMs).
func (g *group) settleProtect() error {
	d := g.d
	if !g.op.TryLock() {
		return nil // it is not broken off
	}
	if d.find(g.name) != g {
		g.op.Unlock()
		return nil // forgotten meanwhile; the name may be another group's
	}
	ctx, cancel := context.WithTimeout(d.ctx, undoPatience)
	defer cancel()
	moved, err := d.attachedDisks(ctx, g)
	if err != nil {
		defer g.op.Unlock()
		g.alarm("protect", fmt.Sprintf("protect was broken off by the daemon's end; it is settled when libvirt answers: %s", text(err)))
		return nil
	}
	f := g.snapshot()
	if len(moved) == len(f.Disks) {
		defer g.op.Unlock()
		g.alarm("protect", "")
		g.note("protect was broken off by the daemon's end; the first sync is taken up again")
		g.keepOld()
		return g.startSource()
	}
	d.wg.Go(func() {
		defer g.op.Unlock()
		g.note(fmt.Sprintf("protect was broken off by the daemon's end: taken back (disks that run from kagami: %s)", orNone(moved)))
		err := g.serveMoved(moved)
		if err == nil {
			err = d.undo(g, ending{purge: true, tell: true}, false, func(ev control.Event) {
				if ev.Total == 0 {
					g.note(ev.Step + ": " + ev.Message)
				}
			})
		}
		if err != nil && d.ctx.Err() == nil {
			g.note(d.halfDone(g, errors.New("the daemon ended"), err).Error())
		}
	})
	return nil
}

// serveMoved serves the disks that the VM has from here.
func (g *group) serveMoved(moved []string) error {
	if len(moved) == 0 {
		return nil
	}
	if err := g.update(func(f *groupFile) { f.Phase = Unprotecting }); err != nil {
		return err
	}
	g.input(Released, "protect is taken back")
	return g.startAlone()
}

func orNone(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// cancelCopies ends block jobs that an earlier life of the daemon began.
func (g *group) cancelCopies(ctx context.Context) error {
	hv, err := g.d.virt()
	if err != nil {
		return err
	}
	f := g.snapshot()
	for _, disk := range f.Disks {
		err := hv.CancelCopy(ctx, f.VM, disk.Name, disk.Socket)
		if err != nil && !errors.Is(err, qmp.ErrNoDomain) && !errors.Is(err, qmp.ErrNoDisk) {
			return fromHypervisor(err)
		}
	}
	return nil
}

// ending says how a group ends.
type ending struct {
	purge bool // the replica's images go, too
	tell  bool // the replica's site may have a replica
}

// end takes away a group that no VM uses: its service, its images and state
// here, its replica at the peer. If the peer cannot be told, the group stays
// as long as it takes to tell it, over restarts.
func (d *Daemon) end(g *group, how ending, emit func(control.Event)) error {
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while stopping: %v", err))
	}
	if d.find(g.name) != g { // it has no file yet
		return errors.Join(g.removeImages(), g.removeFolder())
	}
	f := g.snapshot()
	how.tell = how.tell && f.Role == RoleSource && d.links[f.Peer] != nil
	// From here on it ends, whatever happens: durable before anything is removed.
	if err := g.update(func(f *groupFile) { f.Phase, f.Purge, f.Clean = Ending, how.purge, nil }); err != nil {
		return err
	}
	g.input(Ended, "no VM uses it any more")
	if err := g.removeImages(); err != nil {
		return err
	}
	if how.tell {
		err := d.callPeer(context.Background(), f.Peer, wire.MethodRemove, wire.RemoveRequest{Group: f.ID, Purge: how.purge}, nil)
		if err != nil && !isCode(err, string(wire.CodeNotFound)) {
			say(emit, "warning", "site %s is told to remove its replica as soon as it is connected: %s", f.Peer, text(err))
			g.leave()
			return nil
		}
	}
	return g.vanish()
}

// leave tells the replica's site, as soon as it is connected, that the group has ended.
func (g *group) leave() {
	g.d.wg.Go(func() {
		if err := g.farewell(g.d.ctx); err != nil && g.d.ctx.Err() == nil {
			g.fail(err)
		}
	})
}

func (g *group) farewell(ctx context.Context) error {
	f := g.snapshot()
	if err := g.removeImages(); err != nil {
		return err
	}
	for link := g.d.links[f.Peer]; link != nil; {
		sess, err := link.Session(ctx)
		if err != nil {
			return err // ctx has ended
		}
		if g.d.find(g.name) != g {
			return nil // forgotten meanwhile
		}
		err = sess.Call(ctx, wire.MethodRemove, wire.RemoveRequest{Group: f.ID, Purge: f.Purge}, nil)
		var werr *wire.Error
		told := err == nil || errors.As(err, &werr) && werr.Code == wire.CodeNotFound
		if told && g.op.TryLock() { // nobody forgets it meanwhile
			defer g.op.Unlock()
			break
		}
		if !told {
			g.alarm("leave", fmt.Sprintf("site %s did not remove its replica: %v", f.Peer, err))
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(g.d.pause.farewell):
		}
	}
	if g.d.find(g.name) != g {
		return nil // forgotten; the name may be another group's
	}
	return g.vanish()
}

// vanish removes the last traces of a group that has ended.
func (g *group) vanish() error {
	if err := g.removeFolder(); err != nil {
		return err
	}
	g.note("ended")
	g.d.forget(g)
	return nil
}
