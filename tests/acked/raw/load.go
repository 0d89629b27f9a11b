// Package raw checks a block device's promises without a file system: a tiny
// NBD client writes stamped sectors (package stamp) with several requests in
// flight, a History records what was sent and what was answered, and Check and
// CheckPrefix decide whether an image is a state that the promises allow.
//
// The order of two writes is known only when one was answered before the
// other was sent; the checkers use nothing else, so they accept every correct
// server, however it schedules, and reject every lost or invented sector that
// an observer could prove.
package raw

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"

	"kagami/tests/acked/stamp"
)

// Load is a random stream of requests on one disk of a history.
type Load struct {
	Seed    uint64
	Disk    int
	Workers int     // requests in flight; default 1, which gives a history whose order is known
	Ops     int     // requests to send, at most MaxOps; 0: MaxOps
	MaxLen  int64   // largest write in bytes; default 32 KiB
	MaxZero int64   // largest zero or trim in bytes; default 256 KiB
	Align   int64   // of offsets and lengths, bytes; default stamp.Size
	Flush   float64 // share of requests that are flushes; default 0.1
	FUA     float64 // share of writes, zeros and trims with FUA
	Zeroes  float64 // share of zeros
	Trims   float64 // share of trims
}

// MaxOps bounds the requests of one Load, and so a history's memory.
const MaxOps = 1 << 20

func (l *Load) defaults() {
	set := func(v *int64, d int64) {
		if *v == 0 {
			*v = d
		}
	}
	set(&l.Align, stamp.Size)
	set(&l.MaxLen, 32<<10)
	set(&l.MaxZero, 256<<10)
	if l.Workers == 0 {
		l.Workers = 1
	}
	if l.Ops == 0 || l.Ops > MaxOps {
		l.Ops = MaxOps
	}
	if l.Flush == 0 {
		l.Flush = 0.1
	}
}

// Run sends requests until Ops are done, ctx ends or a request fails; it
// returns that first failure. It waits for the requests under way: to abandon
// those of a server that does not answer, Kill the client.
func (l Load) Run(ctx context.Context, h *History, c *Client) error {
	l.defaults()
	var wg sync.WaitGroup
	errs := make([]error, l.Workers)
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	for w := range l.Workers {
		n := l.Ops / l.Workers
		if w < l.Ops%l.Workers {
			n++
		}
		wg.Go(func() {
			rng := rand.New(rand.NewPCG(l.Seed, uint64(w)+1))
			if errs[w] = l.work(ctx, h, c, rng, n); errs[w] != nil {
				cancel()
			}
		})
	}
	wg.Wait()
	return errors.Join(errs...)
}

func (l Load) work(ctx context.Context, h *History, c *Client, rng *rand.Rand, n int) error {
	buf := make([]byte, l.MaxLen)
	for range n {
		select {
		case <-ctx.Done(): // that is how a load is ended
			return nil
		default:
		}
		op := l.choose(rng, h.data.Disks[l.Disk])
		seq := h.Begin(op)
		err := l.send(h, c, op, seq, buf)
		if !errors.Is(err, ErrDisconnected) {
			h.End(seq, err)
		}
		if err != nil {
			return fmt.Errorf("%v %d (%d bytes at %d): %w", op.Kind, seq, op.Len, op.Off, err)
		}
	}
	return nil
}

// choose makes the next request at random.
func (l Load) choose(rng *rand.Rand, d Disk) Op {
	op := Op{Disk: l.Disk, Kind: Write}
	limit := l.MaxLen
	switch f := rng.Float64(); {
	case f < l.Flush:
		op.Kind = Flush
		return op
	case f < l.Flush+l.Zeroes:
		op.Kind, limit = Zero, l.MaxZero
	case f < l.Flush+l.Zeroes+l.Trims:
		op.Kind, limit = Trim, l.MaxZero
	}
	op.FUA = rng.Float64() < l.FUA
	op.Len = l.Align * (1 + rng.Int64N(max(1, min(limit, d.Len)/l.Align)))
	op.Off = d.Off + l.Align*rng.Int64N((d.Len-op.Len)/l.Align+1)
	return op
}

func (l Load) send(h *History, c *Client, op Op, seq uint64, buf []byte) error {
	switch op.Kind {
	case Flush:
		return c.Flush()
	case Zero:
		return c.Zero(op.Off, op.Len, seq%2 == 0, op.FUA)
	case Trim:
		return c.Trim(op.Off, op.Len, op.FUA)
	}
	p := buf[:op.Len]
	h.Fill(p, seq, op.Disk, op.Off)
	return c.Write(p, op.Off, op.FUA)
}
