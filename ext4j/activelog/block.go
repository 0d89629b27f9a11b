package activelog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"kagami/ext4j/epoch"
)

// Layout of a block, little-endian:
//
//	   0  8 B  "KAGAMIAL"
//	   8  u32  version 1
//	  12  u32  required feature bits, 0; an unknown one is refused
//	  16  u32  optional feature bits, 0; ignored
//	  20  u32  blocks of a half: a file that was cut shows
//	  24  u64  generation
//	  32  u32  number of the block in its half
//	  36  u32  blocks in this generation's snapshot, at least 1
//	  40  u32  number of the first block of its batch; 0 in the snapshot
//	  44  u16  removals
//	  46  u16  additions
//	  48  16 B group
//	  64  u64  bytes of a region
//	  72  16 B lineage of the floor
//	  88  16 B replica of the floor; zero: none was ever followed
//	 104  u64  session of the floor
//	 112  u64  LSN of the floor: what the replica had acknowledged when this was
//	           written, and so at least what removals so far relied on
//	 120  u64  entries: removals, then additions; disk slot << 48 | region number
//	4092  u32  CRC32C of bytes 0..4092
//
// A source with several replicas will need a floor of each: a required feature.
const (
	blockBytes   = 4096
	entriesAt    = 120
	sumAt        = 4092
	blockEntries = (sumAt - entriesAt) / 8
	logMagic     = "KAGAMIAL"
	logVersion   = 1
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// errNoBlock: the bytes are no block (never written, torn or damaged).
var errNoBlock = errors.New("not a valid block")

// key is an entry: disk slot << 48 | region number.
type key uint64

const indexBits = 48

func makeKey(disk uint32, index uint64) key { return key(disk)<<indexBits | key(index) }

func (k key) region() Region {
	return Region{Disk: uint32(k >> indexBits), Index: uint64(k) & (1<<indexBits - 1)}
}

type block struct {
	half        uint32
	generation  uint64
	number      uint32
	snapshot    uint32
	batch       uint32
	group       epoch.UUID
	regionBytes uint64
	follower    Follower
	floor       Floor
	removals    []key
	additions   []key
}

func (b *block) append(dst []byte) []byte {
	n := len(dst)
	dst = append(dst, make([]byte, blockBytes)...)
	p := dst[n:]
	le := binary.LittleEndian
	copy(p, logMagic)
	le.PutUint32(p[8:], logVersion)
	le.PutUint32(p[20:], b.half)
	le.PutUint64(p[24:], b.generation)
	le.PutUint32(p[32:], b.number)
	le.PutUint32(p[36:], b.snapshot)
	le.PutUint32(p[40:], b.batch)
	le.PutUint16(p[44:], uint16(len(b.removals)))
	le.PutUint16(p[46:], uint16(len(b.additions)))
	copy(p[48:], b.group[:])
	le.PutUint64(p[64:], b.regionBytes)
	copy(p[72:], b.follower.Lineage[:])
	copy(p[88:], b.follower.Replica[:])
	le.PutUint64(p[104:], b.floor.Session)
	le.PutUint64(p[112:], uint64(b.floor.LSN))
	at := entriesAt
	for _, list := range [][]key{b.removals, b.additions} {
		for _, k := range list {
			le.PutUint64(p[at:], uint64(k))
			at += 8
		}
	}
	le.PutUint32(p[sumAt:], crc32.Checksum(p[:sumAt], castagnoli))
	return dst
}

// decodeBlock reads a block. errNoBlock means that it is torn or was never
// written; any other error that this release must not use the log.
func decodeBlock(p []byte) (block, error) {
	le := binary.LittleEndian
	if len(p) != blockBytes || string(p[:8]) != logMagic || crc32.Checksum(p[:sumAt], castagnoli) != le.Uint32(p[sumAt:]) {
		return block{}, errNoBlock
	}
	if v := le.Uint32(p[8:]); v != logVersion {
		return block{}, fmt.Errorf("active log version %d is not known to this release", v)
	}
	if f := le.Uint32(p[12:]); f != 0 {
		return block{}, fmt.Errorf("active log needs features %#x, not known to this release", f)
	}
	b := block{half: le.Uint32(p[20:]), generation: le.Uint64(p[24:]), number: le.Uint32(p[32:]), snapshot: le.Uint32(p[36:]), batch: le.Uint32(p[40:]),
		regionBytes: le.Uint64(p[64:]), floor: Floor{le.Uint64(p[104:]), epoch.LSN(le.Uint64(p[112:]))}}
	copy(b.group[:], p[48:64])
	copy(b.follower.Lineage[:], p[72:88])
	copy(b.follower.Replica[:], p[88:104])
	nr, na := int(le.Uint16(p[44:])), int(le.Uint16(p[46:]))
	if nr+na > blockEntries || b.snapshot == 0 || b.batch > b.number {
		return block{}, fmt.Errorf("%w: block %d of generation %d cannot be", ErrCorrupt, b.number, b.generation)
	}
	keys := make([]key, nr+na)
	for i := range keys {
		keys[i] = key(le.Uint64(p[entriesAt+8*i:]))
	}
	b.removals, b.additions = keys[:nr:nr], keys[nr:]
	return b, nil
}

// batch cuts removals and additions into blocks. All removals come first, so that
// no prefix of the blocks makes the set larger than it ever was.
func batch(proto block, removals, additions []key) []byte {
	var out []byte
	for first := true; first || len(removals)+len(additions) > 0; first = false {
		b := proto
		r := min(len(removals), blockEntries)
		b.removals, removals = removals[:r], removals[r:]
		a := min(len(additions), blockEntries-r)
		if len(removals) > 0 {
			a = 0
		}
		b.additions, additions = additions[:a], additions[a:]
		out = b.append(out)
		proto.number++
	}
	return out
}

// half is what one half of the file holds.
type half struct {
	generation uint64 // the highest in it; 0: none
	blocks     []block
	complete   bool // the snapshot is there as a whole
	damaged    bool // a block is invalid that was durable
}

// readHalf decodes a half. Blocks of older generations in it are ignored.
func readHalf(p []byte) (half, error) {
	all := make([]*block, len(p)/blockBytes)
	var h half
	for i := range all {
		b, err := decodeBlock(p[i*blockBytes : (i+1)*blockBytes])
		if errors.Is(err, errNoBlock) {
			continue
		}
		if err != nil {
			return half{}, err
		}
		if int(b.half) != len(all) {
			return half{}, fmt.Errorf("%w: a half has %d blocks, %d were written for it", ErrCorrupt, len(all), b.half)
		}
		if b.number == uint32(i) {
			all[i] = &b
			h.generation = max(h.generation, b.generation)
		}
	}
	for i, b := range all {
		switch {
		case b == nil || b.generation != h.generation:
		case len(h.blocks) == i && (i == 0 || b.snapshot == h.blocks[0].snapshot):
			h.blocks = append(h.blocks, *b)
		default: // behind an invalid block
			h.damaged = h.damaged || b.batch > uint32(len(h.blocks))
		}
	}
	h.complete = len(h.blocks) > 0 && len(h.blocks) >= int(h.blocks[0].snapshot)
	return h, nil
}

// state is what a file holds.
type state struct {
	set        map[key]bool
	half       int    // that counts
	blocks     int    // valid blocks in it
	generation uint64 // the highest seen anywhere
	group      epoch.UUID
	region     uint64   // bytes
	follower   Follower // the newest
	floor      Floor    // likewise
}

// replay reads a whole file, two halves of equal size.
func replay(p []byte) (state, error) {
	var s state
	best, damaged := half{}, half{}
	for i := range 2 {
		h, err := readHalf(p[i*len(p)/2 : (i+1)*len(p)/2])
		if err != nil {
			return s, err
		}
		s.generation = max(s.generation, h.generation)
		if h.complete && h.generation > best.generation {
			best, s.half = h, i
		}
		if h.damaged && h.generation > damaged.generation {
			damaged = h
		}
	}
	switch {
	case best.generation == 0:
		return s, fmt.Errorf("%w: neither half holds a complete snapshot", ErrCorrupt)
	case damaged.generation >= best.generation:
		return s, fmt.Errorf("%w: block %d of generation %d is missing", ErrCorrupt, len(damaged.blocks), damaged.generation)
	}
	s.set, s.blocks = map[key]bool{}, len(best.blocks)
	s.group, s.region = best.blocks[0].group, best.blocks[0].regionBytes
	for _, b := range best.blocks {
		s.follower, s.floor = b.follower, b.floor
		for _, k := range b.removals {
			delete(s.set, k)
		}
		for _, k := range b.additions {
			s.set[k] = true
		}
	}
	return s, nil
}
