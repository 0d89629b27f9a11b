package ext4j

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
)

// TestAsyncBound: a FLUSH is answered by this site alone while the replica lacks
// no more than it may, in bytes and in time; past that, FLUSHes and writes wait.
func TestAsyncBound(t *testing.T) {
	for name, mode := range map[string]Mode{
		"bytes": {Async: true, Bytes: 10_000},
		"age":   {Async: true, Age: 5 * time.Second},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				r := started(t, Options{})
				defer r.close()
				r.g.SetMode(mode)
				write := func() *call { return r.call(func() error { return r.disk[0].WriteAt(fill(4096, 1), 0, false) }) }
				for range 2 {
					if err := write().wait(); err != nil {
						t.Fatal(err)
					}
					f := r.call(r.disk[0].Flush)
					if synctest.Wait(); !f.returned() {
						t.Fatal("a FLUSH waits for the replica within the bound")
					}
				}
				if syncs := r.img[0].syncs; syncs != 2 {
					t.Errorf("%d fdatasyncs for 2 FLUSHes", syncs)
				}
				if mode.Age > 0 {
					time.Sleep(mode.Age + time.Millisecond)
				}
				w := write()
				synctest.Wait()
				f := r.call(r.disk[0].Flush)
				if synctest.Wait(); w.returned() || f.returned() != (mode.Bytes > 0) {
					t.Errorf("past the bound: write returned %v, FLUSH %v", w.returned(), f.returned())
				}
				if !r.g.Stats().Bounded {
					t.Error("Stats do not say so")
				}
				r.ack(1, r.ship())
				if err := w.wait(); err != nil {
					t.Fatal(err)
				}
				if err := f.wait(); err != nil {
					t.Fatal(err)
				}
				if s := r.g.Stats(); s.Bounded || s.Lag > time.Second {
					t.Errorf("after the acknowledgement: %+v", s)
				}
			})
		})
	}
}

// TestModeChanges: FLUSHes that arrive after a change to sync wait, and one that
// waits is let go by a change to async.
func TestModeChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		write := func() {
			if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
				t.Fatal(err)
			}
		}
		write()
		f := r.call(r.disk[0].Flush)
		if synctest.Wait(); f.returned() {
			t.Fatal("a FLUSH did not wait in sync mode")
		}
		r.g.SetMode(Mode{Async: true})
		if err := f.wait(); err != nil {
			t.Fatal(err)
		}
		r.g.SetMode(Mode{})
		f = r.call(r.disk[0].Flush)
		if synctest.Wait(); f.returned() {
			t.Error("what was written in async mode is not waited for in sync mode")
		}
		r.ack(1, r.ship())
		if err := f.wait(); err != nil {
			t.Fatal(err)
		}
	})
}

// TestAsyncWaitsForResync: until a resync has ended the replica's point may be
// older than any bound, so FLUSHes wait; so does the first client.
func TestAsyncWaitsForResync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		r.g.SetMode(Mode{Async: true})
		r.g.Begin(epoch.UUID{9}, 5, 101, true)
		r.g.OpenGate()
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		f := r.call(r.disk[0].Flush)
		r.disk[1].Opened()
		read := r.call(func() error { return r.disk[1].ReadAt(make([]byte, 512), 0) })
		end := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		if synctest.Wait(); f.returned() || read.returned() {
			t.Fatal("a client was answered before the end of the resync")
		}
		r.ack(5, r.ship())
		for _, c := range []*call{f, read, end} {
			if err := c.wait(); err != nil {
				t.Fatal(err)
			}
		}
		// A first client waits for all, whatever the mode: it must not read what the replica lacks.
		if err := r.disk[0].WriteAt(fill(512, 2), 0, false); err != nil {
			t.Fatal(err)
		}
		r.disk[0].Opened()
		read = r.call(func() error { return r.disk[0].ReadAt(make([]byte, 512), 0) })
		if synctest.Wait(); read.returned() {
			t.Error("a new client reads what the replica lacks")
		}
		r.ack(5, r.ship())
		if err := read.wait(); err != nil {
			t.Fatal(err)
		}
	})
}
