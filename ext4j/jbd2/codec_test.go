package jbd2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"testing"

	. "kagami/ext4j/jbd2"
	"kagami/ext4j/jbd2/jtest"
)

// formats are all combinations of features that shape blocks.
func formats() []Features {
	var all []Features
	for _, sum := range []Features{0, SumV1, SumV2, SumV3} {
		all = append(all, sum, sum|Bit64, sum|Revoke, sum|Bit64|Revoke)
	}
	return all
}

func TestTagSize(t *testing.T) {
	want := map[Features]int{
		0: 8, Bit64: 12, SumV1: 8, SumV1 | Bit64: 12,
		SumV2: 10, SumV2 | Bit64: 14, SumV3: 16, SumV3 | Bit64: 16,
	}
	for f, n := range want {
		if got := (Format{Features: f}).TagSize(); got != n {
			t.Errorf("%v: tag of %d bytes, want %d", f, got, n)
		}
	}
}

func TestTIDOrder(t *testing.T) {
	for _, c := range []struct {
		a, b  TID
		after bool
	}{{2, 1, true}, {1, 2, false}, {1, 1, false}, {0, 0xffffffff, true}, {0xffffffff, 0, false}, {0x80000000, 1, true}, {5, 0xfffffff0, true}} {
		if got := c.a.After(c.b); got != c.after {
			t.Errorf("%d after %d: %v", c.a, c.b, got)
		}
	}
	if !Revoked(7, 7) || !Revoked(6, 7) || Revoked(8, 7) || !Revoked(0xffffffff, 3) || Revoked(3, 0xffffffff) {
		t.Error("Revoked is wrong about order or about the revoking transaction itself")
	}
}

// TestTagLayout writes a tag of each layout byte by byte.
func TestTagLayout(t *testing.T) {
	home := uint64(0x1_2233_4455)
	for f, raw := range map[Features]string{
		0:             "\x22\x33\x44\x55\x00\x00\x00\x0b",
		Bit64:         "\x22\x33\x44\x55\x00\x00\x00\x0b\x00\x00\x00\x01",
		SumV2:         "\x22\x33\x44\x55\xab\xcd\x00\x0b\x00\x00",
		SumV2 | Bit64: "\x22\x33\x44\x55\xab\xcd\x00\x0b\x00\x00\x00\x01\x00\x00",
		SumV3 | Bit64: "\x22\x33\x44\x55\x00\x00\x00\x0b\x00\x00\x00\x01\x01\x23\xab\xcd",
	} {
		block := make([]byte, 1024)
		copy(block[HeaderSize:], raw)
		tags, _ := Format{BlockSize: 1024, Features: f}.Tags(nil, block)
		want := Tag{Block: home, Flags: FlagLast | FlagSameUUID | FlagEscape}
		switch {
		case !f.Has(Bit64):
			want.Block = uint64(uint32(home))
		}
		switch {
		case f.Has(SumV2):
			want.Sum = 0xabcd
		case f.Has(SumV3):
			want.Sum = 0x0123abcd
		}
		if len(tags) != 1 || tags[0] != want {
			t.Errorf("%v: %+v, want %+v", f, tags, want)
		}
	}
}

func TestDescriptor(t *testing.T) {
	for _, f := range formats() {
		b := jtest.New(f, 1024, 64, 1, 9)
		var in []jtest.Block
		for i := range 5 {
			data := bytes.Repeat([]byte{byte(i + 1)}, 1024)
			if i == 3 {
				binary.BigEndian.PutUint32(data, Magic)
			}
			in = append(in, jtest.Block{Home: uint64(100 + i), Data: data})
		}
		b.Descriptor(in, 0)
		form := b.Super.Journal().Format
		tags, ok := form.Tags(nil, b.At(1))
		if !ok || len(tags) != len(in) {
			t.Fatalf("%v: %d tags, checksum %v", f, len(tags), ok)
		}
		for i, tag := range tags {
			if tag.Block != in[i].Home || tag.Escaped() != (i == 3) || !form.DataOK(9, tag, b.At(uint32(2+i))) {
				t.Errorf("%v: tag %d is %+v", f, i, tag)
			}
			b.At(uint32(2 + i))[700] ^= 1
			if f.SumV2or3() == form.DataOK(9, tag, b.At(uint32(2+i))) {
				t.Errorf("%v: damage of data block %d judged wrongly", f, i)
			}
		}
		for _, off := range []int{HeaderSize, 500, 1020, 1023} {
			b.At(1)[off] ^= 0x10
			if _, ok := form.Tags(nil, b.At(1)); ok == f.SumV2or3() {
				t.Errorf("%v: damage at %d judged wrongly", f, off)
			}
			b.At(1)[off] ^= 0x10
		}
	}
}

// TestDescriptorWithoutLast: the list ends where no tag fits before the tail.
func TestDescriptorWithoutLast(t *testing.T) {
	for _, f := range formats() {
		block := make([]byte, 1024)
		form := Format{BlockSize: 1024, Features: f}
		end := 1024
		if f.SumV2or3() {
			end -= 4
		}
		want := 0
		for p := HeaderSize; p+form.TagSize() <= end; p += form.TagSize() + 16 {
			want++
		}
		if tags, _ := form.Tags(nil, block); len(tags) != want {
			t.Errorf("%v: %d tags, want %d", f, len(tags), want)
		}
	}
}

func TestRevokeBlock(t *testing.T) {
	for _, f := range formats() {
		b := jtest.New(f, 1024, 64, 1, 9)
		in := []uint64{5, 77, 1 << 31}
		if f.Has(Bit64) {
			in = append(in, 1<<40)
		}
		b.Revoke(in)
		form := b.Super.Journal().Format
		r, ok, err := form.DecodeRevoke(b.At(1))
		if err != nil || !ok || r.Len() != len(in) {
			t.Fatalf("%v: %d entries, checksum %v, %v", f, r.Len(), ok, err)
		}
		i := 0
		for got := range r.All() {
			if got != in[i] {
				t.Errorf("%v: entry %d is %d, want %d", f, i, got, in[i])
			}
			i++
		}
		for range r.All() {
			break // stopping early must not panic
		}
		b.At(1)[900] ^= 1
		if _, ok, _ := form.DecodeRevoke(b.At(1)); ok == f.SumV2or3() {
			t.Errorf("%v: damage judged wrongly", f)
		}
	}
}

func TestRevokeCount(t *testing.T) {
	for _, c := range []struct {
		f    Features
		n    uint32
		want int
		bad  bool
	}{
		{0, 0, 0, false}, {0, 16, 0, false}, {0, 19, 0, false}, {0, 20, 1, false}, {Bit64, 31, 1, false},
		{0, 1024, 252, false}, {0, 1025, 0, true}, {SumV3, 1020, 251, false}, {SumV3, 1021, 0, true}, {0, 0xffffffff, 0, true},
	} {
		block := make([]byte, 1024)
		binary.BigEndian.PutUint32(block[12:], c.n)
		r, _, err := Format{BlockSize: 1024, Features: c.f}.DecodeRevoke(block)
		if r.Len() != c.want || errors.Is(err, ErrCorrupt) != c.bad {
			t.Errorf("%v, count %d: %d entries, %v", c.f, c.n, r.Len(), err)
		}
	}
}

func TestCommitSums(t *testing.T) {
	data := []jtest.Block{{Home: 7, Data: bytes.Repeat([]byte{3}, 1024)}}
	for _, f := range formats() {
		b := jtest.New(f, 1024, 64, 1, 9)
		crc := b.Descriptor(data, ^uint32(0))
		raw := b.Commit(1234567, crc)
		form := b.Super.Journal().Format
		c, err := DecodeCommit(raw)
		if err != nil || c.Sec != 1234567 {
			t.Fatalf("%v: %+v, %v", f, c, err)
		}
		want := SumGood
		if f&(SumV1|SumV2|SumV3) == 0 {
			want = SumNone
		}
		if got := form.CommitSum(c, raw, crc); got != want {
			t.Errorf("%v: %v, want %v", f, got, want)
		}
		if f.SumV2or3() {
			raw[600] = 1 // a sector after the first one is not the commit's
			if got := form.CommitSum(c, raw, crc); got != SumPartial {
				t.Errorf("%v: a commit block written in part is %v", f, got)
			}
			raw[50] ^= 1
			if got := form.CommitSum(c, raw, crc); got != SumBad {
				t.Errorf("%v: a damaged commit block is %v", f, got)
			}
		}
		if f.Has(SumV1) {
			if got := form.CommitSum(c, raw, crc^1); got != SumBad {
				t.Errorf("%v: wrong checksum is %v", f, got)
			}
			if got := form.CommitSum(CommitBlock{}, raw, crc); got != SumNone {
				t.Errorf("%v: absent checksum is %v", f, got)
			}
		}
	}
}

func TestCommitTime(t *testing.T) {
	for _, c := range []struct {
		sec  uint64
		nsec uint32
		want string
	}{{0, 0, "1970-01-01T00:00:00Z"}, {1700000000, 5, "2023-11-14T22:13:20.000000005Z"}, {253402300799, 999999999, "9999-12-31T23:59:59.999999999Z"},
		{253402300800, 0, "0001-01-01T00:00:00Z"}, {1 << 63, 0, "0001-01-01T00:00:00Z"}, {5, 1e9, "0001-01-01T00:00:00Z"}} {
		b, err := CommitBlock{Sec: c.sec, Nsec: c.nsec}.Time().MarshalText()
		if err != nil || string(b) != c.want {
			t.Errorf("%d.%d: %s, %v", c.sec, c.nsec, b, err)
		}
	}
}

func TestSuperblock(t *testing.T) {
	for _, f := range append(formats(), FastCommit|SumV3, AsyncCommit|SumV3) {
		b := jtest.New(f, 4096, 4096, 17, 9)
		b.Super.FastLen, b.Super.Head, b.Super.Errno = 100, 33, -5
		b.PutSuper()
		s, err := DecodeSuperblock(b.Buf)
		if err != nil || s != b.Super {
			t.Fatalf("%v: %+v, %v", f, s, err)
		}
		if err := s.Check(4096, 4096); err != nil {
			t.Errorf("%v: %v", f, err)
		}
		want := uint32(4096)
		if f.Has(FastCommit) {
			want = 3996
		}
		if s.Last() != want {
			t.Errorf("%v: log ends at %d, want %d", f, s.Last(), want)
		}
		b.Buf[1000] ^= 1
		if _, err := DecodeSuperblock(b.Buf); errors.Is(err, ErrCorrupt) != f.SumV2or3() {
			t.Errorf("%v: damage judged wrongly: %v", f, err)
		}
	}
}

func TestSuperblockV1(t *testing.T) {
	b := jtest.New(0, 1024, 1024, 1, 9)
	b.Super.Version = 1
	b.PutSuper()
	b.Buf[0x2b] = 0xff // no features in version 1
	s, err := DecodeSuperblock(b.Buf)
	if err != nil || s.Version != 1 || s.Features != 0 {
		t.Fatalf("%+v, %v", s, err)
	}
	before := bytes.Clone(b.Buf[:1024])
	s.MarkEmpty(b.Buf, 12, 40)
	for i := range before {
		if before[i] != b.Buf[i] && (i < 0x18 || i >= 0x24) {
			t.Errorf("byte 0x%x of a version 1 superblock changed", i)
		}
	}
}

func TestSuperblockRefused(t *testing.T) {
	for name, c := range map[string]struct {
		change func(*jtest.Builder)
		is     error
	}{
		"incompat":  {func(b *jtest.Builder) { b.Super.Features |= 0x40 << 32 }, ErrUnsupported},
		"ro_compat": {func(b *jtest.Builder) { b.Super.ROCompat = 1 }, ErrUnsupported},
		"v2 and v3": {func(b *jtest.Builder) { b.Super.Features |= SumV2 | SumV3 }, ErrCorrupt},
		"v1 and v3": {func(b *jtest.Builder) { b.Super.Features |= SumV1 | SumV3 }, ErrCorrupt},
		"size":      {func(b *jtest.Builder) { b.Super.BlockSize = 2048 }, ErrCorrupt},
		"long":      {func(b *jtest.Builder) { b.Super.MaxLen = 4097 }, ErrCorrupt},
		"short":     {func(b *jtest.Builder) { b.Super.MaxLen = 1023 }, ErrCorrupt},
		"first 0":   {func(b *jtest.Builder) { b.Super.First = 0 }, ErrCorrupt},
		"first":     {func(b *jtest.Builder) { b.Super.First = 4096 }, ErrCorrupt},
		"start":     {func(b *jtest.Builder) { b.Super.Start = 4096 }, ErrCorrupt},
		"fast": {func(b *jtest.Builder) {
			b.Super.Features |= FastCommit
			b.Super.FastLen = 0xffffffff
		}, ErrCorrupt},
		"fast start": {func(b *jtest.Builder) {
			b.Super.Features |= FastCommit
			b.Super.Start = 4000
		}, ErrCorrupt},
	} {
		b := jtest.New(0, 1024, 4096, 1, 9)
		c.change(b)
		b.PutSuper()
		s, err := DecodeSuperblock(b.Buf)
		if err == nil {
			err = s.Check(1024, 4096)
		}
		if !errors.Is(err, c.is) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, raw := range [][]byte{nil, make([]byte, 1023), make([]byte, 1024)} {
		if _, err := DecodeSuperblock(raw); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%d zeros: %v", len(raw), err)
		}
	}
}

func TestMarkEmpty(t *testing.T) {
	b := jtest.New(SumV3|Bit64|FastCommit, 4096, 4096, 17, 9)
	b.Super.Errno = -5
	b.PutSuper()
	before := bytes.Clone(b.Buf[:1024])
	b.Super.MarkEmpty(b.Buf, 85, 44)
	s, err := DecodeSuperblock(b.Buf)
	if err != nil || s.Start != 0 || s.Sequence != 85 || s.Head != 44 || s.Errno != 0 || s.Features != SumV3|Bit64 {
		t.Fatalf("%+v, %v", s, err)
	}
	if !bytes.Equal(before[512:], b.Buf[512:1024]) {
		t.Error("bytes beyond the first 512 changed")
	}
	s.MarkEmpty(b.Buf, 86, 0)
	if s, _ = DecodeSuperblock(b.Buf); s.Head != 44 {
		t.Errorf("head %d: it must stay where none is given", s.Head)
	}
}

func TestFeatureNames(t *testing.T) {
	if got := (SumV3 | Bit64 | Revoke).String(); got != "journal_incompat_revoke journal_64bit journal_checksum_v3" {
		t.Error(got)
	}
	if got := (Features(0x40<<32 | 2)).String(); got != "compat 0x2 incompat 0x40" {
		t.Error(got)
	}
}
