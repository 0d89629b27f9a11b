package host

import (
	"errors"

	"kagami/appliance/control"
	"kagami/qmp"
)

// The errors of commands: one sentence, what to do next, an exit code.

func failure(code, message, hint string) error {
	return &control.Error{Code: code, Message: message, Hint: hint, Exit: control.ExitFailed}
}

func refused(message, hint string) error {
	return &control.Error{Code: "refused", Message: message, Hint: hint, Exit: control.ExitRefused}
}

func notFound(message, hint string) error {
	return &control.Error{Code: "not-found", Message: message, Hint: hint, Exit: control.ExitNotFound}
}

func usage(message, hint string) error {
	return &control.Error{Code: "usage", Message: message, Hint: hint, Exit: control.ExitUsage}
}

func isCode(err error, code string) bool {
	var e *control.Error
	return errors.As(err, &e) && e.Code == code
}

// fromHypervisor classes an error of package qmp; its text already says what to do next.
func fromHypervisor(err error) error {
	switch {
	case errors.Is(err, qmp.ErrNoDomain), errors.Is(err, qmp.ErrNoDisk):
		return notFound(err.Error(), "")
	case errors.Is(err, qmp.ErrNotRunning), errors.Is(err, qmp.ErrRunning), errors.Is(err, qmp.ErrAlreadyAttached),
		errors.Is(err, qmp.ErrNotAttached), errors.Is(err, qmp.ErrUnsuited), errors.Is(err, qmp.ErrJobRunning), errors.Is(err, qmp.ErrSize):
		return refused(err.Error(), "")
	default:
		return failure("libvirt", err.Error(), "")
	}
}
