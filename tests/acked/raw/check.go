package raw

import (
	"bytes"
	"fmt"
	"io"
	"strings"

	"kagami/tests/acked/stamp"
)

// Options say what, beyond the promises of FLUSH and FUA, the images must hold.
type Options struct {
	// Completed: nothing answered may be missing, flushed or not (the server
	// ended well, or only its process died and the page cache survived).
	Completed bool
	// Cut: the images together are a state the group's disks went through: a
	// write that shows brings with it every write that was answered before it
	// was sent, on any disk. What Completed is for the past, Cut is for order.
	Cut bool
	// Atomic (with Cut): a write shows whole or not at all, unless it was
	// answered with an error.
	Atomic bool
	// TrimIsZero: a trimmed range reads as zeros. Without it a trim may, but
	// need not, have made it zeros.
	TrimIsZero bool
}

// Finding is one sector that is not as it must be.
type Finding struct {
	Disk   int
	Offset int64
	What   string
}

func (f Finding) String() string {
	return fmt.Sprintf("disk %d offset %d: %s", f.Disk, f.Offset, f.What)
}

const maxFindings = 20

// Report is the outcome of a check. Lists are cut off at 20 entries; counts are not.
type Report struct {
	Writes, Acked, Durable int // writes, zeros and trims: issued, answered, promised durable
	Sectors                int // looked at
	LostCount              int
	Lost                   []Finding // sectors older than they may be
	InventedCount          int
	Invented               []Finding // sectors nobody wrote
}

// Err is nil when the images are a legal state.
func (r Report) Err() error {
	if r.LostCount+r.InventedCount == 0 {
		return nil
	}
	var b strings.Builder
	fmt.Fprintf(&b, "%d sectors lost, %d invented of %d (%d writes, %d answered, %d durable)",
		r.LostCount, r.InventedCount, r.Sectors, r.Writes, r.Acked, r.Durable)
	for _, f := range append(r.Lost[:len(r.Lost):len(r.Lost)], r.Invented...) {
		fmt.Fprintf(&b, "\n  %v", f)
	}
	return fmt.Errorf("%s", b.String())
}

func (r *Report) lost(disk int, off int64, format string, args ...any) {
	if r.LostCount++; len(r.Lost) < maxFindings {
		r.Lost = append(r.Lost, Finding{disk, off, fmt.Sprintf(format, args...)})
	}
}

func (r *Report) invented(disk int, off int64, format string, args ...any) {
	if r.InventedCount++; len(r.Invented) < maxFindings {
		r.Invented = append(r.Invented, Finding{disk, off, fmt.Sprintf(format, args...)})
	}
}

// Check decides whether the images, one per disk of the history, are a legal
// state after it. Writes are ordered only as far as the history knows: a comes
// before b when a was answered before b was sent. Per sector (512 bytes), the
// content must be that of a write that no write which must be there comes
// after; writes that must be there are those covered by a flush that was
// answered, and those the options add.
func Check(h *History, o Options, images ...io.ReaderAt) (Report, error) {
	c := checker{d: h.snapshot(), o: o}
	if len(images) != len(c.d.Disks) {
		return c.r, fmt.Errorf("%d images for %d disks", len(images), len(c.d.Disks))
	}
	for i, img := range images {
		if err := c.scan(i, img); err != nil {
			return c.r, err
		}
	}
	c.require()
	c.judge()
	return c.r, nil
}

// foreign marks a sector in checker.seen that is no write's.
const foreign = ^uint32(0)

type checker struct {
	d     historyData
	o     Options
	r     Report
	seen  [][]uint32 // by disk and sector: sequence number of the content, 0: zeros
	must  []bool     // by operation: it has to be there
	shows []bool     // by operation: some sector holds it
}

// scan reads an image and finds out which write each sector is from.
func (c *checker) scan(disk int, img io.ReaderAt) error {
	if c.shows == nil {
		c.shows = make([]bool, len(c.d.Ops))
	}
	d := c.d.Disks[disk]
	seen := make([]uint32, d.Len/stamp.Size)
	buf := make([]byte, min(1<<20, d.Len))
	for at := int64(0); at < d.Len; at += int64(len(buf)) {
		part := buf[:min(int64(len(buf)), d.Len-at)]
		if n, err := img.ReadAt(part, d.Off+at); n < len(part) {
			return fmt.Errorf("read the image of disk %d at %d: %w", disk, d.Off+at, err)
		}
		for i := 0; i < len(part); i += stamp.Size {
			off := at + int64(i)
			seen[off/stamp.Size] = c.identify(disk, d.Off+off, part[i:i+stamp.Size])
		}
	}
	c.seen = append(c.seen, seen)
	c.r.Sectors += len(seen)
	return nil
}

func (c *checker) identify(disk int, off int64, b []byte) uint32 {
	s, kind := stamp.Read(b)
	switch {
	case kind == stamp.Zero:
		return 0
	case kind == stamp.Foreign && s.Seq != 0:
		c.r.invented(disk, off, "damaged content of %v", s)
		return foreign
	case kind == stamp.Foreign:
		c.r.invented(disk, off, "foreign content %x…", bytes.TrimSpace(b[:min(16, len(b))]))
		return foreign
	case s.Seed != c.d.Seed || s.Place != uint32(disk) || s.Offset != off || !c.wrote(s.Seq, disk, off):
		c.r.invented(disk, off, "holds %v, which was never written here", s)
		return foreign
	}
	c.shows[s.Seq-1] = true
	return uint32(s.Seq)
}

// wrote reports that write seq covers the sector at off.
func (c *checker) wrote(seq uint64, disk int, off int64) bool {
	if seq == 0 || seq > uint64(len(c.d.Ops)) {
		return false
	}
	op := c.d.Ops[seq-1]
	return op.Kind == Write && op.Disk == disk && op.Off <= off && off < op.Off+op.Len
}

// life is the number of power losses before a time.
func (c *checker) life(t int64) int {
	n := 0
	for _, l := range c.d.Losses {
		if t > l {
			n++
		}
	}
	return n
}

// require finds the operations that have to be there.
func (c *checker) require() {
	c.must = make([]bool, len(c.d.Ops))
	c.requirePromised()
	if c.o.Cut {
		c.requireCut()
	}
}

func (c *checker) requirePromised() {
	type key struct{ disk, life int }
	flushed := map[key]int64{} // Issue of the last answered flush
	for _, op := range c.d.Ops {
		if op.Kind == Flush && op.Done != 0 && !op.Failed {
			k := key{op.Disk, c.life(op.Issue)}
			flushed[k] = max(flushed[k], op.Issue)
		}
	}
	for i, op := range c.d.Ops {
		if op.Kind == Flush {
			continue
		}
		c.r.Writes++
		if op.Done == 0 || op.Failed {
			continue
		}
		c.r.Acked++
		if op.FUA || op.Done < flushed[key{op.Disk, c.life(op.Issue)}] {
			c.r.Durable++
			c.must[i] = true
		}
		c.must[i] = c.must[i] || c.o.Completed
	}
}

// requireCut adds, until nothing changes, what comes within one life before
// anything that has to be there or shows. That a zero shows may follow from
// what was found before.
func (c *checker) requireCut() {
	for more := true; more; {
		c.requireBefore()
		more = false
		for disk := range c.seen {
			more = c.showZeros(disk) || more
		}
	}
}

func (c *checker) requireBefore() {
	latest := make([]int64, len(c.d.Losses)+1) // by life
	for i, op := range c.d.Ops {
		if c.must[i] || c.shows[i] {
			n := c.life(op.Issue)
			latest[n] = max(latest[n], op.Issue)
		}
	}
	for i, op := range c.d.Ops {
		if op.Kind == Flush {
			continue
		}
		before := op.Done != 0 && !op.Failed && op.Done < latest[c.life(op.Issue)]
		c.must[i] = c.must[i] || before || (c.o.Atomic && c.shows[i] && !op.Refused)
	}
}

// showZeros finds zeros and trims that show: a sector is zeros, had to be
// written, and of those that can have made it zeros since, this one comes
// before all others, so it took part whichever it was.
func (c *checker) showZeros(disk int) (more bool) {
	floor, _ := c.floors(disk)
	first := make([]uint32, len(floor)) // by sector: the candidate sent first
	second := make([]int64, len(floor)) // by sector: Issue of the next one
	for _, op := range c.d.Ops {
		if op.Disk != disk || (op.Kind != Zero && op.Kind != Trim) {
			continue
		}
		s, end := c.sectors(op)
		for ; s < end; s++ {
			switch {
			case c.seen[disk][s] != 0 || floor[s] == 0 || c.older(uint32(op.Seq), floor[s]):
			case first[s] == 0:
				first[s] = uint32(op.Seq)
			case second[s] == 0:
				second[s] = op.Issue
			}
		}
	}
	for s, seq := range first {
		if seq != 0 && !c.shows[seq-1] && (second[s] == 0 || c.older(seq, second[s])) {
			c.shows[seq-1], more = true, true
		}
	}
	return more
}

// judge compares every sector with the latest write that has to be there.
func (c *checker) judge() {
	for disk, seen := range c.seen {
		floor, by := c.floors(disk)
		zero := c.zeros(disk, floor)
		for i, seq := range seen {
			off := c.d.Disks[disk].Off + int64(i)*stamp.Size
			switch {
			case seq == foreign || floor[i] == 0:
			case seq == 0 && !zero[i]:
				c.r.lost(disk, off, "zeros, but %s has to be there", c.describe(by[i]))
			case seq != 0 && c.older(seq, floor[i]):
				c.r.lost(disk, off, "content of %s, but %s has to be there", c.describe(seq), c.describe(by[i]))
			}
		}
	}
}

// older reports that operation seq surely comes before one issued at floor.
func (c *checker) older(seq uint32, floor int64) bool {
	done := c.d.Ops[seq-1].Done
	return done != 0 && done < floor
}

// floors gives, per sector, the latest Issue of an operation that has to be
// there, and that operation.
func (c *checker) floors(disk int) (floor []int64, by []uint32) {
	n := c.d.Disks[disk].Len / stamp.Size
	floor, by = make([]int64, n), make([]uint32, n)
	for i, op := range c.d.Ops {
		if !c.must[i] || op.Disk != disk || (op.Kind == Trim && !c.o.TrimIsZero) {
			continue
		}
		first, end := c.sectors(op)
		for s := first; s < end; s++ {
			if op.Issue > floor[s] {
				floor[s], by[s] = op.Issue, uint32(op.Seq)
			}
		}
	}
	return floor, by
}

// zeros tells, per sector, whether zeros are allowed: the floor is a zero or
// trim, or one comes after or beside it.
func (c *checker) zeros(disk int, floor []int64) []bool {
	ok := make([]bool, len(floor))
	for _, op := range c.d.Ops {
		if op.Disk != disk || (op.Kind != Zero && op.Kind != Trim) {
			continue
		}
		first, end := c.sectors(op)
		for s := first; s < end; s++ {
			ok[s] = ok[s] || !c.older(uint32(op.Seq), floor[s])
		}
	}
	return ok
}

// sectors is the range of sectors, within the disk's part, that op covers.
func (c *checker) sectors(op Op) (first, end int64) {
	d := c.d.Disks[op.Disk]
	first = max(0, (op.Off-d.Off)/stamp.Size)
	return first, min(d.Len, op.Off+op.Len-d.Off) / stamp.Size
}

func (c *checker) describe(seq uint32) string {
	op := c.d.Ops[seq-1]
	return fmt.Sprintf("%v %d (%d bytes at %d, sent at %d, answered at %d)", op.Kind, op.Seq, op.Len, op.Off, op.Issue, op.Done)
}
