package e2e

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
)

// TestFlushLatency: a write and its FLUSH take one round trip, not none and not two.
func TestFlushLatency(t *testing.T) {
	const rtt = 60 * time.Millisecond
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: rtt, Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 8 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()
	flush := func(int64) error { return c.Flush() }
	fua := func(off int64) error { return c.Write(make([]byte, 4096), off, true) }
	for name, promise := range map[string]func(int64) error{"FLUSH": flush, "FUA": fua} {
		var took []time.Duration
		for i := range int64(12) {
			began := time.Now()
			must(t, c.Write(make([]byte, 4096), i<<12, false))
			if d := time.Since(began); i > 0 && d > rtt {
				t.Errorf("a plain write took %v", d)
			}
			must(t, promise(i<<12))
			took = append(took, time.Since(began))
		}
		t.Logf("%s: %v", name, took)
		slices.Sort(took)
		if took[0] < rtt {
			t.Errorf("%s returned after %v, RTT is %v: it cannot have waited for the other site", name, took[0], rtt)
		}
		if took[1] >= 2*rtt {
			t.Errorf("%s takes %v, RTT is %v: more than one round trip", name, took[1], rtt)
		}
	}
}

// later runs f and tells when it has returned.
func later(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- f() }()
	return done
}

// TestFlushWaits: with the line cut FLUSH waits, writes go on until the queue
// is full, reads go on for ever; after the cut everything goes on by itself.
func TestFlushWaits(t *testing.T) {
	t.Parallel()
	const queue = 1 << 20
	limits := rounds.QuickLink()
	limits["queue_bytes"] = "1MiB"
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: 5 * time.Millisecond, Limits: limits,
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "d", Size: 16 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	h := raw.NewHistory(seed(t), raw.Disk{Len: 16 << 20})
	c, err := rounds.Dial(ctx, r.Main, "g", "d")
	must(t, err)
	defer c.Kill()
	write := func(i int64) error {
		op := raw.Op{Kind: raw.Write, Off: i % 4096 << 12, Len: 4096}
		seq := h.Begin(op)
		p := make([]byte, op.Len)
		h.Fill(p, seq, 0, op.Off)
		err := c.Write(p, op.Off, false)
		h.End(seq, err)
		return err
	}
	flush := func() error {
		seq := h.Begin(raw.Op{Kind: raw.Flush})
		err := c.Flush()
		h.End(seq, err)
		return err
	}
	must(t, write(0))
	must(t, flush())

	r.Link.Cut()
	must(t, write(1))
	flushed := later(flush)
	n := int64(2)
	var stuck <-chan error
	for stuck == nil {
		done := later(func() error { return write(n) })
		select {
		case err := <-done:
			must(t, err)
			n++
		case <-time.After(2 * time.Second):
			stuck = done
		}
		if n > queue>>12 {
			t.Fatalf("%d bytes were taken with the line cut, the queue is to hold %d", n<<12, queue)
		}
	}
	t.Logf("%d bytes were taken with the line cut", n<<12)
	if n<<12 < queue/2 {
		t.Errorf("writes wait after %d bytes, the queue holds %d", n<<12, queue)
	}
	for i := range 10 {
		read := later(func() error { _, err := c.ReadAt(make([]byte, 4096), int64(i)<<12); return err })
		select {
		case err := <-read:
			must(t, err)
		case <-time.After(5 * time.Second):
			t.Fatal("a read waits for the line")
		}
	}
	g, err := r.Await(ctx, "g", "stalled")
	must(t, err)
	if g.Flushes == 0 || g.RPOSeconds == 0 || g.PeerUp {
		t.Errorf("stalled: %+v", g)
	}
	select {
	case err := <-flushed:
		t.Fatalf("FLUSH returned with the line cut: %v", err)
	case err := <-stuck:
		t.Fatalf("the write that waited went on with the line cut: %v", err)
	default:
	}

	r.Link.Restore()
	must(t, within(ctx, flushed, "the FLUSH"))
	must(t, within(ctx, stuck, "the write"))
	must(t, flush())
	must(t, c.Close())
	g, err = r.Await(ctx, "g", "streaming")
	must(t, err)
	if g.Resynced != 0 {
		t.Errorf("a lost line cost a resync of %d bytes", g.Resynced)
	}
	stoppedEqual(ctx, t, r, "g")
	checkImage(t, h, r.Replica("g", "d"))
}

func within(ctx context.Context, done <-chan error, what string) error {
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return fmt.Errorf("%s did not return: %w", what, context.Cause(ctx))
	}
}
