package host

import (
	"context"
	"crypto/tls"
	"fmt"
	"net"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"kagami/appliance/config"
	"kagami/appliance/pki"
)

// userTimeout is how long sent data may stay unacknowledged by the peer's
// kernel before the connection is given up, so that no sender hangs on a link
// that is gone.
const userTimeout = 15 * time.Second

// notSentLow keeps what waits unsent inside the kernel small: a record that
// closes an epoch must not queue behind seconds of bulk data.
const notSentLow = 256 << 10

// socketOptions sets what both ends of a peer connection need.
func socketOptions(_, _ string, c syscall.RawConn) error {
	var serr error
	err := c.Control(func(fd uintptr) {
		serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_USER_TIMEOUT, int(userTimeout.Milliseconds()))
		if serr == nil {
			serr = unix.SetsockoptInt(int(fd), unix.IPPROTO_TCP, unix.TCP_NOTSENT_LOWAT, notSentLow)
		}
	})
	if err != nil {
		return err
	}
	return serr
}

// dialer returns how to connect to a peer: TCP, then TLS 1.3 with both
// certificates, the peer's being of the site that the config names.
func dialer(files pki.Files, p config.Peer) (func(context.Context) (net.Conn, error), error) {
	conf, err := pki.ClientConfig(files, p.Name)
	if err != nil {
		return nil, fmt.Errorf("TLS set-up for peer %s: %w", p.Name, err)
	}
	d := &net.Dialer{Control: func(_, _ string, c syscall.RawConn) error { return socketOptions("", "", c) }}
	return func(ctx context.Context) (net.Conn, error) {
		c, err := d.DialContext(ctx, "tcp", p.Address)
		if err != nil {
			return nil, err
		}
		t := tls.Client(c, conf)
		if err := t.HandshakeContext(ctx); err != nil {
			_ = c.Close()
			return nil, fmt.Errorf("TLS handshake: %w", err)
		}
		return t, nil
	}, nil
}
