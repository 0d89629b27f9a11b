package ext4j

import (
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
)

// TestFlushWaitsForBothHalves: the later of the two ends the FLUSH.
func TestFlushWaitsForBothHalves(t *testing.T) {
	for _, c := range []struct{ local, remote, want time.Duration }{
		{10 * time.Millisecond, 30 * time.Millisecond, 30 * time.Millisecond},
		{30 * time.Millisecond, 10 * time.Millisecond, 30 * time.Millisecond},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := started(t, Options{})
			defer r.close()
			if err := r.disk[0].WriteAt(fill(4096, 1), 0, false); err != nil {
				t.Fatal(err)
			}
			r.img[0].syncing = c.local
			f := r.call(r.disk[0].Flush)
			synctest.Wait()
			last := r.ship()
			if r.types() != "wc" {
				t.Errorf("shipped %q before the fdatasync ended, want write and close", r.types())
			}
			if any, urgent := r.g.Unsent(); any || urgent && c.remote < c.local {
				_ = urgent // a FLUSH counts as urgent only once it waits for the replica
			}
			time.Sleep(c.remote)
			r.ack(1, last)
			if err := f.wait(); err != nil || f.ended.Sub(f.began) != c.want {
				t.Errorf("local %v, remote %v: flush took %v, %v", c.local, c.remote, f.ended.Sub(f.began), err)
			}
			if r.img[0].durable[0] != 1 {
				t.Error("the write is not durable here")
			}
		})
	}
}

// TestFlushCoversAnsweredWrites: the Close record a FLUSH waits for comes after
// every write that was answered before it, on any disk.
func TestFlushCoversAnsweredWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		for i := range 10 {
			if err := r.disk[i%2].WriteAt(fill(512, byte(i+1)), int64(i)*512, false); err != nil {
				t.Fatal(err)
			}
		}
		f := r.call(r.disk[0].Flush)
		synctest.Wait()
		last := r.ship()
		if r.types() != "wwwwwwwwwwc" || last != 11 {
			t.Fatalf("shipped %q", r.types())
		}
		info, err := epoch.DecodeClose(r.sent[10].Payload)
		if err != nil || info.Reason != epoch.ByFlush || info.First != 1 || info.TimeNs != time.Now().UnixNano() {
			t.Errorf("close record %+v, %v", info, err)
		}
		for l := epoch.LSN(1); l < last; l++ {
			if err := r.g.Acked(1, last, l); err != nil {
				t.Fatal(err)
			}
			if synctest.Wait(); f.returned() {
				t.Fatalf("flush returned when only %d of %d was durable", l, last)
			}
		}
		r.ack(1, last)
		if err := f.wait(); err != nil {
			t.Error(err)
		}
	})
}

// TestFlushNeedsANewSync: an fdatasync that began before the FLUSH does not do.
func TestFlushNeedsANewSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		r.img[0].syncing = 10 * time.Millisecond
		a := r.call(r.disk[0].Flush)
		time.Sleep(5 * time.Millisecond)
		if err := r.disk[0].WriteAt(fill(512, 7), 0, false); err != nil {
			t.Fatal(err)
		}
		b := r.call(r.disk[0].Flush)
		synctest.Wait()
		r.ack(1, r.ship())
		if err := errors.Join(a.wait(), b.wait()); err != nil {
			t.Fatal(err)
		}
		if d := b.ended.Sub(a.began); d != 20*time.Millisecond || r.img[0].durable[0] != 7 || r.img[0].syncs != 2 {
			t.Errorf("second flush ended after %v, %d syncs, durable %d", d, r.img[0].syncs, r.img[0].durable[0])
		}
	})
}

func TestEmptyFlushAddsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		if err := r.disk[1].Flush(); err != nil {
			t.Fatal(err)
		}
		if last := r.ship(); last != 0 {
			t.Errorf("a flush of nothing shipped %q", r.types())
		}
		// But one behind an unacknowledged epoch waits for it.
		w := r.call(func() error { return r.disk[0].WriteAt(fill(512, 1), 0, true) })
		synctest.Wait()
		f := r.call(r.disk[1].Flush)
		synctest.Wait()
		if f.returned() || w.returned() {
			t.Error("returned although nothing was acknowledged")
		}
		r.ack(1, r.ship())
		if err := errors.Join(f.wait(), w.wait()); err != nil || r.types() != "wc" {
			t.Errorf("%q, %v", r.types(), err)
		}
	})
}

func TestFUA(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		for i, f := range []func() error{
			func() error { return r.disk[0].WriteAt(fill(512, 1), 0, true) },
			func() error { return r.disk[0].WriteZeroes(0, 4096, true, true) },
			func() error { return r.disk[0].Trim(0, 4096, true) },
		} {
			c := r.call(f)
			synctest.Wait()
			last := r.ship()
			if c.returned() || last != epoch.LSN(2*i+2) {
				t.Fatalf("request %d: returned %v, shipped %q", i, c.returned(), r.types())
			}
			r.ack(1, last)
			if err := c.wait(); err != nil || r.img[0].syncs != i+1 {
				t.Errorf("request %d: %d syncs, %v", i, r.img[0].syncs, err)
			}
		}
	})
}

// TestFlushDuringResync: it waits for the acknowledgement of the resync's end,
// though the gate is open and writes go on.
func TestFlushDuringResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{Limits: Limits{EpochAge: time.Second, EpochBytes: 4096}})
		defer r.close()
		r.g.Begin(epoch.UUID{9}, 5, 101, true)
		r.g.OpenGate()
		if err := r.disk[0].WriteAt(fill(9000, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		f := r.call(r.disk[0].Flush)
		empty := r.call(r.disk[1].Flush)
		time.Sleep(10 * time.Second)
		last := r.ship()
		if r.types() != "w" {
			t.Errorf("shipped %q: the resync's epoch must stay open", r.types())
		}
		if err := r.g.Acked(5, last, 100); err != nil {
			t.Fatal(err)
		}
		if synctest.Wait(); f.returned() || empty.returned() {
			t.Fatal("a flush returned during the resync")
		}
		end := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		synctest.Wait()
		last = r.ship()
		if r.types() != "wsc" || f.returned() || end.returned() {
			t.Fatalf("shipped %q, flush returned %v, end %v", r.types(), f.returned(), end.returned())
		}
		if err := r.g.Acked(5, last, last-1); err != nil {
			t.Fatal(err)
		}
		if synctest.Wait(); f.returned() || empty.returned() {
			t.Fatal("a flush returned before the resync's end was durable")
		}
		r.ack(5, last)
		if err := errors.Join(f.wait(), empty.wait(), end.wait()); err != nil {
			t.Fatal(err)
		}
		if s := r.g.Stats(); s.Resyncing || s.Ack != last || s.QueueBytes != 0 {
			t.Errorf("%+v", s)
		}
	})
}

// TestSessionChangeRetargets: a FLUSH that waited in one session is answered
// by the end of the resync that replaces it, and by nothing before.
func TestSessionChangeRetargets(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		f := r.call(r.disk[0].Flush)
		synctest.Wait()
		old := r.ship()
		for session := uint64(2); session < 5; session++ {
			r.g.Begin(epoch.UUID{9}, session, 1, true)
			r.ack(1, old) // late, of a session that is over
			if err := r.disk[0].WriteAt(fill(512, 2), 512, false); err != nil {
				t.Fatal(err)
			}
			r.sent = nil
			last := r.ship()
			if err := r.g.Acked(session, last, 0); err != nil {
				t.Fatal(err)
			}
			if synctest.Wait(); f.returned() {
				t.Fatalf("session %d: flush returned", session)
			}
		}
		end := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		synctest.Wait()
		last := r.ship()
		r.ack(4, last)
		if err := errors.Join(f.wait(), end.wait()); err != nil {
			t.Error(err)
		}
	})
}

// TestFinishScanEndsWithItsSession: a resync that a new session replaces is no success.
func TestFinishScanEndsWithItsSession(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		r.g.Begin(epoch.UUID{9}, 5, 101, true)
		a := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		synctest.Wait()
		r.g.Begin(epoch.UUID{9}, 6, 101, true)
		if err := a.wait(); err == nil {
			t.Error("the resync of a session that ended counts as done")
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		b := r.call(func() error { _, err := r.g.FinishScan(ctx); return err })
		synctest.Wait()
		cancel(errTorn)
		if err := b.wait(); !errors.Is(err, errTorn) {
			t.Errorf("got %v", err)
		}
	})
}

func TestFirstOpenFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		d := r.disk[0]
		d.Opened()
		read := r.call(func() error { return d.ReadAt(make([]byte, 512), 0) })
		if synctest.Wait(); read.returned() || !d.WouldBlock() {
			t.Fatal("a read is served although the gate is closed")
		}
		r.g.Begin(epoch.UUID{9}, 5, 101, true)
		r.g.OpenGate()
		d.Opened()
		second := r.call(func() error { return d.ReadAt(make([]byte, 512), 0) })
		if synctest.Wait(); read.returned() || second.returned() || !d.WouldBlock() {
			t.Fatal("a read is served before the resync is acknowledged")
		}
		end := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		synctest.Wait()
		r.ack(5, r.ship())
		if err := errors.Join(read.wait(), second.wait(), end.wait()); err != nil {
			t.Fatal(err)
		}
		if d.WouldBlock() || d.Clients() != 2 {
			t.Errorf("would block %v, %d clients", d.WouldBlock(), d.Clients())
		}
		// A third client beside the others flushes nothing.
		syncs := r.img[0].syncs
		d.Opened()
		if err := d.ReadAt(make([]byte, 512), 0); err != nil || r.img[0].syncs != syncs {
			t.Errorf("%d syncs, %v", r.img[0].syncs-syncs, err)
		}
		// After all are gone, the next one waits for what is not yet acknowledged.
		if err := d.WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		for range 3 {
			d.Closed()
		}
		d.Opened()
		read = r.call(func() error { return d.ReadAt(make([]byte, 512), 0) })
		if synctest.Wait(); read.returned() {
			t.Error("a new client reads what the replica lacks")
		}
		r.ack(5, r.ship())
		if err := read.wait(); err != nil || r.img[0].syncs != syncs+1 {
			t.Errorf("%d syncs, %v", r.img[0].syncs-syncs, err)
		}
	})
}

// TestBackPressure: writes wait while the queue is full, and go on when it is
// acknowledged (in a resync: received).
func TestBackPressure(t *testing.T) {
	for _, hold := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			const limit = 64 << 10
			r := newRig(t, Options{Limits: Limits{QueueBytes: limit}})
			defer r.close()
			woken := make(chan struct{}, 1000)
			r.g.SetWake(func() { woken <- struct{}{} })
			r.g.Begin(epoch.UUID{9}, 1, 1, hold)
			r.g.OpenGate()
			writer := r.call(func() error {
				for i := range 100 {
					if err := r.disk[0].WriteAt(fill(4096, byte(i)), int64(i)*4096, false); err != nil {
						return err
					}
				}
				return nil
			})
			for !writer.returned() {
				synctest.Wait()
				if s := r.g.Stats(); s.QueueBytes > limit {
					t.Fatalf("the queue holds %d bytes", s.QueueBytes)
				}
				last := r.ship()
				durable := last
				if hold {
					durable = 0
				}
				for len(woken) > 0 {
					<-woken
				}
				if err := r.g.Acked(1, last, durable); err != nil {
					t.Fatal(err)
				}
				time.Sleep(time.Millisecond)
			}
			if writer.err != nil {
				t.Error(writer.err)
			}
			if r.ship(); r.g.Stats().Stalls == 0 {
				t.Error("no stall was counted")
			}
			r.sameAsShipped()
		})
	}
}

// TestFullQueueWakesTheSender: the Close record that a full queue makes is
// announced; without it the acknowledgement that makes room would never come.
func TestFullQueueWakesTheSender(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{Limits: Limits{QueueBytes: 8 << 10}})
		defer r.close()
		wake := make(chan struct{}, 1)
		r.g.SetWake(func() {
			select {
			case wake <- struct{}{}:
			default:
			}
		})
		stop := make(chan struct{})
		r.wg.Go(func() { // a sender that looks only when it is woken, and a replica that answers at once
			for {
				select {
				case <-stop:
					return
				case <-wake:
				}
				last := r.ship()
				for i := len(r.sent) - 1; i >= 0; i-- {
					if r.sent[i].Type == epoch.TypeClose {
						_ = r.g.Acked(1, last, r.sent[i].LSN)
						break
					}
				}
			}
		})
		w := r.call(func() error {
			for i := range 20 {
				if err := r.disk[0].WriteAt(fill(4096, byte(i)), int64(i)*4096, false); err != nil {
					return err
				}
				time.Sleep(time.Millisecond)
			}
			return nil
		})
		if time.Sleep(time.Minute); !w.returned() {
			t.Errorf("a write waits for ever; the sender has not been told of %d records", r.g.Stats().QueueRecords)
			r.g.Fail(errTorn)
		}
		_ = w.wait()
		close(stop)
	})
}

func TestEpochBySizeAndAge(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{Limits: Limits{EpochBytes: 10_000, EpochAge: time.Second}})
		defer r.close()
		var woken time.Time
		r.g.SetWake(func() { woken = time.Now() })
		write := func(n int) {
			t.Helper()
			if err := r.disk[0].WriteAt(fill(n, 1), 0, false); err != nil {
				t.Fatal(err)
			}
		}
		write(9_000)
		write(900)
		if r.ship(); r.types() != "wwc" {
			t.Errorf("by size: shipped %q", r.types())
		}
		began := time.Now()
		time.Sleep(300 * time.Millisecond)
		write(512)
		time.Sleep(999 * time.Millisecond)
		write(512)
		if r.ship(); r.types() != "wwcww" {
			t.Errorf("before its age: shipped %q", r.types())
		}
		time.Sleep(time.Minute)
		synctest.Wait()
		if r.ship(); r.types() != "wwcwwc" || woken.Sub(began) != 1300*time.Millisecond {
			t.Errorf("by age: shipped %q, woken after %v", r.types(), woken.Sub(began))
		}
		var why []epoch.Reason
		for _, rec := range r.sent {
			if rec.Type == epoch.TypeClose {
				info, _ := epoch.DecodeClose(rec.Payload)
				why = append(why, info.Reason)
			}
		}
		if len(why) != 2 || why[0] != epoch.BySize || why[1] != epoch.ByTime {
			t.Errorf("reasons %v", why)
		}
	})
}

// TestFailedWrite: the guest gets the error, the replica what the image holds.
func TestFailedWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		d, img := r.disk[0], r.img[0]
		if err := d.WriteAt(fill(8192, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		for i, f := range []func() error{
			func() error { return d.WriteAt(fill(4096, 2), 0, false) },
			func() error { return d.WriteZeroes(0, 4096, false, true) },
			func() error { return d.Trim(512, 7000, false) },
		} {
			img.failNext = errIO
			if err := f(); !errors.Is(err, errIO) {
				t.Errorf("request %d: %v", i, err)
			}
		}
		r.ship()
		r.sameAsShipped()
		if r.g.Err() != nil || len(r.rec.stuck) != 0 {
			t.Errorf("group ended: %v, %v", r.g.Err(), r.rec.stuck)
		}
	})
}

// TestUnknownContent: what the image holds after a failed write cannot be
// read: the group ends, the region never leaves the record of changes.
func TestUnknownContent(t *testing.T) {
	for _, op := range []string{"write", "trim"} {
		synctest.Test(t, func(t *testing.T) {
			r := started(t, Options{})
			defer r.close()
			r.img[1].failNext, r.img[1].failRead = errIO, errTorn
			var err error
			if op == "write" {
				err = r.disk[1].WriteAt(fill(4096, 2), 0, false)
			} else {
				err = r.disk[1].Trim(0, 4096, false)
			}
			if !errors.Is(err, errIO) || !errors.Is(err, errTorn) || !errors.Is(r.g.Err(), errTorn) || len(r.rec.stuck) != 1 {
				t.Errorf("%s: %v; group %v; stuck %v", op, err, r.g.Err(), r.rec.stuck)
			}
			if err := r.disk[0].ReadAt(make([]byte, 1), 0); !errors.Is(err, errTorn) {
				t.Errorf("%s: the other disk still serves: %v", op, err)
			}
		})
	}
}

// TestFailedSyncIsFinal: after a failed fdatasync nothing succeeds.
func TestFailedSyncIsFinal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		other := r.call(r.disk[1].Flush)
		r.img[0].syncing, r.img[0].failSync = time.Millisecond, errIO
		a, b := r.call(r.disk[0].Flush), r.call(r.disk[0].Flush)
		synctest.Wait()
		r.ack(1, r.ship())
		if err := errors.Join(other.wait()); err != nil {
			t.Errorf("the other disk's flush, answered before: %v", err)
		}
		if !errors.Is(a.wait(), errIO) || !errors.Is(b.wait(), errIO) || !errors.Is(r.g.Err(), errIO) {
			t.Errorf("got %v, %v; group %v", a.err, b.err, r.g.Err())
		}
		r.img[0].failSync = nil
		for i, err := range []error{r.disk[0].Flush(), r.disk[1].Flush(), r.disk[1].WriteAt(fill(1, 1), 0, false),
			r.disk[0].ReadAt(make([]byte, 1), 0), r.disk[0].Trim(0, 512, false), r.g.SyncImages(), r.disk[0].Ready()} {
			if i != 5 && !errors.Is(err, errIO) {
				t.Errorf("request %d after the failure: %v", i, err)
			}
		}
		if r.rec.ended[0] != 0 {
			t.Error("the failed fdatasync was reported as one that succeeded")
		}
		select {
		case <-r.g.Done():
		default:
			t.Error("Done is not closed")
		}
	})
}

func TestDrain(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		r.img[0].writing = 10 * time.Millisecond
		w := r.call(func() error { return r.disk[0].WriteAt(fill(512, 1), 0, false) })
		synctest.Wait()
		var pos epoch.Pos
		d := r.call(func() (err error) { pos, err = r.g.Drain(context.Background()); return err })
		synctest.Wait()
		late := r.call(func() error { return r.disk[0].WriteAt(fill(512, 2), 512, false) })
		if err := w.wait(); err != nil {
			t.Error(err)
		}
		synctest.Wait()
		last := r.ship()
		if d.returned() || late.returned() || r.types() != "wc" {
			t.Fatalf("drained %v, late write done %v, shipped %q", d.returned(), late.returned(), r.types())
		}
		r.g.OpenGate() // as when the link comes back meanwhile
		if synctest.Wait(); late.returned() {
			t.Fatal("a write was served while the group drained")
		}
		r.ack(1, last)
		if err := d.wait(); err != nil || pos != (epoch.Pos{Lineage: epoch.UUID{9}, Session: 1, LSN: 2}) {
			t.Errorf("drained at %v: %v", pos, err)
		}
		r.g.OpenGate()
		if synctest.Wait(); late.returned() || r.img[0].durable[0] != 1 {
			t.Error("a write was served after the drain, or the images are not durable")
		}
		r.g.Close()
		if err := late.wait(); !errors.Is(err, ErrGone) {
			t.Errorf("late write: %v", err)
		}
	})
}

// TestDrainFails: without an acknowledgement, in a resync, and before the first
// attachment there is no drained position.
func TestDrainFails(t *testing.T) {
	for name, begin := range map[string]func(*rig){
		"no ack":         func(r *rig) { r.g.Begin(epoch.UUID{9}, 1, 1, false); r.g.OpenGate() },
		"resync":         func(r *rig) { r.g.Begin(epoch.UUID{9}, 1, 1, true); r.g.OpenGate() },
		"never attached": func(*rig) {},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, Options{})
			defer r.close()
			if begin(r); name == "no ack" {
				if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
					t.Fatal(err)
				}
			}
			ctx, cancel := context.WithTimeout(context.Background(), time.Second)
			defer cancel()
			if pos, err := r.g.Drain(ctx); err == nil {
				t.Errorf("%s: drained at %v", name, pos)
			}
		})
	}
}

// TestCloseEndsRequests: whatever a request waits for, Close makes it return ErrGone.
func TestCloseEndsRequests(t *testing.T) {
	write := func(r *rig) error { return r.disk[0].WriteAt(fill(4096, 1), 0, false) }
	for name, c := range map[string]struct {
		prepare func(*rig)
		do      func(*rig) error
	}{
		"gate":  {func(*rig) {}, write},
		"flush": {func(r *rig) { r.open(); _ = write(r) }, func(r *rig) error { return r.disk[0].Flush() }},
		"queue": {func(r *rig) { r.open(); _ = write(r) }, write},
		"log":   {func(r *rig) { r.open(); r.rec.full = make(chan struct{}) }, write},
		"entry": {func(r *rig) { r.g.Begin(epoch.UUID{9}, 1, 1, true); r.g.OpenGate(); r.disk[0].Opened() },
			func(r *rig) error { return r.disk[0].ReadAt(make([]byte, 1), 0) }},
		"trim in the log": {func(r *rig) { r.open(); r.rec.full = make(chan struct{}) }, func(r *rig) error { return r.disk[0].Trim(0, 512, false) }},
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, Options{Limits: Limits{QueueBytes: 6000}})
			c.prepare(r)
			f := r.call(func() error { return c.do(r) })
			if synctest.Wait(); f.returned() {
				t.Fatalf("%s: returned %v at once", name, f.err)
			}
			r.close()
			if err := f.wait(); !errors.Is(err, ErrGone) {
				t.Errorf("%s: %v", name, err)
			}
		})
	}
}

func (r *rig) open() {
	r.g.Begin(epoch.UUID{9}, 1, 1, false)
	r.g.OpenGate()
}

// TestDetached: with no replica nothing waits for one and nothing is kept.
func TestDetached(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{Detached: true, Limits: Limits{QueueBytes: 1, EpochBytes: 4096, EpochAge: time.Second}})
		defer r.close()
		r.g.Begin(epoch.UUID{9}, 1, 50, false)
		r.g.OpenGate()
		r.disk[0].Opened()
		for i := range 20 {
			if err := r.disk[i%2].WriteAt(fill(8192, byte(i)), int64(i)*4096, i%5 == 0); err != nil {
				t.Fatal(err)
			}
		}
		r.img[0].failNext = errIO
		if err := r.disk[0].WriteAt(fill(8192, 9), 0, false); !errors.Is(err, errIO) {
			t.Error(err)
		}
		if err := errors.Join(r.disk[0].Flush(), r.disk[1].Trim(0, 4096, true)); err != nil {
			t.Fatal(err)
		}
		s := r.g.Stats()
		if s.QueueBytes != 0 || s.QueueRecords != 0 || s.Next <= 70 || s.Lag != 0 || len(r.g.Take(1<<20, 10)) != 0 {
			t.Errorf("%+v", s)
		}
		if r.img[1].durable[4096+1] == 0 {
			t.Error("flush made nothing durable")
		}
	})
}

// TestLyingAcks: positions that were never sent, or that contradict themselves, are refused.
func TestLyingAcks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		f := r.call(func() error { return r.disk[0].WriteAt(fill(512, 1), 0, true) })
		synctest.Wait()
		last := r.ship()
		for _, a := range [][2]epoch.LSN{{last + 1, last}, {last + 1, last + 1}, {^epoch.LSN(0), ^epoch.LSN(0)}, {last - 1, last}} {
			if err := r.g.Acked(1, a[0], a[1]); err == nil {
				t.Errorf("received %d, durable %d is believed; the last record is %d", a[0], a[1], last)
			}
		}
		if err := errors.Join(r.g.Acked(2, 100, 100), r.g.Acked(0, last, last)); err != nil {
			t.Errorf("acks of other sessions must be ignored: %v", err)
		}
		if synctest.Wait(); f.returned() || r.g.Stats().Ack != 0 {
			t.Error("a lie was believed")
		}
		r.ack(1, last)
		if err := errors.Join(f.wait(), r.g.Acked(1, 1, 0), r.g.Acked(1, last, last)); err != nil || r.g.Stats().Ack != last {
			t.Errorf("old acks: %v, ack %d", err, r.g.Stats().Ack)
		}
	})
}

func TestResume(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		f := r.call(func() error { return r.disk[0].WriteAt(fill(512, 1), 0, true) }) // 1, 2
		synctest.Wait()
		g := r.call(func() error { return r.disk[0].WriteAt(fill(512, 2), 0, true) }) // 3, 4
		synctest.Wait()
		r.ship()
		r.ack(1, 2)
		if err := f.wait(); err != nil {
			t.Fatal(err)
		}
		for _, bad := range []epoch.LSN{0, 1, 5, ^epoch.LSN(0)} {
			if r.g.Resume(bad) {
				t.Errorf("resumed at %d; 2 was acknowledged, 4 is the last", bad)
			}
		}
		r.sent = nil
		if !r.g.Resume(2) {
			t.Fatal("not resumed at what was acknowledged")
		}
		if r.ship(); r.types() != "wc" || r.sent[0].LSN != 3 {
			t.Errorf("shipped %q again", r.types())
		}
		r.sent = nil
		if !r.g.Resume(4) || r.ship() != 0 {
			t.Errorf("resumed at the end: shipped %q", r.types())
		}
		if err := g.wait(); err != nil {
			t.Error(err)
		}
	})
}

// TestResumeDuringResync: what a resync shipped was freed on receipt; it
// cannot be sent again.
func TestResumeDuringResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		r.g.Begin(epoch.UUID{9}, 1, 1, true)
		r.g.OpenGate()
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		if r.ship(); r.g.Resume(0) {
			t.Error("resumed in a resync")
		}
		if err := r.g.Acked(1, 1, 0); err != nil {
			t.Fatal(err)
		}
		end := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		synctest.Wait()
		if r.g.Resume(0) {
			t.Error("resumed although record 1 is gone")
		}
		r.ack(1, r.ship())
		if err := end.wait(); err != nil {
			t.Error(err)
		}
	})
}

// TestSplit: requests larger than a record become several, cut at fixed
// boundaries, with dense LSNs; FUA flushes once, at the end.
func TestSplit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{MaxExtent: 128 << 10})
		defer r.close()
		rng := rand.New(rand.NewPCG(1, 0))
		p := make([]byte, 700_000)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		if err := r.disk[0].WriteAt(p, 1000, false); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(r.disk[0].Trim(5000, 300_000, false), r.disk[0].WriteZeroes(400_000, 200_000, true, false)); err != nil {
			t.Fatal(err)
		}
		r.ship()
		r.sameAsShipped()
		for _, rec := range r.sent {
			limit := uint64(epoch.MaxPayload)
			if rec.Type != epoch.TypeWrite {
				limit = 128 << 10
			}
			if rec.Length > limit || rec.Offset/limit != (rec.End()-1)/limit {
				t.Errorf("%s of %d bytes at %d crosses a boundary of %d", rec.Type, rec.Length, rec.Offset, limit)
			}
		}
	})
}

// TestHolesStayHoles: zeroes that may give their space back do so at the
// replica too.
func TestHolesStayHoles(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		if err := errors.Join(r.disk[0].WriteZeroes(0, 4096, false, false), r.disk[0].WriteZeroes(0, 4096, true, false), r.disk[0].Trim(0, 4096, false)); err != nil {
			t.Fatal(err)
		}
		if r.ship(); r.types() != "tzt" {
			t.Errorf("shipped %q, want trim, zero, trim", r.types())
		}
	})
}

// TestConcurrentOrder: whatever the overlap, what was shipped gives the image.
func TestConcurrentOrder(t *testing.T) {
	for seed := range uint64(12) {
		synctest.Test(t, func(t *testing.T) {
			r := started(t, Options{Limits: Limits{QueueBytes: 1 << 20, EpochBytes: 100_000, EpochAge: time.Second}})
			r.rec.slow = time.Microsecond
			r.img[0].writing = time.Microsecond
			for _, img := range r.img {
				img.data = img.data[:64<<10]
			}
			stop := make(chan struct{})
			r.wg.Go(func() {
				for {
					select {
					case <-stop:
						return
					case <-time.After(20 * time.Microsecond):
						r.ack(1, r.ship())
					}
				}
			})
			var guests sync.WaitGroup
			for w := range 6 {
				rng := rand.New(rand.NewPCG(seed, uint64(w)))
				guests.Go(func() {
					for i := range 40 {
						if err := randomRequest(rng, r.disk[rng.IntN(2)], byte(w*40+i)); err != nil {
							t.Errorf("seed %d: %v", seed, err)
						}
						time.Sleep(time.Duration(rng.IntN(3)) * time.Microsecond)
					}
				})
			}
			guests.Wait()
			close(stop)
			r.close()
			r.ship()
			r.sameAsShipped()
		})
	}
}

func randomRequest(rng *rand.Rand, d *Disk, b byte) error {
	off := rng.Int64N(64) * 512
	n := 512 * (1 + rng.Int64N(30))
	switch rng.IntN(8) {
	case 0:
		return d.Trim(off, n, rng.IntN(4) == 0)
	case 1:
		return d.WriteZeroes(off, n, rng.IntN(2) == 0, rng.IntN(4) == 0)
	case 2:
		return d.Flush()
	default:
		return d.WriteAt(fill(int(n), b), off, rng.IntN(8) == 0)
	}
}
