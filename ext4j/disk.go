package ext4j

import (
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"

	"kagami/ext4j/epoch"
)

// Image is the local copy of a disk; images.Image implements it.
type Image interface {
	io.ReaderAt
	io.WriterAt
	Size() int64
	// WriteZeroes makes a range read as zeros, keeping its space if noHole.
	WriteZeroes(off, n int64, noHole bool) error
	// Trim makes a range read as zeros and gives its space back.
	Trim(off, n int64) error
	// Datasync makes all completed changes durable; an error is final.
	Datasync() error
	// NextData finds the next allocated extent; io.EOF after the last.
	NextData(off int64) (start, end int64, err error)
}

// Disk is one disk of a group and the device behind its export. All methods
// are safe for concurrent use. Ranges are already checked against Size.
type Disk struct {
	g     *Group
	slot  uint32
	img   Image
	locks rangeLock
	sync  syncer
	eyes  *eyes                 // nil: what the guest writes is not looked at
	watch atomic.Pointer[watch] // of a Verify; nil: none is under way

	mu      sync.Mutex
	clients int
	entry   chan struct{} // non-nil while the first client's implicit FLUSH runs
}

// AddDisk adds a disk before the group's gate is first opened.
func (g *Group) AddDisk(slot uint32, img Image) *Disk {
	d := &Disk{g: g, slot: slot, img: img}
	d.sync.run = d.datasync
	g.disks[slot] = d
	if g.eyes.Follow && !g.detached {
		d.openEyes(g.eyes)
	}
	return d
}

// Size is the disk's length in bytes.
func (d *Disk) Size() int64 { return d.img.Size() }

// Opened counts a client in. The first one after a time without any starts an
// implicit FLUSH, and no request of any client is served before it returns:
// nobody may read, and so tell the world, what the other site could lose.
func (d *Disk) Opened() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.clients++
	if d.eyes != nil {
		d.eyes.reset()
	}
	if d.clients > 1 || d.entry != nil {
		return
	}
	done := make(chan struct{})
	d.entry = done
	d.g.wg.Add(1)
	go func() {
		defer d.g.wg.Done()
		if err := d.g.enter(); err == nil {
			err = d.flushAll()
			d.g.leave()
			if err != nil && !errors.Is(err, ErrGone) {
				d.g.Fail(err)
			}
		}
		d.mu.Lock()
		d.entry = nil
		d.mu.Unlock()
		close(done)
	}()
}

// Closed counts a client out.
func (d *Disk) Closed() {
	d.mu.Lock()
	d.clients--
	d.mu.Unlock()
}

// Clients is the number of clients attached.
func (d *Disk) Clients() int {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.clients
}

// WouldBlock is a hint that a request may wait for more than the local image.
func (d *Disk) WouldBlock() bool {
	d.mu.Lock()
	entering := d.entry != nil
	d.mu.Unlock()
	g := d.g
	g.mu.Lock()
	defer g.mu.Unlock()
	return entering || g.hold || g.gate != gateOpen || g.q.bytes*2 > g.limits.QueueBytes
}

// begin admits a request; it pairs with g.leave.
func (d *Disk) begin() error {
	d.mu.Lock()
	entry := d.entry
	d.mu.Unlock()
	if entry != nil {
		<-entry
	}
	return d.g.enter()
}

// ReadAt fills p from the local image.
func (d *Disk) ReadAt(p []byte, off int64) error {
	if err := d.begin(); err != nil {
		return err
	}
	defer d.g.leave()
	if _, err := d.img.ReadAt(p, off); err != nil {
		return fmt.Errorf("read %d bytes at %d: %w", len(p), off, err)
	}
	return nil
}

// WriteAt writes p; with fua it returns when p is durable at both sites.
func (d *Disk) WriteAt(p []byte, off int64, fua bool) error {
	if err := d.begin(); err != nil {
		return err
	}
	defer d.g.leave()
	for len(p) > 0 {
		n := piece(off, int64(len(p)), epoch.MaxPayload)
		if err := d.write(p[:n], off); err != nil {
			return err
		}
		p, off = p[n:], off+n
	}
	return d.afterwards(fua)
}

// WriteZeroes makes a range read as zeros. Without noHole it gives the space
// back, here and at the replica.
func (d *Disk) WriteZeroes(off, n int64, noHole, fua bool) error {
	t := epoch.TypeTrim
	if noHole {
		t = epoch.TypeZero
	}
	return d.zero(t, off, n, fua, func(off, n int64) error { return d.img.WriteZeroes(off, n, noHole) })
}

// Trim makes a range read as zeros and gives its space back.
func (d *Disk) Trim(off, n int64, fua bool) error {
	return d.zero(epoch.TypeTrim, off, n, fua, d.img.Trim)
}

// Flush returns when every write answered before it is durable at both sites.
func (d *Disk) Flush() error {
	if err := d.begin(); err != nil {
		return err
	}
	defer d.g.leave()
	return d.flush()
}

func (d *Disk) afterwards(fua bool) error {
	if !fua {
		return nil
	}
	return d.flush()
}

// flush closes the epoch and waits for both halves of the promise at once:
// the local fdatasync (begun after the call) and the replica's acknowledgement.
func (d *Disk) flush() error {
	d.g.mu.Lock()
	d.g.stats.Flushes++
	d.g.mu.Unlock()
	b := d.g.closeEpoch(epoch.ByFlush)
	if d.eyes != nil {
		b = d.g.only(b, d.eyes.newest())
	}
	return d.await(b)
}

// flushAll is a FLUSH that waits for every record, whatever it promises.
func (d *Disk) flushAll() error {
	b := d.g.closeEpoch(epoch.ByFlush)
	b.all = true
	return d.await(b)
}

func (d *Disk) await(b barrier) error {
	local := d.sync.request()
	err := <-local
	if err == nil {
		err = d.g.waitAcked(b)
	}
	return err
}

// datasync is one fdatasync of the image. Its failure is final for the group:
// what was written since the last good one is suspect. After it no other is
// tried: it would succeed, the kernel reports a failure once, and the regions
// that were lost would leave the record of changes.
func (d *Disk) datasync() error {
	if err := d.g.Err(); err != nil {
		return err
	}
	token := d.g.rec.SyncBegin(d.slot)
	if err := d.img.Datasync(); err != nil {
		err = fmt.Errorf("fdatasync of the image of disk %d: %w", d.slot, err)
		d.g.Fail(err)
		return err
	}
	d.g.rec.SyncEnd(d.slot, token)
	return nil
}

// piece is how much of n bytes at off fits one record: up to the next multiple of limit.
func piece(off, n, limit int64) int64 { return min(n, limit-off%limit) }

// write applies and queues one record's worth of a guest write.
func (d *Disk) write(p []byte, off int64) error {
	n := int64(len(p))
	if err := d.g.reserve(n); err != nil {
		return err
	}
	if err := d.g.rec.Acquire(d.g.ctx, d.slot, off, n); err != nil {
		return d.g.acquireError(err)
	}
	l := d.locks.lock(off, n)
	defer d.locks.unlock(l)
	before := d.before(off, n)
	_, werr := d.img.WriteAt(p, off)
	var payload []byte
	if !d.g.detached {
		payload = append(make([]byte, 0, n), p...)
	}
	if werr != nil && !d.g.detached {
		if payload, werr = d.salvage(off, n, werr); payload == nil {
			d.g.rec.Release(d.slot, off, n, unknownLSN)
			return werr
		}
	}
	lsn := d.append(epoch.Record{Type: epoch.TypeWrite, Disk: d.slot, Offset: uint64(off), Length: uint64(n), Payload: payload}, before)
	d.g.rec.Release(d.slot, off, n, lsn)
	return werr
}

// salvage returns what the image holds after a failed write, so that the
// replica gets just that. If it cannot be read, the group has failed.
func (d *Disk) salvage(off, n int64, cause error) ([]byte, error) {
	cause = fmt.Errorf("write %d bytes at %d: %w", n, off, cause)
	now := make([]byte, n)
	if _, err := d.img.ReadAt(now, off); err != nil {
		cause = fmt.Errorf("%w; and what the image holds there now cannot be read: %w", cause, err)
		d.g.Fail(cause)
		return nil, cause
	}
	return now, cause
}

// zero applies and queues a zero or trim, in pieces of at most MaxExtent.
func (d *Disk) zero(t epoch.Type, off, n int64, fua bool, do func(off, n int64) error) error {
	if err := d.begin(); err != nil {
		return err
	}
	defer d.g.leave()
	for n > 0 {
		k := piece(off, n, d.g.extent)
		if err := d.zeroPiece(t, off, k, do); err != nil {
			return err
		}
		off, n = off+k, n-k
	}
	return d.afterwards(fua)
}

func (d *Disk) zeroPiece(t epoch.Type, off, n int64, do func(off, n int64) error) error {
	if err := d.g.reserve(0); err != nil {
		return err
	}
	if err := d.g.rec.Acquire(d.g.ctx, d.slot, off, n); err != nil {
		return d.g.acquireError(err)
	}
	lsn, err := d.zeroLocked(epoch.Record{Type: t, Disk: d.slot, Offset: uint64(off), Length: uint64(n)}, do)
	if err != nil {
		// How much of the range was zeroed is unknown: ship what is there.
		last, serr := d.shipRange(off, n)
		lsn, err = last, errors.Join(err, serr)
	}
	d.g.rec.Release(d.slot, off, n, lsn)
	return err
}

// zeroLocked applies and queues r, a zero or trim.
func (d *Disk) zeroLocked(r epoch.Record, do func(off, n int64) error) (epoch.LSN, error) {
	off, n := int64(r.Offset), int64(r.Length)
	l := d.locks.lock(off, n)
	defer d.locks.unlock(l)
	if err := do(off, n); err != nil {
		return 0, fmt.Errorf("%s %d bytes at %d: %w", r.Type, n, off, err)
	}
	return d.append(r, nil), nil
}

// unknownLSN is the mark of a range that never leaves the record of changes:
// what it holds was not shipped.
const unknownLSN = ^epoch.LSN(0)

// shipRange queues the present content of a range after a zero or trim that
// failed half-way, and returns its last mark. It waits for room piece by piece,
// as a write does, and holds no lock while it waits: a resync, whose end may be
// what makes the room, takes the same locks. What another request writes to
// the range meanwhile is shipped before, and again with the range.
func (d *Disk) shipRange(off, n int64) (epoch.LSN, error) {
	last := unknownLSN
	for n > 0 && !d.g.detached {
		k := piece(off, n, epoch.MaxPayload)
		if err := d.g.reserve(k); err != nil {
			return unknownLSN, err
		}
		lsn, err := d.shipPiece(off, k)
		if err != nil {
			return unknownLSN, err
		}
		last, off, n = lsn, off+k, n-k
	}
	return last, nil
}

func (d *Disk) shipPiece(off, n int64) (epoch.LSN, error) {
	l := d.locks.lock(off, n)
	defer d.locks.unlock(l)
	p := make([]byte, n)
	if _, err := d.img.ReadAt(p, off); err != nil {
		err = fmt.Errorf("read back %d bytes at %d: %w", n, off, err)
		d.g.Fail(err)
		return 0, err
	}
	return d.append(epoch.Record{Type: epoch.TypeWrite, Disk: d.slot, Offset: uint64(off), Length: uint64(n), Payload: p}, nil), nil
}

// acquireError turns the end of the group's context into the group's error,
// and any other failure of the record of changes into the group's end.
func (g *Group) acquireError(err error) error {
	if final := g.Err(); final != nil {
		return final
	}
	err = fmt.Errorf("record changed regions: %w", err)
	g.Fail(err)
	return err
}

// Ready returns when requests may be served, or the group's final error.
func (d *Disk) Ready() error {
	if err := d.begin(); err != nil {
		return err
	}
	d.g.leave()
	return nil
}

// Disk returns the disk of a slot, or nil.
func (g *Group) Disk(slot uint32) *Disk { return g.disks[slot] }
