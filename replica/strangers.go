package replica

import (
	"errors"
	"net"
	"net/netip"
	"syscall"
	"time"
)

// Whoever reaches the port can open connections and stay silent. They are
// bounded, they end after handshakeTime, and they do not keep peers out: when
// there are too many, the oldest one from where most of them come is dropped.

// crowd is the index of the oldest connection from the network that has the
// most. There is at least one.
func crowd(conns []net.Conn) int {
	count, first := map[string]int{}, map[string]int{}
	most := ""
	for i, c := range conns {
		from := network(c)
		if _, ok := first[from]; !ok {
			first[from] = i
		}
		if count[from]++; count[from] > count[most] {
			most = from
		}
	}
	return first[most]
}

// network is what one host can have addresses of: one IPv4 address, 64 bits of an IPv6 one.
func network(c net.Conn) string {
	at, err := netip.ParseAddrPort(c.RemoteAddr().String())
	if err != nil {
		return "" // not of the Internet
	}
	addr := at.Addr().Unmap()
	bits := addr.BitLen()
	if addr.Is6() {
		bits = 64
	}
	p, err := addr.WithZone("").Prefix(bits)
	if err != nil {
		return ""
	}
	return p.String()
}

// acceptPause is the time between two attempts when the system is short of something.
const acceptPause = 100 * time.Millisecond

// temporary says whether accepting may work again later.
func temporary(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}
