package ext4j

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"slices"

	"kagami/ext4j/epoch"
)

// Chunk is the unit in which images are compared and shipped by a scan, bytes.
const Chunk = 64 << 10

// hashBatch is the number of chunks asked for in one request of hashes.
const hashBatch = 256

// Hasher returns the replica's SHA-256 of the chunks that begin at the given
// offsets of a disk; the last chunk of a disk may be short.
type Hasher func(ctx context.Context, slot uint32, offsets []int64) ([][]byte, error)

// Range is a part of a disk to scan, bytes.
type Range struct {
	Slot uint32
	Off  int64
	Len  int64
}

// Progress is told, after each chunk, how many bytes of how many have been looked at.
type Progress func(done, total int64)

// AllocatedRanges lists what the images hold; everything else reads as zeros.
func (g *Group) AllocatedRanges() ([]Range, error) {
	var out []Range
	for _, slot := range g.slots() {
		img := g.disks[slot].img
		for off := int64(0); off < img.Size(); {
			start, end, err := img.NextData(off)
			if errors.Is(err, io.EOF) {
				break
			}
			if err != nil {
				return nil, fmt.Errorf("find allocated extents of disk %d: %w", slot, err)
			}
			if end <= off {
				return nil, fmt.Errorf("find allocated extents of disk %d: extent [%d, %d) does not move on from %d", slot, start, end, off)
			}
			out, off = append(out, Range{slot, start, min(end, img.Size()) - start}), end
		}
	}
	return out, nil
}

// WholeRanges lists every byte of every disk.
func (g *Group) WholeRanges() []Range {
	var out []Range
	for _, slot := range g.slots() {
		out = append(out, Range{slot, 0, g.disks[slot].img.Size()})
	}
	return out
}

func (g *Group) slots() []uint32 {
	out := make([]uint32, 0, len(g.disks))
	for s := range g.disks {
		out = append(out, s)
	}
	for i := range out { // insertion sort: a VM has few disks
		for j := i; j > 0 && out[j] < out[j-1]; j-- {
			out[j], out[j-1] = out[j-1], out[j]
		}
	}
	return out
}

// Scan ships the content of the given ranges as records of the stream, in
// whole chunks, while the guest writes on. With a Hasher, chunks that the
// replica already has are left out; without one the replica's images are known
// to read as zeros there, and chunks of zeros are left out.
//
// Leaving out a chunk whose hash was equal is safe at any time of this
// session: what the guest wrote to it since is in the stream too, and applying
// a suffix of those writes again to content that has them all changes nothing.
func (g *Group) Scan(ctx context.Context, ranges []Range, remote Hasher, progress Progress) error {
	w := g.walkOver(ranges)
	done, total := int64(0), w.bytes()
	for batch := w.next(); len(batch) > 0; batch = w.next() {
		err := g.scanBatch(ctx, batch, remote, func() {
			if done += Chunk; progress != nil {
				progress(done, total)
			}
		})
		if err != nil {
			return err
		}
	}
	return nil
}

type chunk struct {
	slot uint32
	off  int64
}

// walk is what is left of a scan: ranges of whole chunks, apart and in order.
// It takes memory for the ranges, not for their chunks.
type walk []Range

// walkOver covers ranges with whole chunks, each once.
func (g *Group) walkOver(ranges []Range) walk {
	var all walk
	for _, r := range ranges {
		d, ok := g.disks[r.Slot]
		if !ok {
			continue // a region of a disk that the group no longer has
		}
		off, end := r.Off-r.Off%Chunk, min(r.Off+r.Len, d.img.Size())
		if off < end {
			all = append(all, Range{r.Slot, off, (end - off + Chunk - 1) / Chunk * Chunk})
		}
	}
	slices.SortFunc(all, func(a, b Range) int { return cmp.Or(cmp.Compare(a.Slot, b.Slot), cmp.Compare(a.Off, b.Off)) })
	out := all[:0]
	for _, r := range all {
		if n := len(out); n > 0 && out[n-1].Slot == r.Slot && r.Off <= out[n-1].Off+out[n-1].Len {
			out[n-1].Len = max(out[n-1].Len, r.Off+r.Len-out[n-1].Off)
		} else {
			out = append(out, r)
		}
	}
	return out
}

func (w walk) bytes() (n int64) {
	for _, r := range w {
		n += r.Len
	}
	return n
}

// skip leaves out the first n bytes, in whole chunks, and tells how many those were.
func (w *walk) skip(n int64) (skipped int64) {
	n -= n % Chunk
	for len(*w) > 0 && skipped < n {
		r := &(*w)[0]
		k := min(r.Len, n-skipped)
		r.Off, r.Len, skipped = r.Off+k, r.Len-k, skipped+k
		if r.Len == 0 {
			*w = (*w)[1:]
		}
	}
	return skipped
}

// next takes the next chunks, of one disk, at most hashBatch; none at the end.
func (w *walk) next() []chunk {
	var out []chunk
	for len(*w) > 0 && len(out) < hashBatch {
		r := &(*w)[0]
		if len(out) > 0 && out[0].slot != r.Slot {
			break
		}
		out = append(out, chunk{r.Slot, r.Off})
		r.Off, r.Len = r.Off+Chunk, r.Len-Chunk
		if r.Len <= 0 {
			*w = (*w)[1:]
		}
	}
	return out
}

// scanBatch scans chunks of one disk and calls step after each. Neighbours that
// became zeros are trimmed as one record: without payload it is the record that
// takes room in the replica's spool.
func (g *Group) scanBatch(ctx context.Context, batch []chunk, remote Hasher, step func()) error {
	d := g.disks[batch[0].slot]
	sums, err := askHashes(ctx, batch, remote)
	if err != nil {
		return err
	}
	run := -1 // where such neighbours begin
	trim := func(end int) error {
		begin := run
		if run = -1; begin < 0 {
			return nil
		}
		return d.trimChunks(ctx, batch[begin:end], sums[begin:end])
	}
	for i, c := range batch {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		zero, err := d.scanChunk(ctx, c.off, sums[i], true)
		apart := run >= 0 && c.off != batch[i-1].off+Chunk
		if err == nil && (!zero || apart) {
			err = trim(i)
		}
		if err != nil {
			return fmt.Errorf("scan disk %d at %d: %w", c.slot, c.off, err)
		}
		if zero && run < 0 {
			run = i
		}
		step()
	}
	return trim(len(batch))
}

func askHashes(ctx context.Context, batch []chunk, remote Hasher) ([][]byte, error) {
	if remote == nil {
		return make([][]byte, len(batch)), nil
	}
	offsets := make([]int64, len(batch))
	for i, c := range batch {
		offsets[i] = c.off
	}
	sums, err := remote(ctx, batch[0].slot, offsets)
	if err != nil {
		return nil, fmt.Errorf("ask the replica for hashes: %w", err)
	}
	if len(sums) != len(batch) {
		return nil, fmt.Errorf("ask the replica for hashes: %d came for %d chunks", len(sums), len(batch))
	}
	return sums, nil
}

// scanChunk ships one chunk if the replica may lack it. sum is the replica's
// hash; nil means that it reads as zeros there. With leave, a chunk of zeros that
// the replica lacks is left to the caller, and zero says so.
func (d *Disk) scanChunk(ctx context.Context, off int64, sum []byte, leave bool) (zero bool, err error) {
	n := min(Chunk, d.img.Size()-off)
	if err := d.g.reserveScan(ctx, n); err != nil {
		return false, err
	}
	l := d.locks.lock(off, n)
	defer d.locks.unlock(l)
	p := make([]byte, n)
	if _, err := d.img.ReadAt(p, off); err != nil {
		return false, fmt.Errorf("read: %w", err)
	}
	zero = isZero(p)
	if sum == nil && zero {
		return false, nil
	}
	if here := sha256.Sum256(p); sum != nil && bytes.Equal(here[:], sum) {
		return false, nil
	}
	if zero && leave {
		return true, nil
	}
	r := epoch.Record{Type: epoch.TypeWrite, Flags: epoch.FlagResync, Disk: d.slot, Offset: uint64(off), Length: uint64(n), Payload: p}
	if zero {
		r.Type, r.Payload = epoch.TypeTrim, nil
	}
	d.append(r, nil)
	return false, nil
}

// trimChunks ships neighbours that were zeros a moment ago, as one record if they
// still are.
func (d *Disk) trimChunks(ctx context.Context, batch []chunk, sums [][]byte) error {
	off, end := batch[0].off, min(batch[len(batch)-1].off+Chunk, d.img.Size())
	if done, err := d.trimZeros(ctx, off, end-off); done || err != nil {
		return err
	}
	for i, c := range batch {
		if _, err := d.scanChunk(ctx, c.off, sums[i], false); err != nil {
			return err
		}
	}
	return nil
}

// trimZeros queues a trim of a range if it reads as zeros.
func (d *Disk) trimZeros(ctx context.Context, off, n int64) (bool, error) {
	if err := d.g.reserveScan(ctx, 0); err != nil {
		return false, err
	}
	l := d.locks.lock(off, n)
	defer d.locks.unlock(l)
	p := make([]byte, Chunk)
	for at, end := off, off+n; at < end; at += Chunk {
		p = p[:min(Chunk, end-at)]
		if _, err := d.img.ReadAt(p, at); err != nil {
			return false, fmt.Errorf("read: %w", err)
		}
		if !isZero(p) {
			return false, nil
		}
	}
	d.append(epoch.Record{Type: epoch.TypeTrim, Flags: epoch.FlagResync, Disk: d.slot, Offset: uint64(off), Length: uint64(n)}, nil)
	return true, nil
}

func isZero(p []byte) bool {
	for len(p) > 0 {
		n := min(len(p), len(zeros))
		if !bytes.Equal(p[:n], zeros[:n]) {
			return false
		}
		p = p[n:]
	}
	return true
}

var zeros [4096]byte

// FinishScan ends a first sync or resync: it makes the local images durable,
// puts a SyncDone record into the stream, closes the epoch, and waits for the
// replica to have it. From then on the replica is a complete copy. It returns
// the LSN of the Close record.
//
// The images come first: a failed fdatasync may have taken away what the scan should
// have read, and the replica must not be told that what it got is whole. One that began
// before has failed the group by the time SyncImages, which began after, returns.
func (g *Group) FinishScan(ctx context.Context) (epoch.LSN, error) {
	if err := g.SyncImages(); err != nil {
		return 0, err
	}
	g.mu.Lock()
	if g.err != nil || g.apart {
		defer g.mu.Unlock()
		return 0, cmp.Or(g.err, ErrApart)
	}
	g.appendLocked(epoch.Record{Type: epoch.TypeSyncDone, Flags: epoch.FlagResync, Disk: epoch.GroupWide})
	lsn := g.closeLocked(epoch.ByResync)
	g.floor, g.hold = lsn, false
	session, wake := g.session, g.wake
	g.cond.Broadcast()
	g.mu.Unlock()
	if wake != nil {
		wake()
	}
	return lsn, g.waitSession(ctx, session, lsn)
}

// waitSession waits for the acknowledgement of lsn in a session; the end of
// the session or of ctx is an error.
func (g *Group) waitSession(ctx context.Context, session uint64, lsn epoch.LSN) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer g.wakeAtEnd(ctx)()
	for g.err == nil && ctx.Err() == nil && g.session == session && !g.apart && g.acked < lsn {
		g.cond.Wait()
	}
	switch {
	case g.err != nil:
		return g.err
	case g.session != session, g.apart && g.acked < lsn:
		return fmt.Errorf("session %d ended before the replica acknowledged it", session)
	case g.acked < lsn:
		return context.Cause(ctx)
	}
	return nil
}

// AwaitAcked waits until the replica has every epoch that was closed before the
// call. The end of the session or of ctx is an error.
func (g *Group) AwaitAcked(ctx context.Context) error {
	g.mu.Lock()
	session, lsn := g.session, g.closed
	g.mu.Unlock()
	return g.waitSession(ctx, session, lsn)
}

// SyncImages makes every image durable.
func (g *Group) SyncImages() error {
	var waits []<-chan error
	for _, slot := range g.slots() {
		waits = append(waits, g.disks[slot].sync.request())
	}
	var first error
	for _, w := range waits {
		if err := <-w; err != nil && first == nil {
			first = err
		}
	}
	return first
}
