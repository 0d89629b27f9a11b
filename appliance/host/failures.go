package host

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"kagami/appliance/control"
	"kagami/appliance/pki"
	"kagami/images"
	"kagami/qmp"
	"kagami/replica/wire"
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

// explained makes sure that a command's error says what to do next: hint, if
// the error brings nothing better.
func explained(err error, hint string) error {
	var e *control.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e) && e.Hint != "":
		return e
	case errors.As(err, &e):
		return &control.Error{Code: e.Code, Message: e.Message, Hint: hint, Exit: e.Exit}
	case images.NoSpace(err):
		return failure("no-space", err.Error(), "make room there; "+hint)
	case errors.Is(err, context.Canceled):
		return failure("cancelled", "interrupted", strings.TrimPrefix(hint, "put that right, then "))
	}
	return failure("failed", err.Error(), hint)
}

// because adds to an error what came of it; code, hint and exit code stay.
func because(err error, format string, a ...any) error {
	e := &control.Error{}
	errors.As(explained(err, ""), &e)
	return &control.Error{Code: e.Code, Message: e.Message + "; " + fmt.Sprintf(format, a...), Hint: e.Hint, Exit: e.Exit}
}

// listed puts one problem on the line of what it ends, more on lines of their own.
func listed(problems []string) string {
	if len(problems) == 1 {
		return " " + problems[0]
	}
	return "\n    " + strings.Join(problems, "\n    ")
}

// text is an error without what to do next, to be part of another one.
func text(err error) string {
	var e *control.Error
	if errors.As(err, &e) {
		return e.Message
	}
	return err.Error()
}

// fromHypervisor classes an error of package qmp.
func fromHypervisor(err error) error {
	var e *control.Error
	switch {
	case err == nil:
		return nil
	case errors.As(err, &e), errors.Is(err, context.Canceled):
		return err // not the hypervisor's
	case errors.Is(err, qmp.ErrNoDomain), errors.Is(err, qmp.ErrNoDisk):
		return notFound(advice(err, "virsh list --all and virsh domblklist show what there is"))
	case errors.Is(err, qmp.ErrUnsuited), errors.Is(err, qmp.ErrNotRunning), errors.Is(err, qmp.ErrRunning), errors.Is(err, qmp.ErrAlreadyAttached),
		errors.Is(err, qmp.ErrNotAttached), errors.Is(err, qmp.ErrJobRunning), errors.Is(err, qmp.ErrSize):
		return refused(advice(err, "look at the VM with virsh, put it right, then try again"))
	default:
		return failure("libvirt", err.Error(), "see libvirt's log (journalctl -u libvirtd) and QEMU's (/var/log/libvirt/qemu), then try again")
	}
}

// advice cuts an error of package qmp into what is wrong and what to do, which
// is its last part, as those errors are worded; else what to do is otherwise.
func advice(err error, otherwise string) (message, hint string) {
	text := err.Error()
	for _, cut := range []string{"; ", ": "} {
		if i := strings.LastIndex(text, cut); i > 0 && !strings.HasSuffix(text, ")") {
			return text[:i], text[i+len(cut):]
		}
	}
	return text, otherwise
}

// fromLink classes the reason why a peer is not connected. lasting says that
// it does not pass by itself.
func fromLink(site string, err error) (e error, lasting bool) {
	err = pki.Explain(err)
	var hint string
	var werr *wire.Error
	switch {
	case errors.Is(err, pki.ErrUnknownCA), errors.Is(err, pki.ErrRefused), errors.Is(err, pki.ErrBadIdentity), errors.Is(err, pki.ErrExpired):
		hint = fmt.Sprintf("give both sites certificates of one CA: kagami pki issue %s, where kagami pki init was run", site)
	case errors.Is(err, pki.ErrWrongSite):
		hint = fmt.Sprintf("put the address of site %s right in the config file", site)
	case errors.Is(err, pki.ErrNoTLS):
		hint = fmt.Sprintf("put the address of site %s right in the config file: something else answers there", site)
	case errors.As(err, &werr) && werr.Code == wire.CodeVersion, strings.Contains(err.Error(), "protocol version"):
		hint = "upgrade the older of the two sites"
	default:
		return failure("unreachable", err.Error(), fmt.Sprintf("see to it that the daemon runs at site %s and that its address in the config file is right", site)), false
	}
	return failure("unreachable", err.Error(), hint), true
}

// fromPeer classes a peer's refusal.
func fromPeer(site string, err error) error {
	var werr *wire.Error
	if !errors.As(err, &werr) {
		return failure("unreachable", err.Error(), fmt.Sprintf("wait until site %s is connected again (kagami status), then try again", site))
	}
	hint := "see the log of the daemon at site " + site
	switch werr.Code {
	case wire.CodeDenied:
		hint = "issue this site a certificate that allows the group: kagami pki issue --group, where kagami pki init was run"
	case wire.CodeNoSpace:
		hint = fmt.Sprintf("make room at site %s, or move its state_dir to a larger file system", site)
	case wire.CodeBusy:
		hint = "wait for it, then try again"
	case wire.CodeConflict:
		hint = fmt.Sprintf("look at kagami status at site %s", site)
	case wire.CodeVersion:
		hint = "upgrade the older of the two sites"
	}
	return &control.Error{Code: string(werr.Code), Message: werr.Message, Hint: hint, Exit: control.ExitFailed}
}
