package ext4cap

import (
	"crypto/sha256"
	"fmt"

	"kagami/ext4j/epoch"
	"kagami/ext4j/follow"
)

// Stream is what was written to a disk, from a state on.
type Stream struct {
	Base  []byte
	Log   []Record
	Mount string // options that whoever mounts it needs to keep the journal as it is
}

// Played is what a follower made of a stream.
type Played struct {
	Flushes, Local, Waited, Empty int
	Commits                       int
	Counts                        [follow.Classes]uint64
	Status                        follow.Status
	Answers                       []Answer // of the FLUSHes answered locally
}

// Answer is a FLUSH that was answered locally: everything up to the boundary
// Acked was at the replica, everything up to Boundary was covered. Boundaries
// count the FLUSHes of the log, 0 is the base.
type Answer struct{ Acked, Boundary int }

// Play lets a follower judge a stream as a source would: a FLUSH that is not
// answered locally waits for the replica, whose acknowledgements come lag FLUSHes late.
func (s Stream) Play(o follow.Options, lag int) *Played {
	img := memory(append([]byte(nil), s.Base...))
	o.Size = int64(len(img))
	f := follow.New(o)
	p := &Played{}
	feed(f, img)
	var lsn epoch.LSN
	bounds := []epoch.LSN{0} // by boundary
	acked, last := 0, epoch.LSN(0)
	for _, r := range s.Log {
		switch r.Kind {
		case Flush:
			p.Flushes++
			lsn++
			bounds = append(bounds, lsn)
			now := len(bounds) - 1
			switch a := bounds[acked]; {
			case last <= a:
				p.Empty++
			case f.Local(a):
				p.Local++
				p.Answers = append(p.Answers, Answer{acked, now})
				f.Flushed()
			default:
				p.Waited++
				acked = max(acked, now-lag)
				f.Flushed()
			}
		case Write, Zero:
			lsn++
			last = lsn
			w := follow.Write{LSN: lsn, Range: follow.Range{Off: r.Off, Len: r.Len}, Data: r.Data}
			if r.Kind == Zero {
				w.Kind = follow.Zeroes
			}
			if f.NeedsBefore(r.Off, r.Len) {
				w.Before = append([]byte(nil), img[r.Off:r.Off+r.Len]...)
			}
			apply(img, r)
			f.Observe(w)
			feed(f, img)
			c, _ := f.Commits()
			p.Commits += len(c)
		}
	}
	p.Status = f.Status()
	p.Counts = p.Status.Counts
	return p
}

func apply(img []byte, r Record) {
	switch r.Kind {
	case Write:
		copy(img[r.Off:], r.Data)
	case Zero:
		clear(img[r.Off : r.Off+r.Len])
	}
}

func feed(f *follow.Follower, img []byte) {
	for {
		ws := f.Wants(64)
		if len(ws) == 0 {
			return
		}
		for _, w := range ws {
			f.Loaded(w, img[w.Off:w.Off+w.Len])
		}
	}
}

// Check recovers the disk at every boundary that an answer spans and compares
// what is found: all of them must look alike. It returns the first Lie.
func (s Stream) Check(j *Judge, answers []Answer) error {
	until := map[int]int{} // boundary → the first one it must look like
	last := 0
	for _, a := range answers {
		for b := a.Acked; b <= a.Boundary; b++ {
			if from, ok := until[b]; !ok || a.Acked < from {
				until[b] = a.Acked
			}
		}
		last = max(last, a.Boundary)
	}
	c := checker{j: j, until: until, looks: map[int]string{}, img: append([]byte(nil), s.Base...)}
	if err := c.look(0); err != nil {
		return err
	}
	n := 0
	for _, r := range s.Log {
		switch r.Kind {
		case Note:
			c.note(string(r.Data))
		case Flush:
			if n++; n > last {
				return nil
			}
			if err := c.look(n); err != nil {
				return err
			}
		default:
			apply(c.img, r)
		}
	}
	return nil
}

// checker goes through a stream for Check.
type checker struct {
	j     *Judge
	until map[int]int
	looks map[int]string
	img   []byte
	raw   [][2]int64 // ranges that a program owns without a file system
}

// note takes what the workload promised itself.
func (c *checker) note(text string) {
	var off, n int64
	if text == "raw end" {
		c.raw = nil
	} else if _, err := fmt.Sscanf(text, "raw %d %d", &off, &n); err == nil {
		c.raw = append(c.raw, [2]int64{off, n})
	}
}

// look looks at boundary n if an answer spans it, and compares with where that began.
func (c *checker) look(n int) error {
	from, ok := c.until[n]
	if !ok {
		return nil
	}
	tree, err := c.j.Look(c.img)
	if err != nil {
		return fmt.Errorf("at FLUSH %d: %w", n, err)
	}
	for _, r := range c.raw {
		tree += fmt.Sprintf("\nraw %d %x", r[0], sha256.Sum256(c.img[r[0]:r[0]+r[1]]))
	}
	c.looks[n] = tree
	for b := from; b < n; b++ {
		if before := c.looks[b]; before != tree {
			return &Lie{Answer: Answer{from, n}, At: b, Before: before, After: tree}
		}
	}
	return nil
}

// Lie is a FLUSH that was answered locally although what it covers shows.
type Lie struct {
	Answer
	At            int
	Before, After string
}

func (l *Lie) Error() string {
	return fmt.Sprintf("FLUSH %d was answered with FLUSH %d acknowledged, but recovery at %d shows\n%s\nand at %d\n%s", l.Boundary, l.Acked, l.At, l.Before, l.Boundary, l.After)
}
