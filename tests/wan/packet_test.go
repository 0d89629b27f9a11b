package wan

import (
	"bytes"
	"encoding/binary"
	"math/rand/v2"
	"testing"
)

// TestSliceMakesWhatTheDeviceWouldSend cuts trains at random places and checks
// each piece field by field.
func TestSliceMakesWhatTheDeviceWouldSend(t *testing.T) {
	rng := rand.New(rand.NewPCG(11, 11))
	for round := range 500 {
		v6, mss := round%2 == 0, 1+rng.IntN(1448)
		payload := mss + 1 + rng.IntN(60000-mss)
		seq := rng.Uint32()
		b := makeTrain(t, v6, mss, payload, seq, tcpFIN|tcpPSH|tcpCWR)
		tr, ok := parseTrain(b)
		if !ok {
			t.Fatalf("round %d: not seen as a train", round)
		}
		n := tr.segments()
		var joined []byte
		for i := 0; i < n; {
			j := i + 1 + rng.IntN(n-i)
			s := tr.slice(b, i, j)
			checkPiece(t, tr, s, i, j, n, seq)
			joined = append(joined, s[vnetLen+tr.headers:]...)
			i = j
		}
		if !bytes.Equal(joined, tr.ip[tr.headers:]) {
			t.Fatalf("round %d: payload changed", round)
		}
	}
}

func checkPiece(t *testing.T, tr train, s []byte, i, j, n int, seq uint32) {
	t.Helper()
	ip := s[vnetLen:]
	tcp := ip[tr.ipLen:]
	if _, segs := wireSize(s); segs != j-i {
		t.Fatalf("segments [%d,%d) became %d", i, j, segs)
	}
	if (s[1] == gsoNone) != (j-i == 1) || s[0] != 1 {
		t.Fatalf("virtio header % x for %d segments", s[:vnetLen], j-i)
	}
	if got := binary.BigEndian.Uint32(tcp[4:]); got != seq+uint32(i*tr.mss) {
		t.Fatalf("sequence number %d for segment %d", got, i)
	}
	if last := tcp[13]&(tcpFIN|tcpPSH) == tcpFIN|tcpPSH; last != (j == n) {
		t.Fatalf("flags %02x of segments [%d,%d) of %d", tcp[13], i, j, n)
	}
	if first := tcp[13]&tcpCWR != 0; first != (i == 0) {
		t.Fatalf("flags %02x of segments [%d,%d)", tcp[13], i, j)
	}
	addresses := ip[12:20]
	if tr.v6 {
		addresses = ip[8:40]
		if int(binary.BigEndian.Uint16(ip[4:])) != len(ip)-40 {
			t.Fatal("IPv6 payload length")
		}
	} else {
		if int(binary.BigEndian.Uint16(ip[2:])) != len(ip) || onesSum(ip[:20]) != 0xffff {
			t.Fatal("IPv4 length or header checksum")
		}
		if id := binary.BigEndian.Uint16(ip[4:]); id != uint16(0xfffe+i) {
			t.Fatalf("IPv4 id %04x of segment %d", id, i)
		}
	}
	pseudo := append(bytes.Clone(addresses), 0, protoTCP)
	pseudo = binary.BigEndian.AppendUint16(pseudo, uint16(len(tcp)))
	if got := binary.BigEndian.Uint16(tcp[16:]); got != onesSum(pseudo) {
		t.Fatalf("pseudo header sum %04x, want %04x", got, onesSum(pseudo))
	}
}

// onesSum is RFC 1071, written without the code under test.
func onesSum(b []byte) uint16 {
	var s uint64
	for i, c := range b {
		s += uint64(c) << (8 * uint(1-i%2))
	}
	for s > 0xffff {
		s = s%0x10000 + s/0x10000
	}
	return uint16(s)
}

// FuzzParseTrain: whatever a namespace sends, nothing panics and every
// segment can be cut out.
func FuzzParseTrain(f *testing.F) {
	f.Add([]byte{})
	f.Add(make([]byte, vnetLen+20))
	f.Add([]byte{1, gsoTCPv4, 0, 0, 1, 0, 20, 0, 16, 0, 0x45, 0, 0, 0, 0, 0, 0, 0, 0, protoTCP})
	f.Fuzz(func(t *testing.T, b []byte) {
		tr, ok := parseTrain(b)
		if !ok {
			return
		}
		if len(b) > maxPacket {
			return
		}
		n := tr.segments()
		for i := range n {
			tr.slice(b, i, i+1)
		}
		tr.slice(b, 0, n)
	})
}
