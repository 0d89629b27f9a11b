package stamp

import (
	"bytes"
	"encoding/hex"
	"testing"
)

func TestFillAndRead(t *testing.T) {
	p := make([]byte, 8*Size)
	for seq := uint64(1); seq < 9; seq++ {
		Fill(p, Stamp{Seed: 7, Seq: seq, Place: 2, Offset: 4096})
		for i := range 8 {
			got, kind := Read(p[i*Size : (i+1)*Size])
			want := Stamp{Seed: 7, Seq: seq, Place: 2, Offset: 4096 + int64(i)*Size}
			if kind != Intact || got != want {
				t.Fatalf("sector %d is %v (%d), want %v", i, got, kind, want)
			}
		}
	}
}

// TestEveryByteCounts: one changed bit anywhere makes a sector foreign.
func TestEveryByteCounts(t *testing.T) {
	b := make([]byte, Size)
	Fill(b, Stamp{Seed: 1, Seq: 4, Offset: 512})
	for i := range b {
		b[i] ^= 0x10
		if s, kind := Read(b); kind != Foreign {
			t.Errorf("byte %d changed: %v, kind %d", i, s, kind)
		}
		b[i] ^= 0x10
	}
	if _, kind := Read(b); kind != Intact {
		t.Fatal("not intact after all changes were undone")
	}
}

func TestZeroAndForeign(t *testing.T) {
	if _, kind := Read(make([]byte, Size)); kind != Zero {
		t.Error("zeros are not Zero")
	}
	for _, b := range [][]byte{nil, []byte(magic), bytes.Repeat([]byte{1}, Size)} {
		if _, kind := Read(b); kind != Foreign {
			t.Errorf("%s is kind %d", hex.EncodeToString(b), kind)
		}
	}
}
