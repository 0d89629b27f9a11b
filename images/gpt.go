package images

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"strings"
	"unicode"
	"unicode/utf16"
)

// gptHeader is what is used of a GPT header, after its checks.
type gptHeader struct {
	sector    int64 // bytes
	entries   int64 // byte offset of the entry array
	count     int
	entrySize int
	arraySum  uint32
}

// readGPT tries the primary header, then the backup one, for both sector sizes.
func readGPT(r io.ReaderAt, size int64) ([]Partition, Scheme, error) {
	var reasons error
	for _, backup := range []bool{false, true} {
		for _, sector := range []int64{512, 4096} {
			lba, scheme := int64(1), SchemeGPT
			if backup {
				lba, scheme = size/sector-1, SchemeGPTBackup
			}
			h, array, err := readGPTAt(r, size, sector, lba)
			if err == nil {
				parts, err := h.partitions(array, size)
				return parts, scheme, err
			}
			if !errors.Is(err, ErrTable) {
				return nil, SchemeGPT, err
			}
			reasons = errors.Join(reasons, err)
		}
	}
	return nil, SchemeGPT, fmt.Errorf("neither GPT header can be used: %w", reasons)
}

// readGPTAt reads and checks the header at lba and its entry array.
func readGPTAt(r io.ReaderAt, size, sector, lba int64) (gptHeader, []byte, error) {
	bad := func(what string, args ...any) (gptHeader, []byte, error) {
		return gptHeader{}, nil, fmt.Errorf("%w: GPT header at sector %d of %d bytes: %s", ErrTable, lba, sector, fmt.Sprintf(what, args...))
	}
	if lba < 1 || lba > size/sector-1 {
		return bad("the disk has only %d bytes", size)
	}
	b := make([]byte, sector)
	if err := readFull(r, b, lba*sector); err != nil {
		return gptHeader{}, nil, err
	}
	h, err := parseGPTHeader(b, lba, size)
	if err != nil {
		return bad("%v", err)
	}
	array := make([]byte, h.count*h.entrySize)
	if err := readFull(r, array, h.entries); err != nil {
		return gptHeader{}, nil, err
	}
	if crc32.ChecksumIEEE(array) != h.arraySum {
		return bad("checksum of the entries differs")
	}
	return h, array, nil
}

// parseGPTHeader checks the header in b, one whole sector (UEFI 2.10, table 5.5).
func parseGPTHeader(b []byte, lba, size int64) (gptHeader, error) {
	le := binary.LittleEndian
	sector := int64(len(b))
	if string(b[:8]) != "EFI PART" {
		return gptHeader{}, errors.New("no signature")
	}
	n := le.Uint32(b[12:])
	if n < 92 || int64(n) > sector {
		return gptHeader{}, fmt.Errorf("header of %d bytes", n)
	}
	sum := le.Uint32(b[16:])
	le.PutUint32(b[16:], 0)
	if crc32.ChecksumIEEE(b[:n]) != sum {
		return gptHeader{}, errors.New("checksum differs")
	}
	if got := le.Uint64(b[24:]); got != uint64(lba) {
		return gptHeader{}, fmt.Errorf("it says it is at sector %d", got)
	}
	first, count, each := le.Uint64(b[72:]), le.Uint32(b[80:]), le.Uint32(b[84:])
	if each < 128 || each > maxEntrySize || each%8 != 0 || count > maxEntryBytes/each {
		return gptHeader{}, fmt.Errorf("%d entries of %d bytes", count, each)
	}
	bytes := int64(count) * int64(each)
	if first > uint64(size/sector) || bytes > size-int64(first)*sector {
		return gptHeader{}, fmt.Errorf("entries at sector %d lie outside the disk", first)
	}
	return gptHeader{sector, int64(first) * sector, int(count), int(each), le.Uint32(b[88:])}, nil
}

// partitions decodes the entries in use (UEFI 2.10, table 5.6).
func (h gptHeader) partitions(array []byte, size int64) (parts []Partition, err error) {
	for i := range h.count {
		e := array[i*h.entrySize:]
		if [16]byte(e) == ([16]byte{}) {
			continue
		}
		p, perr := h.partition(i+1, e, size)
		if perr != nil {
			err = errors.Join(err, perr)
			continue
		}
		parts = append(parts, p)
	}
	return parts, err
}

func (h gptHeader) partition(number int, e []byte, size int64) (Partition, error) {
	first, last := binary.LittleEndian.Uint64(e[32:]), binary.LittleEndian.Uint64(e[40:])
	sectors := uint64(size / h.sector)
	if first > last || last >= sectors {
		return Partition{}, fmt.Errorf("%w: partition %d, sectors %d to %d, does not lie on a disk of %d sectors",
			ErrTable, number, first, last, sectors)
	}
	return Partition{
		Number: number, Start: int64(first) * h.sector, Length: int64(last-first+1) * h.sector,
		Type: guidText(e), Name: gptName(e[56:128]),
	}, nil
}

// guidText prints a GUID whose first three fields are little-endian.
func guidText(b []byte) string {
	le := binary.LittleEndian
	return fmt.Sprintf("%08X-%04X-%04X-%X-%X", le.Uint32(b), le.Uint16(b[4:]), le.Uint16(b[6:]), b[8:10], b[10:16])
}

// gptName decodes a NUL-terminated UTF-16LE name. The guest wrote it: what
// could play with a terminal is replaced.
func gptName(b []byte) string {
	var units []uint16
	for i := 0; i+1 < len(b); i += 2 {
		u := binary.LittleEndian.Uint16(b[i:])
		if u == 0 {
			break
		}
		units = append(units, u)
	}
	return strings.Map(func(c rune) rune {
		if !unicode.IsPrint(c) {
			return unicode.ReplacementChar
		}
		return c
	}, string(utf16.Decode(units)))
}
