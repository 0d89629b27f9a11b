package ext4j

import (
	"context"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
)

// TestLimitHold: clients that write on during a resync cannot make its epoch
// larger than the replica's spool; the scan gets its share and ends it.
func TestLimitHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const limit = 64 << 10
		r := newRig(t, Options{Limits: Limits{QueueBytes: 1 << 20}})
		defer r.close()
		r.g.LimitHold(limit)
		r.g.Begin(epoch.UUID{9}, 1, 1, true)
		r.g.OpenGate()
		stop := make(chan struct{})
		replica := r.call(func() error { // takes everything at once; the epoch is not durable before it is closed
			for {
				select {
				case <-stop:
					return nil
				case <-time.After(time.Millisecond):
				}
				durable := epoch.LSN(0)
				last := r.ship()
				for _, rec := range r.sent {
					if rec.Type == epoch.TypeClose {
						durable = rec.LSN
					}
				}
				if err := r.g.Acked(1, last, durable); err != nil {
					return err
				}
			}
		})
		writer := r.call(func() error {
			for i := range 100 {
				if err := r.disk[0].WriteAt(fill(4096, byte(i)), 0, false); err != nil {
					return err
				}
			}
			return nil
		})
		trimmer := r.call(func() error {
			for range 2000 {
				if err := r.disk[1].Trim(0, 4096, false); err != nil {
					return err
				}
			}
			return nil
		})
		time.Sleep(time.Second + time.Millisecond/2) // the replica rests just then
		synctest.Wait()
		var clients int
		for _, rec := range r.sent {
			clients += len(rec.Payload) + epoch.HeaderSize
		}
		if writer.returned() || trimmer.returned() || clients > limit+4096+2*epoch.HeaderSize || clients < limit/2 {
			t.Errorf("clients put %d bytes into the resync's epoch, the limit is %d", clients, limit)
		}
		if !r.disk[0].WouldBlock() {
			t.Error("the export is not told that requests wait")
		}
		empty := [][]byte{make([]byte, rigSize), make([]byte, rigSize)}
		scrubbed := r.call(func() error { return r.g.Scan(context.Background(), r.g.WholeRanges(), hashesOf(empty), nil) })
		if err := scrubbed.wait(); err != nil {
			t.Fatal(err)
		}
		if _, err := r.g.FinishScan(context.Background()); err != nil {
			t.Fatal(err)
		}
		for _, c := range []*call{writer, trimmer} {
			if err := c.wait(); err != nil {
				t.Error(err)
			}
		}
		close(stop)
		if err := replica.wait(); err != nil {
			t.Error(err)
		}
	})
}

// TestRebuildAnswersFlushes: a session without hold, begun while clients are
// served, is a first sync: nothing is promised until its end, so a FLUSH of the
// session before does not wait for that; FLUSHes of its own wait as ever.
func TestRebuildAnswersFlushes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		before := r.call(r.disk[0].Flush)
		if synctest.Wait(); before.returned() {
			t.Fatal("flush returned without an acknowledgement")
		}
		r.g.Begin(epoch.UUID{9}, 2, 11, false)
		if err := before.wait(); err != nil {
			t.Fatal(err)
		}
		if err := r.disk[0].WriteAt(fill(512, 2), 512, false); err != nil {
			t.Fatal(err)
		}
		during := r.call(r.disk[0].Flush)
		if synctest.Wait(); during.returned() {
			t.Fatal("flush returned without an acknowledgement")
		}
		r.ack(2, r.ship())
		if err := during.wait(); err != nil {
			t.Fatal(err)
		}
		end := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		if synctest.Wait(); end.returned() {
			t.Fatal("the first sync ended without an acknowledgement")
		}
		r.ack(2, r.ship())
		if err := end.wait(); err != nil {
			t.Error(err)
		}
	})
}
