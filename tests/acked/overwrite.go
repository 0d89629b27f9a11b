package acked

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"kagami/tests/acked/stamp"
)

// overwriter writes stamped sectors into its part of a preallocated file.
// Operation n writes one run of 1 to 24 sectors, stamped n.
type overwriter struct {
	common
	sectors int64 // of its part
	file    *os.File
}

func (o *overwriter) name() string {
	if o.spec.Shared {
		return "overwrite-shared.blk"
	}
	return fmt.Sprintf("overwrite-%d.blk", o.number)
}

// base is where the writer's part begins, in bytes.
func (o *overwriter) base() int64 {
	if o.spec.Shared {
		return int64(o.number) * o.sectors * stamp.Size
	}
	return 0
}

// run is what operation n writes: sectors [first, first+count) of the part.
func (o *overwriter) run(n uint64) (first, count int64) {
	rng := o.rand(n)
	count = min(o.sectors, 1+rng.Int64N(24))
	return rng.Int64N(o.sectors - count + 1), count
}

// prepare writes zeros, so that later writes change neither size nor extents.
func (o *overwriter) prepare(dir string) (err error) {
	flags := os.O_CREATE | os.O_WRONLY | o.spec.Sync.openFlags()
	if o.file, err = os.OpenFile(filepath.Join(dir, o.name()), flags, 0o600); err != nil {
		return err
	}
	if _, err := o.file.WriteAt(make([]byte, o.sectors*stamp.Size), o.base()); err != nil {
		return err
	}
	return o.file.Sync()
}

func (o *overwriter) perform(n uint64) error {
	first, count := o.run(n)
	p := make([]byte, count*stamp.Size)
	off := o.base() + first*stamp.Size
	stamp.Fill(p, stamp.Stamp{Seed: o.seed, Seq: n, Place: uint32(o.number), Offset: off})
	if _, err := o.file.WriteAt(p, off); err != nil {
		return err
	}
	return o.spec.Sync.apply(o.file)
}

func (o *overwriter) close() error { return o.file.Close() }

// check: each sector is from the last acknowledged operation that covers it,
// or from the one under way if that covers it.
func (o *overwriter) check(dir string, acked, issued uint64, f *findings) {
	f.allowed[o.name()] = true
	last := make([]uint64, o.sectors)
	for n := uint64(1); n <= acked; n++ {
		first, count := o.run(n)
		for s := first; s < first+count; s++ {
			last[s] = n
		}
	}
	got, err := o.read(dir)
	if err != nil {
		f.lostf(0, "%s, durable before the first operation: %v", o.name(), err)
		for _, n := range last {
			if n > 0 {
				f.lostf(n, "%s cannot be read: %v", o.name(), err)
			}
		}
		return
	}
	under := func(int64) bool { return false }
	if issued > acked {
		first, count := o.run(issued)
		under = func(s int64) bool { return s >= first && s < first+count }
	}
	for s, want := range last {
		o.checkSector(int64(s), got[s*stamp.Size:(s+1)*stamp.Size], want, issued, under(int64(s)), f)
	}
}

func (o *overwriter) checkSector(s int64, got []byte, want, issued uint64, underWay bool, f *findings) {
	off := o.base() + s*stamp.Size
	st, kind := stamp.Read(got)
	ours := kind == stamp.Intact && st.Seed == o.seed && st.Place == uint32(o.number) && st.Offset == off
	switch {
	case kind == stamp.Zero && want == 0, ours && st.Seq == want, ours && underWay && st.Seq == issued:
	case want != 0 && kind == stamp.Zero:
		f.lostf(want, "%s offset %d holds zeros", o.name(), off)
	case want != 0 && ours && st.Seq < want:
		f.lostf(want, "%s offset %d holds the older operation %d", o.name(), off, st.Seq)
	case want != 0:
		f.lostf(want, "%s offset %d is damaged: %v", o.name(), off, st)
		fallthrough
	default:
		f.inventedf("%s offset %d holds what was never written there: %v", o.name(), off, st)
	}
}

// read returns the writer's part, and an error unless the file is as long as
// it was made.
func (o *overwriter) read(dir string) ([]byte, error) {
	file, err := os.Open(filepath.Join(dir, o.name()))
	if err != nil {
		return nil, err
	}
	defer file.Close()
	p := make([]byte, o.sectors*stamp.Size)
	if st, err := file.Stat(); err != nil {
		return nil, err
	} else if !o.spec.Shared && st.Size() > int64(len(p)) {
		return nil, fmt.Errorf("the file is %d bytes longer than it was made", st.Size()-int64(len(p)))
	}
	if _, err := file.ReadAt(p, o.base()); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	} else if err != nil {
		return nil, fmt.Errorf("the file is shorter than it was made: %w", err)
	}
	return p, nil
}
