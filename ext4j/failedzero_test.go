package ext4j

import (
	"errors"
	"io"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
)

// fullImage is an image whose file system has no space: zeros that keep their
// space fail.
type fullImage struct{}

func (fullImage) Size() int64                            { return 1 << 30 }
func (fullImage) ReadAt(p []byte, _ int64) (int, error)  { return len(p), nil }
func (fullImage) WriteAt(p []byte, _ int64) (int, error) { return len(p), nil }
func (fullImage) WriteZeroes(int64, int64, bool) error   { return syscall.ENOSPC }
func (fullImage) Trim(int64, int64) error                { return nil }
func (fullImage) Datasync() error                        { return nil }
func (fullImage) NextData(int64) (int64, int64, error)   { return 0, 0, io.EOF }

// TestFailedZerosAreBounded: zeros that fail ship what their range holds, which
// is much more than the request was. They wait for room in the queue, and in a
// resync for room in its epoch, and a scan passes them.
func TestFailedZerosAreBounded(t *testing.T) {
	const requests, length, limit = 8, 4 << 20, 1 << 20
	for _, hold := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			g := NewGroup(Options{Recorder: newFakeRecorder(t), Limits: Limits{QueueBytes: limit, EpochBytes: limit / 4, EpochAge: time.Second}})
			defer g.Close()
			d := g.AddDisk(0, fullImage{})
			g.LimitHold(limit)
			g.Begin(epoch.UUID{9}, 1, 1, hold)
			g.OpenGate()
			done := make(chan error, requests)
			for i := range int64(requests) {
				go func() { done <- d.WriteZeroes(i*length, length, true, false) }()
			}
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if s := g.Stats(); s.QueueBytes > limit+requests*epoch.MaxPayload {
				t.Errorf("hold %v: %d requests made the queue hold %d bytes, its limit is %d", hold, requests, s.QueueBytes, limit)
			}
			if hold {
				shipped(t, g)
				ranges := []Range{{Slot: 0, Off: 0, Len: requests * length}}
				if err := g.Scan(t.Context(), ranges, nil, nil); err != nil {
					t.Fatal(err)
				}
				go func() { // what ends the resync is acknowledged below
					if _, err := g.FinishScan(t.Context()); err != nil {
						t.Error(err)
					}
				}()
			}
			for n := 0; n < requests; {
				synctest.Wait()
				shipped(t, g)
				select {
				case err := <-done:
					if n++; !errors.Is(err, syscall.ENOSPC) {
						t.Error(err)
					}
				default:
				}
			}
			if s := g.Stats(); s.WrittenBytes != requests*length {
				t.Errorf("hold %v: %d bytes were shipped of %d", hold, s.WrittenBytes, requests*length)
			}
		})
	}
}

// shipped acknowledges all that is queued, as durable up to the last Close record.
func shipped(t *testing.T, g *Group) {
	t.Helper()
	for recs := g.Take(1<<20, 1000); len(recs) > 0; recs = g.Take(1<<20, 1000) {
	}
	s := g.Stats()
	if err := g.Acked(1, s.Next-1, s.Close); err != nil {
		t.Fatal(err)
	}
}
