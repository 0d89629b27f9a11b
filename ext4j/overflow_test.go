package ext4j

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/backlog"
	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

// overflows makes a group go on with a backlog of so many bytes, and returns what it
// hears of it, and the file system that it is on.
func (r *rig) overflows(limit int64) (<-chan error, *fault.FS) {
	r.t.Helper()
	fsys := fault.NewFS(1)
	must(r.t, fsys.MkdirAll("/group", 0o700))
	store, err := backlog.Create(fsys, backlog.Options{Path: "/group/backlog", Limit: limit})
	must(r.t, err)
	events := make(chan error, 100)
	if !r.g.Overflow(store, func(err error) { events <- err }) {
		r.t.Fatal("the group does not go on")
	}
	return events, fsys
}

// drainTo ships and acknowledges until the queue has everything, as a link that is back does.
func (r *rig) drainTo() {
	r.t.Helper()
	for range 10_000 {
		if last := r.ship(); last > 0 {
			r.ack(1, last)
		}
		synctest.Wait()
		if s := r.g.Stats(); s.Ack+1 == s.Next {
			return
		}
		r.g.closeEpoch(epoch.BySize)
		synctest.Wait()
	}
	r.t.Fatalf("it does not end: %+v", r.g.Stats())
}

// TestOverflowKeepsTheHistory: clients go on without the replica, far beyond the queue;
// then it gets every record once, in order, each epoch where it was, while clients write on.
func TestOverflowKeepsTheHistory(t *testing.T) {
	const seed = 3
	t.Logf("seed %d", seed)
	synctest.Test(t, func(t *testing.T) {
		rng := rand.New(rand.NewPCG(seed, 0))
		r := started(t, Options{Limits: Limits{QueueBytes: 64 << 10}})
		defer r.close()
		write := func() {
			n := 512 * (1 + rng.IntN(64))
			must(t, r.disk[rng.IntN(2)].WriteAt(fill(n, byte(rng.IntN(255)+1)), 512*int64(rng.IntN(rigSize/512-64)), false))
		}
		write()
		waits := r.call(r.disk[0].Flush)
		synctest.Wait()
		if waits.returned() {
			t.Fatal("a FLUSH did not wait")
		}
		events, _ := r.overflows(64 << 20)
		must(t, waits.wait())
		flushes := 1
		for range 1000 {
			if write(); rng.IntN(5) == 0 {
				must(t, r.disk[rng.IntN(2)].Flush())
				flushes++
			}
			synctest.Wait()
		}
		s := r.g.Stats()
		if !s.Overflow || !s.Alone || s.Apart || s.BacklogBytes < 10<<20 || s.QueueBytes > 64<<10 || s.Ack != 0 || int(s.Epochs) < flushes {
			t.Fatalf("%+v", s)
		}
		if !r.g.Resume(0) {
			t.Fatal("the session does not go on")
		}
		done := r.call(func() error { return r.g.CatchUp(t.Context(), func(int64) {}) })
		guest := r.call(func() error { // waits for room now and then
			for range 100 {
				write()
				time.Sleep(catchUpTick)
			}
			return nil
		})
		for !done.returned() || !guest.returned() {
			if last := r.ship(); last > 0 {
				r.ack(1, last)
			}
			time.Sleep(catchUpTick)
			synctest.Wait()
		}
		must(t, errors.Join(done.wait(), guest.wait()))
		if s := r.g.Stats(); s.Overflow || !s.Alone || s.BacklogBytes != 0 {
			t.Fatalf("caught up: %+v", s)
		}
		rejoin := r.call(func() error { return r.g.Rejoin(t.Context()) })
		f := r.call(r.disk[1].Flush)
		if synctest.Wait(); rejoin.returned() && r.g.Stats().Ack+1 != r.g.Stats().Next {
			t.Fatal("the replica lacks something")
		}
		r.drainTo()
		must(t, errors.Join(rejoin.wait(), f.wait()))
		for i, rec := range r.sent {
			if rec.LSN != epoch.LSN(i+1) || rec.Verify() != nil {
				t.Fatalf("record %d was sent as number %d", rec.LSN, i+1)
			}
		}
		for slot, img := range r.replay() {
			if !bytes.Equal(img, r.img[slot].data) || !bytes.Equal(img, r.img[slot].durable) {
				t.Errorf("disk %d differs", slot)
			}
		}
		must(t, r.disk[0].WriteAt(fill(512, 1), 0, false))
		f = r.call(r.disk[0].Flush)
		if synctest.Wait(); f.returned() || len(events) > 0 {
			t.Errorf("a FLUSH after all is over returned %v; events %d", f.returned(), len(events))
		}
		r.drainTo()
		must(t, f.wait())
	})
}

// TestOverflowFull: with a full backlog clients wait, and go on when the group goes apart,
// or when there is room.
func TestOverflowFull(t *testing.T) {
	for _, then := range []string{"apart", "room"} {
		t.Run(then, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := started(t, Options{Limits: Limits{QueueBytes: 64 << 10}})
				defer r.close()
				events, _ := r.overflows(2 << 20)
				var w *call
				for i := range 1000 {
					w = r.call(func() error { return r.disk[0].WriteAt(fill(32<<10, byte(i)), int64(i%32)<<15, false) })
					if synctest.Wait(); !w.returned() {
						break
					}
				}
				s := r.g.Stats()
				if !s.BacklogFull || s.Waiting != 1 || s.BacklogBytes > 4<<20 || !errors.Is(<-events, backlog.ErrFull) {
					t.Fatalf("%+v", s)
				}
				if then == "apart" {
					r.g.GoApart(epoch.UUID{9}, 1, time.Time{})
					must(t, w.wait())
					if s := r.g.Stats(); s.Overflow || !s.Apart || s.BacklogBytes != 0 || s.Next != epoch.LSN(s.Records+s.Epochs)+1 || r.g.Resume(0) {
						t.Errorf("%+v", s)
					}
					return
				}
				r.g.Resume(0)
				for range 100 {
					r.ack(1, r.ship())
					synctest.Wait()
				}
				must(t, w.wait())
				must(t, r.disk[0].Flush())
				r.drainTo()
				must(t, r.g.CatchUp(t.Context(), func(int64) {}))
				if s := r.g.Stats(); s.Apart || s.Overflow || len(r.sent) != int(s.Next-1) {
					t.Errorf("%d records: %+v", len(r.sent), s)
				}
			})
		})
	}
}

// TestOverflowLost: a backlog that fails is told of, and nobody takes the stream for whole.
func TestOverflowLost(t *testing.T) {
	for _, op := range []fault.Op{fault.OpWrite, fault.OpRead} {
		t.Run(fmt.Sprint(op), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := started(t, Options{Limits: Limits{QueueBytes: 64 << 10}})
				defer r.close()
				events, fsys := r.overflows(16 << 20)
				write := func(i int) {
					must(t, r.disk[0].WriteAt(fill(32<<10, byte(i)), int64(i%32)<<15, false))
					synctest.Wait()
				}
				for i := range 10 {
					write(i)
				}
				fsys.SetHook(func(o fault.Op, _ string) error {
					if o == op {
						return errTorn
					}
					return nil
				})
				if op == fault.OpRead {
					r.g.Resume(0)
					r.ack(1, r.ship())
				}
				for i := range 10 {
					write(i)
				}
				must(t, r.disk[0].Flush())
				if err := <-events; !errors.Is(err, errTorn) {
					t.Errorf("told of %v", err)
				}
				s := r.g.Stats()
				if !s.Apart || s.Overflow || !s.Alone || r.g.Resume(s.Ack) || len(r.g.Take(1<<20, 10)) > 0 {
					t.Errorf("%+v", s)
				}
				if err := r.g.CatchUp(t.Context(), func(int64) {}); !errors.Is(err, ErrApart) {
					t.Errorf("CatchUp: %v", err)
				}
			})
		})
	}
}

// TestOverflowRefused: where there is no stream to go on with, nothing is kept.
func TestOverflowRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		try := func(what string, want bool) {
			t.Helper()
			if got := r.g.Overflow(&nothing{}, nil); got != want {
				t.Errorf("%s: %v", what, got)
			}
		}
		try("no session", false)
		r.g.Begin(epoch.UUID{9}, 1, 1, true)
		r.g.OpenGate()
		try("a resync", false)
		end := r.call(func() error { _, err := r.g.FinishScan(t.Context()); return err })
		synctest.Wait()
		try("a resync whose end is not acknowledged", false)
		r.ack(1, r.ship())
		must(t, end.wait())
		try("a stream", true)
		try("twice", false)
		r.g.GoApart(epoch.UUID{9}, 1, time.Time{})
		try("apart", false)
		r.g.Begin(epoch.UUID{9}, 2, 1, false)
		try("again", true)
	})
}

// nothing is a Store that is never used.
type nothing struct{}

func (*nothing) Append([]epoch.Record) error        { panic("not to be used") }
func (*nothing) Next(int64) ([]epoch.Record, error) { panic("not to be used") }
func (*nothing) Bytes() int64                       { return 0 }
func (*nothing) Close() error                       { return nil }

// TestThin: no epoch seems younger than it is, none is acknowledged too early, and their number is bounded.
func TestThin(t *testing.T) {
	began := time.Now()
	var marks []closeMark
	for i := range 5*maxMarks + 3 {
		if marks = thin(append(marks, closeMark{epoch.LSN(i + 1), began.Add(time.Duration(i))})); len(marks) > maxMarks {
			t.Fatalf("%d marks", len(marks))
		}
	}
	if first, last := marks[0], marks[len(marks)-1]; !first.since.Equal(began) || last.lsn != 5*maxMarks+3 {
		t.Errorf("from %+v to %+v", first, last)
	}
	for i := 1; i < len(marks); i++ {
		if prev, m := marks[i-1], marks[i]; m.lsn <= prev.lsn || m.since.Before(prev.since) || m.since.Sub(began) > time.Duration(m.lsn) || m.since.Sub(began) != time.Duration(prev.lsn) {
			t.Fatalf("%+v follows %+v", m, prev)
		}
	}
}

// TestOverflowOfLargeEpochs: an epoch that the queue has hardly room for reaches the replica all the same.
func TestOverflowOfLargeEpochs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{Limits: Limits{QueueBytes: 96 << 10, EpochBytes: 96 << 10}})
		defer r.close()
		r.overflows(16 << 20)
		for i := range 3000 {
			must(t, r.disk[0].WriteAt(fill(512, byte(i)), int64(i%1000)*512, false))
			synctest.Wait()
		}
		if s := r.g.Stats(); s.QueueBytes > 97<<10 || s.BacklogBytes < 1<<20 {
			t.Fatalf("%+v", s)
		}
		must(t, r.disk[0].Flush())
		r.g.Resume(0)
		for done := epoch.LSN(0); done+1 < r.g.Stats().Next; {
			r.ship()
			last := done
			for _, rec := range r.sent[done:] {
				if rec.Type == epoch.TypeClose {
					last = rec.LSN
				}
			}
			if last == done {
				t.Fatalf("after record %d the stream stands still: %+v", done, r.g.Stats())
			}
			must(t, r.g.Acked(1, epoch.LSN(len(r.sent)), last))
			done = last
			if synctest.Wait(); r.g.Stats().QueueBytes > 200<<10 {
				t.Fatalf("%+v", r.g.Stats())
			}
		}
		must(t, r.g.CatchUp(t.Context(), func(int64) {}))
		r.sameAsShipped()
	})
}

// TestCatchUpEnds: clients that write all the time, faster than the line carries, do not keep the replica from
// having everything.
func TestCatchUpEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{Limits: Limits{QueueBytes: 64 << 10, EpochBytes: 16 << 10}})
		defer r.close()
		events, _ := r.overflows(4 << 20)
		stop := make(chan struct{})
		for w := range 3 {
			r.call(func() error {
				for i := 0; ; i++ {
					select {
					case <-stop:
						return nil
					default:
					}
					if err := r.disk[w%2].WriteAt(fill(4096, byte(i)), int64(i%200)*4096, false); err != nil {
						return err
					}
					time.Sleep(time.Millisecond)
				}
			})
		}
		time.Sleep(3 * time.Second) // it is full by then
		r.g.Resume(0)
		began := time.Now()
		done := r.call(func() error { return r.g.CatchUp(t.Context(), func(int64) {}) })
		for !done.returned() {
			for range 10 { // 40 KiB each 50 ms: a fifteenth of what the clients would write
				run := r.g.Take(1, 1)
				r.sent = append(r.sent, run...)
			}
			for i := len(r.sent) - 1; i >= 0; i-- {
				if r.sent[i].Type == epoch.TypeClose {
					must(t, r.g.Acked(1, r.sent[len(r.sent)-1].LSN, r.sent[i].LSN))
					break
				}
			}
			if time.Sleep(50 * time.Millisecond); time.Since(began) > time.Minute {
				t.Fatalf("it does not end: %+v", r.g.Stats())
			}
		}
		must(t, done.wait())
		close(stop)
		synctest.Wait()
		r.drainTo()
		if n := len(events); n != 1 {
			t.Errorf("told %d times that it is full", n)
		}
	})
}
