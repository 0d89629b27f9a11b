// Package script holds short recordings of what the kernel's ext4 wrote to a
// disk, for the simulator, which needs no root to play them. Each is complete: the
// disk as it was, every write and FLUSH, and for every prefix of these a class: two
// prefixes are of one class if and only if the kernel shows the same names, attributes
// and contents after recovery of either. tests/ext4cap makes them (MakeScripts).
package script

import (
	"bytes"
	"compress/gzip"
	"embed"
	"encoding/gob"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Script is a recording.
type Script struct {
	Name  string
	Base  []byte   // the disk at the beginning
	Steps []Step   // in their order
	Class []uint32 // of the disk before each step, and at the end: one more than Steps
}

// Step is a write, or a FLUSH where Data is nil.
type Step struct {
	Off  int64
	Data []byte
}

// Pack writes a script.
func (s Script) Pack() ([]byte, error) {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if err != nil {
		return nil, err
	}
	if err := gob.NewEncoder(z).Encode(s); err != nil {
		return nil, err
	}
	err = z.Close()
	return b.Bytes(), err
}

//go:embed *.gob.gz
var packed embed.FS

// All are the scripts there are, sorted by name.
func All() ([]Script, error) {
	entries, err := packed.ReadDir(".")
	if err != nil {
		return nil, err
	}
	var all []Script
	for _, e := range entries {
		b, err := packed.ReadFile(e.Name())
		if err != nil {
			return nil, err
		}
		s, err := unpack(b)
		if err != nil {
			return nil, fmt.Errorf("script %s: %w", e.Name(), err)
		}
		all = append(all, s)
	}
	slices.SortFunc(all, func(a, b Script) int { return strings.Compare(a.Name, b.Name) })
	return all, nil
}

func unpack(b []byte) (s Script, err error) {
	z, err := gzip.NewReader(bytes.NewReader(b))
	if err != nil {
		return s, err
	}
	if err := gob.NewDecoder(io.LimitReader(z, 1<<28)).Decode(&s); err != nil {
		return s, err
	}
	if len(s.Class) != len(s.Steps)+1 {
		return s, fmt.Errorf("%d classes for %d steps", len(s.Class), len(s.Steps))
	}
	return s, z.Close()
}
