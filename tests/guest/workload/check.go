package workload

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

const (
	maxSlots  = 65536
	maxDamage = 20 // places named in a report
)

// Found is the state of one file.
type Found struct {
	Highest uint64   // highest number of the gap-free run; 0: none
	Bytes   int64    // append.log: up to the end of the last whole record; blocks.dat: its size
	Torn    int64    // append.log: bytes after the last whole record, a record that was being written
	Damage  []string // what no lawful state holds; at most 20 are named
}

func (f *Found) damage(format string, a ...any) {
	if len(f.Damage) < maxDamage {
		f.Damage = append(f.Damage, fmt.Sprintf(format, a...))
	}
}

// Report is the state of both files.
type Report struct{ Append, Blocks Found }

func (r Report) of(f File) Found {
	if f == Append {
		return r.Append
	}
	return r.Blocks
}

func name(f File) string {
	if f == Append {
		return AppendName
	}
	return BlocksName
}

// OK reports that nothing is damaged.
func (r Report) OK() bool { return len(r.Append.Damage)+len(r.Blocks.Damage) == 0 }

// String is one line of fixed form, then a line for each damaged place.
func (r Report) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "FOUND A %d B %d torn %d damage %d",
		r.Append.Highest, r.Blocks.Highest, r.Append.Torn, len(r.Append.Damage)+len(r.Blocks.Damage))
	for _, f := range []File{Append, Blocks} {
		for _, d := range r.of(f).Damage {
			fmt.Fprintf(&b, "\nDAMAGE %c %s", f, d)
		}
	}
	return b.String()
}

// ParseReport reads the first line of Report.String back. The damaged places
// are kept as text.
func ParseReport(s string) (Report, error) {
	var r Report
	var damage int
	lines := strings.Split(strings.TrimSpace(s), "\n")
	if _, err := fmt.Sscanf(lines[0], "FOUND A %d B %d torn %d damage %d",
		&r.Append.Highest, &r.Blocks.Highest, &r.Append.Torn, &damage); err != nil {
		return r, fmt.Errorf("read the checker's report %q: %w", lines[0], err)
	}
	for _, l := range lines[1:] {
		if d, ok := strings.CutPrefix(l, "DAMAGE A "); ok {
			r.Append.Damage = append(r.Append.Damage, d)
		} else if d, ok := strings.CutPrefix(l, "DAMAGE B "); ok {
			r.Blocks.Damage = append(r.Blocks.Damage, d)
		}
	}
	if n := len(r.Append.Damage) + len(r.Blocks.Damage); n != damage {
		return r, fmt.Errorf("the checker's report names %d damaged places of %d", n, damage)
	}
	return r, nil
}

// Check reads both files. A missing or empty file holds no records, which is no damage:
// the caller compares Highest with what was acknowledged.
func Check(dir string, seed uint64) (Report, error) {
	a, err := read(dir, AppendName, func(r io.Reader) (Found, error) { return checkAppend(r, seed) })
	if err != nil {
		return Report{}, err
	}
	b, err := read(dir, BlocksName, func(r io.Reader) (Found, error) { return checkBlocks(r, seed) })
	return Report{Append: a, Blocks: b}, err
}

func read(dir, name string, f func(io.Reader) (Found, error)) (Found, error) {
	h, err := os.Open(filepath.Join(dir, name))
	if errors.Is(err, fs.ErrNotExist) {
		return Found{}, nil
	} else if err != nil {
		return Found{}, err
	}
	defer h.Close()
	return f(bufio.NewReaderSize(h, 1<<18))
}

// checkAppend: records 1, 2, … and then the end of the file, or the begun
// record that was never acknowledged: a part of it, with zeros where its content is missing.
func checkAppend(r io.Reader, seed uint64) (Found, error) {
	var f Found
	for n := uint64(1); ; n++ {
		want := Record(Append, seed, n)
		got := make([]byte, len(want))
		k, err := io.ReadFull(r, got)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return f, err
		}
		if !bytes.Equal(got[:k], want) {
			rest, err := io.Copy(io.Discard, r)
			f.Torn = int64(k) + rest
			if rest > 0 || !bytes.HasPrefix(want, bytes.TrimRight(got[:k], "\x00")) {
				f.damage("record %d at byte %d is not what was written, %d bytes follow it", n, f.Bytes, rest)
			}
			return f, err
		}
		f.Highest, f.Bytes = n, f.Bytes+int64(k)
	}
}

// checkBlocks: slot s holds the highest number ≤ Highest that is s modulo the
// number of slots, or zeros if there is none.
func checkBlocks(r io.Reader, seed uint64) (Found, error) {
	var f Found
	var slots []uint64
	b := make([]byte, blockSize)
	for {
		_, err := io.ReadFull(r, b)
		if errors.Is(err, io.EOF) {
			break
		} else if errors.Is(err, io.ErrUnexpectedEOF) || len(slots) == maxSlots {
			f.damage("size is not that of whole slots, or too large")
			break
		} else if err != nil {
			return f, err
		}
		n, ok := number(Blocks, seed, b)
		if !ok && len(bytes.Trim(b, "\x00")) > 0 {
			f.damage("slot %d holds no record", len(slots))
		}
		if !ok {
			n = 0
		}
		f.Highest = max(f.Highest, n)
		slots = append(slots, n)
	}
	f.Bytes = int64(len(slots)) * blockSize
	for s, n := range slots {
		if want := expected(f.Highest, uint64(s), uint64(len(slots))); n != want {
			f.damage("slot %d holds number %d, not %d, though number %d was written", s, n, want, f.Highest)
		}
	}
	return f, nil
}

// expected is the highest number ≤ highest that is s modulo slots, from 1 on; 0: none.
func expected(highest, s, slots uint64) uint64 {
	d := (highest%slots + slots - s) % slots
	if d >= highest {
		return 0
	}
	return highest - d
}
