package qmp

import (
	"context"
	"encoding/xml"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Disks lists the disks of a VM: of the running one if it runs, else of the
// stored definition. Errors: ErrNoDomain.
func (l *Libvirt) Disks(ctx context.Context, vm string) (ds []Disk, err error) {
	err = l.on(ctx, vm, "", func(w *worker) error {
		ds, err = w.disks(ctx)
		return err
	})
	return ds, err
}

func (w *worker) disks(ctx context.Context) ([]Disk, error) {
	st, err := await(ctx, w.calls, "ask for the state of "+w.d.name(), w.d.state)
	if err != nil {
		return nil, err
	}
	doc, err := await(ctx, w.calls, "read the definition of "+w.d.name(), func() (string, error) { return w.d.xml(!st.Active()) })
	if err != nil {
		return nil, err
	}
	ds, err := parseDisks(doc)
	for i := range ds {
		ds[i].Running = st.Active()
		if ds[i].Kind == "" {
			continue
		}
		// Not of every source, and not of every stopped VM: then it is not known.
		n, err := await(ctx, w.calls, "ask for the size of "+ds[i].Target, func() (int64, error) { return w.d.capacity(ds[i].Target) })
		if err == nil {
			ds[i].Size = n
		} else if ctx.Err() != nil {
			return nil, err
		}
	}
	return ds, err
}

// DomainXML is the stored definition, with secrets: what the next start would use.
func (l *Libvirt) DomainXML(ctx context.Context, vm string) (doc string, err error) {
	err = l.on(ctx, vm, "", func(w *worker) error {
		doc, err = await(ctx, w.calls, "read the definition of "+vm, func() (string, error) { return w.d.xml(true) })
		return err
	})
	return doc, err
}

// State is what a VM is doing. Errors: ErrNoDomain.
func (l *Libvirt) State(ctx context.Context, vm string) (s State, err error) {
	err = l.on(ctx, vm, "", func(w *worker) error {
		s, err = await(ctx, w.calls, "ask for the state of "+vm, w.d.state)
		return err
	})
	return s, err
}

// Attach puts a disk of a running VM behind an export, live. See the package
// comment for what an error leaves behind: ErrUntreated means that it is attached
// and Treat must be called again; before the pivot, the VM is as it was.
// Cancelling ctx before the pivot cancels the copy. It is the caller who must do so when the
// server dies meanwhile: nobody else may notice. A server that holds up the copy's writes holds
// up its end, too: see BeforeCancel. The error policies in the
// stored definition ("stop") take effect at the VM's next start.
func (l *Libvirt) Attach(ctx context.Context, s AttachSpec, progress Progress) error {
	if err := s.check(); err != nil {
		return err
	}
	return l.onDisk(ctx, s.VM, s.Target, func(w *worker) error { return w.attach(ctx, s, progress) })
}

// AttachOffline changes the stored definition of a VM that does not run. The
// caller has copied the disk. BeforePivot and Bandwidth are not used.
func (l *Libvirt) AttachOffline(ctx context.Context, s AttachSpec) error {
	if err := s.check(); err != nil {
		return err
	}
	return l.onDisk(ctx, s.VM, s.Target, func(w *worker) error { return w.attachOffline(ctx, s) })
}

// Treat gives an attached disk of a running VM the reconnect treatment. Doing so twice
// is harmless. The export must be served: QEMU stands still while it connects.
func (l *Libvirt) Treat(ctx context.Context, vm, target, socket, export string, delay time.Duration) error {
	return l.onDisk(ctx, vm, target, func(w *worker) error { return w.treat(ctx, target, socket, export, delay) })
}

// Detach copies a disk of a running VM to a new file and makes the VM use it,
// live. On an error before the pivot the VM is as it was and the file is gone.
func (l *Libvirt) Detach(ctx context.Context, s DetachSpec, progress Progress) error {
	if err := s.check(); err != nil {
		return err
	}
	return l.onDisk(ctx, s.VM, s.Target, func(w *worker) error { return w.detach(ctx, s, progress) })
}

// DetachOffline changes the stored definition of a VM that does not run. The
// caller has copied the disk to the file.
func (l *Libvirt) DetachOffline(ctx context.Context, s DetachSpec) error {
	if err := s.check(); err != nil {
		return err
	}
	return l.onDisk(ctx, s.VM, s.Target, func(w *worker) error { return w.detachOffline(ctx, s) })
}

// CancelCopy ends a copy of a disk to the socket that an earlier life of the
// daemon left running; without one it does nothing.
func (l *Libvirt) CancelCopy(ctx context.Context, vm, target, socket string) error {
	return l.onDisk(ctx, vm, target, func(w *worker) error {
		_, x, err := w.definition(ctx, false, target)
		if err != nil || x.Mirror == nil || x.Mirror.Source == nil {
			return err
		}
		var d Disk
		if d.source(x.Mirror.Source); d.Socket != socket {
			return advise(ErrJobRunning, "the block job on disk %s of %s is not kagami's: wait for it or end it (virsh blockjob)", target, vm)
		}
		return w.cancel(ctx, target)
	})
}

// Served is a disk of a VM that kagami serves.
type Served struct {
	Target, Socket, Export string
	ReconnectDelay         time.Duration
}

// Start starts a VM paused, treats its disks and lets it run. If a disk cannot
// be treated the VM, which has not run, is stopped again.
func (l *Libvirt) Start(ctx context.Context, vm string, disks ...Served) error {
	return l.on(ctx, vm, "", func(w *worker) error {
		if err := awaitErr(ctx, w.calls, "start "+vm, w.d.startPaused); err != nil {
			return err
		}
		for _, d := range disks {
			if err := w.treatLocked(ctx, d); err != nil {
				stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), jobEnd)
				defer cancel()
				return joinCleanup(fmt.Errorf("start %s: %w", vm, err), awaitErr(stop, w.calls, "stop "+vm, w.d.destroy))
			}
		}
		return awaitErr(ctx, w.calls, "let "+vm+" run", w.d.resume)
	})
}

// treatLocked is treat of a disk whose lock is not held. The daemon may be
// treating the same disk because of libvirt's event.
func (w *worker) treatLocked(ctx context.Context, d Served) error {
	unlock, err := w.locks.lock(ctx, diskLock(w.d.name(), d.Target))
	if err != nil {
		return err
	}
	defer unlock()
	return w.treat(ctx, d.Target, d.Socket, d.Export, d.ReconnectDelay)
}

// Resume lets a paused VM run; requests that failed are made again.
func (l *Libvirt) Resume(ctx context.Context, vm string) error {
	return l.do(ctx, vm, "resume", (domain).resume)
}

// Destroy stops a VM hard.
func (l *Libvirt) Destroy(ctx context.Context, vm string) error {
	return l.do(ctx, vm, "stop", (domain).destroy)
}

// shutdownAgain is the pause after which a guest is asked once more to shut down:
// one that boots, or whose system is busy, does not hear the first time.
const shutdownAgain = 10 * time.Second

// Shutdown asks the guest to shut down, again and again, until the VM is off; the end
// of ctx is an error.
func (l *Libvirt) Shutdown(ctx context.Context, vm string) error {
	for asked := (time.Time{}); ; {
		st, err := l.State(ctx, vm)
		if err != nil || !st.Active() {
			return err
		}
		if time.Since(asked) > shutdownAgain {
			asked = time.Now()
			if err := l.do(ctx, vm, "shut down", (domain).shutdown); err != nil && ctx.Err() == nil {
				if st, serr := l.State(ctx, vm); serr == nil && !st.Active() {
					return nil // it went off meanwhile
				}
				return err
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("shut down %s: %w", vm, context.Cause(ctx))
		case <-time.After(shutdownPoll):
		}
	}
}

const shutdownPoll = 200 * time.Millisecond

// Undefine removes the stored definition; firmware variables and TPM state are left.
func (l *Libvirt) Undefine(ctx context.Context, vm string) error {
	return l.do(ctx, vm, "undefine", (domain).undefine)
}

// Autostart makes libvirt start the VM when the host boots.
func (l *Libvirt) Autostart(ctx context.Context, vm string) error {
	return l.do(ctx, vm, "set autostart of", (domain).autostart)
}

// Freeze makes the guest agent flush and freeze the guest's file systems.
func (l *Libvirt) Freeze(ctx context.Context, vm string) error {
	return l.do(ctx, vm, "freeze the file systems of", (domain).freeze)
}

// Thaw ends Freeze.
func (l *Libvirt) Thaw(ctx context.Context, vm string) error {
	return l.do(ctx, vm, "thaw the file systems of", (domain).thaw)
}

// do makes one call. It takes no lock: a VM must be resumed or stopped while a
// disk of it is copied, too.
func (l *Libvirt) do(ctx context.Context, vm, what string, f func(domain) error) error {
	return l.on(ctx, vm, "", func(w *worker) error {
		return awaitErr(ctx, w.calls, what+" "+vm, func() error { return f(w.d) })
	})
}

// WithMonitor runs f with the QEMU monitor of a VM, which must not be used afterwards.
func (l *Libvirt) WithMonitor(ctx context.Context, vm string, f func(*Monitor) error) error {
	return l.on(ctx, vm, "", func(w *worker) error {
		d, ok := w.d.(*libvirtDomain)
		if !ok {
			return errors.New("no monitor")
		}
		return f(d.newMonitor())
	})
}

// qemuUser reads it from libvirt's capabilities: <secmodel><model>dac</model><baselabel
// type='kvm'>+64055:+64055</baselabel>.
func qemuUser(caps string) (uid, gid int, err error) {
	var c struct {
		Models []struct {
			Model  string   `xml:"model"`
			Labels []string `xml:"baselabel"`
		} `xml:"host>secmodel"`
	}
	if err := xml.Unmarshal([]byte(caps), &c); err != nil {
		return 0, 0, fmt.Errorf("read libvirt's capabilities: %w", err)
	}
	for _, m := range c.Models {
		if m.Model != "dac" || len(m.Labels) == 0 {
			continue
		}
		u, g, _ := strings.Cut(m.Labels[0], ":")
		uid, err1 := strconv.Atoi(strings.TrimPrefix(u, "+"))
		gid, err2 := strconv.Atoi(strings.TrimPrefix(g, "+"))
		if err := errors.Join(err1, err2); err != nil {
			return 0, 0, fmt.Errorf("read QEMU's user from libvirt's capabilities: %w", err)
		}
		return uid, gid, nil
	}
	return 0, 0, errors.New("libvirt's capabilities do not tell QEMU's user")
}

// hasKVM reads it from libvirt's capabilities: <guest><arch><domain type='kvm'/>.
func hasKVM(caps string) (bool, error) {
	var c struct {
		Domains []struct {
			Type string `xml:"type,attr"`
		} `xml:"guest>arch>domain"`
	}
	if err := xml.Unmarshal([]byte(caps), &c); err != nil {
		return false, fmt.Errorf("read libvirt's capabilities: %w", err)
	}
	for _, d := range c.Domains {
		if d.Type == "kvm" {
			return true, nil
		}
	}
	return false, nil
}

// Identity is the name and UUID in a definition.
func Identity(doc string) (name, uuid string, err error) {
	var d struct {
		Name string `xml:"name"`
		UUID string `xml:"uuid"`
	}
	if err := xml.Unmarshal([]byte(doc), &d); err != nil {
		return "", "", fmt.Errorf("read the VM's definition: %w", err)
	}
	return d.Name, d.UUID, nil
}
