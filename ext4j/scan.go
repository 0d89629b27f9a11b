package ext4j

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"

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

// Progress is told how many bytes of how many have been looked at.
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
	chunks := g.chunksOf(ranges)
	total, done := int64(len(chunks))*Chunk, int64(0)
	for len(chunks) > 0 {
		n := batchOf(chunks)
		if err := g.scanBatch(ctx, chunks[:n], remote); err != nil {
			return err
		}
		done, chunks = done+int64(n)*Chunk, chunks[n:]
		if progress != nil {
			progress(min(done, total), total)
		}
	}
	return nil
}

type chunk struct {
	slot uint32
	off  int64
}

// chunksOf covers the ranges with whole chunks, each once, in order.
func (g *Group) chunksOf(ranges []Range) []chunk {
	var out []chunk
	seen := map[chunk]bool{}
	for _, r := range ranges {
		d, ok := g.disks[r.Slot]
		if !ok {
			continue // a region of a disk that the group no longer has
		}
		end := min(r.Off+r.Len, d.img.Size())
		for off := r.Off - r.Off%Chunk; off < end; off += Chunk {
			if c := (chunk{r.Slot, off}); !seen[c] {
				seen[c] = true
				out = append(out, c)
			}
		}
	}
	return out
}

// batchOf is the number of leading chunks that belong to one disk, at most hashBatch.
func batchOf(chunks []chunk) int {
	n := 1
	for n < len(chunks) && n < hashBatch && chunks[n].slot == chunks[0].slot {
		n++
	}
	return n
}

func (g *Group) scanBatch(ctx context.Context, batch []chunk, remote Hasher) error {
	d := g.disks[batch[0].slot]
	sums, err := askHashes(ctx, batch, remote)
	if err != nil {
		return err
	}
	for i, c := range batch {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		var sum []byte
		if sums != nil {
			sum = sums[i]
		}
		if err := d.scanChunk(ctx, c.off, sum); err != nil {
			return fmt.Errorf("scan disk %d at %d: %w", c.slot, c.off, err)
		}
	}
	return nil
}

func askHashes(ctx context.Context, batch []chunk, remote Hasher) ([][]byte, error) {
	if remote == nil {
		return nil, nil
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
// hash; nil means that it reads as zeros there.
func (d *Disk) scanChunk(ctx context.Context, off int64, sum []byte) error {
	n := min(Chunk, d.img.Size()-off)
	if err := d.g.reserveScan(ctx, n); err != nil {
		return err
	}
	l := d.locks.lock(off, n)
	defer d.locks.unlock(l)
	p := make([]byte, n)
	if _, err := d.img.ReadAt(p, off); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	zero := isZero(p)
	if sum == nil && zero {
		return nil
	}
	if here := sha256.Sum256(p); sum != nil && bytes.Equal(here[:], sum) {
		return nil
	}
	r := epoch.Record{Type: epoch.TypeWrite, Flags: epoch.FlagResync, Disk: d.slot, Offset: uint64(off), Length: uint64(n), Payload: p}
	if zero {
		r.Type, r.Payload = epoch.TypeTrim, nil
	}
	d.g.append(r)
	return nil
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
func (g *Group) FinishScan(ctx context.Context) (epoch.LSN, error) {
	g.mu.Lock()
	if g.err != nil {
		defer g.mu.Unlock()
		return 0, g.err
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
	if err := g.SyncImages(); err != nil {
		return 0, err
	}
	return lsn, g.waitSession(ctx, session, lsn)
}

// waitSession waits for the acknowledgement of lsn in a session; the end of
// the session or of ctx is an error.
func (g *Group) waitSession(ctx context.Context, session uint64, lsn epoch.LSN) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	defer g.wakeAtEnd(ctx)()
	for g.err == nil && ctx.Err() == nil && g.session == session && g.acked < lsn {
		g.cond.Wait()
	}
	switch {
	case g.err != nil:
		return g.err
	case g.session != session:
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
