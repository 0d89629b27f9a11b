package jbd2_test

import (
	"os"
	"slices"
	"testing"

	. "kagami/ext4j/jbd2"
)

// TestGolden decodes what Linux 6.18 wrote: the journal's superblock and
// transaction 3, from block 14 on. The block numbers were taken from debugfs' logdump
// of the same images (recover's TestWriteGolden makes them). The feature revoke is not
// set yet: the kernel writes revoke blocks before it writes that bit.
func TestGolden(t *testing.T) {
	for _, c := range []struct {
		name    string
		feat    Features
		sum     SumState
		blocks  []uint64
		revokes []uint64
	}{
		{"v3-64bit", Bit64 | SumV3, SumGood, []uint64{136, 1, 137, 130, 2, 132, 1158, 134}, []uint64{1173, 1172}},
		{"v1", Bit64 | SumV1, SumGood, []uint64{136, 1, 137, 130, 2, 132, 1158, 134}, []uint64{1173, 1172}},
		{"none", 0, SumNone, []uint64{72, 1, 73, 66, 2, 68, 1094, 70}, []uint64{1108, 1109}},
	} {
		raw, err := os.ReadFile("testdata/" + c.name + ".blocks")
		if err != nil {
			t.Fatal(err)
		}
		s, err := DecodeSuperblock(raw)
		if err != nil || s.Check(1024, 1024) != nil || s.Features != c.feat || s.Start != 1 || s.Sequence != 2 || s.MaxLen != 1024 {
			t.Fatalf("%s: %+v, %v", c.name, s, err)
		}
		j := s.Journal()
		j.Start, j.Sequence = 14, 3 // the file starts with this transaction
		read := func(n uint32, p []byte) error {
			clear(p)
			if at := int(n-14+1) * 1024; at < len(raw) {
				copy(p, raw[at:])
			}
			return nil
		}
		l, err := Scan(j, read)
		if err != nil || len(l.Transactions) != 1 || l.End != EndMagic || l.EndTID != 4 || l.Head != 25 {
			t.Fatalf("%s: %+v, %v", c.name, l, err)
		}
		tr := l.Transactions[0]
		if tr.Sum != c.sum || tr.Revoked != 2 || tr.Commit.Sec < 1700000000 || tr.Commit.Sec > 2000000000 {
			t.Errorf("%s: %+v", c.name, tr)
		}
		checkGoldenBlocks(t, j, tr, read, c.blocks)
		b := make([]byte, 1024)
		_ = read(tr.Revokes[0], b)
		r, ok, err := j.DecodeRevoke(b)
		if got := slices.Collect(r.All()); !ok || err != nil || !slices.Equal(got, c.revokes) {
			t.Errorf("%s: revoked %v, %v, %v", c.name, got, ok, err)
		}
	}
}

func checkGoldenBlocks(t *testing.T, j Journal, tr Transaction, read ReadBlock, want []uint64) {
	t.Helper()
	var got []uint64
	b := make([]byte, 1024)
	for _, e := range tr.Blocks {
		got = append(got, e.Block)
		if _ = read(e.Logical, b); !j.DataOK(tr.TID, e.Tag, b) {
			t.Errorf("block %d: wrong checksum", e.Block)
		}
		if last := e.Flags&FlagLast != 0; last != (len(got) == len(want)) {
			t.Errorf("block %d: flags %d", e.Block, e.Flags)
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("blocks %v, want %v", got, want)
	}
}
