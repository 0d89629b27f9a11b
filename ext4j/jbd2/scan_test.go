package jbd2_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"testing"

	. "kagami/ext4j/jbd2"
	"kagami/ext4j/jbd2/jtest"
)

const bs = 1024

func data(v byte) []byte { return bytes.Repeat([]byte{v}, bs) }

// three makes a journal with transactions 9, 10, 11 of two blocks each,
// committed at 100, 200, 300 s; transaction n revokes block n.
func three(f Features) *jtest.Builder {
	b := jtest.New(f, bs, 64, 1, 9)
	for i := range 3 {
		blocks := []jtest.Block{{Home: uint64(50 + i), Data: data(1)}, {Home: uint64(60 + i), Data: data(2)}}
		b.Transaction(uint64(100*(i+1)), blocks, uint64(9+i))
	}
	return b
}

// Layout of a transaction made by three: revoke, descriptor, two data, commit.
const (
	trLen    = 5
	trRevoke = 0
	trDesc   = 1
	trData   = 2
	trCommit = 4
)

func scan(t *testing.T, b *jtest.Builder) Log {
	t.Helper()
	l, err := Scan(b.Super.Journal(), b.Read)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func TestScan(t *testing.T) {
	for _, f := range formats() {
		b := three(f)
		l := scan(t, b)
		if len(l.Transactions) != 3 || l.End != EndMagic || l.EndTID != 12 || l.Next(b.Super.Journal()) != 13 || l.Head != 16 || l.EndAt != 16 {
			t.Fatalf("%v: %d transactions, %v, %d, head %d", f, len(l.Transactions), l.End, l.EndTID, l.Head)
		}
		for i, tr := range l.Transactions {
			first := uint32(1 + trLen*i)
			if tr.TID != TID(9+i) || tr.Commit.Sec != uint64(100*(i+1)) || len(tr.Blocks) != 2 || tr.First != first || tr.Last != first+trCommit {
				t.Errorf("%v: transaction %d is %+v", f, i, tr)
			}
			if tr.Blocks[1].Block != uint64(60+i) || tr.Blocks[1].Logical != first+trData+1 {
				t.Errorf("%v: entry is %+v", f, tr.Blocks[1])
			}
			if len(tr.Revokes) != 1 || tr.Revokes[0] != first || tr.Revoked != 1 {
				t.Errorf("%v: revokes %v (%d)", f, tr.Revokes, tr.Revoked)
			}
		}
	}
}

func TestScanEmpty(t *testing.T) {
	b := jtest.New(0, bs, 64, 0, 77)
	if l := scan(t, b); l.End != EndEmpty || l.EndTID != 77 || len(l.Transactions) != 0 {
		t.Errorf("%+v", l)
	}
}

// TestScanWraps: blocks and sequence both wrap, at every possible place.
func TestScanWraps(t *testing.T) {
	for start := uint32(1); start < 64; start++ {
		b := jtest.New(SumV3, bs, 64, start, 0xfffffffe)
		for i := range 9 {
			b.Transaction(uint64(i), []jtest.Block{{Home: uint64(i), Data: data(byte(i))}, {Home: 99, Data: data(9)}}, 3)
		}
		l := scan(t, b)
		if len(l.Transactions) != 9 || l.EndTID != 7 || l.Transactions[8].TID != 6 {
			t.Fatalf("start %d: %d transactions, end %d (%v)", start, len(l.Transactions), l.EndTID, l.End)
		}
		for _, tr := range l.Transactions {
			for _, e := range tr.Blocks {
				if !b.Super.Journal().DataOK(tr.TID, e.Tag, b.At(e.Logical)) {
					t.Fatalf("start %d: transaction %d: entry %+v points at other data", start, tr.TID, e)
				}
			}
		}
	}
}

// TestScanFull: a log that fills the ring to the last block ends at its own start.
func TestScanFull(t *testing.T) {
	b := jtest.New(0, bs, 1+4*6, 5, 9) // six transactions of four blocks
	for range 6 {
		b.Transaction(1, []jtest.Block{{Home: 1, Data: data(1)}, {Home: 2, Data: data(1)}})
	}
	if b.Head != 5 {
		t.Fatalf("head %d", b.Head)
	}
	if l := scan(t, b); len(l.Transactions) != 6 || l.End != EndSequence || l.EndTID != 15 {
		t.Errorf("%d transactions, %v at %d", len(l.Transactions), l.End, l.EndTID)
	}
}

func TestScanEnds(t *testing.T) {
	second := uint32(1 + trLen) // first block of transaction 10
	flip := func(at uint32, off int) func(*jtest.Builder) {
		return func(b *jtest.Builder) { b.At(at)[off] ^= 0x40 }
	}
	all := formats()
	v23 := []Features{SumV2, SumV3, SumV2 | Bit64, SumV3 | Bit64}
	old := func(change func(*jtest.Builder)) func(*jtest.Builder) {
		// The time of the commit before is moved past the damaged one's.
		return func(b *jtest.Builder) {
			c := b.At(second - 1)
			binary.BigEndian.PutUint64(c[48:], 1000)
			if b.Super.Features.SumV2or3() {
				clear(c[16:20])
				binary.BigEndian.PutUint32(c[16:], jtest.CRC32C(jtest.CRC32C(^uint32(0), b.Super.UUID[:]), c))
			}
			change(b)
		}
	}
	for _, c := range []struct {
		name   string
		in     []Features
		change func(*jtest.Builder)
		n      int
		end    Reason
		err    error
	}{
		{"magic", all, flip(second, 0), 1, EndMagic, nil},
		{"type", all, flip(second, 5), 1, EndType, nil},
		{"sequence", all, flip(second, 9), 1, EndSequence, nil},
		{"commit magic", all, flip(second+trCommit, 0), 1, EndMagic, nil},
		{"commit sequence", all, flip(second+trCommit, 11), 1, EndSequence, nil},
		{"data, no v1", v23, flip(second+trData, 5), 3, EndMagic, nil},
		{"data, v1", []Features{SumV1, SumV1 | Bit64}, flip(second+trData, 5), 1, EndBadCommit, nil},
		{"data, v1, stale", []Features{SumV1}, old(flip(second+trData, 5)), 1, EndStale, nil},
		{"data, v1, async", []Features{SumV1 | AsyncCommit}, flip(second+trData, 5), 1, EndBadCommit, nil},
		{"last data, v1, async", []Features{SumV1 | AsyncCommit}, flip(second+trLen+trData, 5), 2, EndInterrupted, nil},
		{"commit sum", v23, flip(second+trCommit, 48), 1, EndBadCommit, nil},
		{"commit sum, stale", v23, old(flip(second+trCommit, 16)), 1, EndStale, nil},
		{"commit sum, async", []Features{SumV3 | AsyncCommit}, flip(second+trCommit, 16), 1, EndInterrupted, nil},
		{"commit tail lost", v23, flip(second+trCommit, 700), 3, EndMagic, nil},
		{"descriptor sum", v23, flip(second+trDesc, 1000), 0, 0, ErrCorrupt},
		{"descriptor sum, stale", v23, old(flip(second+trDesc, 1000)), 1, EndStale, nil},
		{"descriptor sum, no commit", v23, func(b *jtest.Builder) {
			flip(second+trDesc, 1000)(b)
			flip(second+trCommit, 0)(b)
		}, 1, EndMagic, nil},
		{"revoke sum", v23, flip(second+trRevoke, 900), 0, 0, ErrCorrupt},
		{"revoke sum, stale", v23, old(flip(second+trRevoke, 900)), 1, EndStale, nil},
		{"revoke count", []Features{0, SumV1, Bit64}, flip(second+trRevoke, 13), 0, 0, ErrCorrupt},
		{"revoke count, no commit", []Features{0}, func(b *jtest.Builder) {
			flip(second+trRevoke, 13)(b)
			flip(second+trCommit, 0)(b)
		}, 1, EndMagic, nil},
	} {
		for _, f := range c.in {
			b := three(f)
			c.change(b)
			l, err := Scan(b.Super.Journal(), b.Read)
			if !errors.Is(err, c.err) {
				t.Errorf("%s, %v: %v, want %v", c.name, f, err, c.err)
				continue
			}
			if next := l.Next(b.Super.Journal()); err == nil && l.End == EndBadCommit && next != l.EndTID+1+63 {
				t.Errorf("%s, %v: next is %d after %d", c.name, f, next, l.EndTID)
			}
			if err == nil && (len(l.Transactions) != c.n || l.End != c.end || l.EndTID != TID(9+c.n)) {
				t.Errorf("%s, %v: %d transactions, %v, end %d", c.name, f, len(l.Transactions), l.End, l.EndTID)
			}
		}
	}
}

// TestScanTwoBadAsync: the first bad commit stays the end.
func TestScanTwoBadAsync(t *testing.T) {
	b := three(SumV3 | AsyncCommit)
	b.At(1 + trLen + trCommit)[16] ^= 1
	b.At(1 + 2*trLen + trCommit)[16] ^= 1
	if l := scan(t, b); len(l.Transactions) != 1 || l.EndTID != 10 || l.End != EndInterrupted {
		t.Errorf("%d transactions, end %d, %v", len(l.Transactions), l.EndTID, l.End)
	}
}

// TestScanEndless: a ring of revoke blocks of one transaction has no end.
func TestScanEndless(t *testing.T) {
	b := jtest.New(0, bs, 64, 1, 9)
	for range 63 {
		b.Revoke([]uint64{1})
	}
	if _, err := Scan(b.Super.Journal(), b.Read); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v", err)
	}
}

// TestScanOverrun: a transaction longer than the ring is an end when it has
// no commit, and corrupt when it has one.
func TestScanOverrun(t *testing.T) {
	b := jtest.New(0, bs, 64, 40, 9)
	b.Transaction(1, []jtest.Block{{Home: 1, Data: data(1)}})
	d := b.Take(TypeDescriptor) // zeros: 42 tags
	at := b.Head
	_ = d
	if l := scan(t, b); len(l.Transactions) != 1 || l.End == EndEmpty {
		t.Errorf("%+v", l)
	}
	tags, _ := b.Super.Journal().Tags(nil, d)
	b.Head = (at-1+uint32(len(tags)))%63 + 1
	b.Take(TypeDescriptor)
	b.Head = (b.Head-1+uint32(len(tags)))%63 + 1
	b.Commit(2, 0)
	if _, err := Scan(b.Super.Journal(), b.Read); !errors.Is(err, ErrCorrupt) {
		t.Errorf("%v", err)
	}
}

func TestScanReadError(t *testing.T) {
	for _, f := range []Features{SumV3, SumV1} {
		b := three(f)
		for fail := range 16 {
			n := 0
			_, err := Scan(b.Super.Journal(), func(l uint32, p []byte) error {
				if n++; n > fail {
					return io.ErrUnexpectedEOF
				}
				return b.Read(l, p)
			})
			// v3 reads ten blocks in all, v1 the data blocks too.
			if want := fail < 10 || f == SumV1; errors.Is(err, io.ErrUnexpectedEOF) != want {
				t.Errorf("%v, read %d fails: %v", f, fail, err)
			}
		}
	}
}

func TestScanRefusesBounds(t *testing.T) {
	good := Journal{Format: Format{BlockSize: 1024}, First: 1, Last: 64, Start: 1}
	for _, change := range []func(*Journal){
		func(j *Journal) { j.BlockSize = 512 }, func(j *Journal) { j.BlockSize = 3000 }, func(j *Journal) { j.BlockSize = 1 << 17 },
		func(j *Journal) { j.First = 0 }, func(j *Journal) { j.Last = 1 }, func(j *Journal) { j.Start = 64 },
		func(j *Journal) { j.First = 5 },
	} {
		j := good
		change(&j)
		if _, err := Scan(j, nil); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%+v: %v", j, err)
		}
	}
}

func TestFastPending(t *testing.T) {
	b := jtest.New(FastCommit|SumV3, bs, 2048, 1, 9)
	b.Transaction(1, []jtest.Block{{Home: 1, Data: data(1)}})
	first, last := b.Super.FastArea()
	if first != 2048-256+1 || last != 2048 {
		t.Fatalf("area %d to %d", first, last)
	}
	l := scan(t, b)
	check := func(want bool) {
		t.Helper()
		if got, err := FastPending(b.Super, l, b.Read); got != want || err != nil {
			t.Errorf("pending: %v, %v", got, err)
		}
	}
	check(false)
	le := binary.LittleEndian
	p := b.At(first)
	le.PutUint16(p, 9)
	le.PutUint16(p[2:], 8)
	le.PutUint32(p[8:], 10)
	check(true)
	le.PutUint32(p[8:], 9)
	check(false)
	le.PutUint32(p[8:], 10)
	l.End = EndEmpty
	check(false)
	b.Super.Features &^= FastCommit
	l.End = EndMagic
	check(false)
}
