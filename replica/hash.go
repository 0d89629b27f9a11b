package replica

import (
	"context"
	"crypto/sha256"
	"fmt"

	"kagami/replica/wire"
)

// hashChunks bounds the chunk size of a HashRequest, bytes.
const (
	minHashChunk = 4 << 10
	maxHashChunk = 1 << 20
)

// Hash returns SHA-256 of chunks of a disk as of a moment in the session:
// everything durable is applied first, so that image and spool are one. The
// chunks may be read while later epochs are applied; for what the hashes are
// used for (ext4j.Group.Scan) that is as good.
func (g *Group) Hash(ctx context.Context, slot uint32, size int64, offsets []int64) ([][]byte, error) {
	img, ok := g.o.Images[slot]
	if !ok {
		return nil, wire.Errorf(wire.CodeNotFound, "the group has no disk %d", slot)
	}
	if size < minHashChunk || size > maxHashChunk || len(offsets) > wire.MaxHashes {
		return nil, wire.Errorf(wire.CodeFailed, "hash of %d chunks of %d bytes is out of bounds", len(offsets), size)
	}
	if err := g.applyNow(); err != nil {
		return nil, fmt.Errorf("apply the spool before hashing: %w", err)
	}
	buf := make([]byte, size)
	sums := make([][]byte, 0, len(offsets))
	for _, off := range offsets {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		if off < 0 || off >= img.Size() {
			return nil, wire.Errorf(wire.CodeFailed, "hash at %d: the disk has %d bytes", off, img.Size())
		}
		p := buf[:min(size, img.Size()-off)]
		if _, err := img.ReadAt(p, off); err != nil {
			return nil, fmt.Errorf("read %d bytes at %d of disk %d: %w", len(p), off, slot, err)
		}
		sum := sha256.Sum256(p)
		sums = append(sums, sum[:])
	}
	return sums, nil
}
