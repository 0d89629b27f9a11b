// Package acked checks the promise that matters: whatever a file system call
// made durable and returned, is there after a disaster.
//
// A Workload writes through a mounted file system in several ways at once and
// notes in a Ledger, outside that file system, each operation that is about to
// begin and each that has returned. After the disaster Check compares another
// mount (the replica's) with the ledger: every acknowledged operation must be
// there and intact, the one operation that each writer had under way may be
// there in whole or in part, and nothing else may.
//
// What a writer does is a pure function of the seed, the writer's number and
// the operation's number, so the ledger holds only counts and times. Each
// writer does one operation at a time and ends at its first error: an error of
// fsync is final, and what a later one would promise is not known.
//
// MountNBD puts the kernel's ext4 on an NBD server, MountImage on an image
// file. Package raw checks a block device without a file system.
package acked

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"time"
)

// Kind is what a writer does.
type Kind string

// The kinds of writer.
const (
	// Append adds checksummed, numbered records to one file.
	Append Kind = "append"
	// Overwrite writes stamped sectors at random places of a preallocated file.
	Overwrite Kind = "overwrite"
	// Files makes, replaces (by rename), moves and deletes small files in two folders.
	Files Kind = "files"
)

// Sync is how a writer of kind Append or Overwrite makes an operation durable.
type Sync string

// The ways to make data durable.
const (
	Fsync     Sync = "fsync"
	Fdatasync Sync = "fdatasync"
	Syncfs    Sync = "syncfs"
	ODsync    Sync = "O_DSYNC"
	OSync     Sync = "O_SYNC"
)

// Writer describes one writer.
type Writer struct {
	Kind Kind `json:"kind"`
	Sync Sync `json:"sync,omitempty"` // of Append and Overwrite
	// Shared (of Overwrite): all shared writers write their own parts of one file.
	Shared bool `json:"shared,omitempty"`
}

// Config describes a workload.
type Config struct {
	Seed    uint64        `json:"seed"`
	Writers []Writer      `json:"writers"`           // default: AllWriters
	Blocks  int           `json:"blocks"`            // size of an Overwrite writer's part in 4 KiB; default 64
	MaxOps  int           `json:"max_ops"`           // of one writer; default and limit 1 Mi
	Pause   time.Duration `json:"pause_ns,omitzero"` // of a writer between two operations
}

// AllWriters is one writer of every kind and way, and three that share a file.
func AllWriters() []Writer {
	var ws []Writer
	for _, s := range []Sync{Fsync, Fdatasync, ODsync} {
		ws = append(ws, Writer{Kind: Append, Sync: s}, Writer{Kind: Overwrite, Sync: s})
	}
	return append(ws, Writer{Kind: Append, Sync: OSync}, Writer{Kind: Append, Sync: Syncfs},
		Writer{Kind: Overwrite, Sync: Fdatasync, Shared: true},
		Writer{Kind: Overwrite, Sync: Fsync, Shared: true},
		Writer{Kind: Overwrite, Sync: ODsync, Shared: true},
		Writer{Kind: Files}, Writer{Kind: Files})
}

const maxOps = 1 << 20

func (c *Config) complete() error {
	if len(c.Writers) == 0 {
		c.Writers = AllWriters()
	}
	if c.Blocks == 0 {
		c.Blocks = 64
	}
	if c.MaxOps == 0 {
		c.MaxOps = maxOps
	}
	if len(c.Writers) > 1000 || c.Blocks < 1 || c.Blocks > 1<<20 || c.MaxOps < 0 || c.MaxOps > maxOps {
		return errors.New("writers, blocks or operations out of range")
	}
	for i, w := range c.Writers {
		if err := w.check(); err != nil {
			return fmt.Errorf("writer %d: %w", i, err)
		}
	}
	return nil
}

func (w Writer) check() error {
	switch {
	case w.Kind == Files && w.Sync == "" && !w.Shared:
		return nil
	case w.Kind != Append && w.Kind != Overwrite, w.Shared && w.Kind != Overwrite:
		return fmt.Errorf("%+v is no kind of writer", w)
	}
	switch w.Sync {
	case Fsync, Fdatasync, Syncfs, ODsync, OSync:
		return nil
	}
	return fmt.Errorf("%q is no way to make data durable", w.Sync)
}

// worker is one writer at work. Operations are numbered 1, 2, ….
type worker interface {
	// prepare makes the writer's files, durably, before the first operation.
	prepare(dir string) error
	// perform does operation n; when it returns nil, n is acknowledged.
	perform(n uint64) error
	close() error
	// check compares what is in dir with operations 1..acked done and, if
	// issued is larger, operation issued under way.
	check(dir string, acked, issued uint64, f *findings)
}

func (c Config) worker(i int) worker {
	w, base := c.Writers[i], common{seed: c.Seed, number: i, spec: c.Writers[i]}
	switch w.Kind {
	case Append:
		return &appender{common: base}
	case Overwrite:
		return &overwriter{common: base, sectors: int64(c.Blocks) * 8}
	default:
		return &filer{common: base}
	}
}

// common is what every worker knows of itself.
type common struct {
	seed   uint64
	number int
	spec   Writer
}

func (c common) String() string {
	return fmt.Sprintf("writer %d (%s %s)", c.number, c.spec.Kind, c.spec.Sync)
}

// rand is the source of every choice of operation n.
func (c common) rand(n uint64) *rand.Rand {
	return rand.New(rand.NewPCG(c.seed^uint64(c.number)<<48, n))
}
