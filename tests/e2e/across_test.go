package e2e

import (
	"bytes"
	"context"
	enc "encoding/binary"
	"errors"
	"fmt"
	"sync"
	"testing"
	"time"

	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
	"kagami/tests/e2e/stage"
)

// across writes to two disks of one group what a database does with its log on
// one disk and its pages on another: record n of a lane goes to disk a, and only
// when that write has returned, to disk b, where it says that n is on a. Some of
// the writes are flushed, on either disk.
type across struct {
	r       *rounds.Rig
	clients [2]*raw.Client
	wg      sync.WaitGroup
	errs    [lanes]error
	// last record of each lane that a FLUSH covered, by disk; a FLUSH of one disk
	// covers both, because the group is one stream.
	flushed [lanes][2]uint64
}

const (
	lanes    = 8
	laneSize = 4096
)

// record is what a lane's place on a disk holds.
func record(n uint64) []byte {
	return bytes.Repeat(enc.LittleEndian.AppendUint64(nil, n), laneSize/8)
}

// read reads every lane of a disk; a torn record is an error.
func (x *across) read(ctx context.Context, s *stage.Site, disk string) (found [lanes]uint64, err error) {
	c, err := rounds.Dial(ctx, s, "g", disk)
	if err != nil {
		return found, err
	}
	defer c.Kill()
	p := make([]byte, laneSize)
	for i := range found {
		if _, err := c.ReadAt(p, int64(i)*laneSize); err != nil {
			return found, err
		}
		found[i] = enc.LittleEndian.Uint64(p)
		if !bytes.Equal(p, record(found[i])) {
			return found, fmt.Errorf("record %d of lane %d on disk %s is torn", found[i], i, disk)
		}
	}
	return found, nil
}

// check reads both disks and compares them with each other and with what was promised.
func (x *across) check(ctx context.Context, s *stage.Site) ([lanes]uint64, error) {
	a, err := x.read(ctx, s, "a")
	if err != nil {
		return a, err
	}
	b, err := x.read(ctx, s, "b")
	if err != nil {
		return a, err
	}
	var errs []error
	for i := range lanes {
		if b[i] > a[i] {
			errs = append(errs, fmt.Errorf("lane %d: disk b says that record %d is on disk a, which has %d", i, b[i], a[i]))
		}
		if f := x.flushed[i]; a[i] < f[0] || b[i] < f[1] {
			errs = append(errs, fmt.Errorf("lane %d: %v were flushed, %d and %d are there", i, f, a[i], b[i]))
		}
	}
	return a, errors.Join(errs...)
}

// start lets the lanes go on after what the disks hold.
func (x *across) start(ctx context.Context) error {
	from, err := x.check(ctx, x.r.Main)
	if err != nil {
		return err
	}
	for i, disk := range []string{"a", "b"} {
		if x.clients[i], err = rounds.Dial(ctx, x.r.Main, "g", disk); err != nil {
			return err
		}
	}
	for i := range lanes {
		x.wg.Go(func() { x.errs[i] = x.run(i, from[i]) })
	}
	return nil
}

// run is one lane; it ends by an error.
func (x *across) run(lane int, from uint64) error {
	for n := from + 1; ; n++ {
		for i, every := range []uint64{3, 5} {
			if err := x.clients[i].Write(record(n), int64(lane)*laneSize, false); err != nil {
				return err
			}
			if (n+uint64(lane))%every != 0 {
				continue
			}
			if err := x.clients[i].Flush(); err != nil {
				return err
			}
			x.flushed[lane] = [2]uint64{n, n - 1 + uint64(i)}
		}
	}
}

// ended waits for the lanes after the server is gone.
func (x *across) ended() error {
	for _, c := range x.clients {
		c.Kill()
	}
	x.wg.Wait()
	var errs []error
	for _, err := range x.errs {
		if !errors.Is(err, raw.ErrDisconnected) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// TestAcrossDisks: what is on one disk because of what is on another never
// survives without it: at the source after its daemon was killed, at the other
// site after the disaster.
func TestAcrossDisks(t *testing.T) {
	t.Parallel()
	limits := rounds.QuickLink()
	limits["epoch_bytes"], limits["epoch_age"] = "64KiB", "20ms"
	r, ctx := newRig(t, time.Minute, rounds.Options{RTT: 5 * time.Millisecond, Connections: 4, Limits: limits,
		Groups: []rounds.Group{{Name: "g", Disks: []rounds.Disk{{Name: "a", Size: 8 << 20}, {Name: "b", Size: 8 << 20}}}}})
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	x := &across{r: r}
	must(t, x.start(ctx))
	time.Sleep(time.Second)
	must(t, r.Main.Kill())
	must(t, x.ended())
	must(t, r.Main.Start(ctx))
	must(t, r.AwaitProtected(ctx))
	must(t, x.start(ctx))
	time.Sleep(500 * time.Millisecond)
	must(t, r.DR.Kill())
	must(t, r.DR.Start(ctx))
	must(t, r.AwaitProtected(ctx))
	time.Sleep(time.Second)
	r.Link.Cut() // the lanes go on until their next FLUSH
	time.Sleep(50 * time.Millisecond)
	must(t, r.Main.Kill())
	must(t, x.ended())
	_, err := r.Failover(ctx, "g")
	must(t, err)
	found, err := x.check(ctx, r.DR)
	must(t, err)
	t.Logf("found %v, flushed %v", found, x.flushed)
	for lane, f := range x.flushed {
		if f[1] == 0 {
			t.Errorf("lane %d flushed nothing", lane)
		}
	}
}
