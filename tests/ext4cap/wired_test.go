package ext4cap

import (
	"context"
	"io"
	"testing"
	"time"

	"kagami/ext4j"
	"kagami/ext4j/epoch"
	"kagami/ext4j/follow"
)

// noRecord is a record of changes that is never needed.
type noRecord struct{}

func (noRecord) Acquire(context.Context, uint32, int64, int64) error { return nil }
func (noRecord) Release(uint32, int64, int64, epoch.LSN)             {}
func (noRecord) Begin(uint64, epoch.LSN, epoch.LSN)                  {}
func (noRecord) Acked(epoch.LSN)                                     {}
func (noRecord) SyncBegin(uint32) uint64                             { return 0 }
func (noRecord) SyncEnd(uint32, uint64)                              {}
func (noRecord) NeedsRoom() <-chan struct{}                          { return nil }

// imageOf makes a state of the disk an ext4j.Image.
type imageOf struct{ memory }

func (m imageOf) Size() int64                                { return int64(len(m.memory)) }
func (m imageOf) WriteZeroes(off, n int64, _ bool) error     { clear(m.memory[off : off+n]); return nil }
func (m imageOf) Trim(off, n int64) error                    { return m.WriteZeroes(off, n, false) }
func (m imageOf) NextData(int64) (start, end int64, _ error) { return 0, 0, io.EOF }

// TestWired plays a stream through a whole ext4j.Group, whose replica acknowledges
// only when a FLUSH waits for it, and judges the FLUSHes that did not.
func TestWired(t *testing.T) {
	need(t)
	w := Workload{Name: "wired", MiB: 16, Run: func(e *Env) error { return mixture(e) }}
	s, err := Capture(tempShm(t), w, 1)
	if err != nil {
		t.Fatal(err)
	}
	for name, eyes := range map[string]ext4j.Eyes{"on": {Follow: true, LocalFlushes: true}, "labels only": {Follow: true}, "off": {}} {
		t.Run(name, func(t *testing.T) {
			answers, waited := s.wired(t, eyes)
			pure := s.Play(follow.Options{}, 0)
			t.Logf("%d answered locally, %d waited; the follower alone: %d and %d", len(answers), waited, pure.Local, pure.Waited)
			switch {
			case !eyes.LocalFlushes && len(answers) > 0:
				t.Errorf("%d FLUSHes were answered locally", len(answers))
			case eyes.LocalFlushes && len(answers) < pure.Local*3/4:
				t.Errorf("%d FLUSHes were answered locally, the follower alone has %d", len(answers), pure.Local)
			}
			if err := s.Check(judge(t, s), answers); err != nil {
				t.Error(err)
			}
		})
	}
}

func (s Stream) wired(t *testing.T, eyes ext4j.Eyes) (answers []Answer, waited int) {
	t.Helper()
	g := ext4j.NewGroup(ext4j.Options{Recorder: noRecord{}, Eyes: eyes, Limits: ext4j.Limits{QueueBytes: 1 << 30, EpochBytes: 1 << 30}})
	defer g.Close()
	d := g.AddDisk(0, imageOf{append(memory(nil), s.Base...)})
	g.Begin(epoch.UUID{1}, 1, 1, false)
	g.OpenGate()
	ack := func() {
		last := g.Stats().Close
		if err := g.Acked(1, last, last); err != nil {
			t.Fatal(err)
		}
	}
	acked, n := 0, 0
	last := epoch.LSN(0) // Close record of the FLUSH before
	for _, r := range s.Log {
		var err error
		switch r.Kind {
		case Write:
			err = d.WriteAt(r.Data, r.Off, false)
		case Zero:
			err = d.Trim(r.Off, r.Len, false)
		case Flush:
			n++
			done := make(chan error, 1)
			go func() { done <- d.Flush() }()
			var waits bool
			if waits, err = await(g, done); waits {
				waited++
				ack()
				err = <-done
				acked = n
			} else if now := g.Stats().Close; now != last { // it covered something
				answers = append(answers, Answer{acked, n})
			}
			last = g.Stats().Close
		}
		if err != nil {
			t.Fatal(err)
		}
		settle(d)
	}
	return answers, waited
}

// await waits until a FLUSH has returned, or waits for the replica.
func await(g *ext4j.Group, done chan error) (waits bool, err error) {
	for range 100000 {
		select {
		case err := <-done:
			return false, err
		default:
		}
		if g.Stats().UnackedFlushes > 0 {
			return true, nil
		}
		time.Sleep(10 * time.Microsecond)
	}
	return false, context.DeadlineExceeded
}

// settle gives the disk time to read what its follower wants, which the guest's
// writes need not wait for.
func settle(d *ext4j.Disk) {
	for range 1000 {
		seen, ok := d.Seen()
		if !ok || seen.Settled {
			return
		}
		time.Sleep(20 * time.Microsecond)
	}
}
