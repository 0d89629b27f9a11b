package qmp

import (
	"context"
	"errors"
	"fmt"
	"time"
)

// jobEnd is how long a cancelled job may take to go away.
const jobEnd = time.Minute

// mirror is one block copy that ends in a pivot.
type mirror struct {
	target string
	start  func() error
	before func(context.Context) error // may be nil: see AttachSpec.BeforePivot
	giveUp func(why error)             // may be nil: see AttachSpec.BeforeCancel
	moved  func(Disk) bool             // the disk is what the pivot makes it
	undo   func() error                // may be nil: after a copy that began and was cancelled
}

// mirror starts a block copy, follows it until it is ready, asks before and
// pivots. On every error, the VM goes on with the disk it had and the job is gone.
func (w *worker) mirror(ctx context.Context, m mirror, progress Progress) error {
	if err := awaitErr(ctx, w.calls, "start to copy disk "+m.target, m.start); err != nil {
		if ctx.Err() != nil { // the call may be under way still
			return joinCleanup(err, w.cancelMirror(ctx, m, err))
		}
		return err
	}
	err := w.follow(ctx, m.target, progress)
	if err == nil && m.before != nil {
		err = m.before(ctx)
	}
	if err == nil {
		progress.at(0, 0, PhasePivot)
		err = w.pivot(ctx, m)
	}
	if err == nil {
		return nil
	}
	cleanup := w.cancelMirror(ctx, m, err)
	if cleanup == nil && m.undo != nil {
		cleanup = m.undo()
	}
	return joinCleanup(err, cleanup)
}

// cancelMirror ends the job of a mirror that is given up.
func (w *worker) cancelMirror(ctx context.Context, m mirror, why error) error {
	if m.giveUp != nil {
		m.giveUp(why)
	}
	return w.cancel(ctx, m.target)
}

// follow waits until the copy is complete and follows the guest.
func (w *worker) follow(ctx context.Context, target string, progress Progress) error {
	tick := time.NewTicker(w.poll)
	defer tick.Stop()
	for {
		j, err := await(ctx, w.calls, "copy disk "+target, func() (*blockJob, error) { return w.d.blockJob(target) })
		if err != nil {
			return err
		}
		if j == nil {
			return advise(ErrCopyFailed, "the copy of disk %s of %s failed, the VM goes on as before: see QEMU's log in /var/log/libvirt/qemu and the daemon's, then try again",
				target, w.d.name())
		}
		if j.cur > 0 || j.end > 1 { // 0 of 1 is libvirt's way to say that it does not know yet
			progress.at(int64(j.cur), int64(j.end), PhaseCopy)
		}
		if j.end > 0 && j.cur >= j.end {
			ready, err := w.ready(ctx, target)
			if err != nil || ready {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("copy disk %s: %w", target, context.Cause(ctx))
		case <-tick.C:
		}
	}
}

// ready asks the definition: it has <mirror ready='yes'> from QEMU's own event on.
func (w *worker) ready(ctx context.Context, target string) (bool, error) {
	_, x, err := w.definition(ctx, false, target)
	if err != nil {
		return false, err
	}
	return x.Mirror != nil && x.Mirror.Ready == "yes", nil
}

// pivot makes the VM use the copy. Once it has begun it is not cut short, and
// an error means that the VM does not use the copy: the definition is asked.
func (w *worker) pivot(ctx context.Context, m mirror) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterPivot)
	defer cancel()
	for {
		err := awaitErr(ctx, w.calls, "make the VM use the copy of disk "+m.target, func() error { return w.d.abortJob(m.target, true) })
		if err == nil {
			return nil
		}
		if !isNotReady(err) {
			moved, err2 := w.moved(m)
			if moved {
				return nil
			}
			return errors.Join(err, err2)
		}
		select {
		case <-ctx.Done():
			return err
		case <-time.After(w.poll):
		}
	}
}

// moved reports whether the running VM uses the copy.
func (w *worker) moved(m mirror) (bool, error) {
	ctx, cancel := context.WithTimeout(context.Background(), jobEnd)
	defer cancel()
	_, x, err := w.definition(ctx, false, m.target)
	if err != nil {
		return false, err
	}
	return m.moved(diskOf(x)), nil
}

// cancel ends the job, if there is one, and waits until it is gone. It works
// when ctx has ended, too.
func (w *worker) cancel(ctx context.Context, target string) error {
	ctx, done := context.WithTimeout(context.WithoutCancel(ctx), jobEnd)
	defer done()
	asked := false
	for {
		j, err := await(ctx, w.calls, "cancel the copy of disk "+target, func() (*blockJob, error) { return w.d.blockJob(target) })
		if err != nil {
			return err
		}
		if j == nil {
			return nil
		}
		if !asked {
			err = awaitErr(ctx, w.calls, "cancel the copy of disk "+target, func() error { return w.d.abortJob(target, false) })
			// The job may have ended by itself meanwhile: what counts is that it is gone.
			asked = err == nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(err, fmt.Errorf("the copy of disk %s does not end: %w", target, ctx.Err()))
		case <-time.After(w.poll):
		}
	}
}
