package ext4j

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
)

// hashesOf plays the replica: it hashes given images.
func hashesOf(images [][]byte) Hasher {
	return func(_ context.Context, slot uint32, offsets []int64) ([][]byte, error) {
		var out [][]byte
		for _, off := range offsets {
			sum := sha256.Sum256(images[slot][off:min(off+Chunk, int64(len(images[slot])))])
			out = append(out, sum[:])
		}
		return out, nil
	}
}

// scrub puts random content, zeros included, into an image behind the group's back.
func scrub(rng *rand.Rand, p []byte) {
	for off := 0; off < len(p); off += 8 << 10 {
		switch rng.IntN(3) {
		case 0:
			for i := range p[off : off+8<<10] {
				p[off+i] = byte(rng.Uint32())
			}
		case 1:
			clear(p[off : off+8<<10])
		}
	}
}

// TestScanMakesEqual: after a scan of everything the replica's images, plus
// the stream, equal the source's, whatever both held and whatever the guest
// writes meanwhile; what was equal is not shipped.
func TestScanMakesEqual(t *testing.T) {
	for seed := range uint64(5) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 0))
			r := newRig(t, Options{Limits: Limits{QueueBytes: 512 << 10, EpochBytes: 64 << 10}})
			remote := [][]byte{make([]byte, rigSize), make([]byte, rigSize)}
			for slot := range remote {
				scrub(rng, r.img[slot].data)
				copy(remote[slot], r.img[slot].data)
				if rng.IntN(2) == 0 {
					scrub(rng, remote[slot][:rigSize/4])
				}
			}
			hold := rng.IntN(2) == 0
			r.g.Begin(epoch.UUID{9}, 1, 1, hold)
			r.g.OpenGate()
			before := [][]byte{bytes.Clone(remote[0]), bytes.Clone(remote[1])}
			scan := r.call(func() error {
				if err := r.g.Scan(context.Background(), r.g.WholeRanges(), hashesOf(before), nil); err != nil {
					return err
				}
				_, err := r.g.FinishScan(context.Background())
				return err
			})
			guest := r.call(func() error {
				rng := rand.New(rand.NewPCG(seed, 1))
				for i := range 60 {
					off := rng.Int64N(rigSize/512-8) * 512
					if err := r.disk[rng.IntN(2)].WriteAt(fill(4096, byte(i)), off, false); err != nil {
						return err
					}
					time.Sleep(time.Microsecond)
				}
				return nil
			})
			for !scan.returned() || !guest.returned() {
				last, durable := r.ship(), r.g.Stats().Ack
				for _, rec := range r.sent {
					if rec.Type == epoch.TypeClose {
						durable = max(durable, rec.LSN)
					}
				}
				if err := r.g.Acked(1, last, durable); err != nil {
					t.Fatal(err)
				}
				time.Sleep(10 * time.Microsecond)
			}
			if err := errors.Join(scan.err, guest.err); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			r.close()
			r.ship()
			shipped := 0
			for _, rec := range r.sent {
				if rec.Flags&epoch.FlagResync != 0 && rec.Type != epoch.TypeSyncDone {
					shipped++
				}
				switch rec.Type {
				case epoch.TypeWrite:
					copy(remote[rec.Disk][rec.Offset:], rec.Payload)
				case epoch.TypeZero, epoch.TypeTrim:
					clear(remote[rec.Disk][rec.Offset:rec.End()])
				}
			}
			for slot := range remote {
				if !bytes.Equal(remote[slot], r.img[slot].data) {
					t.Errorf("seed %d, hold %v: disk %d differs", seed, hold, slot)
				}
			}
			if shipped > 2*rigSize/Chunk*3/4 {
				t.Errorf("seed %d: %d chunks were shipped", seed, shipped)
			}
		})
	}
}

// TestFinishScanNeedsTheImages: where an image cannot be made durable, the replica is
// not told that the scan was whole.
func TestFinishScanNeedsTheImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		r.g.Begin(epoch.UUID{9}, 5, 101, true)
		r.g.OpenGate()
		if err := r.disk[0].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		r.img[0].failSync = errIO
		if _, err := r.g.FinishScan(context.Background()); !errors.Is(err, errIO) {
			t.Errorf("got %v", err)
		}
		r.ship()
		if r.types() != "w" {
			t.Errorf("shipped %q", r.types())
		}
	})
}

// TestFirstScan: without hashes the replica reads as zeros; chunks of zeros stay out.
func TestFirstScan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		r.img[0].data[5*Chunk+77], r.img[1].data[rigSize-1] = 1, 2
		r.g.Begin(epoch.UUID{9}, 1, 1, false)
		ranges, err := r.g.AllocatedRanges()
		if err != nil || len(ranges) != 2 || ranges[0] != (Range{0, 5 * Chunk, 4096}) || ranges[1] != (Range{1, rigSize - 4096, 4096}) {
			t.Fatalf("allocated: %v, %v", ranges, err)
		}
		if err := r.g.Scan(context.Background(), append(ranges, Range{0, 0, Chunk}, Range{7, 0, 1 << 40}), nil, nil); err != nil {
			t.Fatal(err)
		}
		r.ship()
		r.sameAsShipped()
		if r.types() != "ww" {
			t.Errorf("shipped %q", r.types())
		}
	})
}

// TestWalk: a scan covers each chunk once, in order, disk by disk.
func TestWalk(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{})
		defer r.close()
		ranges := []Range{{1, rigSize - 1, 100 << 20}, {0, 10, 20}, {0, Chunk - 1, 2}, {0, 0, 5}, {9, 0, 1}, {0, 4 * Chunk, 1}, {0, 0, 0}, {1, rigSize, 1}}
		w := r.g.walkOver(ranges)
		if n := w.bytes(); n != 4*Chunk {
			t.Errorf("%d bytes are to be looked at", n)
		}
		var got []chunk
		for batch := w.next(); len(batch) > 0; batch = w.next() {
			got = append(got, batch...)
			for _, c := range batch {
				if c.slot != batch[0].slot {
					t.Errorf("a batch of two disks: %v", batch)
				}
			}
		}
		if want := []chunk{{0, 0}, {0, Chunk}, {0, 4 * Chunk}, {1, rigSize - Chunk}}; !slices.Equal(got, want) {
			t.Errorf("got %v, want %v", got, want)
		}
		huge := walk{{Slot: 3, Off: 0, Len: 1 << 50}}
		if batch := huge.next(); len(batch) != hashBatch || huge.bytes() != 1<<50-hashBatch*Chunk {
			t.Errorf("a batch of %d chunks, %d bytes left", len(batch), huge.bytes())
		}
	})
}

// TestZerosAreOneTrim: neighbours that the source has as zeros and the replica has
// not are one record, unless a client writes to them meanwhile.
func TestZerosAreOneTrim(t *testing.T) {
	for _, written := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, Options{})
			defer r.close()
			remote := [][]byte{fill(rigSize, 1), fill(rigSize, 1)}
			copy(r.img[0].data[2*Chunk:], fill(Chunk, 2)) // one that is not zeros
			copy(r.img[0].data[5*Chunk:], fill(Chunk, 1)) // one that the replica has
			r.g.Begin(epoch.UUID{9}, 1, 1, false)
			r.g.OpenGate()
			left := 9
			err := r.g.Scan(t.Context(), []Range{{0, 0, 9*Chunk - 5}}, hashesOf(remote), func(done, total int64) {
				left--
				if total != 9*Chunk || done != int64(9-left)*Chunk {
					t.Errorf("%d bytes of %d with %d chunks left", done, total, left)
				}
				if written && done == 7*Chunk { // the run of zeros has two more chunks to come
					if err := r.disk[0].WriteAt(fill(512, 3), 6*Chunk+512, false); err != nil {
						t.Error(err)
					}
				}
			})
			if err != nil || left != 0 {
				t.Fatalf("%v, %d chunks left", err, left)
			}
			r.ship()
			want := "wttt" // chunk 2, then chunks 0-1, 3-4, 6-8
			if written {
				want = "wttwwtt"
			}
			if got := r.types(); got != want {
				t.Errorf("written %v: shipped %q, want %q", written, got, want)
			}
			for _, rec := range r.sent {
				if rec.Type == epoch.TypeWrite {
					copy(remote[0][rec.Offset:], rec.Payload)
				} else {
					clear(remote[0][rec.Offset:rec.End()])
				}
			}
			if !bytes.Equal(remote[0][:9*Chunk], r.img[0].data[:9*Chunk]) {
				t.Errorf("written %v: the replica differs", written)
			}
			if s := r.g.Stats(); s.ResyncRecords != uint64(len(want))-uint64(strings.Count(want, "ww")) {
				t.Errorf("%d records are counted as the scan's of %q", s.ResyncRecords, want)
			}
		})
	}
}

// TestScanErrors: a scan that cannot go on says so, and never waits for ever.
func TestScanErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, Options{Limits: Limits{QueueBytes: 100 << 10}})
		defer r.close()
		for slot := range r.img {
			for i := range r.img[slot].data {
				r.img[slot].data[i] = 1
			}
		}
		r.g.Begin(epoch.UUID{9}, 1, 1, true)
		all := r.g.WholeRanges()
		fails := func(context.Context, uint32, []int64) ([][]byte, error) { return nil, errTorn }
		if err := r.g.Scan(context.Background(), all, fails, nil); !errors.Is(err, errTorn) {
			t.Errorf("failed hashes: %v", err)
		}
		short := func(context.Context, uint32, []int64) ([][]byte, error) { return make([][]byte, 3), nil }
		if err := r.g.Scan(context.Background(), all, short, nil); err == nil {
			t.Error("too few hashes are accepted")
		}
		ctx, cancel := context.WithCancelCause(context.Background())
		stuck := r.call(func() error { return r.g.Scan(ctx, all, nil, nil) })
		if synctest.Wait(); stuck.returned() {
			t.Fatal("the queue does not hold the scan back")
		}
		cancel(errTorn)
		if err := stuck.wait(); !errors.Is(err, errTorn) {
			t.Errorf("cancelled: %v", err)
		}
		r.img[1].failRead = errIO
		_ = r.g.Acked(1, r.ship(), 0)
		if err := r.g.Scan(context.Background(), all[1:], nil, nil); !errors.Is(err, errIO) {
			t.Errorf("unreadable image: %v", err)
		}
	})
}

// TestScanPassesFullRecorder: in a resync regions leave a full record of
// changes only at its end, so a request that waits for room must not hold
// what the scan needs.
func TestScanPassesFullRecorder(t *testing.T) {
	for name, request := range map[string]func(*Disk) error{
		"write": func(d *Disk) error { return d.WriteAt(fill(4096, 5), 3*Chunk, false) },
		"trim":  func(d *Disk) error { return d.Trim(0, rigSize, false) },
	} {
		synctest.Test(t, func(t *testing.T) {
			r := newRig(t, Options{})
			defer r.close()
			r.g.Begin(epoch.UUID{9}, 1, 1, true)
			r.g.OpenGate()
			r.rec.full = make(chan struct{})
			w := r.call(func() error { return request(r.disk[0]) })
			synctest.Wait()
			scan := r.call(func() error {
				zero := [][]byte{make([]byte, rigSize), make([]byte, rigSize)}
				if err := r.g.Scan(context.Background(), r.g.WholeRanges(), hashesOf(zero), nil); err != nil {
					return err
				}
				_, err := r.g.FinishScan(context.Background())
				return err
			})
			synctest.Wait()
			r.ack(1, r.ship())
			if time.Sleep(time.Minute); !scan.returned() {
				t.Errorf("the scan waits for a %s that waits for the scan's end", name)
				r.g.Fail(errTorn)
			}
			close(r.rec.full)
			_, _ = w.wait(), scan.wait()
		})
	}
}

// TestRecorderAcrossSessions: a session may begin below where the one before
// had come to, because the replica lost something. A region that the earlier one
// wrote may leave the record when the resync is acknowledged, not before, and
// need not wait until the numbers have caught up.
func TestRecorderAcrossSessions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		for i := range int64(30) {
			if err := r.disk[0].WriteAt(fill(512, byte(i)), i*512, false); err != nil {
				t.Fatal(err)
			}
		}
		old := r.rec.lasts[0]
		r.ship()
		r.g.Begin(epoch.UUID{9}, 2, 5, true)
		if err := r.disk[0].WriteAt(fill(512, 99), 0, false); err != nil {
			t.Fatal(err)
		}
		if now := r.rec.lasts[0]; now <= old {
			t.Errorf("the record of changes is told %d after %d", now, old)
		}
		if err := r.g.Acked(2, r.ship(), 4); err != nil {
			t.Fatal(err)
		}
		end := r.call(func() error { _, err := r.g.FinishScan(context.Background()); return err })
		synctest.Wait()
		last := r.ship()
		if err := r.g.Acked(2, last, 4); err != nil {
			t.Fatal(err)
		}
		if r.rec.acked >= old {
			t.Errorf("before the resync's end %d counts as acknowledged; %d is not at the replica", r.rec.acked, old)
		}
		r.ack(2, last)
		if err := end.wait(); err != nil || r.rec.acked < r.rec.lasts[0] {
			t.Errorf("after the resync %d is acknowledged, %d was written: %v", r.rec.acked, r.rec.lasts[0], err)
		}
	})
}

// TestRelieve: when the recorder needs room, the epoch is closed and the
// images are made durable.
func TestRelieve(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		if err := r.disk[1].WriteAt(fill(512, 1), 0, false); err != nil {
			t.Fatal(err)
		}
		r.rec.full = make(chan struct{})
		w := r.call(func() error { return r.disk[0].WriteAt(fill(512, 1), 0, false) })
		synctest.Wait()
		if r.ship(); r.types() != "wc" || r.img[1].syncs != 1 || r.img[0].syncs != 1 {
			t.Errorf("shipped %q, syncs %d and %d", r.types(), r.img[0].syncs, r.img[1].syncs)
		}
		close(r.rec.full)
		if err := w.wait(); err != nil {
			t.Error(err)
		}
	})
}

// TestRecorderFailureIsFinal: a write whose region cannot be recorded is not
// made, and the group ends.
func TestRecorderFailureIsFinal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		r.rec.err = errTorn
		var wg sync.WaitGroup
		for i := range 3 {
			wg.Go(func() {
				if err := r.disk[0].WriteAt(fill(512, 1), int64(i)*512, false); !errors.Is(err, errTorn) {
					t.Errorf("got %v", err)
				}
			})
		}
		wg.Wait()
		if !errors.Is(r.g.Err(), errTorn) || !isZero(r.img[0].data) || r.ship() != 0 {
			t.Errorf("group %v, shipped %q", r.g.Err(), r.types())
		}
	})
}

// TestScanLeavesRoom: while a FLUSH waits, a scan puts little in front of the next one; without
// any it fills the queue.
func TestScanLeavesRoom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const queue = 512 << 10
		r := newRig(t, Options{Limits: Limits{QueueBytes: queue}})
		defer r.close()
		rng := rand.New(rand.NewPCG(1, 1))
		scrub(rng, r.img[0].data)
		scrub(rng, r.img[1].data)
		r.g.Begin(epoch.UUID{9}, 1, 1, false)
		r.g.OpenGate()
		must(t, r.disk[0].WriteAt(fill(4096, 1), 0, false))
		f := r.call(r.disk[0].Flush)
		synctest.Wait()
		scan := r.call(func() error {
			return r.g.Scan(t.Context(), r.g.WholeRanges(), hashesOf([][]byte{make([]byte, rigSize), make([]byte, rigSize)}), nil)
		})
		synctest.Wait()
		if n := r.g.Stats().QueueBytes; n == 0 || n > queue/scanShare {
			t.Errorf("beside a FLUSH the queue has %d bytes", n)
		}
		r.ack(1, r.ship())
		must(t, f.wait())
		synctest.Wait()
		if n := r.g.Stats().QueueBytes; n < queue/2 || n > queue {
			t.Errorf("without a FLUSH it has %d", n)
		}
		for !scan.returned() {
			r.ack(1, r.ship())
			synctest.Wait()
		}
		must(t, scan.wait())
	})
}

// TestClientsWait: a resync is not slowed down when FLUSHes wait for its end.
func TestClientsWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := started(t, Options{})
		defer r.close()
		look := func(what string, want bool) {
			t.Helper()
			if r.g.ClientsWait() != want {
				t.Errorf("%s: %v", what, !want)
			}
		}
		look("a stream", false)
		r.g.Begin(epoch.UUID{9}, 2, 1, true)
		look("a resync", true)
		r.g.Alone(true)
		look("one beside which they are answered", false)
	})
}
