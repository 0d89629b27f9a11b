package qmp

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
)

// DetachSpec says which disk goes back to which file.
type DetachSpec struct {
	VM        string
	Target    string
	Socket    string // the export's, to be sure that it is kagami's disk
	File      string // absolute path of a file that does not exist yet; libvirt makes it
	Format    string // raw or qcow2; raw when empty
	Bandwidth uint64 // limit of the copy in bytes per second; 0: none
}

func (s *DetachSpec) check() error {
	if s.Format == "" {
		s.Format = "raw"
	}
	switch {
	case s.VM == "" || s.Target == "":
		return errors.New("detach: VM and target must be given")
	case s.Format != "raw" && s.Format != "qcow2":
		return fmt.Errorf("detach: format %q: allowed are raw and qcow2", s.Format)
	case !filepath.IsAbs(s.File):
		return fmt.Errorf("detach: file %q: want an absolute path", s.File)
	}
	return nil
}

// isAttached refuses a disk that is not served from the socket.
func (w *worker) isAttached(ctx context.Context, inactive bool, s DetachSpec) error {
	_, x, err := w.definition(ctx, inactive, s.Target)
	if err != nil {
		return err
	}
	if d := diskOf(x); d.Socket == "" || d.Socket != s.Socket {
		return advise(ErrNotAttached, "disk %s of %s is not served by kagami: it uses %s", s.Target, s.VM, d.Source)
	}
	return nil
}

func (w *worker) detach(ctx context.Context, s DetachSpec, progress Progress) error {
	if err := w.needState(ctx, true); err != nil {
		return err
	}
	if err := w.isAttached(ctx, false, s); err != nil {
		return err
	}
	if err := w.noJob(ctx, s.Target); err != nil {
		return err
	}
	if _, err := os.Lstat(s.File); err == nil {
		return fmt.Errorf("detach disk %s of %s: %s exists: name a file that does not", s.Target, s.VM, s.File)
	}
	m := mirror{
		target: s.Target,
		start: func() error {
			return w.d.blockCopy(s.Target, fileTarget(s.Target, s.File, s.Format), false, s.Bandwidth)
		},
		moved: func(d Disk) bool { return d.Source == s.File },
		undo:  func() error { return w.removeCopy(s) },
	}
	if err := w.mirror(ctx, m, progress); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), afterPivot)
	defer cancel()
	err := w.redefine(ctx, func(doc string) (string, error) { return detachDefinition(doc, s.VM, s.Target, s.File, s.Format) })
	return errors.Join(err, syncFile(s.File))
}

// removeCopy removes the file of a copy that was cancelled, once it is sure
// that the VM does not use it.
func (w *worker) removeCopy(s DetachSpec) error {
	ctx, cancel := context.WithTimeout(context.Background(), jobEnd)
	defer cancel()
	if err := w.isAttached(ctx, false, s); err != nil {
		return err
	}
	if err := os.Remove(s.File); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

// syncFile makes the new file and its name durable: QEMU flushes the one, but
// nobody has made the other so.
func syncFile(file string) error {
	for _, name := range []string{file, filepath.Dir(file)} {
		f, err := os.Open(name)
		if err != nil {
			return fmt.Errorf("make %s durable: %w", file, err)
		}
		if err := errors.Join(f.Sync(), f.Close()); err != nil {
			return fmt.Errorf("make %s durable: %w", file, err)
		}
	}
	return nil
}

func (w *worker) detachOffline(ctx context.Context, s DetachSpec) error {
	if err := w.needState(ctx, false); err != nil {
		return err
	}
	if err := w.isAttached(ctx, true, s); err != nil {
		return err
	}
	return w.redefine(ctx, func(doc string) (string, error) { return detachDefinition(doc, s.VM, s.Target, s.File, s.Format) })
}
