package qmp

import (
	"errors"
	"fmt"
)

// Errors of this package, each a sentence that says what to do next when it is
// printed with its details.
var (
	ErrNoDomain        = errors.New("no such VM")
	ErrNotRunning      = errors.New("the VM is not running")
	ErrRunning         = errors.New("the VM is running")
	ErrNoDisk          = errors.New("no such disk")
	ErrAlreadyAttached = errors.New("the disk is already served by kagami")
	ErrNotAttached     = errors.New("the disk is not served by kagami")
	ErrUnsuited        = errors.New("the disk cannot be protected")
	ErrJobRunning      = errors.New("a block job is running on the disk")
	ErrSize            = errors.New("sizes differ")
	ErrCopyFailed      = errors.New("the copy failed")
	ErrUntreated       = errors.New("the disk is attached, but a restart of the daemon would still be an I/O error in the guest")
	ErrClosed          = errors.New("the connection to libvirt is closed")
)

// advice is an error of one of the kinds above, with what to do next.
type advice struct {
	kind error
	text string
}

func (a *advice) Error() string { return a.text }
func (a *advice) Unwrap() error { return a.kind }

// advise makes an error of a kind whose text stands alone.
func advise(kind error, format string, a ...any) error {
	return &advice{kind: kind, text: fmt.Sprintf(format, a...)}
}

// joinCleanup adds the error of tidying up after err.
func joinCleanup(err, cleanup error) error {
	if cleanup == nil {
		return err
	}
	return fmt.Errorf("%w (and tidying up failed: %w)", err, cleanup)
}
