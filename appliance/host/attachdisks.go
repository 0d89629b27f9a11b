package host

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"kagami/appliance/control"
	"kagami/qmp"
)

// attachDisks is step 4 of Protect: copy every disk into its export, and when
// all copies follow the guest, make the VM use them. Until then, an
// interruption or the end of the group's service cancels all copies.
//
// A copy that is given up has its exports dropped first: QEMU ends a job only
// when the job's writes have ended, and those wait for as long as the queue is
// full and the link down. The first pivot needs the exports for good.
func (d *Daemon) attachDisks(ctx context.Context, g *group, src *source, emit func(control.Event)) error {
	copying, cancel := context.WithCancelCause(context.WithoutCancel(ctx))
	defer cancel(nil)
	interrupt := context.AfterFunc(ctx, func() { cancel(context.Cause(ctx)) })
	defer interrupt()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel(nil)
	watching, stopWatching := context.WithCancel(copying)
	defer stopWatching()
	wg.Go(func() { watchCopies(watching, g, src, cancel, emit) })
	committed := false
	giveUp := func(error) {
		if !committed {
			stopWatching() // what ends the exports now is no news
			src.drop()
		}
	}
	commit := func() error {
		// A pivot holds up the guest until the export has answered a FLUSH, so
		// the replica must be there and have caught up.
		if err := src.caughtUp(copying); err != nil {
			cancel(fmt.Errorf("the exports of %s failed: %w", g.name, err))
			return err
		}
		if !interrupt() {
			return context.Cause(ctx)
		}
		committed = true // the first pivot follows at once
		return nil
	}
	err := d.attachFrom(copying, g, g.snapshot().Disks, copyHooks{commit, giveUp}, emit)
	if cause := context.Cause(copying); err != nil && cause != nil {
		return cause // what libvirt says is that it was told to stop
	}
	return fromHypervisor(err)
}

// copyHooks are what attachDisks does between copies and pivots. They are
// called from its own goroutine.
type copyHooks struct {
	commit func() error    // before the first pivot
	giveUp func(why error) // before the job of a copy is cancelled
}

// watchCopies cancels copies that will not get on, which nobody but us
// notices, and passes on why those that may wait do so.
func watchCopies(ctx context.Context, g *group, src *source, cancel context.CancelCauseFunc, emit func(control.Event)) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	said := map[string]bool{}
	for {
		select {
		case <-ctx.Done():
			return
		case <-src.eng.Done():
			if ctx.Err() != nil {
				return
			}
			cancel(fmt.Errorf("the exports of %s failed: %w", g.name, src.eng.Err()))
		case err := <-src.refused:
			cancel(fromPeer(g.snapshot().Peer, err))
		case <-tick.C:
			for _, text := range g.waitsFor() {
				if !said[text] {
					said[text] = true
					say(emit, "warning", "%s", text)
				}
			}
		}
	}
}

// waitsFor says what keeps the stream of a source from getting on.
func (g *group) waitsFor() []string {
	st := g.status()
	if st.State == string(Stalled) {
		return append(st.Alarms, fmt.Sprintf("site %s is not connected, the copy waits: %s", st.Peer, st.Reason))
	}
	return st.Alarms
}

// attachFrom attaches the first of disks, and before it pivots, all others:
// the last disk is the first to pivot, after hooks.commit.
func (d *Daemon) attachFrom(ctx context.Context, g *group, disks []diskFile, hooks copyHooks, emit func(control.Event)) error {
	if len(disks) == 0 {
		return hooks.commit()
	}
	hv, err := d.virt()
	if err != nil {
		return err
	}
	disk, began, what := disks[0], time.Now(), "first sync of "+disks[0].Name
	g.setProgress(what, 0, disk.Size)
	defer g.setProgress("", 0, 0)
	progress := func(done, total int64, phase string) {
		if phase == qmp.PhaseCopy {
			g.setProgress(what, done, total)
		}
		emit(progressEvent("sync "+disk.Name, phase, done, total, began))
	}
	err = hv.Attach(ctx, qmp.AttachSpec{VM: g.snapshot().VM, Target: disk.Name, Socket: disk.Socket, Export: disk.Name,
		Size: disk.Size, ReconnectDelay: d.limits(g.name).ReconnectDelay, BeforeCancel: hooks.giveUp,
		BeforePivot: func(ctx context.Context) error {
			if err := d.attachFrom(ctx, g, disks[1:], hooks, emit); err != nil {
				return err
			}
			return g.pivots(disk.Slot)
		}}, progress)
	if err != nil && d.isAttached(g, disk.Name) { // it runs from the export, which is what counts
		say(emit, "warning", "disk %s: %v", disk.Name, err)
		g.alarm(untreated(disk.Name), fmt.Sprintf("disk %s of VM %s: %v", disk.Name, g.domainName(), err))
		return nil
	}
	return err
}

// pivots notes that a disk may run from its image from now on: durable before
// the pivot, since a power loss can take the new definition away and not what
// the guest has written by then.
func (g *group) pivots(slot uint32) error {
	return g.update(func(f *groupFile) {
		for i := range f.Disks {
			f.Disks[i].Pivoted = f.Disks[i].Pivoted || f.Disks[i].Slot == slot
		}
	})
}

// isAttached reports that the VM is known to have the disk from here.
func (d *Daemon) isAttached(g *group, disk string) bool {
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	names, err := d.attachedDisks(ctx, g)
	return err == nil && slices.Contains(names, disk)
}

// untreated is the kind of a disk's alarm about its place in the VM.
func untreated(disk string) string { return "vm-" + disk }

func progressEvent(step, message string, done, total int64, began time.Time) control.Event {
	ev := control.Event{Step: step, Message: message, Done: done, Total: total}
	if spent := time.Since(began).Seconds(); spent > 0.1 && done > 0 {
		ev.Rate = int64(float64(done) / spent)
		if ev.Rate > 0 && total > done {
			ev.ETASeconds = float64(total-done) / float64(ev.Rate)
		}
	}
	return ev
}

// attachedDisks names the disks of a group that its VM uses through kagami.
func (d *Daemon) attachedDisks(ctx context.Context, g *group) ([]string, error) {
	f := g.snapshot()
	hv, err := d.virt()
	if err != nil {
		return nil, err
	}
	disks, err := hv.Disks(ctx, g.domainName())
	if err != nil {
		return nil, fromHypervisor(err)
	}
	var names []string
	for _, disk := range disks {
		if slices.ContainsFunc(f.Disks, func(df diskFile) bool { return df.Name == disk.Target && df.Socket == disk.Socket }) {
			names = append(names, disk.Target)
		}
	}
	return names, nil
}
