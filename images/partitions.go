package images

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Scheme is the kind of a partition table.
type Scheme string

// The schemes that Partitions knows.
const (
	SchemeNone      Scheme = "none"
	SchemeMBR       Scheme = "mbr"
	SchemeGPT       Scheme = "gpt"
	SchemeGPTBackup Scheme = "gpt (backup header)" // the primary one is damaged
)

// ErrTable is wrapped by errors about a damaged or hostile partition table.
var ErrTable = errors.New("bad partition table")

// Partition is one entry of a partition table.
type Partition struct {
	Number int   // as Linux counts: MBR 1–4, logical ones from 5; GPT from 1
	Start  int64 // bytes
	Length int64 // bytes, at least 1; Start+Length lies within the disk
	// Type is the GPT type GUID in upper case, or the MBR type byte in hex ("83", "f").
	Type string
	Name string // GPT only; unprintable characters are replaced
}

// Bounds on what a table may make us do.
const (
	maxLogical    = 255     // logical partitions followed
	maxEntryBytes = 1 << 20 // GPT entry array; the usual one has 16 KiB
	maxEntrySize  = 4096    // one GPT entry; the usual one has 128 bytes
)

// mbrSector is the unit of MBR tables. Disks with sectors of 4096 bytes and an
// MBR cannot be told apart by content and are not supported.
const mbrSector = 512

// mbrEntry is one of the four entries of an MBR or EBR; start and count are sectors.
type mbrEntry struct {
	boot, kind   byte
	start, count uint32
}

func (e mbrEntry) extended() bool { return e.kind == 0x05 || e.kind == 0x0f || e.kind == 0x85 }

// Partitions reads the partition table of a disk of size bytes. Entries that
// cannot be right (outside the disk, a looping chain) are left out and said in
// the error, which wraps ErrTable; the other partitions are returned along
// with it. Any other error is one of reading.
//
// Formats: MBR and EBR as Linux reads them (block/partitions/msdos.c); GPT as
// in the UEFI specification 2.10, section 5.3, with sectors of 512 or 4096 bytes.
func Partitions(r io.ReaderAt, size int64) ([]Partition, Scheme, error) {
	entries, ok, err := readMBR(r, size, 0)
	if err != nil || !ok {
		return nil, SchemeNone, err
	}
	for _, e := range entries {
		if e.kind == 0xee {
			return readGPT(r, size)
		}
	}
	parts, err := mbrPartitions(r, size, entries)
	return parts, SchemeMBR, err
}

// readMBR reads the table in the sector at byte off. ok tells whether it is one.
func readMBR(r io.ReaderAt, size, off int64) (entries [4]mbrEntry, ok bool, err error) {
	if off > size-mbrSector {
		return entries, false, nil
	}
	var b [mbrSector]byte
	if err := readFull(r, b[:], off); err != nil {
		return entries, false, err
	}
	if b[510] != 0x55 || b[511] != 0xaa {
		return entries, false, nil
	}
	for i := range entries {
		e := b[446+16*i:]
		entries[i] = mbrEntry{e[0], e[4], binary.LittleEndian.Uint32(e[8:]), binary.LittleEndian.Uint32(e[12:])}
		if e[0]&0x7f != 0 { // the boot sector of a file system, not a table
			return entries, false, nil
		}
	}
	return entries, true, nil
}

func mbrPartitions(r io.ReaderAt, size int64, entries [4]mbrEntry) (parts []Partition, err error) {
	next := 5 // number of the next logical partition
	for i, e := range entries {
		if e.kind == 0 || e.count == 0 {
			continue
		}
		p, perr := mbrPartition(i+1, size, 0, e)
		if perr != nil {
			err = errors.Join(err, perr)
			continue
		}
		parts = append(parts, p)
		if e.extended() {
			logical, lerr := logicalPartitions(r, size, p, &next)
			parts, err = append(parts, logical...), errors.Join(err, lerr)
		}
	}
	sortByNumber(parts)
	return parts, err
}

func mbrPartition(number int, size, base int64, e mbrEntry) (Partition, error) {
	start := base + int64(e.start)*mbrSector
	length := int64(e.count) * mbrSector
	return checked(Partition{Number: number, Start: start, Length: length, Type: fmt.Sprintf("%x", e.kind)}, size)
}

// logicalPartitions follows the chain of EBRs inside ext. Each EBR's first
// entry is a partition relative to that EBR; its second one is the next EBR,
// relative to ext.
func logicalPartitions(r io.ReaderAt, size int64, ext Partition, next *int) (parts []Partition, err error) {
	for at, n := ext.Start, 0; ; n++ {
		if n == maxLogical {
			return parts, fmt.Errorf("%w: more than %d logical partitions, or a loop", ErrTable, maxLogical)
		}
		entries, ok, rerr := readMBR(r, size, at)
		if rerr != nil || !ok {
			return parts, errors.Join(err, rerr) // an empty chain has no signature
		}
		link := int64(-1)
		for _, e := range entries {
			switch {
			case e.kind == 0 || e.count == 0:
			case e.extended():
				if link < 0 {
					link = ext.Start + int64(e.start)*mbrSector
				}
			default:
				p, perr := mbrPartition(*next, size, at, e)
				*next++
				if perr != nil {
					err = errors.Join(err, perr)
				} else {
					parts = append(parts, p)
				}
			}
		}
		if link < 0 {
			return parts, err
		}
		at = link
	}
}

// checked refuses a partition outside the disk.
func checked(p Partition, size int64) (Partition, error) {
	if p.Start < 0 || p.Length <= 0 || p.Start > size || p.Length > size-p.Start {
		return p, fmt.Errorf("%w: partition %d, %d bytes at %d, does not lie on a disk of %d bytes",
			ErrTable, p.Number, p.Length, p.Start, size)
	}
	return p, nil
}

func sortByNumber(parts []Partition) {
	// At most four primary ones are out of place: logical ones were put behind their container.
	for i := range parts {
		for j := i; j > 0 && parts[j].Number < parts[j-1].Number; j-- {
			parts[j], parts[j-1] = parts[j-1], parts[j]
		}
	}
}

func readFull(r io.ReaderAt, b []byte, off int64) error {
	n, err := r.ReadAt(b, off)
	if n == len(b) {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return fmt.Errorf("read partition table at %d: %w", off, err)
}
