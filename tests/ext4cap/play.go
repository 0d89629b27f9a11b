package ext4cap

import (
	"fmt"

	"kagami/ext4j/epoch"
	"kagami/ext4j/follow"
)

// Stream is what was written to a disk, from a state on.
type Stream struct {
	Base []byte
	Log  []Record
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
// what is found: all of them must look alike.
func (s Stream) Check(j *Judge, answers []Answer) error {
	need := map[int]bool{}
	for _, a := range answers {
		for b := a.Acked; b <= a.Boundary; b++ {
			need[b] = true
		}
	}
	looks := map[int]string{}
	img, n := append([]byte(nil), s.Base...), 0
	look := func() error {
		if !need[n] {
			return nil
		}
		tree, err := j.Look(img)
		if err != nil {
			return fmt.Errorf("at FLUSH %d: %w", n, err)
		}
		looks[n] = tree
		return nil
	}
	if err := look(); err != nil {
		return err
	}
	for _, r := range s.Log {
		apply(img, r)
		if r.Kind == Flush {
			n++
			if err := look(); err != nil {
				return err
			}
		}
	}
	for _, a := range answers {
		for b := a.Acked; b < a.Boundary; b++ {
			if looks[b] != looks[a.Boundary] {
				return &Lie{Answer: a, At: b, Before: looks[b], After: looks[a.Boundary]}
			}
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
