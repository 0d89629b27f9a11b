// Package workload is what test guests write and how it is checked: numbered,
// checksummed records whose content follows from (seed, file, number) alone,
// so that a checker needs nothing but the files to find loss and damage.
//
// Two files live in the folder that is written to:
//
//   - append.log: records of varying size, appended and fsynced one by one;
//   - blocks.dat: slots of 4096 bytes, written and fsynced once in advance and
//     then overwritten round and round, each overwrite with fdatasync, which on
//     ext4 reaches the disk as a flush without a journal commit.
//
// A number is acknowledged only after its fsync or fdatasync returned, and
// number n+1 is begun only after that. So any state the disk may lawfully be
// found in holds a gap-free run of numbers up to some highest one, at least the
// highest acknowledged, in each file.
//
// A record, little-endian:
//
//	 0 u32 magic "KWRK"      4 u32 bytes of the whole record
//	 8 u64 seed             16 u64 number, from 1
//	24 u32 file: 'A' or 'B' 28 u32 CRC32C of the rest
//	32 content
package workload

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
)

// File tells the two files apart in acknowledgements.
type File byte

// The two files.
const (
	Append File = 'A'
	Blocks File = 'B'
)

// Names of the files in the folder.
const (
	AppendName = "append.log"
	BlocksName = "blocks.dat"
)

const (
	magic      = 0x4b52574b // "KWRK"
	headerSize = 32
	blockSize  = 4096
	minAppend  = 64
	maxAppend  = 5000
)

var table = crc32.MakeTable(crc32.Castagnoli)

// mix is splitmix64: a well-spread value for every x.
func mix(x uint64) uint64 {
	x += 0x9e3779b97f4a7c15
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// size is the length of record n in bytes.
func size(f File, seed, n uint64) int {
	if f == Blocks {
		return blockSize
	}
	return minAppend + int(mix(seed^mix(n))%(maxAppend-minAppend))
}

// Record makes record n of a file.
func Record(f File, seed, n uint64) []byte {
	b := make([]byte, size(f, seed, n))
	binary.LittleEndian.PutUint32(b, magic)
	binary.LittleEndian.PutUint32(b[4:], uint32(len(b)))
	binary.LittleEndian.PutUint64(b[8:], seed)
	binary.LittleEndian.PutUint64(b[16:], n)
	binary.LittleEndian.PutUint32(b[24:], uint32(f))
	x := mix(seed) ^ mix(n) ^ mix(uint64(f))
	var w [8]byte
	for i := headerSize; i < len(b); i += 8 {
		x = mix(x)
		binary.LittleEndian.PutUint64(w[:], x)
		copy(b[i:], w[:])
	}
	binary.LittleEndian.PutUint32(b[28:], sum(b))
	return b
}

func sum(b []byte) uint32 {
	return crc32.Update(crc32.Checksum(b[:28], table), table, b[headerSize:])
}

// number reads a block's number; ok only if the whole block is exactly the
// record of that number.
func number(f File, seed uint64, b []byte) (n uint64, ok bool) {
	if len(b) < headerSize || binary.LittleEndian.Uint32(b) != magic {
		return 0, false
	}
	n = binary.LittleEndian.Uint64(b[16:])
	return n, n > 0 && bytes.Equal(b, Record(f, seed, n))
}
