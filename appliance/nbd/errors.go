package nbd

import "errors"

// ErrGone is returned by a Device that is closing down. The server leaves the
// request unanswered and drops the connection, so that a client with
// reconnect-delay sends it again to the next server. It never sends ESHUTDOWN:
// QEMU would pass that on to the guest as an I/O error.
var ErrGone = errors.New("device is going away")
