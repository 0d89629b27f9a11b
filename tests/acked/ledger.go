package acked

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"
)

// Ledger is the record of what was begun and what was acknowledged. It must
// live outside the file system under test. It is safe for concurrent use.
//
// With a file behind it, it survives the test's own death: a header line with
// the Config, then one line per event,
//
//	i WRITER NUMBER        operation about to begin
//	a WRITER NUMBER TIME   operation acknowledged, ns since 1970
//
// A last line without its end is ignored.
type Ledger struct {
	mu     sync.Mutex
	config Config
	issued []uint64  // by writer: last operation begun
	acks   [][]int64 // by writer: time of each acknowledgement
	file   *os.File
	err    error
	frozen bool
}

// errFrozen ends a writer whose operation returned after Freeze.
var errFrozen = errors.New("returned after the disaster")

// NewLedger makes a ledger for a workload. path may be empty; otherwise the
// file must not exist.
func NewLedger(c Config, path string) (*Ledger, error) {
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	l := emptyLedger(c)
	if path == "" {
		return l, nil
	}
	head, err := json.Marshal(c)
	if err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	if l.file, err = os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600); err != nil {
		return nil, fmt.Errorf("ledger: %w", err)
	}
	if _, err := l.file.Write(append(head, '\n')); err != nil {
		l.file.Close()
		return nil, fmt.Errorf("ledger: %w", err)
	}
	return l, nil
}

func emptyLedger(c Config) *Ledger {
	return &Ledger{config: c, issued: make([]uint64, len(c.Writers)), acks: make([][]int64, len(c.Writers))}
}

// LoadLedger reads a ledger's file.
func LoadLedger(path string) (*Ledger, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("load the ledger: %w", err)
	}
	defer f.Close()
	r := bufio.NewReader(f)
	head, err := r.ReadBytes('\n')
	if err != nil {
		return nil, fmt.Errorf("load the ledger's header: %w", err)
	}
	var c Config
	if err := json.Unmarshal(head, &c); err != nil {
		return nil, fmt.Errorf("load the ledger's header: %w", err)
	}
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("load the ledger's header: %w", err)
	}
	l := emptyLedger(c)
	for {
		line, err := r.ReadString('\n')
		if errors.Is(err, io.EOF) {
			return l, nil
		}
		if err != nil {
			return nil, fmt.Errorf("load the ledger: %w", err)
		}
		if err := l.replay(line); err != nil {
			return nil, fmt.Errorf("load the ledger: %w", err)
		}
	}
}

func (l *Ledger) replay(line string) error {
	var kind string
	var w int
	var n uint64
	var at int64
	if _, err := fmt.Sscan(line+" 0", &kind, &w, &n, &at); err != nil {
		return fmt.Errorf("line %q: %w", line, err)
	}
	known := w >= 0 && w < len(l.issued)
	switch {
	case known && kind == "i" && n == l.issued[w]+1:
		l.issued[w] = n
	case known && kind == "a" && n == l.issued[w] && n == uint64(len(l.acks[w]))+1:
		l.acks[w] = append(l.acks[w], at)
	default:
		return fmt.Errorf("line %q does not follow", line)
	}
	return nil
}

// issue notes that operation n of a writer is about to begin.
func (l *Ledger) issue(w int, n uint64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.issued[w] = n
	l.write("i %d %d\n", w, n)
}

// Freeze is the moment of the disaster: what returns later was heard by
// nobody and counts as under way. Call it before pulling a cord. The kernel
// lives on, sees I/O errors where a machine without power sees nothing, and
// jbd2_complete_transaction (Linux 6.1, fs/jbd2/journal.c) answers an fsync
// with success when the transaction it asks for was aborted just before.
func (l *Ledger) Freeze() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.frozen = true
}

// ack notes that the last operation begun has returned. After Freeze it fails.
func (l *Ledger) ack(w int, at time.Time) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.frozen {
		return errFrozen
	}
	l.acks[w] = append(l.acks[w], at.UnixNano())
	l.write("a %d %d %d\n", w, len(l.acks[w]), at.UnixNano())
	return nil
}

func (l *Ledger) write(format string, args ...any) {
	if l.file == nil || l.err != nil {
		return
	}
	if _, err := fmt.Fprintf(l.file, format, args...); err != nil {
		l.err = fmt.Errorf("write the ledger: %w", err)
	}
}

// Close closes the ledger's file; the ledger can still be checked against. It
// returns the first error of writing it, if any.
func (l *Ledger) Close() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.file == nil {
		return l.err
	}
	err := errors.Join(l.err, l.file.Close())
	l.file = nil
	return err
}

// Acked is the number of acknowledged operations.
func (l *Ledger) Acked() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, a := range l.acks {
		n += len(a)
	}
	return n
}

// LastAck is when the latest acknowledgement came; zero when there is none.
func (l *Ledger) LastAck() time.Time {
	l.mu.Lock()
	defer l.mu.Unlock()
	var last int64
	for _, a := range l.acks {
		if len(a) > 0 {
			last = max(last, a[len(a)-1])
		}
	}
	if last == 0 {
		return time.Time{}
	}
	return time.Unix(0, last)
}

// state is one writer's counts and times; the slice must not be changed.
func (l *Ledger) state(w int) (issued uint64, acks []int64) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.issued[w], l.acks[w]
}
