package recover

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"sync"
	"testing"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
	"kagami/ext4j/jbd2/jtest"
)

// synth is an image in memory with a journal made by hand.
type synth struct {
	t   testing.TB
	img []byte
	fs  *ext4.FS
	j   *journal
	b   *jtest.Builder
}

// newSynth makes an image of 8 MiB with 1 KiB blocks, and a builder for its journal.
// The journal's features are those mke2fs and the kernel would give it, and f.
func newSynth(t testing.TB, f jbd2.Features, args ...string) *synth {
	t.Helper()
	s := &synth{t: t, img: fresh(t, args...)}
	s.reopen()
	j := s.j.super
	s.b = jtest.New(f, j.BlockSize, j.MaxLen, 1, 7)
	s.b.Super.UUID = j.UUID
	s.editSuper(func(r *ext4.Raw) { r.SetIncompat(r.Incompat() | ext4.Recover) })
	return s
}

// freshImages are the images fresh has made, by their arguments.
var freshImages sync.Map

// fresh is a new file system of 8 MiB with 1 KiB blocks.
func fresh(t testing.TB, args ...string) []byte {
	t.Helper()
	if !slices.Contains(args, "-t") {
		args = append([]string{"-t", "ext4"}, args...)
	}
	key := fmt.Sprint(args)
	if img, ok := freshImages.Load(key); ok {
		return bytes.Clone(img.([]byte))
	}
	path := format(t, 8, append([]string{"-b", "1024", "-U", "11223344-5566-7788-99aa-bbccddeeff00"}, args...)...)
	img := rawAt(t, path, 0, 8<<20)
	freshImages.Store(key, img)
	return bytes.Clone(img)
}

// reopen reads superblock and journal again.
func (s *synth) reopen() {
	s.t.Helper()
	var err error
	if s.fs, err = ext4.Probe(bytes.NewReader(s.img), 0, int64(len(s.img))); err != nil {
		s.t.Fatal(err)
	}
	if s.j, err = openJournal(s.fs); err != nil {
		s.t.Fatal(err)
	}
}

// editSuper changes the superblock and redoes its checksum.
func (s *synth) editSuper(change func(*ext4.Raw)) {
	r := (*ext4.Raw)(s.img[ext4.Offset:])
	change(r)
	r.SetChecksum()
}

// store puts the builder's journal into the image.
func (s *synth) store() []byte {
	s.b.PutSuper()
	for n := range s.b.Super.MaxLen {
		at, _ := s.j.bmap.Physical(uint64(n))
		copy(s.block(at), s.b.At(n))
	}
	return s.img
}

func (s *synth) block(n uint64) []byte {
	bs := uint64(s.fs.BlockSize)
	return s.img[n*bs : (n+1)*bs]
}

// free are blocks that belong to no file, for the journal to write.
func (s *synth) free(n int) []uint64 {
	var out []uint64
	for b := s.fs.Blocks - 1; len(out) < n; b-- {
		if !s.j.bmap.Contains(b) {
			out = append(out, b)
		}
	}
	return out
}

// superCopy is a journal copy of the superblock's block, with a change.
func (s *synth) superCopy(change func(*ext4.Raw)) jtest.Block {
	home := uint64(ext4.Offset) / uint64(s.fs.BlockSize)
	b := bytes.Clone(s.block(home))
	r := (*ext4.Raw)(b[ext4.Offset%int(s.fs.BlockSize):])
	change(r)
	r.SetChecksum()
	return jtest.Block{Home: home, Data: b}
}

// groupCopy is a journal copy of the first block of descriptors, with other
// free counts in group 0.
func (s *synth) groupCopy(freeBlocks, freeInodes uint16) jtest.Block {
	home := uint64(ext4.Offset)/uint64(s.fs.BlockSize) + 1
	b := bytes.Clone(s.block(home))
	binary.LittleEndian.PutUint16(b[12:], freeBlocks)
	binary.LittleEndian.PutUint16(b[14:], freeInodes)
	if s.fs.ROCompat&ext4.MetadataCsum != 0 {
		seed := jtest.CRC32C(^uint32(0), s.fs.UUID[:])
		clear(b[0x1e:0x20])
		sum := jtest.CRC32C(jtest.CRC32C(seed, []byte{0, 0, 0, 0}), b[:s.fs.DescSize])
		binary.LittleEndian.PutUint16(b[0x1e:], uint16(sum))
	}
	return jtest.Block{Home: home, Data: b}
}

// random fills blocks.
func random(rng *rand.Rand, homes []uint64, size uint32) []jtest.Block {
	var out []jtest.Block
	for _, h := range homes {
		b := make([]byte, size)
		for i := range b {
			b[i] = byte(rng.Uint32())
		}
		if rng.IntN(3) == 0 {
			binary.BigEndian.PutUint32(b, jbd2.Magic)
		}
		out = append(out, jtest.Block{Home: h, Data: b})
	}
	return out
}

// typical fills the journal with some transactions that write and revoke
// free blocks, the superblock and descriptors.
func (s *synth) typical(seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 1))
	homes := s.free(40)
	for i := range 6 {
		rng.Shuffle(len(homes), func(i, j int) { homes[i], homes[j] = homes[j], homes[i] })
		blocks := random(rng, homes[:10], s.fs.BlockSize)
		blocks = append(blocks, s.superCopy(func(r *ext4.Raw) { r[0x200] = byte(i); r[0x30] = byte(i) }), s.groupCopy(uint16(100+i), uint16(50+i)))
		s.b.Transaction(uint64(1000+i), blocks, homes[20:23]...)
	}
}

// memDevice is a Device in memory.
type memDevice struct {
	b     []byte
	wrote bool
	syncs int
}

func (m *memDevice) ReadAt(p []byte, off int64) (int, error) {
	return bytes.NewReader(m.b).ReadAt(p, off)
}

func (m *memDevice) WriteAt(p []byte, off int64) (int, error) {
	m.wrote = true
	return copy(m.b[off:], p), nil
}

func (m *memDevice) Datasync() error { m.syncs++; return nil }

// run recovers a copy of the image.
func (s *synth) run(opts Options) (*memDevice, Report, error) {
	d := &memDevice{b: bytes.Clone(s.img)}
	rep, err := Run(d, 0, int64(len(d.b)), opts)
	return d, rep, err
}
