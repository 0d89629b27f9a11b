package wire

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"

	"kagami/ext4j/epoch"
)

func mustJSON(t testing.TB, v any) json.RawMessage {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func newCodec(t testing.TB) *Codec {
	t.Helper()
	c, err := NewCodec()
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestEveryBit flips every bit of every golden frame.
func TestEveryBit(t *testing.T) {
	for _, g := range goldenFrames(t) {
		for i := range g.frame {
			for bit := range 8 {
				b := append(bytes.Clone(g.frame), make([]byte, 1<<10)...)
				b[i] ^= 1 << bit
				if _, _, _, err := ReadFrame(bytes.NewReader(b), nil, MaxBody, g.seed); err == nil {
					t.Fatalf("%s with bit %d of byte %d flipped is accepted", g.name, bit, i)
				}
			}
		}
		if _, _, _, err := ReadFrame(bytes.NewReader(g.frame), nil, MaxBody, g.seed+1); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s is accepted on another link: %v", g.name, err)
		}
	}
}

func TestReadFrameCutShort(t *testing.T) {
	f := AppendFrame(nil, TypePing, make([]byte, 8), 1)
	for n := range f {
		_, _, _, err := ReadFrame(bytes.NewReader(f[:n]), nil, MaxBody, 1)
		want := io.ErrUnexpectedEOF
		if n == 0 {
			want = io.EOF // the peer closed between two frames
		}
		if !errors.Is(err, want) {
			t.Errorf("cut to %d bytes: %v, want %v", n, err, want)
		}
	}
}

// TestReadFrameBounds: a length is refused before anything of that size is allocated or read.
func TestReadFrameBounds(t *testing.T) {
	head := func(n uint32) []byte {
		b := BeginFrame(nil, TypeRecords)
		binary.LittleEndian.PutUint32(b[8:], n)
		return b
	}
	for _, c := range []struct {
		n     uint32
		limit int
	}{{MaxBody + 1, MaxBody}, {^uint32(0), MaxBody}, {MaxHello + 1, MaxHello}, {MaxBody + 1, 1 << 30}} {
		_, _, buf, err := ReadFrame(bytes.NewReader(head(c.n)), nil, c.limit, 0)
		if !errors.Is(err, ErrProtocol) || cap(buf) != 0 {
			t.Errorf("frame of %d bytes with a limit of %d: %v, buffer of %d", c.n, c.limit, err, cap(buf))
		}
	}
	full := AppendFrame(nil, TypeRecords, make([]byte, MaxBody), 3)
	if _, body, _, err := ReadFrame(bytes.NewReader(full), nil, MaxBody, 3); err != nil || len(body) != MaxBody {
		t.Errorf("the largest frame: %d bytes, %v", len(body), err)
	}
}

func TestReadFrameReusesBuffer(t *testing.T) {
	var stream []byte
	for i := range 20 {
		stream = AppendFrame(stream, TypePing, bytes.Repeat([]byte{byte(i)}, 300-10*i), 1)
	}
	r := bytes.NewReader(stream)
	buf := make([]byte, 300)
	for i := range 20 {
		_, body, grown, err := ReadFrame(r, buf, MaxBody, 1)
		if err != nil || len(body) != 300-10*i || body[0] != byte(i) || &grown[0] != &buf[0] {
			t.Fatalf("frame %d: %d bytes, %v", i, len(body), err)
		}
		buf = grown
	}
}

func TestHeaderLies(t *testing.T) {
	for name, lie := range map[string]func([]byte){
		"magic":           func(b []byte) { b[0]++ },
		"version 0":       func(b []byte) { b[4] = 0 },
		"version 2":       func(b []byte) { b[4] = 2 },
		"reserved byte 6": func(b []byte) { b[6] = 1 },
		"reserved byte 7": func(b []byte) { b[7] = 1 },
	} {
		b := AppendFrame(nil, TypePing, make([]byte, 8), 0)
		lie(b)
		if _, _, _, err := ReadFrame(bytes.NewReader(EndFrame(b, 0, 0)), nil, MaxBody, 0); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestDecodeRecords(t *testing.T) {
	recs := someRecords(100)
	h, got, err := DecodeRecords(recordFrame(4, 7, recs, 5)[HeaderSize:], 5, nil)
	if err != nil || h != (RecordsHead{4, 3, 7}) || len(got) != 3 || got[2].LSN != 102 || string(got[0].Payload) != "hello" {
		t.Fatalf("got %+v %+v, %v", h, got, err)
	}
	gap := append(someRecords(100)[:1:1], someRecords(101)[1])
	wrapped := []epoch.Record{sealed(epoch.Record{Type: epoch.TypeNop, Disk: epoch.GroupWide, Session: 7, LSN: ^epoch.LSN(0)}),
		sealed(epoch.Record{Type: epoch.TypeNop, Disk: epoch.GroupWide, Session: 7})}
	many := make([]epoch.Record, MaxRecords+1)
	for i := range many {
		many[i] = sealed(epoch.Record{Type: epoch.TypeNop, Disk: epoch.GroupWide, Session: 7, LSN: epoch.LSN(i + 1)})
	}
	count := func(n uint32) []byte {
		b := recordFrame(4, 7, recs, 5)[HeaderSize:]
		binary.LittleEndian.PutUint32(b[4:], n)
		return b
	}
	for name, body := range map[string][]byte{
		"empty":           {},
		"no records":      recordFrame(4, 7, nil, 5)[HeaderSize:],
		"fewer claimed":   count(2),
		"more claimed":    count(4),
		"billions":        count(^uint32(0)),
		"other session":   recordFrame(4, 8, recs, 5)[HeaderSize:],
		"gap":             recordFrame(4, 7, gap, 5)[HeaderSize:],
		"LSN wraps":       recordFrame(4, 7, wrapped, 5)[HeaderSize:],
		"too many":        recordFrame(4, 7, many, 5)[HeaderSize:],
		"bytes behind":    append(recordFrame(4, 7, recs, 5)[HeaderSize:], 0),
		"other link":      recordFrame(4, 7, recs, 6)[HeaderSize:],
		"a record is cut": recordFrame(4, 7, recs, 5)[HeaderSize : HeaderSize+200],
	} {
		if _, _, err := DecodeRecords(body, 5, nil); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, got, err := DecodeRecords(recordFrame(4, 7, many[:MaxRecords], 5)[HeaderSize:], 5, nil); err != nil || len(got) != MaxRecords {
		t.Errorf("the most records: %d, %v", len(got), err)
	}
}

func TestCodecRoundTrip(t *testing.T) {
	const seed = 1
	rng, c := rand.New(rand.NewPCG(seed, 0)), newCodec(t)
	for i := range 200 {
		raw := make([]byte, rng.IntN(epoch.MaxPayload+1))
		if i < 4 {
			raw = raw[:[]int{0, 1, 511, 512}[i]]
		}
		for j := 0; j < len(raw); {
			run, b := 1+rng.IntN(1+rng.IntN(300)), byte(rng.Uint32())
			for ; run > 0 && j < len(raw); run-- {
				raw[j] = b
				j++
			}
		}
		codec, stored := c.Deflate(raw)
		if codec == epoch.CodecRaw {
			if !bytes.Equal(stored, raw) {
				t.Fatalf("seed %d, %d: raw form differs", seed, i)
			}
			continue
		}
		if len(stored)*8 > len(raw)*7 {
			t.Fatalf("seed %d, %d: %d bytes kept as %d", seed, i, len(raw), len(stored))
		}
		back, err := c.Inflate(codec, stored, len(raw))
		if err != nil || !bytes.Equal(back, raw) {
			t.Fatalf("seed %d, %d: %v", seed, i, err)
		}
	}
}

// bomb is a small frame that inflates to n bytes.
func bomb(t testing.TB, n int, o ...zstd.EOption) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := zstd.NewWriter(&b, o...)
	if err != nil {
		t.Fatal(err)
	}
	piece := make([]byte, 1<<20)
	for ; n > 0; n -= len(piece) {
		if _, err := w.Write(piece[:min(n, len(piece))]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// TestInflateBounded: whatever is promised, never more than the promised
// length comes out, and no bomb takes much more memory than one payload.
func TestInflateBounded(t *testing.T) {
	c := newCodec(t)
	honest := bomb(t, 100_000, zstd.WithWindowSize(epoch.MaxPayload))
	bombs := map[string][]byte{
		"1 byte too many":   bomb(t, 100_001, zstd.WithWindowSize(epoch.MaxPayload)),
		"256 MiB":           bomb(t, 256<<20),
		"256 MiB, windowed": bomb(t, 256<<20, zstd.WithWindowSize(epoch.MaxPayload)),
		"8 MiB window":      bomb(t, 50_000, zstd.WithWindowSize(8<<20), zstd.WithSingleSegment(false)),
		"two frames":        append(bytes.Clone(honest), honest...),
		"garbage":           []byte(strings.Repeat("garbage", 20)),
		"empty":             {},
	}
	if got, err := c.Inflate(epoch.CodecZstd, honest, 100_000); err != nil || len(got) != 100_000 {
		t.Fatalf("an honest payload: %d bytes, %v", len(got), err)
	}
	for name, b := range bombs {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		got, err := c.Inflate(epoch.CodecZstd, b, 100_000)
		runtime.ReadMemStats(&after)
		if err == nil && len(got) == 100_000 || len(got) > epoch.MaxPayload {
			t.Errorf("%s: %d bytes came out, %v", name, len(got), err)
		}
		if used := after.TotalAlloc - before.TotalAlloc; used > 8*epoch.MaxPayload {
			t.Errorf("%s took %d bytes of memory", name, used)
		}
		r := epoch.Record{Type: epoch.TypeWrite, LSN: 1, Length: 100_000, Payload: make([]byte, 100_000)}
		r.Seal()
		if _, _, err := epoch.DecodeStored(r.AppendStored(nil, epoch.CodecZstd, b, 0), 0, c.Inflate); err == nil {
			t.Errorf("%s makes a record", name)
		}
	}
	for _, n := range []int{-1, epoch.MaxPayload + 1, 1 << 40} {
		if _, err := c.Inflate(epoch.CodecZstd, honest, n); err == nil {
			t.Errorf("a promise of %d bytes is believed", n)
		}
	}
	if _, err := c.Inflate(7, honest, 100_000); err == nil {
		t.Error("codec 7 is accepted")
	}
}

// TestFrameOfBombs: many small records that inflate to the most each are cut
// off at MaxRawFrame.
func TestFrameOfBombs(t *testing.T) {
	c := newCodec(t)
	raw := make([]byte, epoch.MaxPayload)
	_, stored := c.Deflate(raw)
	body := RecordsHead{Channel: 1, Count: 1000, Session: 7}.Append(nil)
	inflated := 0
	for i := range 1000 {
		r := sealed(epoch.Record{Type: epoch.TypeWrite, Session: 7, LSN: epoch.LSN(i + 1), Length: epoch.MaxPayload, Payload: raw})
		body = r.AppendStored(body, epoch.CodecZstd, stored, 0)
	}
	_, recs, err := DecodeRecords(body, 0, func(codec uint8, b []byte, n int) ([]byte, error) {
		inflated += n
		return c.Inflate(codec, b, n)
	})
	if !errors.Is(err, ErrProtocol) || recs != nil || inflated > MaxRawFrame+epoch.MaxPayload {
		t.Errorf("%d bytes were inflated, %d records kept: %v", inflated, len(recs), err)
	}
}

func TestAck(t *testing.T) {
	a := Ack{Channel: 1, Flags: 2, Session: 3, Received: 6, Durable: 5, Applied: 4}
	if got, err := DecodeAck(a.Append(nil)); err != nil || got != a {
		t.Errorf("got %+v, %v", got, err)
	}
	for _, bad := range []Ack{{Received: 1, Durable: 2}, {Received: 2, Durable: 1, Applied: 2}} {
		if _, err := DecodeAck(bad.Append(nil)); !errors.Is(err, ErrProtocol) {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	for _, n := range []int{0, 39, 41} {
		if _, err := DecodeAck(make([]byte, n)); !errors.Is(err, ErrProtocol) {
			t.Errorf("ack of %d bytes: %v", n, err)
		}
	}
	if _, err := DecodePing(make([]byte, 7)); !errors.Is(err, ErrProtocol) {
		t.Errorf("ping of 7 bytes: %v", err)
	}
}

func TestNegotiate(t *testing.T) {
	for _, c := range []struct {
		min, max int
		required uint64
		want     int
	}{{1, 1, 0, 1}, {0, 9, 0, 1}, {2, 9, 0, 0}, {-5, 0, 0, 0}, {5, 1, 0, 0}, {1, 1, 1 << 63, 0}} {
		v, err := Negotiate(Hello{MinVersion: c.min, MaxVersion: c.max, Required: c.required, Site: "x", Release: "9"})
		if v != c.want || (err == nil) != (c.want != 0) {
			t.Errorf("%+v: version %d, %v", c, v, err)
		}
		if err != nil && (err.Code != CodeVersion || !strings.Contains(err.Message, "upgrade")) {
			t.Errorf("%+v: refusal %+v does not say what to do", c, err)
		}
	}
}

// TestWelcomeCheck: what the acceptor requires is checked as what the dialler does.
func TestWelcomeCheck(t *testing.T) {
	refusal := Errorf(CodeDenied, "no")
	for _, c := range []struct {
		w    Welcome
		want string
	}{
		{Welcome{Version: 1}, ""},
		{Welcome{Version: 1, Optional: ^uint64(0)}, ""},
		{Welcome{Version: 0}, "upgrade"},
		{Welcome{Version: 2}, "upgrade the older site"},
		{Welcome{Version: 1, Required: 1 << 40}, "requires features 0x10000000000 that this release does not have: upgrade this site"},
		{Welcome{Error: refusal}, "no"},
	} {
		err := c.w.Check()
		if (err == nil) != (c.want == "") || err != nil && !strings.Contains(err.Message, c.want) {
			t.Errorf("%+v: %v, want %q", c.w, err, c.want)
		}
	}
}

// TestUnsupportedRecord: a record of a later release is no violation, and its
// channel is known; a violation before it is one.
func TestUnsupportedRecord(t *testing.T) {
	recs := someRecords(100)
	add, err := epoch.DiskInfo{ID: epoch.UUID{1}, Slot: 2, BlockSize: 512, Bytes: 512, Name: "vdc"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, r := range map[string]epoch.Record{
		"unknown":  {Type: 77, Session: 7, LSN: 103, Payload: []byte("x")},
		"disk add": {Type: epoch.TypeDiskAdd, Session: 7, LSN: 103, Disk: epoch.GroupWide, Length: uint64(len(add)), Payload: add},
	} {
		h, got, err := DecodeRecords(recordFrame(4, 7, append(recs[:3:3], sealed(r)), 5)[HeaderSize:], 5, nil)
		if !errors.Is(err, epoch.ErrUnsupported) || errors.Is(err, ErrProtocol) || got != nil || h.Channel != 4 || h.Session != 7 {
			t.Errorf("%s: %+v, %d records, %v", name, h, len(got), err)
		}
		r.LSN = 0
		if _, _, err := DecodeRecords(recordFrame(4, 7, []epoch.Record{recs[0], recs[2], sealed(r)}, 5)[HeaderSize:], 5, nil); !errors.Is(err, ErrProtocol) {
			t.Errorf("%s behind a gap: %v", name, err)
		}
	}
}

func TestAppendJSONBounds(t *testing.T) {
	if _, err := AppendJSON(nil, TypeRequest, strings.Repeat("x", MaxBody), 0); err == nil {
		t.Error("a message larger than a frame is encoded")
	}
	if err := DecodeJSON([]byte("{"), &Hello{}); !errors.Is(err, ErrProtocol) {
		t.Errorf("half a message: %v", err)
	}
	var h Hello
	if err := DecodeJSON([]byte(`{"site":"a","what_a_newer_release_says":1}`), &h); err != nil || h.Site != "a" {
		t.Errorf("unknown fields must be ignored: %+v, %v", h, err)
	}
}

// TestHashResponseFits: the largest answer that a HashRequest can ask for fits a frame.
func TestHashResponseFits(t *testing.T) {
	sums := make([][]byte, MaxHashes)
	for i := range sums {
		sums[i] = bytes.Repeat([]byte{0xff}, 32)
	}
	if _, err := AppendJSON(nil, TypeResponse, Response{ID: ^uint64(0), Result: mustJSON(t, HashResponse{Sums: sums})}, 0); err != nil {
		t.Error(err)
	}
}

func FuzzReadFrame(f *testing.F) {
	for _, g := range goldenFrames(f) {
		f.Add(g.frame, g.seed, false)
		f.Add(append(bytes.Clone(g.frame), g.frame...), g.seed, true)
	}
	f.Fuzz(func(t *testing.T, b []byte, seed uint32, repair bool) {
		if repair && len(b) >= HeaderSize {
			b = EndFrame(bytes.Clone(b), 0, seed)
		}
		typ, body, buf, err := ReadFrame(bytes.NewReader(b), nil, MaxBody, seed)
		if cap(buf) > MaxBody {
			t.Fatalf("buffer of %d bytes", cap(buf))
		}
		if err != nil {
			return
		}
		if again := AppendFrame(nil, typ, body, seed); b[4] == Version && !bytes.HasPrefix(b, again) {
			t.Fatalf("frame of type %d with %d bytes encodes differently", typ, len(body))
		}
	})
}

func FuzzDecodeRecords(f *testing.F) {
	f.Add(recordFrame(4, 7, someRecords(100), 5)[HeaderSize:], uint32(5))
	f.Add([]byte{}, uint32(0))
	c := newCodec(f)
	codec, stored := c.Deflate(make([]byte, 4096))
	r := sealed(epoch.Record{Type: epoch.TypeWrite, Session: 7, LSN: 1, Length: 4096, Payload: make([]byte, 4096)})
	f.Add(r.AppendStored(RecordsHead{1, 1, 7}.Append(nil), codec, stored, 5), uint32(5))
	f.Fuzz(func(t *testing.T, b []byte, seed uint32) {
		h, recs, err := DecodeRecords(b, seed, c.Inflate)
		if err != nil {
			if errors.Is(err, ErrProtocol) == errors.Is(err, epoch.ErrUnsupported) || recs != nil {
				t.Fatalf("%d records, %v", len(recs), err)
			}
			return
		}
		for i := range recs {
			if recs[i].Verify() != nil || recs[i].Session != h.Session || recs[i].LSN != recs[0].LSN+epoch.LSN(i) {
				t.Fatalf("record %d: %+v", i, recs[i])
			}
		}
	})
}

func FuzzDecodeAck(f *testing.F) {
	f.Add(Ack{1, 1, 2, 5, 4, 3}.Append(nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		a, err := DecodeAck(b)
		if err == nil && (!bytes.Equal(a.Append(nil), b) || a.Applied > a.Durable || a.Durable > a.Received) {
			t.Fatalf("%x is read as %+v", b, a)
		}
	})
}

// FuzzMessages feeds one body to every message that a peer sends as JSON.
func FuzzMessages(f *testing.F) {
	for _, g := range goldenFrames(f) {
		f.Add(g.frame[HeaderSize:])
	}
	f.Add([]byte(`{"manifest":{"disks":[{"size":-1}]},"offsets":[9223372036854775807],"params":{"a":[[[]]]}}`))
	f.Add(bytes.Repeat([]byte("["), 20_000))
	f.Fuzz(func(t *testing.T, b []byte) {
		for _, v := range []any{&Hello{}, &Welcome{}, &Request{}, &Response{}, &AttachRequest{}, &AttachResponse{}, &HashRequest{},
			&HashResponse{}, &RemoveRequest{}, &DomainRequest{}, &CheckRequest{}, &CheckResponse{}} {
			if err := DecodeJSON(b, v); err != nil && !errors.Is(err, ErrProtocol) {
				t.Fatalf("%T: %v", v, err)
			}
			if w, ok := v.(*Welcome); ok {
				_ = w.Check()
			}
			if h, ok := v.(*Hello); ok {
				if v, err := Negotiate(*h); (v == Version) != (err == nil) {
					t.Fatalf("%+v negotiates %d, %v", h, v, err)
				}
			}
		}
	})
}
