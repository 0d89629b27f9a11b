package wan

import "encoding/binary"

// A packet as a TUN device with IFF_VNET_HDR hands it over: a virtio_net_hdr
// (10 bytes, host byte order, see linux/virtio_net.h) and an IP packet. With
// TSO the IP packet may be a whole train of TCP segments.
const (
	vnetLen   = 10
	maxPacket = vnetLen + 65535 + 64 // the kernel's GSO limit with room to spare

	gsoNone  = 0
	gsoTCPv4 = 1
	gsoTCPv6 = 4

	protoTCP = 6

	tcpFIN, tcpPSH, tcpCWR = 0x01, 0x08, 0x80
)

// train describes a packet that a sender's TCP left to the device to cut up.
type train struct {
	ip      []byte // IP packet
	ipLen   int    // length of the IP header(s)
	headers int    // IP and TCP headers
	mss     int    // payload bytes in a segment
	v6      bool
}

// parseTrain finds the segments of a TSO packet. ok is false for anything
// else, which is then one packet on the wire whatever its length.
func parseTrain(buf []byte) (t train, ok bool) {
	if len(buf) < vnetLen+20 {
		return t, false
	}
	t.ip, t.mss = buf[vnetLen:], int(binary.NativeEndian.Uint16(buf[4:]))
	t.ipLen = int(binary.NativeEndian.Uint16(buf[6:])) // csum_start: where TCP begins
	switch buf[1] {
	case gsoTCPv4:
		ok = t.ip[0]>>4 == 4 && t.ip[9] == protoTCP && t.ipLen == int(t.ip[0]&15)*4
	case gsoTCPv6:
		t.v6 = true
		ok = t.ip[0]>>4 == 6 && t.ipLen >= 40 && len(t.ip) >= 40
	}
	if !ok || t.mss == 0 || len(t.ip) < t.ipLen+20 {
		return t, false
	}
	t.headers = t.ipLen + int(t.ip[t.ipLen+12]>>4)*4
	return t, t.headers >= t.ipLen+20 && t.headers < len(t.ip)
}

// segments is the number of packets the train is on the wire.
func (t train) segments() int { return (len(t.ip) - t.headers + t.mss - 1) / t.mss }

// wireSize is the number of IP bytes that the packet takes on the wire, and
// the number of packets.
func wireSize(buf []byte) (bytes, segments int) {
	t, ok := parseTrain(buf)
	if !ok {
		return len(buf) - vnetLen, 1
	}
	n := t.segments()
	return len(t.ip) + (n-1)*t.headers, n
}

// slice makes a packet of its own of segments [i, j) of a train, as the
// device would have sent them. It copies.
func (t train) slice(vnet []byte, i, j int) []byte {
	n := t.segments()
	payload := t.ip[t.headers:]
	part := payload[i*t.mss : min(j*t.mss, len(payload))]
	out := make([]byte, 0, vnetLen+t.headers+len(part))
	out = append(out, vnet[:vnetLen]...)
	out = append(out, t.ip[:t.headers]...)
	out = append(out, part...)
	if j-i == 1 {
		out[1] = gsoNone
		binary.NativeEndian.PutUint16(out[4:], 0)
	}
	ip := out[vnetLen:]
	tcp := ip[t.ipLen:]
	binary.BigEndian.PutUint32(tcp[4:], binary.BigEndian.Uint32(tcp[4:])+uint32(i*t.mss))
	if j < n {
		tcp[13] &^= tcpFIN | tcpPSH
	}
	if i > 0 {
		tcp[13] &^= tcpCWR
	}
	t.fixLengths(ip, i)
	return out
}

// fixLengths sets what depends on the length of a slice: the IP length and
// header checksum and, because the TCP checksum is left to the device
// (NEEDS_CSUM), the pseudo header's sum in its field.
func (t train) fixLengths(ip []byte, first int) {
	be := binary.BigEndian
	tcp := ip[t.ipLen:]
	var pseudo uint32
	if t.v6 {
		be.PutUint16(ip[4:], uint16(len(ip)-40))
		pseudo = sum16(ip[8:40], 0)
	} else {
		be.PutUint16(ip[2:], uint16(len(ip)))
		be.PutUint16(ip[4:], be.Uint16(ip[4:])+uint16(first))
		be.PutUint16(ip[10:], 0)
		be.PutUint16(ip[10:], ^fold(sum16(ip[:t.ipLen], 0)))
		pseudo = sum16(ip[12:20], 0)
	}
	be.PutUint16(tcp[16:], fold(pseudo+protoTCP+uint32(len(tcp))))
}

// sum16 adds 16-bit big-endian words; b is at most a header long.
func sum16(b []byte, s uint32) uint32 {
	for ; len(b) >= 2; b = b[2:] {
		s += uint32(binary.BigEndian.Uint16(b))
	}
	return s
}

func fold(s uint32) uint16 {
	for s>>16 != 0 {
		s = s&0xffff + s>>16
	}
	return uint16(s)
}
