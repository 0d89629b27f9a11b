package jbd2

import (
	"encoding/binary"
	"hash/crc32"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// crc32c continues crc over p as the kernel does: no inversion before or after.
func crc32c(crc uint32, p []byte) uint32 { return ^crc32.Update(^crc, castagnoli, p) }

// crc32cHole is crc32c over b with the four bytes at off taken as zeros.
func crc32cHole(crc uint32, b []byte, off int) uint32 {
	crc = crc32c(crc, b[:off])
	crc = crc32c(crc, []byte{0, 0, 0, 0})
	return crc32c(crc, b[off+4:])
}

// beTable drives crc32be: the polynomial 0x04c11db7, most significant bit first.
var beTable = makeBETable()

func makeBETable() *[256]uint32 {
	var t [256]uint32
	for i := range t {
		c := uint32(i) << 24
		for range 8 {
			if c&(1<<31) != 0 {
				c = c<<1 ^ 0x04c11db7
			} else {
				c <<= 1
			}
		}
		t[i] = c
	}
	return &t
}

// crc32be continues crc over p as the kernel's crc32_be does: most significant
// bit first, no inversion. Checksum v1 uses it, seeded with ^0.
func crc32be(crc uint32, p []byte) uint32 {
	for _, c := range p {
		crc = crc<<8 ^ beTable[byte(crc>>24)^c]
	}
	return crc
}

// Seed is the seed of all v2 and v3 checksums of a journal: the CRC-32C of its UUID.
func Seed(uuid [16]byte) uint32 { return crc32c(^uint32(0), uuid[:]) }

// tailOK checks the checksum in the last four bytes of a descriptor or revoke
// block. Without v2 or v3 there is none and every block is good.
func (f Format) tailOK(b []byte) bool {
	if !f.Features.SumV2or3() {
		return true
	}
	off := len(b) - tailSize
	return binary.BigEndian.Uint32(b[off:]) == crc32cHole(f.Seed, b, off)
}

// DataSum is the v2/v3 checksum of a data block as it stands in the log (that
// is, with its escape), of which a v2 tag keeps the low 16 bits.
func (f Format) DataSum(tid TID, block []byte) uint32 {
	var seq [4]byte
	binary.BigEndian.PutUint32(seq[:], uint32(tid))
	return crc32c(crc32c(f.Seed, seq[:]), block)
}

// DataOK checks a data block of the log against its tag. Without v2 or v3
// tags hold no checksum and every block is good.
func (f Format) DataOK(tid TID, t Tag, block []byte) bool {
	switch {
	case f.Features.Has(SumV3):
		return t.Sum == f.DataSum(tid, block)
	case f.Features.Has(SumV2):
		return t.Sum == f.DataSum(tid, block)&0xffff
	}
	return true
}
