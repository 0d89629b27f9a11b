package wire

import (
	"bufio"
	"bytes"
	"encoding/hex"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"kagami/ext4j/epoch"
)

var update = flag.Bool("update", false, "rewrite the golden file: only with a new protocol version")

const (
	goldenFile = "testdata/frames.golden"
	goldenSeed = 0x0badcafe
)

type golden struct {
	name  string
	frame []byte
	seed  uint32
}

func sealed(r epoch.Record) epoch.Record {
	r.Seal()
	return r
}

func someRecords(lsn epoch.LSN) []epoch.Record {
	line := epoch.UUID{1, 2, 3}
	info := epoch.CloseInfo{TimeNs: 1_700_000_000_000_000_000, Reason: epoch.ByFlush, First: lsn, Bytes: 5}.Encode()
	return []epoch.Record{
		sealed(epoch.Record{Type: epoch.TypeWrite, Lineage: line, Session: 7, LSN: lsn, Disk: 1, Offset: 512, Length: 5, Payload: []byte("hello")}),
		sealed(epoch.Record{Type: epoch.TypeTrim, Lineage: line, Session: 7, LSN: lsn + 1, Disk: 1, Offset: 4096, Length: 4096}),
		sealed(epoch.Record{Type: epoch.TypeClose, Lineage: line, Session: 7, LSN: lsn + 2, Disk: epoch.GroupWide, Length: 32, Payload: info}),
	}
}

func recordFrame(channel uint32, session uint64, recs []epoch.Record, seed uint32) []byte {
	b := RecordsHead{Channel: channel, Count: uint32(len(recs)), Session: session}.Append(BeginFrame(nil, TypeRecords))
	for i := range recs {
		b = recs[i].AppendStored(b, epoch.CodecRaw, recs[i].Payload, seed)
	}
	return EndFrame(b, 0, seed)
}

func goldenFrames(t testing.TB) []golden {
	t.Helper()
	id := epoch.UUID{0xaa, 0xbb}
	js := func(typ Type, v any, seed uint32) []byte {
		b, err := AppendJSON(nil, typ, v, seed)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	m := Manifest{Name: "vm1", ID: id, Lineage: id, Past: []epoch.Pos{{Lineage: id, Session: 1, LSN: 2}}, Session: 3,
		Disks: []Disk{{Slot: 0, ID: id, Name: "vdb", Size: 1 << 30, BlockSize: 512}}, VM: "vm1", Window: 1 << 20}
	return []golden{
		{"hello", js(TypeHello, Hello{MinVersion: 1, MaxVersion: 1, Site: "a", SiteID: id, Link: id, Data: true, Release: "0.1"}, 0), 0},
		{"welcome", js(TypeWelcome, Welcome{Version: 1, Required: 1 << 63, Optional: 6, Site: "b", SiteID: id, Seed: goldenSeed, Release: "0.1"}, 0), 0},
		{"refusal", js(TypeWelcome, Welcome{Version: 1, Site: "b", SiteID: id, Error: Errorf(CodeDenied, "no"), Release: "0.1"}, 0), 0},
		{"records", recordFrame(4, 7, someRecords(100), goldenSeed), goldenSeed},
		{"ack", AppendFrame(nil, TypeAck, Ack{Channel: 4, Flags: AckSpoolFull, Session: 7, Received: 102, Durable: 101, Applied: 100}.Append(nil), goldenSeed), goldenSeed},
		{"ping", AppendFrame(nil, TypePing, []byte{1, 2, 3, 4, 5, 6, 7, 8}, goldenSeed), goldenSeed},
		{"goodbye", AppendFrame(nil, TypeGoodbye, nil, goldenSeed), goldenSeed},
		{"attach", js(TypeRequest, Request{ID: 1, Method: MethodAttach, Params: mustJSON(t, AttachRequest{Manifest: m, Create: true})}, goldenSeed), goldenSeed},
		{"attached", js(TypeResponse, Response{ID: 1, Result: mustJSON(t, AttachResponse{Channel: 4, Replica: epoch.UUID{0xcc}, Pos: epoch.Pos{Lineage: id, Session: 2, LSN: 9}, Applied: 8, Complete: true})}, goldenSeed), goldenSeed},
		{"hash", js(TypeRequest, Request{ID: 2, Method: MethodHash, Params: mustJSON(t, HashRequest{Group: id, Session: 3, Chunk: 65536, Offsets: []int64{0, 65536}})}, goldenSeed), goldenSeed},
	}
}

// TestGolden pins the frames: two sites of different releases must agree on them.
func TestGolden(t *testing.T) {
	frames := goldenFrames(t)
	if *update {
		var b strings.Builder
		for _, g := range frames {
			fmt.Fprintf(&b, "%s %s\n", g.name, hex.EncodeToString(g.frame))
		}
		if err := os.WriteFile(goldenFile, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want := readGolden(t)
	if len(want) != len(frames) {
		t.Errorf("%d frames in %s, %d are tested", len(want), goldenFile, len(frames))
	}
	for _, g := range frames {
		if got := hex.EncodeToString(g.frame); got != want[g.name] {
			t.Errorf("%s encodes as\n%s, want\n%s", g.name, got, want[g.name])
		}
		typ, body, _, err := ReadFrame(bytes.NewReader(g.frame), nil, MaxBody, g.seed)
		if err != nil || typ != Type(g.frame[5]) || !bytes.Equal(body, g.frame[HeaderSize:]) {
			t.Errorf("%s is read as type %d: %v", g.name, typ, err)
		}
	}
}

func readGolden(t *testing.T) map[string]string {
	t.Helper()
	f, err := os.Open(goldenFile)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	out := map[string]string{}
	s := bufio.NewScanner(f)
	for s.Buffer(nil, 1<<20); s.Scan(); {
		if name, hexed, ok := strings.Cut(s.Text(), " "); ok {
			out[name] = hexed
		}
	}
	return out
}
