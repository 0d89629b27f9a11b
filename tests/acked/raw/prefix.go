package raw

import (
	"errors"
	"fmt"
	"io"
)

// Prefix is which prefixes of a sequential history the images equal. First
// and Last are numbers of operations; 0 is the state before the first. There
// are several only when operations changed nothing.
type Prefix struct {
	First, Last uint64 // the shortest and the longest prefix that the images equal
	Acked       uint64 // the images must hold at least operations 1..Acked
}

// ErrNoPrefix: the images equal no state that the disks went through.
var ErrNoPrefix = errors.New("the images equal no prefix of the history")

// CheckPrefix decides whether the images equal, sector by sector, the disks'
// state after exactly some prefix of the history, and one that is not shorter
// than what was promised durable. It needs a history whose order is known:
// every operation answered without error before the next was sent, but for the
// very last, and no power loss.
func CheckPrefix(h *History, images ...io.ReaderAt) (Prefix, error) {
	c := checker{d: h.snapshot(), o: Options{TrimIsZero: true}}
	if len(images) != len(c.d.Disks) {
		return Prefix{}, fmt.Errorf("%d images for %d disks", len(images), len(c.d.Disks))
	}
	if err := sequential(c.d); err != nil {
		return Prefix{}, err
	}
	for i, img := range images {
		if err := c.scan(i, img); err != nil {
			return Prefix{}, err
		}
	}
	if c.r.InventedCount > 0 {
		return Prefix{}, fmt.Errorf("%w: %w", ErrNoPrefix, c.r.Err())
	}
	c.require()
	return c.prefixes()
}

func sequential(d historyData) error {
	if len(d.Losses) > 0 {
		return errors.New("the order is not known: the history has a power loss")
	}
	var last int64
	unanswered := false
	for _, op := range d.Ops {
		answered := op.Done != 0 && !op.Failed
		switch {
		case answered && unanswered, answered && op.Issue < last:
			return fmt.Errorf("the order is not known: operation %d was sent while another was under way", op.Seq)
		case answered:
			last = op.Done
		case unanswered:
			return fmt.Errorf("the order is not known: operation %d was sent after one without a good answer", op.Seq)
		default:
			unanswered = true
		}
	}
	return nil
}

// prefixes replays the history, counting the sectors that differ from the images.
func (c *checker) prefixes() (Prefix, error) {
	p := Prefix{}
	model := make([][]uint32, len(c.seen))
	differ := 0
	for d, seen := range c.seen {
		model[d] = make([]uint32, len(seen))
		for _, seq := range seen {
			if seq != 0 {
				differ++
			}
		}
	}
	for i := range c.must {
		if c.must[i] {
			p.Acked = uint64(i) + 1
		}
	}
	found, best := differ == 0, differ
	for _, op := range c.d.Ops {
		differ += c.apply(model[op.Disk], op)
		best = min(best, differ)
		if differ == 0 {
			if !found {
				p.First = op.Seq
			}
			found, p.Last = true, op.Seq
		}
	}
	switch {
	case !found:
		return p, fmt.Errorf("%w: the nearest differs in %d sectors", ErrNoPrefix, best)
	case p.Last < p.Acked:
		return p, fmt.Errorf("the images equal the state after operation %d, but operation %d was promised durable", p.Last, p.Acked)
	}
	return p, nil
}

// apply does op on the model and returns the change in the number of sectors
// that differ from the image.
func (c *checker) apply(model []uint32, op Op) (change int) {
	if op.Kind == Flush {
		return 0
	}
	content := uint32(0)
	if op.Kind == Write {
		content = uint32(op.Seq)
	}
	first, end := c.sectors(op)
	for s := first; s < end; s++ {
		want := c.seen[op.Disk][s]
		if model[s] == want {
			change++
		}
		if model[s] = content; content == want {
			change--
		}
	}
	return change
}
