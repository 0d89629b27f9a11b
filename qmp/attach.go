package qmp

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"
)

// AttachSpec says which disk goes behind which export. The export must be served
// already and accept two connections at once. Its content is what the copy makes it.
type AttachSpec struct {
	VM             string
	Target         string        // vda, vdb, …
	Socket         string        // clean absolute path; QEMU's user may connect to it
	Export         string        // name of the export
	Size           int64         // bytes of the export, exactly those of the disk
	ReconnectDelay time.Duration // how long QEMU waits for a server that is away; 1 s to 10 years
	Bandwidth      uint64        // limit of the copy in bytes per second; 0: none
	// BeforePivot is called once the copy is complete and follows the guest's
	// writes; an error cancels the attach. It may be nil.
	BeforePivot func(ctx context.Context) error
	// BeforeCancel is called before a copy that has begun is cancelled, with the
	// reason. A job ends only when its writes have: whoever serves, and holds some
	// up, must drop them now. It may be nil.
	BeforeCancel func(why error)
}

// Phases of Attach and Detach, as given to their progress functions.
const (
	PhaseCopy  = "copy"
	PhasePivot = "pivot"
	PhaseTreat = "reconnect treatment"
)

// Progress is told how many bytes of how many are done. It is called from the
// caller's goroutine and may be nil.
type Progress func(done, total int64, phase string)

func (p Progress) at(done, total int64, phase string) {
	if p != nil {
		p(done, total, phase)
	}
}

func (s AttachSpec) check() error {
	switch {
	case s.VM == "" || s.Target == "" || s.Export == "":
		return errors.New("attach: VM, target and export must be given")
	case !path.IsAbs(s.Socket) || path.Clean(s.Socket) != s.Socket:
		return fmt.Errorf("attach: socket %q: want a clean absolute path", s.Socket)
	case s.ReconnectDelay < minDelay || s.ReconnectDelay > maxDelay:
		return fmt.Errorf("attach: reconnect delay %v: allowed are %v to %v", s.ReconnectDelay, minDelay, maxDelay)
	case s.Size <= 0:
		return fmt.Errorf("attach: export of %d bytes", s.Size)
	}
	return nil
}

// worker does one piece of work on one domain.
type worker struct {
	d     domain
	calls *calls
	locks *locks
	poll  time.Duration // how often a job is looked at
}

// afterPivot is how long what follows a pivot may take once the caller has given up.
const afterPivot = 2 * time.Minute

// checkDisk looks at a disk of a definition with the eyes of Attach.
func checkDisk(vm string, x *libvirtxml.DomainDisk, s AttachSpec) error {
	d := diskOf(x)
	if d.Socket == s.Socket && s.Socket != "" {
		return advise(ErrAlreadyAttached, "disk %s of %s is served by kagami already, from %s", d.Target, vm, d.Socket)
	}
	return d.Unsuited()
}

// definition reads the XML and finds the disk in it.
func (w *worker) definition(ctx context.Context, inactive bool, target string) (element string, x *libvirtxml.DomainDisk, err error) {
	doc, err := await(ctx, w.calls, "read the definition of "+w.d.name(), func() (string, error) { return w.d.xml(inactive) })
	if err != nil {
		return "", nil, err
	}
	s, x, err := findDisk(doc, w.d.name(), target)
	if err != nil {
		return "", nil, err
	}
	return s.of(doc), x, nil
}

// attach is Attach after its argument check.
func (w *worker) attach(ctx context.Context, s AttachSpec, progress Progress) error {
	was, err := w.checkLive(ctx, s)
	if err != nil {
		return err
	}
	m := mirror{
		target: s.Target, before: s.BeforePivot, giveUp: s.BeforeCancel,
		start: func() error {
			return w.d.blockCopy(s.Target, nbdTarget(s.Target, s.Socket, s.Export, s.ReconnectDelay), true, s.Bandwidth)
		},
		moved: func(d Disk) bool { return d.Socket == s.Socket },
	}
	if err := w.mirror(ctx, m, progress); err != nil {
		return err
	}
	// The VM runs from the export now. What is left is done even if the caller gives up.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterPivot)
	defer cancel()
	err = w.redefine(ctx, func(doc string) (string, error) {
		return attachDefinition(doc, s.VM, s.Target, was, s.Socket, s.Export, s.ReconnectDelay)
	})
	progress.at(s.Size, s.Size, PhaseTreat)
	return errors.Join(err, w.treat(ctx, s.Target, s.Socket, s.Export, s.ReconnectDelay))
}

// checkLive refuses what cannot be attached live and returns the stored <disk> element.
func (w *worker) checkLive(ctx context.Context, s AttachSpec) (was string, err error) {
	if err := w.needState(ctx, true); err != nil {
		return "", err
	}
	_, live, err := w.definition(ctx, false, s.Target)
	if err != nil {
		return "", err
	}
	if err := checkDisk(s.VM, live, s); err != nil {
		return "", err
	}
	if err := w.noJob(ctx, s.Target); err != nil {
		return "", err
	}
	was, _, err = w.definition(ctx, true, s.Target)
	if errors.Is(err, ErrNoDisk) {
		return "", advise(ErrUnsuited, "disk %s was plugged into the running %s only and would be gone at its next start: add it to the stored definition, too (virsh attach-device --config)", s.Target, s.VM)
	} else if err != nil {
		return "", err
	}
	return was, w.sameSize(ctx, s)
}

// needState refuses a VM that is not as it must be.
func (w *worker) needState(ctx context.Context, running bool) error {
	vm := w.d.name()
	st, err := await(ctx, w.calls, "ask for the state of "+vm, w.d.state)
	if err != nil {
		return err
	}
	ok, err := await(ctx, w.calls, "ask if "+vm+" is persistent", w.d.persistent)
	switch {
	case err != nil:
		return err
	case running && !st.Active():
		return advise(ErrNotRunning, "%s is not running but %v: start it, or attach its disks offline", vm, st)
	case !running && st.Active():
		return advise(ErrRunning, "%s is %v: shut it down first, or attach its disks live", vm, st)
	case !ok:
		return advise(ErrUnsuited, "%s is transient, its definition is lost when it stops: define it first (virsh dumpxml, virsh define)", vm)
	}
	return nil
}

func (w *worker) noJob(ctx context.Context, target string) error {
	j, err := await(ctx, w.calls, "ask for block jobs of "+w.d.name(), func() (*blockJob, error) { return w.d.blockJob(target) })
	if err != nil {
		return err
	}
	if j != nil {
		return advise(ErrJobRunning, "a block job is running on disk %s of %s: wait for it or end it (virsh blockjob %s %s), then try again",
			target, w.d.name(), w.d.name(), target)
	}
	return nil
}

func (w *worker) sameSize(ctx context.Context, s AttachSpec) error {
	n, err := await(ctx, w.calls, "ask for the size of "+s.Target, func() (int64, error) { return w.d.capacity(s.Target) })
	if err != nil {
		return err
	}
	if n != s.Size {
		return advise(ErrSize, "disk %s of %s has %d bytes, the export %d: make the export exactly as large as the disk", s.Target, s.VM, n, s.Size)
	}
	return nil
}

// redefine changes the stored definition.
func (w *worker) redefine(ctx context.Context, edit func(string) (string, error)) error {
	what := "change the definition of " + w.d.name()
	unlock, err := w.locks.lock(ctx, w.d.name())
	if err != nil {
		return err
	}
	defer unlock()
	doc, err := await(ctx, w.calls, what, func() (string, error) { return w.d.xml(true) })
	if err != nil {
		return err
	}
	doc, err = edit(doc)
	if err != nil {
		return fmt.Errorf("%s: %w", what, err)
	}
	return awaitErr(ctx, w.calls, what, func() error { return w.d.define(doc) })
}

// attachOffline changes the definition of a VM that does not run.
func (w *worker) attachOffline(ctx context.Context, s AttachSpec) error {
	was, err := w.checkOffline(ctx, s)
	if err != nil {
		return err
	}
	return w.redefine(ctx, func(doc string) (string, error) {
		return attachDefinition(doc, s.VM, s.Target, was, s.Socket, s.Export, s.ReconnectDelay)
	})
}

func (w *worker) checkOffline(ctx context.Context, s AttachSpec) (was string, err error) {
	if err := w.needState(ctx, false); err != nil {
		return "", err
	}
	saved, err := await(ctx, w.calls, "ask for a saved state", w.d.hasManagedSave)
	if err != nil {
		return "", err
	}
	if saved {
		return "", advise(ErrUnsuited, "%s has a saved state that names its present disks: start it once, or remove the state (virsh managedsave-remove %s)", s.VM, s.VM)
	}
	was, x, err := w.definition(ctx, true, s.Target)
	if err != nil {
		return "", err
	}
	if err := checkDisk(s.VM, x, s); err != nil {
		return "", err
	}
	return was, w.sameSize(ctx, s)
}

// treat gives the disk of a running VM the reconnect treatment.
func (w *worker) treat(ctx context.Context, target, socket, export string, delay time.Duration) error {
	_, x, err := w.definition(ctx, false, target)
	if err != nil {
		return err
	}
	d := diskOf(x)
	if d.Socket != socket || d.Export != export {
		return advise(ErrNotAttached, "disk %s of %s uses %s, not export %s at %s: attach it first", target, w.d.name(), d.Source, export, socket)
	}
	if d.alias == "" {
		return advise(ErrNotRunning, "%s is not running: its disks are treated when it starts", w.d.name())
	}
	if honoured(x) {
		return nil
	}
	discard := "unmap" // a trim that is not passed on is space kept and shipped for nothing
	if d.discard == "ignore" {
		discard = d.discard
	}
	st, err := await(ctx, w.calls, "ask for the state of "+w.d.name(), w.d.state)
	if err != nil {
		return err
	}
	err = awaitErr(ctx, w.calls, "reconnect treatment of disk "+target, func() error {
		t, err := newTreatment(w.d.monitor(), d.alias, socket, export, discard, delay)
		if err != nil {
			return err
		}
		return t.run(st == StateIOError)
	})
	if err != nil {
		return fmt.Errorf("%w: %w: treat it again", ErrUntreated, err)
	}
	return nil
}

// honoured reports that libvirt itself has given the node the delay: a libvirt
// that knows <reconnect> keeps it in the live definition; libvirt 9.0 drops it.
func honoured(x *libvirtxml.DomainDisk) bool {
	return x.Source != nil && x.Source.Network != nil && x.Source.Network.Reconnect != nil && x.Source.Network.Reconnect.Delay != ""
}

// isNotReady: libvirt's answer to a pivot that comes before QEMU's job is ready.
func isNotReady(err error) bool {
	return err != nil && strings.Contains(err.Error(), "not ready for pivot")
}
