package host

import (
	"reflect"
	"testing"

	"kagami/ext4j/epoch"
)

// FuzzGroupFile: whatever a group file holds, it is refused or read; what is read can be
// written, and is read again as the same.
func FuzzGroupFile(f *testing.F) {
	for _, g := range []*groupFile{
		{Version: groupFileVersion, Name: "web", Role: RoleSource, Peer: "dr", VM: "web", Session: 3, Policy: &policyFile{Mode: "async", AsyncAgeMs: 5},
			Disks: []diskFile{{Name: "vda", Size: 1 << 20, BlockSize: blockSize}}, Clean: &cleanMark{Mtime: map[uint32]int64{0: 1}}},
		{Version: groupFileVersion, Name: "db", Role: RolePromoted, Past: []epoch.Pos{{LSN: 4}}, Failover: &failoverRecord{Notes: []string{"a"}}},
		{Version: groupFileVersion, Name: "x", Role: RoleReplica, Replica: epoch.UUID{1}, Fenced: "no"},
	} {
		b, err := g.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"version":1,"name":"a","role":"source","policy":{"mode":"continue"}}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		if len(b) > groupFileMax {
			return
		}
		g, err := decodeGroupFile(b)
		if err != nil {
			return
		}
		again, err := g.encode()
		if err != nil {
			t.Fatal(err)
		}
		h, err := decodeGroupFile(again)
		if err != nil {
			t.Fatalf("what was written is refused: %v\n%s", err, again)
		}
		h.Sum = g.Sum
		if !reflect.DeepEqual(g, h) {
			t.Errorf("read %+v, then %+v", g, h)
		}
	})
}
