package qmp

import (
	gq "github.com/digitalocean/go-qemu/qmp"
)

// domain is one VM in libvirt: libvirtDomain in libvirt.go, and in tests a
// fake that fails where it is told to. Calls may block for as long as libvirt
// does; they are made through await.
type domain interface {
	name() string
	xml(inactive bool) (string, error)
	state() (State, error)
	persistent() (bool, error)
	hasManagedSave() (bool, error)
	capacity(target string) (int64, error) // bytes
	blockCopy(target, destination string, reuse bool, bandwidth uint64) error
	blockJob(target string) (*blockJob, error) // nil: none
	abortJob(target string, pivot bool) error
	define(xml string) error
	startPaused() error
	resume() error
	destroy() error
	shutdown() error
	undefine() error
	autostart() error
	freeze() error
	thaw() error
	monitor() gq.Monitor
	free()
}

// blockJob is how far a block job is, in bytes.
type blockJob struct{ cur, end uint64 }

// State is what a VM is doing.
type State int

// The states of a VM.
const (
	StateUnknown State = iota
	StateRunning
	StatePaused  // by someone, or by libvirt for a moment
	StateIOError // paused because of a disk I/O error
	StateShutoff
	StateCrashed
	StateStopping
)

func (s State) String() string {
	switch s {
	case StateRunning:
		return "running"
	case StatePaused:
		return "paused"
	case StateIOError:
		return "paused after a disk I/O error"
	case StateShutoff:
		return "shut off"
	case StateCrashed:
		return "crashed"
	case StateStopping:
		return "shutting down"
	}
	return "unknown"
}

// Active reports that there is a QEMU process.
func (s State) Active() bool {
	return s == StateRunning || s == StatePaused || s == StateIOError || s == StateStopping
}
