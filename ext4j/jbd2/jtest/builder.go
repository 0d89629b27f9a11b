// Package jtest writes journals for tests: any combination of formats, with
// its own checksum code, so that the codec is not tested against itself.
package jtest

import (
	"encoding/binary"

	"kagami/ext4j/jbd2"
)

// Block is one data block of a transaction.
type Block struct {
	Home uint64
	Data []byte
}

// Builder writes a journal into Buf, block by block.
type Builder struct {
	Super jbd2.Superblock
	Buf   []byte // MaxLen blocks
	Head  uint32 // next log block
	TID   jbd2.TID
}

// New makes an empty journal that starts at block start with transaction tid.
// blocks counts block 0 and the fast-commit area.
func New(f jbd2.Features, blockSize, blocks, start uint32, tid jbd2.TID) *Builder {
	b := &Builder{
		Super: jbd2.Superblock{Version: 2, BlockSize: blockSize, MaxLen: blocks, First: 1, Sequence: tid, Start: start, Features: f},
		Buf:   make([]byte, int(blockSize)*int(blocks)), Head: start, TID: tid,
	}
	copy(b.Super.UUID[:], "kagami test uuid")
	b.PutSuper()
	return b
}

// PutSuper writes Super into block 0.
func (b *Builder) PutSuper() {
	p, be, s := b.Buf, binary.BigEndian, b.Super
	clear(p[:jbd2.SuperblockSize])
	typ := jbd2.TypeSuperblockV2
	if s.Version == 1 {
		typ = jbd2.TypeSuperblockV1
	}
	header(p, typ, 0)
	be.PutUint32(p[0x0c:], s.BlockSize)
	be.PutUint32(p[0x10:], s.MaxLen)
	be.PutUint32(p[0x14:], s.First)
	be.PutUint32(p[0x18:], uint32(s.Sequence))
	be.PutUint32(p[0x1c:], s.Start)
	be.PutUint32(p[0x20:], uint32(s.Errno))
	if s.Version == 1 {
		return
	}
	be.PutUint32(p[0x24:], uint32(s.Features))
	be.PutUint32(p[0x28:], uint32(s.Features>>32))
	be.PutUint32(p[0x2c:], s.ROCompat)
	copy(p[0x30:], s.UUID[:])
	be.PutUint32(p[0x54:], s.FastLen)
	be.PutUint32(p[0x58:], s.Head)
	if b.v23() {
		p[0x50] = 4
		be.PutUint32(p[0xfc:], CRC32C(^uint32(0), p[:1024]))
	}
}

// At is log block n.
func (b *Builder) At(n uint32) []byte {
	bs := int(b.Super.BlockSize)
	return b.Buf[int(n)*bs : (int(n)+1)*bs]
}

// Read is a jbd2.ReadBlock.
func (b *Builder) Read(n uint32, p []byte) error {
	copy(p, b.At(n))
	return nil
}

// Take returns the next log block, zeroed, with a header of the current transaction.
func (b *Builder) Take(t jbd2.BlockType) []byte {
	p := b.take()
	clear(p)
	header(p, t, b.TID)
	return p
}

func (b *Builder) take() []byte {
	p := b.At(b.Head)
	if b.Head++; b.Head >= b.Super.Last() {
		b.Head = b.Super.First
	}
	return p
}

// Transaction writes a whole transaction and moves on to the next TID. Its
// commit block is returned.
func (b *Builder) Transaction(sec uint64, blocks []Block, revokes ...uint64) []byte {
	crc := ^uint32(0)
	if len(revokes) > 0 {
		b.Revoke(revokes)
	}
	for len(blocks) > 0 {
		n := min(len(blocks), b.perDescriptor())
		crc = b.Descriptor(blocks[:n], crc)
		blocks = blocks[n:]
	}
	return b.Commit(sec, crc)
}

// Descriptor writes one descriptor block and its data; crc is the v1 checksum so far.
func (b *Builder) Descriptor(blocks []Block, crc uint32) uint32 {
	d := b.Take(jbd2.TypeDescriptor)
	datas := make([][]byte, len(blocks))
	p := 12
	for i, bl := range blocks {
		data, flags := append([]byte(nil), bl.Data...), jbd2.TagFlags(0)
		if binary.BigEndian.Uint32(data) == jbd2.Magic {
			flags |= jbd2.FlagEscape
			clear(data[:4])
		}
		if i > 0 {
			flags |= jbd2.FlagSameUUID
		}
		if i == len(blocks)-1 {
			flags |= jbd2.FlagLast
		}
		p += b.tag(d[p:], bl.Home, flags, data)
		if i == 0 {
			p += copy(d[p:], b.Super.UUID[:])
		}
		datas[i] = data
	}
	b.Tail(d)
	crc = CRC32BE(crc, d)
	for _, data := range datas {
		copy(b.take(), data)
		crc = CRC32BE(crc, data)
	}
	return crc
}

func (b *Builder) tag(p []byte, home uint64, flags jbd2.TagFlags, data []byte) int {
	be, f := binary.BigEndian, b.Super.Features
	be.PutUint32(p, uint32(home))
	var seq [4]byte
	be.PutUint32(seq[:], uint32(b.TID))
	sum := CRC32C(CRC32C(b.seed(), seq[:]), data)
	if f.Has(jbd2.SumV3) {
		be.PutUint32(p[4:], uint32(flags))
		be.PutUint32(p[8:], uint32(home>>32))
		be.PutUint32(p[12:], sum)
		return 16
	}
	be.PutUint16(p[6:], uint16(flags))
	n := 8
	if f.Has(jbd2.Bit64) {
		be.PutUint32(p[8:], uint32(home>>32))
		n += 4
	}
	if f.Has(jbd2.SumV2) {
		be.PutUint16(p[4:], uint16(sum))
		n += 2
	}
	return n
}

// perDescriptor is how many tags fit a descriptor block.
func (b *Builder) perDescriptor() int {
	room := int(b.Super.BlockSize) - 12 - 16
	if b.v23() {
		room -= 4
	}
	return room / b.Super.Journal().TagSize()
}

// Revoke writes one revoke block.
func (b *Builder) Revoke(blocks []uint64) {
	p, n := b.Take(jbd2.TypeRevoke), 16
	for _, bl := range blocks {
		if b.Super.Features.Has(jbd2.Bit64) {
			binary.BigEndian.PutUint64(p[n:], bl)
			n += 8
		} else {
			binary.BigEndian.PutUint32(p[n:], uint32(bl))
			n += 4
		}
	}
	binary.BigEndian.PutUint32(p[12:], uint32(n))
	b.Tail(p)
}

// Commit writes the commit block of the current transaction.
func (b *Builder) Commit(sec uint64, crc uint32) []byte {
	p := b.Take(jbd2.TypeCommit)
	binary.BigEndian.PutUint64(p[48:], sec)
	switch {
	case b.v23():
		binary.BigEndian.PutUint32(p[16:], CRC32C(b.seed(), p))
	case b.Super.Features.Has(jbd2.SumV1):
		p[12], p[13] = 1, 4
		binary.BigEndian.PutUint32(p[16:], crc)
	}
	b.TID++
	return p
}

// Tail sets the checksum at the end of a descriptor or revoke block.
func (b *Builder) Tail(p []byte) {
	if b.v23() {
		n := len(p) - 4
		clear(p[n:])
		binary.BigEndian.PutUint32(p[n:], CRC32C(b.seed(), p))
	}
}

func (b *Builder) v23() bool { return b.Super.Features.SumV2or3() }

func (b *Builder) seed() uint32 { return CRC32C(^uint32(0), b.Super.UUID[:]) }

func header(p []byte, t jbd2.BlockType, tid jbd2.TID) {
	binary.BigEndian.PutUint32(p, jbd2.Magic)
	binary.BigEndian.PutUint32(p[4:], uint32(t))
	binary.BigEndian.PutUint32(p[8:], uint32(tid))
}

// CRC32C is the kernel's crc32c, bit by bit.
func CRC32C(crc uint32, p []byte) uint32 {
	for _, c := range p {
		crc ^= uint32(c)
		for range 8 {
			crc = crc>>1 ^ 0x82f63b78&-(crc&1)
		}
	}
	return crc
}

// CRC32BE is the kernel's crc32_be, bit by bit.
func CRC32BE(crc uint32, p []byte) uint32 {
	for _, c := range p {
		crc ^= uint32(c) << 24
		for range 8 {
			crc = crc<<1 ^ 0x04c11db7&-(crc>>31)
		}
	}
	return crc
}
