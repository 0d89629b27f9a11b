package jbd2_test

import (
	"testing"

	. "kagami/ext4j/jbd2"
	"kagami/ext4j/jbd2/jtest"
)

func FuzzSuperblock(f *testing.F) {
	for _, feat := range append(formats(), FastCommit|SumV3) {
		f.Add(jtest.New(feat, 1024, 2048, 5, 9).Buf[:1024])
	}
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := DecodeSuperblock(b)
		if err != nil || s.Check(s.BlockSize, 1<<32) != nil {
			return
		}
		first, last := s.FastArea()
		if s.First >= s.Last() || s.Last() > s.MaxLen || first > last || last > s.MaxLen || (first != 0 && first <= s.Last()) {
			t.Fatalf("%+v: log to %d, fast area %d to %d", s, s.Last(), first, last)
		}
		s.MarkEmpty(b, 5, 6)
		again, err := DecodeSuperblock(b)
		if err != nil || again.Start != 0 || again.Sequence != 5 {
			t.Fatalf("emptied: %+v, %v", again, err)
		}
	})
}

func FuzzBlocks(f *testing.F) {
	b := three(SumV3 | Bit64)
	f.Add(uint64(SumV3|Bit64), b.At(1))
	f.Add(uint64(SumV2), b.At(2))
	f.Add(uint64(SumV1), b.At(5))
	f.Add(uint64(0), make([]byte, 1024))
	f.Fuzz(func(t *testing.T, feat uint64, b []byte) {
		if len(b) < 1024 {
			return
		}
		form := Format{BlockSize: len(b), Features: Features(feat)}
		if tags, _ := form.Tags(nil, b); len(tags) > len(b)/8 {
			t.Fatalf("%d tags in %d bytes", len(tags), len(b))
		}
		if r, _, err := form.DecodeRevoke(b); err == nil {
			n := 0
			for range r.All() {
				n++
			}
			if n != r.Len() || n > len(b)/4 {
				t.Fatalf("%d entries of %d in %d bytes", n, r.Len(), len(b))
			}
		}
		if c, err := DecodeCommit(b); err == nil {
			_ = form.CommitSum(c, b, 1).String()
		}
	})
}

// FuzzScan changes bytes of a valid journal and follows it.
func FuzzScan(f *testing.F) {
	for _, feat := range formats() {
		f.Add(uint64(feat), uint32(1), []byte{})
		f.Add(uint64(feat|AsyncCommit), uint32(20), []byte{30, 0, 1, 0xff})
	}
	f.Fuzz(func(t *testing.T, feat uint64, start uint32, edits []byte) {
		feats := Features(feat) & (SumV1 | Revoke | Bit64 | AsyncCommit | SumV2 | SumV3)
		b := three(feats)
		if start > 0 && start < 64 && start != 1 {
			// The log starts elsewhere: whatever is there must not be trusted.
			b.Super.Start = start
		}
		for ; len(edits) >= 4; edits = edits[4:] {
			b.Buf[(int(edits[0])<<10|int(edits[1])<<8|int(edits[2]))%len(b.Buf)] = edits[3]
		}
		j := b.Super.Journal()
		reads := 0
		l, err := Scan(j, func(n uint32, p []byte) error {
			if reads++; n < j.First || n >= j.Last {
				t.Fatalf("read of block %d", n)
			}
			return b.Read(n, p)
		})
		if reads > 2*63+200 {
			t.Fatalf("%d reads of a journal of 63 blocks", reads)
		}
		if err != nil {
			return
		}
		entries := 0
		for i, tr := range l.Transactions {
			if tr.TID != j.Sequence+TID(i) {
				t.Fatalf("transaction %d has TID %d", i, tr.TID)
			}
			entries += len(tr.Blocks)
		}
		if entries > 63 || l.EndTID != j.Sequence+TID(len(l.Transactions)) {
			t.Fatalf("%d entries, end %d", entries, l.EndTID)
		}
	})
}
