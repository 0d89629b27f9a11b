package acked

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"time"
)

// Finding is one thing that is not as it must be.
type Finding struct {
	Writer int
	Op     uint64    // the operation that is lost; 0: the writer's files themselves, or what was invented
	Acked  time.Time // when it was acknowledged
	What   string
}

func (f Finding) String() string {
	if f.Op == 0 {
		return fmt.Sprintf("writer %d: %s", f.Writer, f.What)
	}
	return fmt.Sprintf("writer %d: operation %d, acknowledged at %s: %s",
		f.Writer, f.Op, f.Acked.Format(time.RFC3339Nano), f.What)
}

const maxFindings = 20

// Report is the outcome of Check. The lists are cut off at 20 entries; the
// counts are not.
type Report struct {
	Acked         int // operations acknowledged
	LostCount     int // operations (and prepared files) whose effect is missing, damaged or undone
	Lost          []Finding
	InventedCount int // things that no operation made
	Invented      []Finding
	LostSince     time.Time // when the first lost operation was acknowledged
	LastAck       time.Time
}

// Err is nil when every acknowledged operation is there and nothing was invented.
func (r Report) Err() error {
	if r.LostCount+r.InventedCount == 0 {
		return nil
	}
	var b strings.Builder
	b.WriteString(r.String())
	for _, f := range append(r.Lost[:len(r.Lost):len(r.Lost)], r.Invented...) {
		fmt.Fprintf(&b, "\n  %v", f)
	}
	return errors.New(b.String())
}

func (r Report) String() string {
	return fmt.Sprintf("%d operations acknowledged, %d lost, %d things invented", r.Acked, r.LostCount, r.InventedCount)
}

// Check compares the folder of a workload, as found after the disaster, with
// the ledger. Whatever cannot be read counts as lost. An error means that
// nothing could be said.
func Check(dir string, l *Ledger) (Report, error) {
	r := Report{Acked: l.Acked(), LastAck: l.LastAck()}
	if len(l.config.Writers) == 0 {
		return r, errors.New("check: the ledger has no writers")
	}
	allowed := map[string]bool{}
	for i := range l.config.Writers {
		issued, acks := l.state(i)
		f := &findings{report: &r, writer: i, acks: acks, allowed: allowed, lost: map[uint64]bool{}}
		l.config.worker(i).check(dir, uint64(len(acks)), issued, f)
	}
	return r, strangers(dir, allowed, &r)
}

// strangers finds names that no writer has.
func strangers(dir string, allowed map[string]bool, r *Report) error {
	entries, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) && r.LostCount > 0 {
		return nil // already told, writer by writer
	}
	if err != nil {
		return fmt.Errorf("check: %w", err)
	}
	for _, e := range entries {
		if !allowed[e.Name()] {
			(&findings{report: r, writer: -1}).inventedf("%s in the workload's folder", e.Name())
		}
	}
	return nil
}

// findings collects what one worker finds.
type findings struct {
	report  *Report
	writer  int
	acks    []int64
	allowed map[string]bool // names in the workload's folder
	lost    map[uint64]bool // operations already counted
}

// lostf notes that an acknowledged operation is not there. Each is counted once.
func (f *findings) lostf(op uint64, format string, args ...any) {
	if f.lost[op] {
		return
	}
	f.lost[op] = true
	r, at := f.report, time.Time{}
	if op > 0 && op <= uint64(len(f.acks)) {
		at = time.Unix(0, f.acks[op-1])
		if r.LostSince.IsZero() || at.Before(r.LostSince) {
			r.LostSince = at
		}
	}
	if r.LostCount++; len(r.Lost) < maxFindings {
		r.Lost = append(r.Lost, Finding{f.writer, op, at, fmt.Sprintf(format, args...)})
	}
}

func (f *findings) inventedf(format string, args ...any) {
	r := f.report
	if r.InventedCount++; len(r.Invented) < maxFindings {
		r.Invented = append(r.Invented, Finding{Writer: f.writer, What: fmt.Sprintf(format, args...)})
	}
}

// partial compares content that was under way with what it was to be: each
// byte is as written, or zero, or the content ends early. It returns the
// offset of the first byte that is neither, or -1.
func partial(got, want []byte) int {
	for i, b := range got {
		if i >= len(want) || (b != 0 && b != want[i]) {
			return i
		}
	}
	return -1
}
