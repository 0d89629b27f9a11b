package ext4j

import (
	"bytes"
	"context"
	"errors"
	"io"
	"sync"
	"syscall"
	"testing"
	"time"

	"kagami/ext4j/epoch"
)

// fakeImage is an image in memory whose operations take (fake) time and fail on demand.
type fakeImage struct {
	t        *testing.T
	rec      *fakeRecorder
	slot     uint32
	mu       sync.Mutex
	data     []byte
	durable  []byte
	syncs    int
	writing  time.Duration // each change takes so long
	syncing  time.Duration
	failNext error // the next change does half its work and returns it
	failSync error
	failRead error
}

func newFakeImage(t *testing.T, rec *fakeRecorder, slot uint32, size int) *fakeImage {
	return &fakeImage{t: t, rec: rec, slot: slot, data: make([]byte, size), durable: make([]byte, size)}
}

func (f *fakeImage) Size() int64 { return int64(len(f.data)) }

func (f *fakeImage) ReadAt(p []byte, off int64) (int, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failRead != nil {
		return 0, f.failRead
	}
	return copy(p, f.data[off:]), nil
}

// change runs one pwrite, zero or trim.
func (f *fakeImage) change(off int64, p []byte) (int, error) {
	if f.writing > 0 {
		time.Sleep(f.writing)
	}
	f.rec.mustHold(f.t, f.slot, off, int64(len(p)))
	f.mu.Lock()
	defer f.mu.Unlock()
	if err := f.failNext; err != nil {
		f.failNext = nil
		return copy(f.data[off:], p[:len(p)/2]), err
	}
	return copy(f.data[off:], p), nil
}

func (f *fakeImage) WriteAt(p []byte, off int64) (int, error) { return f.change(off, p) }

func (f *fakeImage) WriteZeroes(off, n int64, _ bool) error {
	_, err := f.change(off, make([]byte, n))
	return err
}

func (f *fakeImage) Trim(off, n int64) error { return f.WriteZeroes(off, n, false) }

func (f *fakeImage) Datasync() error {
	f.mu.Lock()
	now := bytes.Clone(f.data)
	f.mu.Unlock()
	time.Sleep(f.syncing)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.failSync != nil {
		return f.failSync
	}
	f.durable, f.syncs = now, f.syncs+1
	return nil
}

func (f *fakeImage) NextData(off int64) (int64, int64, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for o := off - off%4096; o < f.Size(); o += 4096 {
		if end := min(o+4096, f.Size()); !isZero(f.data[o:end]) {
			return max(o, off), end, nil
		}
	}
	return 0, 0, io.EOF
}

// fakeRecorder is a recorder whose regions are single bytes ranges of its
// callers; it checks the protocol between Disk and Recorder.
type fakeRecorder struct {
	t      *testing.T
	mu     sync.Mutex
	held   map[heldKey]int // pinned ranges
	lasts  map[uint32]epoch.LSN
	acked  epoch.LSN
	slow   time.Duration
	full   chan struct{} // non-nil: Acquire waits until it is closed
	onFull func(disk uint32, off, n int64) bool
	room   chan struct{}
	err    error
	begun  map[uint32]uint64
	ended  map[uint32]uint64
	stuck  []heldKey // released with no LSN: never leave
}

type heldKey struct {
	disk   uint32
	off, n int64
}

func newFakeRecorder(t *testing.T) *fakeRecorder {
	return &fakeRecorder{t: t, held: map[heldKey]int{}, lasts: map[uint32]epoch.LSN{}, room: make(chan struct{}, 1),
		begun: map[uint32]uint64{}, ended: map[uint32]uint64{}}
}

func (r *fakeRecorder) Acquire(ctx context.Context, disk uint32, off, n int64) error {
	if r.slow > 0 {
		time.Sleep(r.slow)
	}
	r.mu.Lock()
	full, err := r.full, r.err
	if full != nil && r.onFull != nil && !r.onFull(disk, off, n) {
		full = nil
	}
	r.mu.Unlock()
	if err != nil {
		return err
	}
	if full != nil {
		select {
		case r.room <- struct{}{}:
		default:
		}
		select {
		case <-full:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.held[heldKey{disk, off, n}]++
	return nil
}

func (r *fakeRecorder) Release(disk uint32, off, n int64, last epoch.LSN) {
	r.mu.Lock()
	defer r.mu.Unlock()
	k := heldKey{disk, off, n}
	if r.held[k]--; r.held[k] < 0 {
		r.t.Errorf("range %+v is released and was not acquired", k)
	} else if r.held[k] == 0 {
		delete(r.held, k)
	}
	if last == ^epoch.LSN(0) {
		r.stuck = append(r.stuck, k)
	} else {
		r.lasts[disk] = max(r.lasts[disk], last)
	}
}

func (r *fakeRecorder) mustHold(t *testing.T, disk uint32, off, n int64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	for k := range r.held {
		if k.disk == disk && k.off <= off && off+n <= k.off+k.n {
			return
		}
	}
	t.Errorf("disk %d: %d bytes at %d are changed before they are durable in the record of changes", disk, n, off)
}

func (r *fakeRecorder) Begin(uint64, epoch.LSN, epoch.LSN) {}

func (r *fakeRecorder) Acked(lsn epoch.LSN) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.acked = lsn
}

func (r *fakeRecorder) SyncBegin(disk uint32) uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.begun[disk]++
	return r.begun[disk]
}

func (r *fakeRecorder) SyncEnd(disk uint32, token uint64) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if token > r.begun[disk] || token <= r.ended[disk] {
		r.t.Errorf("disk %d: fdatasync %d ends; %d had begun, %d had ended", disk, token, r.begun[disk], r.ended[disk])
	}
	r.ended[disk] = token
}

func (r *fakeRecorder) NeedsRoom() <-chan struct{} { return r.room }

func (r *fakeRecorder) pins() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.held)
}

// rig is a group of two disks in a bubble, with what the test needs to play
// link and replica.
type rig struct {
	t    *testing.T
	rec  *fakeRecorder
	g    *Group
	img  []*fakeImage
	disk []*Disk
	sent []epoch.Record
	wg   sync.WaitGroup
}

const rigSize = 1 << 20

var errTorn = errors.New("torn by the test")

func newRig(t *testing.T, o Options) *rig {
	rec := newFakeRecorder(t)
	o.Recorder = rec
	if o.Limits.QueueBytes == 0 {
		o.Limits.QueueBytes = 1 << 30
	}
	if o.Limits.EpochBytes == 0 {
		o.Limits.EpochBytes = 1 << 30
	}
	r := &rig{t: t, rec: rec, g: NewGroup(o)}
	for slot := range uint32(2) {
		img := newFakeImage(t, rec, slot, rigSize)
		r.img, r.disk = append(r.img, img), append(r.disk, r.g.AddDisk(slot, img))
	}
	return r
}

// started begins session 1 at LSN 1 and opens the gate.
func started(t *testing.T, o Options) *rig {
	r := newRig(t, o)
	r.g.Begin(epoch.UUID{9}, 1, 1, false)
	r.g.OpenGate()
	return r
}

func (r *rig) close() {
	r.g.Close()
	r.wg.Wait()
	if n := r.rec.pins(); n != 0 {
		r.t.Errorf("%d ranges are still pinned", n)
	}
}

// call runs f in a goroutine and returns what it returned, and when.
func (r *rig) call(f func() error) *call {
	c := &call{began: time.Now(), done: make(chan struct{})}
	r.wg.Go(func() {
		c.err = f()
		c.ended = time.Now()
		close(c.done)
	})
	return c
}

type call struct {
	began, ended time.Time
	err          error
	done         chan struct{}
}

func (c *call) returned() bool {
	select {
	case <-c.done:
		return true
	default:
		return false
	}
}

func (c *call) wait() error { <-c.done; return c.err }

// ship takes everything there is, checks that it follows on, and returns the
// newest LSN.
func (r *rig) ship() epoch.LSN {
	for {
		run := r.g.Take(1<<20, 100)
		if len(run) == 0 {
			break
		}
		for _, rec := range run {
			if err := rec.Verify(); err != nil {
				r.t.Errorf("record %d: %v", rec.LSN, err)
			}
			if n := len(r.sent); n > 0 && r.sent[n-1].Session == rec.Session && rec.LSN != r.sent[n-1].LSN+1 {
				r.t.Errorf("record %d is handed out after %d", rec.LSN, r.sent[n-1].LSN)
			}
			r.sent = append(r.sent, rec)
		}
	}
	if len(r.sent) == 0 {
		return 0
	}
	return r.sent[len(r.sent)-1].LSN
}

// ack acknowledges everything up to lsn.
func (r *rig) ack(session uint64, lsn epoch.LSN) {
	if err := r.g.Acked(session, lsn, lsn); err != nil {
		r.t.Errorf("ack of %d: %v", lsn, err)
	}
}

// replay applies the shipped records to empty disks.
func (r *rig) replay() [][]byte {
	out := [][]byte{make([]byte, r.img[0].Size()), make([]byte, r.img[1].Size())}
	for _, rec := range r.sent {
		switch rec.Type {
		case epoch.TypeWrite:
			copy(out[rec.Disk][rec.Offset:], rec.Payload)
		case epoch.TypeZero, epoch.TypeTrim:
			clear(out[rec.Disk][rec.Offset:rec.End()])
		}
	}
	return out
}

// sameAsShipped compares the images with what was shipped.
func (r *rig) sameAsShipped() {
	r.t.Helper()
	for slot, want := range r.replay() {
		if !bytes.Equal(r.img[slot].data, want) {
			r.t.Errorf("disk %d differs from what was shipped", slot)
		}
	}
}

// types lists the types of what was shipped.
func (r *rig) types() (s string) {
	for _, rec := range r.sent {
		s += rec.Type.String()[:1]
	}
	return s
}

func fill(n int, b byte) []byte { return bytes.Repeat([]byte{b}, n) }

var errIO error = syscall.EIO
