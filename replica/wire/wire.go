// Package wire is the protocol between two sites, used by both ends: framing,
// the hello that opens each connection, record frames, acknowledgements,
// heartbeats, and requests with their responses. It is pure: it reads from and
// writes to what it is given, and keeps no state but a connection's seed.
//
// A link is one control connection and N data connections, all dialled by the
// source's site and tied together by a random link id. Every connection starts
// with Hello and Welcome. Record frames travel on data connections; everything
// else on the control connection. All integers are little-endian.
//
//	frame:   0 u32 magic "KFRM"   4 u8 version   5 u8 type   6 u16 zero
//	         8 u32 body length   12 u32 CRC32C of bytes 0..12 and the body, seeded
//	        16 body
//	records: 0 u32 channel        4 u32 count     8 u64 session
//	        16 count records in stored form (package epoch), seeded
//	ack:     0 u32 channel        4 u32 flags     8 u64 session
//	        16 u64 received      24 u64 durable  32 u64 applied
//	ping, pong: 0 u64 value, echoed
//	hello, welcome, request, response, goodbye: JSON
//
// The seed is 0 in Hello and Welcome and afterwards the one that Welcome
// carries: frames of another link do not parse. A frame's body is at most
// MaxBody bytes. A newer peer may send JSON fields that this release does not
// know; what must be understood is named by a required feature bit in Hello or
// Welcome. A record of a type that the replica cannot carry out (ErrUnsupported of package
// epoch) ends its group's channel and no other: the replica acks with AckRefused,
// takes no more records of the channel, and refuses the session at the next attach.
package wire

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"

	"kagami/ext4j/epoch"
)

// Version is the protocol version of this release, and MinVersion the oldest it speaks.
const (
	Version    = 1
	MinVersion = 1
)

// Type of a frame.
type Type uint8

// Frame types of version 1.
const (
	TypeHello    Type = 1
	TypeWelcome  Type = 2
	TypeRecords  Type = 3
	TypeAck      Type = 4
	TypePing     Type = 5
	TypePong     Type = 6
	TypeRequest  Type = 7
	TypeResponse Type = 8
	TypeGoodbye  Type = 9
)

// Limits of version 1, in bytes and records.
const (
	HeaderSize = 16
	MaxBody    = 1 << 20
	// MaxHello bounds a frame before the peer is known to be one.
	MaxHello   = 16 << 10
	MaxRecords = 4096
)

const magic = 0x4d52464b // "KFRM"

var table = crc32.MakeTable(crc32.Castagnoli)

// ErrProtocol is what every violation of the protocol wraps.
var ErrProtocol = errors.New("protocol violation")

func violation(format string, a ...any) error {
	return fmt.Errorf("%w: %s", ErrProtocol, fmt.Sprintf(format, a...))
}

// AppendFrame appends a frame with the given body to dst.
func AppendFrame(dst []byte, t Type, body []byte, seed uint32) []byte {
	dst = append(BeginFrame(dst, t), body...)
	return EndFrame(dst, len(dst)-len(body)-HeaderSize, seed)
}

// BeginFrame appends a frame's header; the caller appends the body and calls
// EndFrame with the offset at which the header begins.
func BeginFrame(dst []byte, t Type) []byte {
	var h [HeaderSize]byte
	binary.LittleEndian.PutUint32(h[0:], magic)
	h[4], h[5] = Version, byte(t)
	return append(dst, h[:]...)
}

// EndFrame fills in length and checksum of the frame that begins at start.
func EndFrame(dst []byte, start int, seed uint32) []byte {
	f := dst[start:]
	binary.LittleEndian.PutUint32(f[8:], uint32(len(f)-HeaderSize))
	binary.LittleEndian.PutUint32(f[12:], frameSum(f[:12], f[HeaderSize:], seed))
	return dst
}

func frameSum(head, body []byte, seed uint32) uint32 {
	return crc32.Update(crc32.Update(seed, table, head), table, body)
}

// ReadFrame reads one frame into buf, which is grown up to max bytes of body.
// The body aliases the returned buffer.
func ReadFrame(r io.Reader, buf []byte, limit int, seed uint32) (t Type, body, grown []byte, err error) {
	var h [HeaderSize]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, buf, err
	}
	if binary.LittleEndian.Uint32(h[:]) != magic {
		return 0, nil, buf, violation("not a kagami frame")
	}
	if h[4] < MinVersion || h[4] > Version || h[6] != 0 || h[7] != 0 {
		return 0, nil, buf, violation("frame of version %d; this release speaks %d", h[4], Version)
	}
	n := binary.LittleEndian.Uint32(h[8:])
	if n > uint32(min(limit, MaxBody)) {
		return 0, nil, buf, violation("frame of %d bytes, at most %d are allowed here", n, min(limit, MaxBody))
	}
	if cap(buf) < int(n) {
		buf = make([]byte, n)
	}
	buf = buf[:n]
	if _, err := io.ReadFull(r, buf); err != nil {
		return 0, nil, buf, fmt.Errorf("read frame body: %w", noEOF(err))
	}
	if frameSum(h[:12], buf, seed) != binary.LittleEndian.Uint32(h[12:]) {
		return 0, nil, buf, violation("frame checksum differs")
	}
	return Type(h[5]), buf, buf, nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// RecordsHead opens the body of a record frame.
type RecordsHead struct {
	Channel uint32
	Count   uint32
	Session uint64
}

// RecordsHeadSize is the size of RecordsHead in bytes.
const RecordsHeadSize = 16

// Append appends the encoded head.
func (h RecordsHead) Append(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, h.Channel)
	dst = binary.LittleEndian.AppendUint32(dst, h.Count)
	return binary.LittleEndian.AppendUint64(dst, h.Session)
}

// DecodeRecords reads the body of a record frame. Payloads of raw records
// alias body. The records are dense in LSN and of one session; every sum is
// checked. With epoch.ErrUnsupported, which is no violation, comes the head.
func DecodeRecords(body []byte, seed uint32, inflate epoch.Inflate) (RecordsHead, []epoch.Record, error) {
	if len(body) < RecordsHeadSize {
		return RecordsHead{}, nil, violation("record frame of %d bytes", len(body))
	}
	le := binary.LittleEndian
	h := RecordsHead{Channel: le.Uint32(body), Count: le.Uint32(body[4:]), Session: le.Uint64(body[8:])}
	rest := body[RecordsHeadSize:]
	if h.Count == 0 || h.Count > MaxRecords || int(h.Count)*epoch.HeaderSize > len(rest) {
		return h, nil, violation("record frame claims %d records in %d bytes", h.Count, len(rest))
	}
	recs := make([]epoch.Record, 0, h.Count)
	var raw int
	for range h.Count {
		r, n, err := epoch.DecodeStored(rest, seed, inflate)
		if errors.Is(err, epoch.ErrUnsupported) {
			return h, nil, err
		}
		if err != nil {
			return h, nil, fmt.Errorf("%w: %w", ErrProtocol, err)
		}
		if r.Session != h.Session || (len(recs) > 0 && r.LSN != recs[len(recs)-1].LSN+1) {
			return h, nil, violation("record %d of session %d does not follow on", r.LSN, r.Session)
		}
		if raw += len(r.Payload); raw > MaxRawFrame {
			return h, nil, violation("record frame inflates to more than %d bytes", MaxRawFrame)
		}
		recs, rest = append(recs, r), rest[n:]
	}
	if len(rest) != 0 {
		return h, nil, violation("%d bytes after the last record", len(rest))
	}
	return h, recs, nil
}

// MaxRawFrame bounds what the payloads of one record frame inflate to, in bytes.
const MaxRawFrame = 2 << 20

// Flags of an Ack.
const (
	// AckSpoolFull says that the replica's spool has no room: records wait in memory.
	AckSpoolFull uint32 = 1 << 0
	// AckSpoolWaits says that its next segment is being prepared: records wait in memory.
	AckSpoolWaits uint32 = 1 << 1
	// AckRefused says that the replica takes no more records of this channel: the
	// answer to another attach says why.
	AckRefused uint32 = 1 << 2
)

// Ack tells the source how far its records have come. Received counts records
// written to the spool, Durable ends at a closed epoch that survives a crash,
// Applied is in the image. Invariant: Applied ≤ Durable ≤ Received.
type Ack struct {
	Channel  uint32
	Flags    uint32
	Session  uint64
	Received epoch.LSN
	Durable  epoch.LSN
	Applied  epoch.LSN
}

const ackSize = 40

// Append appends the encoded ack.
func (a Ack) Append(dst []byte) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, a.Channel)
	dst = binary.LittleEndian.AppendUint32(dst, a.Flags)
	dst = binary.LittleEndian.AppendUint64(dst, a.Session)
	dst = binary.LittleEndian.AppendUint64(dst, uint64(a.Received))
	dst = binary.LittleEndian.AppendUint64(dst, uint64(a.Durable))
	return binary.LittleEndian.AppendUint64(dst, uint64(a.Applied))
}

// DecodeAck reads the body of an ack.
func DecodeAck(b []byte) (Ack, error) {
	if len(b) != ackSize {
		return Ack{}, violation("ack of %d bytes", len(b))
	}
	le := binary.LittleEndian
	a := Ack{Channel: le.Uint32(b), Flags: le.Uint32(b[4:]), Session: le.Uint64(b[8:]),
		Received: epoch.LSN(le.Uint64(b[16:])), Durable: epoch.LSN(le.Uint64(b[24:])), Applied: epoch.LSN(le.Uint64(b[32:]))}
	if a.Applied > a.Durable || a.Durable > a.Received {
		return Ack{}, violation("ack with applied %d, durable %d, received %d", a.Applied, a.Durable, a.Received)
	}
	return a, nil
}

// DecodePing reads the body of a ping or pong.
func DecodePing(b []byte) (uint64, error) {
	if len(b) != 8 {
		return 0, violation("ping of %d bytes", len(b))
	}
	return binary.LittleEndian.Uint64(b), nil
}

// AppendJSON appends a frame whose body is v in JSON.
func AppendJSON(dst []byte, t Type, v any, seed uint32) ([]byte, error) {
	b, err := json.Marshal(v)
	if err != nil {
		return dst, fmt.Errorf("encode frame %d: %w", t, err)
	}
	if len(b) > MaxBody {
		return dst, fmt.Errorf("encode frame %d: %d bytes, at most %d fit", t, len(b), MaxBody)
	}
	return AppendFrame(dst, t, b, seed), nil
}

// DecodeJSON reads a JSON body.
func DecodeJSON(b []byte, v any) error {
	if err := json.Unmarshal(b, v); err != nil {
		return violation("undecodable message: %v", err)
	}
	return nil
}
