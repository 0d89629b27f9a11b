package recover

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"strings"
	"testing"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
	"kagami/ext4j/jbd2/jtest"
)

// TestRefused: what cannot be done exactly is refused, and nothing is written.
func TestRefused(t *testing.T) {
	const feats = jbd2.SumV3 | jbd2.Revoke
	le := binary.LittleEndian
	raw32 := func(off int, v uint32) func(*synth) {
		return func(s *synth) { s.editSuper(func(r *ext4.Raw) { le.PutUint32(r[off:], v) }) }
	}
	or32 := func(off int, v uint32) func(*synth) {
		return func(s *synth) { s.editSuper(func(r *ext4.Raw) { le.PutUint32(r[off:], le.Uint32(r[off:])|v) }) }
	}
	writes := func(blocks ...func(*synth) jtest.Block) func(*synth) {
		return func(s *synth) {
			s.b = jtest.New(feats, 1024, s.j.super.MaxLen, 1, 7)
			s.b.Super.UUID = s.j.super.UUID
			var all []jtest.Block
			for _, b := range blocks {
				all = append(all, b(s))
			}
			s.b.Transaction(1, all)
			s.store()
		}
	}
	at := func(home uint64) func(*synth) jtest.Block {
		return func(s *synth) jtest.Block {
			return random(rand.New(rand.NewPCG(1, 1)), []uint64{home}, 1024)[0]
		}
	}
	copySuper := func(change func(*ext4.Raw)) func(*synth) jtest.Block {
		return func(s *synth) jtest.Block { return s.superCopy(change) }
	}
	for name, c := range map[string]struct {
		change func(*synth)
		words  string
	}{
		"checksum":           {func(s *synth) { s.img[ext4.Offset+0x80] ^= 1 }, "wrong checksum of the superblock"},
		"fs incompat":        {or32(0x60, 1<<30), "incompat 0x40000000"},
		"fs ro_compat":       {or32(0x64, 1<<30), "ro_compat 0x40000000"},
		"no journal":         {func(s *synth) { raw32(0x5c, uint32(s.fs.Compat&^ext4.HasJournal))(s) }, "has no journal"},
		"external":           {raw32(0xe0, 0), "on another device"},
		"both":               {raw32(0xe4, 0x801), "both an internal and an external"},
		"inode out of range": {raw32(0xe0, 0xffffffff), "inode 4294967295"},
		"directory":          {raw32(0xe0, 2), "inode 2 is no journal"},
		"short":              {raw32(0xe0, 7), "journal"},
		"clean with log": {func(s *synth) {
			s.editSuper(func(r *ext4.Raw) { r.SetIncompat(r.Incompat() &^ ext4.Recover) })
		}, "marked clean, but its journal holds transactions from 7 on"},
		"journal magic":    {func(s *synth) { s.jblock(0)[0] = 0 }, "no journal superblock"},
		"journal checksum": {func(s *synth) { s.jblock(0)[0x59] ^= 1 }, "checksum of the journal"},
		"journal incompat": {func(s *synth) { s.b.Super.Features |= 1 << 60; s.store() }, "unknown incompatible features"},
		"journal start":    {func(s *synth) { s.b.Super.Start = 1024; s.store() }, "log starts at block 1024"},
		"journal length": {func(s *synth) {
			s.b.Super.MaxLen = 1025
			s.b.Buf = append(s.b.Buf, make([]byte, 1024)...)
			s.storeSuper()
		}, "1025 blocks claimed"},
		"journal size":       {func(s *synth) { s.b.Super.BlockSize = 4096; s.storeSuper() }, "block size 4096"},
		"descriptor":         {func(s *synth) { s.b.At(2)[900] ^= 1; s.store() }, "wrong checksum of a descriptor or revoke block"},
		"outside":            {writes(at(5), at(8192)), "writes block 8192, outside the device"},
		"far outside":        {writes(at(1 << 31)), "outside the device"},
		"into the journal":   {func(s *synth) { p, _ := s.j.bmap.Physical(700); writes(at(p))(s) }, "part of the journal"},
		"garbage superblock": {writes(at(1)), "superblock in the journal"},
		"other block size":   {writes(copySuper(func(r *ext4.Raw) { r[0x18] = 2 })), "superblock in the journal"},
		"other journal":      {writes(copySuper(func(r *ext4.Raw) { r[0xe0] = 9 })), "the journal would move"},
		"other incompat":     {writes(copySuper(func(r *ext4.Raw) { r.SetIncompat(r.Incompat() | 1<<30) })), "superblock in the journal"},
		"garbage inode table": {func(s *synth) {
			g, err := s.fs.Group(0)
			if err != nil {
				s.t.Fatal(err)
			}
			writes(at(g.InodeTable + 1))(s)
		}, "after the replay"},
		"garbage descriptors": {writes(at(2)), "after the replay"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newSynth(t, feats, "-O", "metadata_csum,^64bit")
			s.typical(1)
			s.store()
			c.change(s)
			d, _, err := s.run(Options{})
			if !errors.Is(err, ErrRefused) || d.wrote || d.syncs > 0 {
				t.Fatalf("%v (wrote %v)", err, d.wrote)
			}
			if !strings.Contains(err.Error(), c.words) {
				t.Errorf("%q does not say %q", err, c.words)
			}
			if _, _, err2 := View(bytes.NewReader(s.img), 0, int64(len(s.img))); err2 == nil || err2.Error() != err.Error() {
				t.Errorf("View says %v", err2)
			}
		})
	}
}

// jblock is block n of the journal in the image.
func (s *synth) jblock(n uint64) []byte {
	at, _ := s.j.bmap.Physical(n)
	return s.block(at)
}

// storeSuper puts only the journal's superblock into the image.
func (s *synth) storeSuper() {
	s.b.PutSuper()
	copy(s.jblock(0), s.b.Buf[:1024])
}

func TestNotNeeded(t *testing.T) {
	s := newSynth(t, jbd2.SumV3, "-L", "a label")
	s.editSuper(func(r *ext4.Raw) { r.SetIncompat(r.Incompat() &^ ext4.Recover) })
	d, rep, err := s.run(Options{})
	if err != nil || rep.Needed || d.wrote || rep.Label != "a label" || rep.UUID[0] != 0x11 || rep.FreeBlocks != s.fs.FreeBlocks {
		t.Errorf("%+v, %v, wrote %v", rep, err, d.wrote)
	}
	v, _, err := View(bytes.NewReader(s.img), 0, int64(len(s.img)))
	if err != nil || !bytes.Equal(readAll(t, v), s.img) {
		t.Errorf("view of a clean file system: %v", err)
	}
	if _, err := Run(&memDevice{b: make([]byte, 1<<20)}, 0, 1<<20, Options{}); !errors.Is(err, ext4.ErrNotExt4) || errors.Is(err, ErrRefused) {
		t.Errorf("zeros: %v", err)
	}
	if _, err := Run(d, 100, 1<<20, Options{}); !errors.Is(err, ErrRefused) {
		t.Errorf("odd offset: %v", err)
	}
	ext2 := &memDevice{b: fresh(t, "-t", "ext2")}
	if rep, err := Run(ext2, 0, int64(len(ext2.b)), Options{}); err != nil || rep.Needed || ext2.wrote {
		t.Errorf("ext2: %+v, %v", rep, err)
	}
}

func readAll(t testing.TB, r io.ReaderAt) []byte {
	t.Helper()
	b, err := io.ReadAll(io.NewSectionReader(r, 0, 1<<40))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestFastCommitsRefused: pending fast commits are refused, stale ones do not matter.
func TestFastCommitsRefused(t *testing.T) {
	for _, c := range []struct {
		tid     uint32
		pending bool
	}{{8, true}, {7, false}, {9, false}} {
		s := newSynth(t, jbd2.SumV3|jbd2.FastCommit, "-O", "fast_commit", "-J", "size=2,fast_commit_size=128")
		s.b.Super.FastLen = 128
		s.b.Transaction(1, random(rand.New(rand.NewPCG(1, 1)), s.free(3), 1024))
		first, _ := s.b.Super.FastArea()
		p := s.b.At(first)
		binary.LittleEndian.PutUint16(p, 9)
		binary.LittleEndian.PutUint32(p[8:], c.tid)
		s.store()
		d, _, err := s.run(Options{})
		if errors.Is(err, ErrRefused) != c.pending || d.wrote == c.pending {
			t.Errorf("tid %d: %v, wrote %v", c.tid, err, d.wrote)
		}
	}
}

// failDevice fails in its nth operation.
type failDevice struct {
	memDevice
	left int
}

var errDevice = errors.New("device error")

func (f *failDevice) fail() bool { f.left--; return f.left < 0 }

func (f *failDevice) ReadAt(p []byte, off int64) (int, error) {
	if f.fail() {
		return 0, errDevice
	}
	return f.memDevice.ReadAt(p, off)
}

func (f *failDevice) WriteAt(p []byte, off int64) (int, error) {
	if f.fail() {
		return 0, errDevice
	}
	return f.memDevice.WriteAt(p, off)
}

func (f *failDevice) Datasync() error {
	if f.fail() {
		return errDevice
	}
	return f.memDevice.Datasync()
}

// TestDeviceErrors: every failing operation ends the run with its error,
// which is no refusal, and nothing is done after it.
func TestDeviceErrors(t *testing.T) {
	s := newSynth(t, jbd2.SumV3|jbd2.Revoke)
	s.typical(1)
	s.store()
	for n := 0; ; n++ {
		d := &failDevice{memDevice: memDevice{b: bytes.Clone(s.img)}, left: n}
		_, err := Run(d, 0, int64(len(d.b)), Options{})
		if err == nil {
			if n < 100 {
				t.Errorf("only %d operations", n)
			}
			return
		}
		if !errors.Is(err, errDevice) || errors.Is(err, ErrRefused) || d.left != -1 {
			t.Fatalf("operation %d fails: %v, %d operations followed", n, err, -1-d.left)
		}
	}
}

// TestJournalMoves: a journal that maps its own inode elsewhere is refused.
func TestJournalMoves(t *testing.T) {
	s := newSynth(t, 0, "-O", "^metadata_csum,^64bit")
	g, err := s.fs.Group(0)
	if err != nil {
		t.Fatal(err)
	}
	at := 7 * uint64(s.fs.InodeSize)
	home := g.InodeTable + at/1024
	b := bytes.Clone(s.block(home))
	extent := b[at%1024+0x28+12:] // the inode's first extent: its place is at 8
	binary.LittleEndian.PutUint32(extent[8:], binary.LittleEndian.Uint32(extent[8:])+1)
	s.b.Transaction(1, []jtest.Block{{Home: home, Data: b}})
	s.store()
	d, _, err := s.run(Options{})
	if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), "the journal would move") || d.wrote {
		t.Errorf("%v (wrote %v)", err, d.wrote)
	}
}
