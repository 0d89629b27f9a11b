package ext4j

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"sync"

	"kagami/ext4j/epoch"
)

// Difference is a chunk that the sites hold different contents of.
type Difference struct {
	Slot        uint32
	Off, Len    int64
	Here, There []byte // SHA-256
}

// VerifyOptions change what Verify does. The functions may be nil.
type VerifyOptions struct {
	Progress Progress
	Pace     func(ctx context.Context, bytes int64) error // waits before so many bytes are compared
	Differs  func(Difference) error                       // is told of each difference, before its repair
	Repair   bool                                         // ship what differs
	From     int64                                        // leaves out what Progress called done, bytes
}

// Verified is what Verify found, in chunks.
type Verified struct {
	Compared int64
	Differ   int64
	Repaired int64
	Again    int64 // comparisons that the guest's writes spoiled, and that were made again
}

// errUnequal is a replica that does not follow the stream, or not yet.
var errUnequal = errors.New("the replica does not follow yet, or a resync is under way")

// Verify compares the images of both sites chunk by chunk while the guest writes on. A
// chunk is read here, then everything written so far is waited for at the replica, then it
// is hashed there; it counts only if nothing was written to it since it was read, so that both
// sides are of one LSN: a difference is never a false alarm. A chunk that is always being
// written to is held still for one round trip at last.
func (g *Group) Verify(ctx context.Context, ranges []Range, remote Hasher, o VerifyOptions) (Verified, error) {
	// A chunk may be held still while the replica is asked, and clients that wait for it keep
	// the group from going apart: that must not wait for the replica in turn.
	ctx, stop := g.untilApart(ctx)
	defer stop()
	v := verifier{g: g, remote: remote, o: o}
	w := g.walkOver(ranges)
	total := w.bytes()
	done := w.skip(o.From)
	for batch := w.next(); len(batch) > 0; batch = w.next() {
		if err := v.batch(ctx, batch); err != nil {
			return v.found, fmt.Errorf("verify disk %d from %d on: %w", batch[0].slot, batch[0].off, err)
		}
		if done += int64(len(batch)) * Chunk; o.Progress != nil {
			o.Progress(done, total)
		}
	}
	if v.found.Repaired == 0 {
		return v.found, nil
	}
	g.closeEpoch(epoch.BySize)
	return v.found, g.AwaitAcked(ctx)
}

type verifier struct {
	g      *Group
	remote Hasher
	o      VerifyOptions
	found  Verified
}

// verifyTries is how often a chunk is compared before it is held still.
const verifyTries = 3

// batch compares chunks of one disk.
func (v *verifier) batch(ctx context.Context, batch []chunk) error {
	if v.o.Pace != nil {
		if err := v.o.Pace(ctx, int64(len(batch))*Chunk); err != nil {
			return err
		}
	}
	left := batch
	for range verifyTries {
		spoiled, err := v.tryOut(ctx, left)
		if err != nil {
			return err
		}
		if left = spoiled; len(left) == 0 {
			return nil
		}
		v.found.Again += int64(len(left))
	}
	for _, c := range left {
		if err := v.still(ctx, c); err != nil {
			return err
		}
	}
	return nil
}

// tryOut compares chunks and returns those that were written to meanwhile.
func (v *verifier) tryOut(ctx context.Context, batch []chunk) (spoiled []chunk, err error) {
	d := v.g.disks[batch[0].slot]
	watch := newWatch(batch)
	if !d.watch.CompareAndSwap(nil, watch) {
		return nil, errors.New("another comparison of the disk is under way")
	}
	defer d.watch.Store(nil)
	here := make([][]byte, len(batch))
	for i, c := range batch {
		if here[i], err = d.hashChunk(c.off); err != nil {
			return nil, err
		}
	}
	there, err := v.ask(ctx, batch)
	if err != nil {
		return nil, err
	}
	for i, c := range batch {
		if watch.touched(c.off) {
			spoiled = append(spoiled, c)
			continue
		}
		if err := v.judge(ctx, d, c, here[i], there[i]); err != nil {
			return nil, err
		}
	}
	return spoiled, nil
}

// still compares one chunk while nobody can write to it.
func (v *verifier) still(ctx context.Context, c chunk) error {
	d := v.g.disks[c.slot]
	here, there, err := func() (here, there []byte, err error) {
		l := d.locks.lock(c.off, Chunk)
		defer d.locks.unlock(l)
		if here, err = d.hashLocked(c.off); err != nil {
			return nil, nil, err
		}
		sums, err := v.ask(ctx, []chunk{c})
		if err != nil {
			return nil, nil, err
		}
		return here, sums[0], nil
	}()
	if err != nil {
		return err
	}
	return v.judge(ctx, d, c, here, there)
}

// ask waits until the replica has all that was written so far, and has it hash chunks.
func (v *verifier) ask(ctx context.Context, batch []chunk) ([][]byte, error) {
	v.g.closeEpoch(epoch.BySize)
	if v.g.unequal() {
		return nil, errUnequal
	}
	if err := v.g.AwaitAcked(ctx); err != nil {
		return nil, err
	}
	return askHashes(ctx, batch, v.remote)
}

// judge counts a comparison, and ships the chunk if it is to be repaired.
func (v *verifier) judge(ctx context.Context, d *Disk, c chunk, here, there []byte) error {
	v.found.Compared++
	if bytes.Equal(here, there) {
		return nil
	}
	v.found.Differ++
	if v.o.Differs != nil {
		diff := Difference{Slot: c.slot, Off: c.off, Len: min(Chunk, d.img.Size()-c.off), Here: here, There: there}
		if err := v.o.Differs(diff); err != nil {
			return err
		}
	}
	if !v.o.Repair {
		return nil
	}
	if err := d.repair(ctx, c.off); err != nil {
		return fmt.Errorf("repair: %w", err)
	}
	v.found.Repaired++
	return nil
}

// repair ships a chunk. It was read, and the image is durable since: nothing that a failed
// fdatasync has taken away is shipped over what the replica had kept.
func (d *Disk) repair(ctx context.Context, off int64) error {
	p := make([]byte, min(Chunk, d.img.Size()-off))
	if err := d.g.reserveScan(ctx, int64(len(p))); err != nil {
		return err
	}
	l := d.locks.lock(off, Chunk)
	defer d.locks.unlock(l)
	if _, err := d.img.ReadAt(p, off); err != nil {
		return fmt.Errorf("read: %w", err)
	}
	if err := <-d.sync.request(); err != nil {
		return err
	}
	d.append(epoch.Record{Type: epoch.TypeWrite, Flags: epoch.FlagResync, Disk: d.slot, Offset: uint64(off), Length: uint64(len(p)), Payload: p}, nil)
	return nil
}

// unequal tells whether the replica cannot be what the stream says: it does not follow
// yet, or a resync is under way.
func (g *Group) unequal() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.session == 0 || g.hold || g.acked < g.floor
}

func (d *Disk) hashChunk(off int64) ([]byte, error) {
	l := d.locks.lock(off, Chunk)
	defer d.locks.unlock(l)
	return d.hashLocked(off)
}

// hashLocked hashes a chunk whose range is locked.
func (d *Disk) hashLocked(off int64) ([]byte, error) {
	p := make([]byte, min(Chunk, d.img.Size()-off))
	if _, err := d.img.ReadAt(p, off); err != nil {
		return nil, fmt.Errorf("read: %w", err)
	}
	sum := sha256.Sum256(p)
	return sum[:], nil
}

// watch notes which chunks of a set are written to.
type watch struct {
	mu     sync.Mutex
	chunks map[int64]bool // offset → written to
}

func newWatch(batch []chunk) *watch {
	w := &watch{chunks: make(map[int64]bool, len(batch))}
	for _, c := range batch {
		w.chunks[c.off] = false
	}
	return w
}

// touch is called with the range of every record, while that range is locked.
func (w *watch) touch(off, n int64) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if n > int64(len(w.chunks))*Chunk { // a large zero or trim
		for c := range w.chunks {
			w.chunks[c] = w.chunks[c] || c < off+n && off < c+Chunk
		}
		return
	}
	for c := off - off%Chunk; c < off+n; c += Chunk {
		if _, ok := w.chunks[c]; ok {
			w.chunks[c] = true
		}
	}
}

func (w *watch) touched(off int64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.chunks[off]
}
