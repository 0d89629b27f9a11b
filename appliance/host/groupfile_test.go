package host

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"kagami/ext4j/epoch"
)

func someGroupFile() *groupFile {
	return &groupFile{Version: groupFileVersion, Name: "vm1", ID: epoch.UUID{1}, Role: RoleReplica, Peer: "main", Lineage: epoch.UUID{2}, Replica: epoch.UUID{3}, Session: 4,
		Disks: []diskFile{{Slot: 0, ID: epoch.UUID{5}, Name: "vda", Image: "/i", Size: 1 << 20, BlockSize: blockSize, Socket: "/s"}}}
}

// TestGroupFileOfLaterRelease: what must be understood is refused in words,
// what need not be is kept.
func TestGroupFileOfLaterRelease(t *testing.T) {
	with := func(change func(map[string]any)) []byte {
		b, err := someGroupFile().encode()
		must(t, err)
		var m map[string]any
		must(t, json.Unmarshal(b, &m))
		change(m)
		b, err = json.Marshal(m)
		must(t, err)
		var fields map[string]json.RawMessage
		must(t, json.Unmarshal(b, &fields))
		m["sum"], err = sumOf(fields)
		must(t, err)
		b, err = json.Marshal(m)
		must(t, err)
		return b
	}
	for _, c := range []struct {
		name   string
		change func(map[string]any)
		words  string
	}{
		{"version", func(m map[string]any) { m["version"] = 2 }, "version 2, this release reads 1"},
		{"required feature", func(m map[string]any) { m["required_features"] = 8 }, "requires features 0x8 that this release does not have"},
		{"block size", func(m map[string]any) { m["disks"].([]any)[0].(map[string]any)["block_size"] = 4096 }, "disk vda has blocks of 4096 bytes, this release serves 512"},
		{"no block size", func(m map[string]any) { delete(m["disks"].([]any)[0].(map[string]any), "block_size") }, "blocks of 0 bytes"},
		{"replica without UUID", func(m map[string]any) { delete(m, "replica") }, "not plausible"},
		{"name", func(m map[string]any) { m["name"] = "../x" }, "not plausible"},
		{"no role", func(m map[string]any) { delete(m, "role") }, "not plausible"},
		{"role", func(m map[string]any) { m["role"] = "witness" }, "not plausible"},
	} {
		if _, err := decodeGroupFile(with(c.change)); err == nil || !strings.Contains(err.Error(), c.words) {
			t.Errorf("%s: %v, want %q", c.name, err, c.words)
		}
	}
	f, err := decodeGroupFile(with(func(m map[string]any) {
		m["optional_features"] = 1 << 40
		m["labels"] = map[string]any{"owner": "me", "n": 12345678901234567}
	}))
	must(t, err)
	f.Session++
	b, err := f.encode()
	must(t, err)
	again, err := decodeGroupFile(b)
	must(t, err)
	if again.Session != 5 || again.Optional != 1<<40 || !bytes.Contains(b, []byte("12345678901234567")) {
		t.Errorf("after a change: %s", b)
	}
	if plain, err := decodeGroupFile(with(func(map[string]any) {})); err != nil || len(plain.extra) != 0 {
		t.Errorf("known fields are taken for unknown ones: %v, %v", plain.extra, err)
	}
}

// TestGroupFileRots: a file with one wrong bit says what it said, or is refused. A
// replica whose role was not read was served as a source.
func TestGroupFileRots(t *testing.T) {
	for _, extra := range []map[string]json.RawMessage{nil, {"labels": json.RawMessage(`{"owner":"me"}`)}} {
		whole := someGroupFile()
		whole.extra = extra
		b, err := whole.encode()
		must(t, err)
		for i := range len(b) * 8 {
			rotten := bytes.Clone(b)
			rotten[i/8] ^= 1 << (i % 8)
			f, err := decodeGroupFile(rotten)
			if err != nil {
				continue
			}
			if again, err := f.encode(); err != nil || !bytes.Equal(again, b) {
				t.Errorf("byte %d, %q for %q: taken as %s, %v", i/8, rotten[i/8], b[i/8], again, err)
			}
		}
	}
}

// TestBlockSizeCounts: a group whose disks have other blocks is another group.
func TestBlockSizeCounts(t *testing.T) {
	f := someGroupFile()
	m := f.manifest(1)
	if m.Disks[0].BlockSize != blockSize || !sameDisks(f, m) {
		t.Errorf("manifest %+v", m)
	}
	must(t, checkManifest(m))
	m.Disks[0].BlockSize = 4096
	if err := checkManifest(m); sameDisks(f, m) || err == nil || !strings.Contains(err.Error(), "blocks of 4096 bytes") {
		t.Errorf("blocks of 4096 bytes are taken: %v", err)
	}
}
