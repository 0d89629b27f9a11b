package qmp

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"

	gq "github.com/digitalocean/go-qemu/qmp"
)

// Monitor is one VM's QEMU monitor, reached through libvirt. It implements go-qemu's
// qmp.Monitor, so go-qemu's qmp/raw can be used on it.
type Monitor struct {
	command func(cmd string) (string, error)
	events  func(ctx context.Context) (<-chan gq.Event, error)
}

var _ gq.Monitor = (*Monitor)(nil)

// Connect does nothing: libvirt is connected.
func (m *Monitor) Connect() error { return nil }

// Disconnect does nothing: the monitor belongs to libvirt.
func (m *Monitor) Disconnect() error { return nil }

// Run sends one command and returns QEMU's whole reply. An error in the reply
// is a *QMPError.
func (m *Monitor) Run(command []byte) ([]byte, error) {
	out, err := m.command(string(command))
	if err != nil {
		return nil, err
	}
	var r struct {
		Error *QMPError `json:"error"`
	}
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return nil, fmt.Errorf("read QEMU's reply: %w", err)
	}
	if r.Error != nil {
		return nil, r.Error
	}
	return []byte(out), nil
}

// Events streams QEMU's own events of this VM until ctx ends, when the
// channel is closed. A reader that falls 256 events behind loses some.
func (m *Monitor) Events(ctx context.Context) (<-chan gq.Event, error) {
	if m.events == nil {
		return nil, gq.ErrEventsNotSupported
	}
	return m.events(ctx)
}

// QMPError is an error QEMU answered a command with.
type QMPError struct {
	Class string `json:"class"`
	Desc  string `json:"desc"`
}

func (e *QMPError) Error() string { return "QEMU: " + e.Desc }

// execute runs a command and decodes what it returns into ret, which may be nil.
func execute(m gq.Monitor, name string, args, ret any) error {
	cmd, err := json.Marshal(gq.Command{Execute: name, Args: args})
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	out, err := m.Run(cmd)
	if err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	if ret == nil {
		return nil
	}
	var r struct {
		Return json.RawMessage `json:"return"`
	}
	if err := json.Unmarshal(out, &r); err != nil {
		return fmt.Errorf("%s: read QEMU's reply: %w", name, err)
	}
	if len(bytes.TrimSpace(r.Return)) == 0 {
		return fmt.Errorf("%s: %w", name, errors.New("QEMU returned nothing"))
	}
	if err := json.Unmarshal(r.Return, ret); err != nil {
		return fmt.Errorf("%s: read QEMU's reply: %w", name, err)
	}
	return nil
}
