package recover

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
	"kagami/ext4j/jbd2/jtest"
)

// model replays a journal the plain way: transaction by transaction.
type model struct {
	revoked map[uint64]jbd2.TID
	log     []modelEntry
}

type modelEntry struct {
	tid jbd2.TID
	jtest.Block
}

func (m *model) result() map[uint64][]byte {
	out := map[uint64][]byte{}
	for _, e := range m.log {
		if by, ok := m.revoked[e.Home]; !ok || e.tid.After(by) {
			out[e.Home] = e.Data
		}
	}
	return out
}

// TestReplayModel compares with a plain model on random journals of all
// formats, the sequence and the ring wrapping.
func TestReplayModel(t *testing.T) {
	seed := seedOf(t)
	sums := []jbd2.Features{0, jbd2.SumV1, jbd2.SumV2, jbd2.SumV3}
	s := newSynth(t, 0, "-O", "metadata_csum")
	for round := range 40 * soak(t) {
		rng := rand.New(rand.NewPCG(seed, uint64(round)))
		f := sums[rng.IntN(4)] | jbd2.Revoke | jbd2.Features(rng.IntN(2))*jbd2.Bit64
		start := 1 + rng.Uint32N(1023)
		tid := jbd2.TID(0) - jbd2.TID(rng.Uint32N(8))
		s.b = jtest.New(f, 1024, 1024, start, tid)
		s.b.Super.UUID = s.j.super.UUID
		m := randomLog(s, rng)
		s.store()
		d, rep, err := s.run(Options{})
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		want := m.result()
		if rep.Written != len(want) || rep.Logged != len(m.log) || rep.Damaged != 0 {
			t.Fatalf("round %d: %+v, want %d of %d blocks", round, rep, len(want), len(m.log))
		}
		for n := range s.fs.Blocks {
			is, was := d.b[n*1024:(n+1)*1024], s.block(n)
			if data, ok := want[n]; ok {
				was = data
			}
			if !bytes.Equal(is, was) && n != 1 && n != s.journalBlock() {
				t.Fatalf("round %d: block %d is wrong", round, n)
			}
		}
		checkLeft(t, s, d, rep)
	}
}

func (s *synth) journalBlock() uint64 {
	at, _ := s.j.bmap.Physical(0)
	return at
}

// randomLog writes some transactions, and then part of one more.
func randomLog(s *synth, rng *rand.Rand) *model {
	m := &model{revoked: map[uint64]jbd2.TID{}}
	homes := s.free(60)
	n := 1 + rng.IntN(12)
	for i := range n {
		rng.Shuffle(len(homes), func(i, j int) { homes[i], homes[j] = homes[j], homes[i] })
		blocks := random(rng, homes[:rng.IntN(40)], 1024)
		revokes := homes[40 : 40+rng.IntN(8)]
		for _, b := range blocks {
			m.log = append(m.log, modelEntry{s.b.TID, b})
		}
		for _, h := range revokes {
			m.revoked[h] = s.b.TID
		}
		s.b.Transaction(uint64(i), blocks, revokes...)
	}
	if rng.IntN(2) == 0 {
		s.b.Revoke(homes[:3])
		s.b.Descriptor(random(rng, homes[:5], 1024), 0)
	}
	return m
}

// checkLeft checks how superblock and journal are left.
func checkLeft(t *testing.T, s *synth, d *memDevice, rep Report) {
	t.Helper()
	fs, err := ext4.Probe(d, 0, int64(len(d.b)))
	if err != nil {
		t.Fatal(err)
	}
	j, err := openJournal(fs)
	if err != nil {
		t.Fatal(err)
	}
	if fs.Incompat&ext4.Recover != 0 || fs.FreeBlocks != rep.FreeBlocks || fs.FreeInodes != rep.FreeInodes {
		t.Errorf("superblock: %v, %d and %d free", fs.Incompat, fs.FreeBlocks, fs.FreeInodes)
	}
	if j.super.Start != 0 || j.super.Sequence != rep.LastTID+2 || j.super.Errno != 0 {
		t.Errorf("journal: %+v after transaction %d", j.super, rep.LastTID)
	}
	again := bytes.Clone(d.b)
	if rep, err := Run(d, 0, int64(len(d.b)), Options{}); err != nil || rep.Needed || !bytes.Equal(again, d.b) {
		t.Errorf("a second run: %+v, %v", rep, err)
	}
}

// TestSuperblock: the journal's copy of the superblock is taken over; free counts come from
// the descriptors, the record of errors from the disk, the error state from all.
func TestSuperblock(t *testing.T) {
	le := binary.LittleEndian
	for _, csum := range []string{"metadata_csum", "^metadata_csum"} {
		s := newSynth(t, jbd2.SumV3|jbd2.Revoke, "-O", csum)
		s.typical(3)
		s.editSuper(func(r *ext4.Raw) {
			copy(r[0x194:], bytes.Repeat([]byte{0xe5}, 0x6c))
			r.SetState(ext4.StateValid | ext4.StateErrors)
		})
		s.store()
		d, rep, err := s.run(Options{})
		if err != nil {
			t.Fatal(err)
		}
		r := (*ext4.Raw)(d.b[ext4.Offset:])
		free := uint64(105)
		for g := uint32(1); g < s.fs.Groups; g++ {
			gd, err := s.fs.Group(g)
			if err != nil {
				t.Fatal(err)
			}
			free += uint64(gd.FreeBlocks)
		}
		switch {
		case r[0x200] != 5 || r[0x30] != 5:
			t.Error("the journal's last copy was not taken over")
		case !bytes.Equal(r[0x194:0x200], bytes.Repeat([]byte{0xe5}, 0x6c)):
			t.Error("the record of errors was lost")
		case r.State() != ext4.StateValid|ext4.StateErrors:
			t.Errorf("state %d", r.State())
		case rep.FreeBlocks != free || uint64(le.Uint32(r[0xc:])) != free || le.Uint32(r[0x10:]) != rep.FreeInodes || rep.FreeInodes == s.fs.FreeInodes:
			t.Errorf("free: %d blocks, %d inodes, want %d blocks", rep.FreeBlocks, rep.FreeInodes, free)
		case !r.ChecksumOK():
			t.Error("wrong checksum")
		}
		checkLeft(t, s, d, rep)
	}
}

func TestJournalErrno(t *testing.T) {
	for _, start := range []uint32{0, 1} {
		s := newSynth(t, jbd2.SumV3)
		s.b.Super.Errno, s.b.Super.Start = -5, start
		s.store()
		d, rep, err := s.run(Options{})
		if err != nil || !rep.MarkedErrors {
			t.Fatalf("%+v, %v", rep, err)
		}
		if r := (*ext4.Raw)(d.b[ext4.Offset:]); r.State() != ext4.StateValid|ext4.StateErrors {
			t.Errorf("state %d", r.State())
		}
		j, err := jbd2.DecodeSuperblock(d.b[s.journalBlock()*1024:])
		if err != nil || j.Errno != 0 || j.Start != 0 || (start == 0 && j.Sequence != 7) {
			t.Errorf("%+v, %v", j, err)
		}
	}
}

// TestDamagedSynthetic: a damaged data block is skipped, a damaged commit ends the log; both
// leave a mark in the superblock.
func TestDamagedSynthetic(t *testing.T) {
	s := newSynth(t, jbd2.SumV3)
	homes := s.free(3)
	rng := rand.New(rand.NewPCG(4, 4))
	first, second := random(rng, homes, 1024), random(rng, homes[:2], 1024)
	s.b.Transaction(1, first)
	s.b.Transaction(2, second)
	s.b.At(7)[4] ^= 1 // second's first data block
	s.store()
	d, rep, err := s.run(Options{})
	if err != nil || rep.Damaged != 1 || rep.BadBlocks[0] != (BadBlock{TID: 8, Block: homes[0], Logical: 7}) || rep.MarkedErrors {
		t.Fatalf("%+v, %v", rep, err)
	}
	for i, want := range []jtest.Block{first[0], second[1], first[2]} {
		if !bytes.Equal(d.b[homes[i]*1024:][4:1024], want.Data[4:]) {
			t.Errorf("block %d is wrong", i)
		}
	}
	if r := (*ext4.Raw)(d.b[ext4.Offset:]); r.State() != 0 {
		t.Errorf("state %d", r.State())
	}

	s.b.At(7)[4] ^= 1
	s.b.At(9)[50] ^= 1 // second's commit block
	s.store()
	d, rep, err = s.run(Options{})
	if err != nil || rep.Transactions != 1 || rep.End != jbd2.EndBadCommit || !rep.MarkedErrors {
		t.Fatalf("%+v, %v", rep, err)
	}
	if r := (*ext4.Raw)(d.b[ext4.Offset:]); r.State() != ext4.StateValid|ext4.StateErrors {
		t.Errorf("state %d", r.State())
	}
	if j, err := jbd2.DecodeSuperblock(d.b[s.journalBlock()*1024:]); err != nil || j.Sequence != 8+1+1023 {
		t.Errorf("%+v, %v", j, err)
	}
}

// TestManyDamaged: the list of bad blocks is bounded.
func TestManyDamaged(t *testing.T) {
	s := newSynth(t, jbd2.SumV3)
	s.b.Transaction(1, random(rand.New(rand.NewPCG(4, 4)), s.free(300), 1024))
	for n := range uint32(320) {
		if h, ok := jbd2.DecodeHeader(s.b.At(n)); !ok || h.Type == 0 {
			s.b.At(n)[9] ^= 1
		}
	}
	s.store()
	_, rep, err := s.run(Options{})
	if err != nil || rep.Damaged != 300 || len(rep.BadBlocks) != maxBadBlocks || rep.Written != 0 {
		t.Errorf("%d damaged, %d named, %v", rep.Damaged, len(rep.BadBlocks), err)
	}
}

// TestView: the view reads what Run leaves, in pieces of any size.
func TestView(t *testing.T) {
	for name, s := range crashCases(t) {
		d, _, err := s.run(Options{})
		if err != nil {
			t.Fatal(err)
		}
		before := bytes.Clone(s.img)
		v, _, err := View(bytes.NewReader(s.img), 0, int64(len(s.img)))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(readAll(t, v), d.b) {
			t.Errorf("%s: the view differs from the result", name)
		}
		rng := rand.New(rand.NewPCG(2, 2))
		for range 300 {
			off, n := rng.Int64N(int64(len(d.b))), rng.IntN(5000)
			if rng.IntN(2) == 0 {
				off %= 8192
			}
			p := make([]byte, n)
			got, err := v.ReadAt(p, off)
			want := min(n, len(d.b)-int(off))
			if got != want || (err == io.EOF) != (want < n) || !bytes.Equal(p[:got], d.b[off:][:got]) {
				t.Fatalf("%s: read of %d at %d: %d, %v", name, n, off, got, err)
			}
		}
		if _, err := v.ReadAt(make([]byte, 1), -1); err == nil {
			t.Error("negative offset accepted")
		}
		if n, err := v.ReadAt(make([]byte, 1), int64(len(d.b))); n != 0 || err != io.EOF {
			t.Errorf("read at the end: %d, %v", n, err)
		}
		if !bytes.Equal(before, s.img) {
			t.Error("the view wrote")
		}
	}
}

// TestOffset: the same within a larger image, whose other bytes stay.
func TestOffset(t *testing.T) {
	s := newSynth(t, jbd2.SumV3|jbd2.Revoke)
	s.typical(1)
	s.store()
	want, _, err := s.run(Options{})
	if err != nil {
		t.Fatal(err)
	}
	const off = 1<<20 + 512
	pad := bytes.Repeat([]byte{0x5a}, off)
	d := &memDevice{b: bytes.Join([][]byte{pad, s.img, pad}, nil)}
	if _, err := Run(d, off, int64(len(s.img)), Options{}); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(d.b, bytes.Join([][]byte{pad, want.b, pad}, nil)) {
		t.Error("another result at an offset")
	}
}

// FuzzRun changes bytes of superblock, descriptors, inode table and journal.
// Whatever they are: no panic, a refusal writes nothing, and success is stable.
func FuzzRun(f *testing.F) {
	var cases []*synth
	for _, feat := range []jbd2.Features{jbd2.SumV3 | jbd2.Bit64 | jbd2.Revoke, jbd2.Revoke, jbd2.SumV1} {
		s := newSynth(f, feat, "-O", []string{"metadata_csum", "^metadata_csum"}[len(cases)%2])
		s.typical(uint64(len(cases)))
		s.store()
		cases = append(cases, s)
	}
	f.Add(uint8(0), []byte{})
	f.Add(uint8(1), []byte{0, 0, 0x60, 0xff})
	f.Add(uint8(2), []byte{3, 0, 0x10, 0xff, 3, 4, 0x0f, 1})
	f.Fuzz(func(t *testing.T, kind uint8, edits []byte) {
		s := cases[int(kind)%len(cases)]
		img := bytes.Clone(s.img)
		g := decodeTable(img)
		for ; len(edits) >= 4; edits = edits[4:] {
			off := int(edits[1])<<8 | int(edits[2])
			switch edits[0] % 4 {
			case 0:
				off = ext4.Offset + off%4096
			case 1:
				off = g + off%4096
			case 2:
				off = int(s.journalBlock())*1024 + off%1024
			default:
				off = int(s.journalBlock())*1024 + off
			}
			img[off%len(img)] = edits[3]
		}
		fixSuper(img)
		d := &memDevice{b: bytes.Clone(img)}
		v, _, verr := View(bytes.NewReader(img), 0, int64(len(img)))
		_, err := Run(d, 0, int64(len(img)), Options{})
		if fmt.Sprint(err) != fmt.Sprint(verr) || (err != nil && d.wrote) {
			t.Fatalf("run: %v (wrote %v), view: %v", err, d.wrote, verr)
		}
		if err != nil {
			return
		}
		if !bytes.Equal(readAll(t, v), d.b) {
			t.Fatal("the view differs from the result")
		}
		d.wrote = false
		if rep, err := Run(d, 0, int64(len(img)), Options{}); err != nil || rep.Needed || d.wrote {
			t.Fatalf("a second run: %+v, %v", rep, err)
		}
	})
}

// decodeTable is the offset of the first inode table.
func decodeTable(img []byte) int { return int(binary.LittleEndian.Uint32(img[2048+8:])) * 1024 }

// fixSuper redoes the superblock's checksum, so that edits get past it.
func fixSuper(img []byte) { (*ext4.Raw)(img[ext4.Offset:]).SetChecksum() }

// TestGrown: a file system that was growing: the journal writes blocks beyond the end
// that the superblock on disk has, and a superblock that moves that end.
func TestGrown(t *testing.T) {
	const blocks = 8192 // of the image; the superblock on disk says 8000
	s := newSynth(t, jbd2.SumV3)
	grown := s.superCopy(func(r *ext4.Raw) {})
	s.editSuper(func(r *ext4.Raw) { binary.LittleEndian.PutUint32(r[4:], 8000) })
	s.reopen()
	beyond := random(rand.New(rand.NewPCG(1, 1)), []uint64{8100}, 1024)[0]
	s.b.Transaction(1, []jtest.Block{beyond, grown})
	s.store()
	d, rep, err := s.run(Options{})
	if err != nil {
		t.Fatal(err)
	}
	fs, err := ext4.Probe(d, 0, int64(len(d.b)))
	if err != nil || s.fs.Blocks != 8000 || fs.Blocks != blocks || !bytes.Equal(d.b[8100<<10:][4:1024], beyond.Data[4:]) {
		t.Errorf("%d blocks, %v", fs.Blocks, err)
	}
	checkLeft(t, s, d, rep)
}
