package nbd

import (
	"context"
	"sync"

	"golang.org/x/sync/semaphore"
)

const (
	// maxPiece is the most that is handed to the device in one call, bytes.
	// Longer requests are cut at multiples of pieceAlign.
	maxPiece   = 256 << 10
	pieceAlign = 4096
	// maxHead is room for what leads the data of a reply.
	maxHead = 64
	// requestCost is charged for each request that runs beside the reader:
	// goroutine, headers, bookkeeping.
	requestCost = 8 << 10
)

// pieceLen is the length of the first piece of n bytes at off.
func pieceLen(off, n int64) int64 {
	if n <= maxPiece {
		return n
	}
	return maxPiece - off%pieceAlign
}

// buffer holds a payload, or a batch of replies, of up to cap(b) bytes.
type buffer struct {
	b    []byte
	pool *sync.Pool // nil: not pooled
}

// pools hold buffers of 4, 16, 64 and 256 KiB.
var pools [4]sync.Pool

func poolSize(i int) int { return maxHead + maxPiece>>(2*(3-i)) }

// getBuffer returns an empty buffer with room for n bytes behind maxHead
// bytes. Up to maxPiece it comes from a pool.
func getBuffer(n int) *buffer {
	for i := range pools {
		if n+maxHead > poolSize(i) {
			continue
		}
		if b, ok := pools[i].Get().(*buffer); ok {
			return b
		}
		return &buffer{make([]byte, 0, poolSize(i)), &pools[i]}
	}
	return &buffer{b: make([]byte, 0, n+maxHead)}
}

func (b *buffer) release() {
	if b != nil && b.pool != nil {
		b.b = b.b[:0]
		b.pool.Put(b)
	}
}

// Budget bounds the memory of the requests of several servers, bytes. One that
// is part of another is charged there too.
type Budget struct {
	sem   *semaphore.Weighted
	whole *Budget // nil: it is no part
}

// NewBudget makes a budget. It holds at least the largest request.
func NewBudget(bytes int64) *Budget {
	return &Budget{sem: semaphore.NewWeighted(max(bytes, MaxPayload+maxHead+requestCost))}
}

// Part makes a budget of at most so many bytes of b, and at least the largest
// request: what the servers of one domain of trust have in common.
func (b *Budget) Part(bytes int64) *Budget {
	p := NewBudget(bytes)
	p.whole = b
	return p
}

func (b *Budget) try(n int64) bool {
	if !b.sem.TryAcquire(n) {
		return false
	}
	if b.whole != nil && !b.whole.try(n) {
		b.sem.Release(n)
		return false
	}
	return true
}

// wait waits for its turn; others go on with their reserves meanwhile.
func (b *Budget) wait(ctx context.Context, n int64) error {
	if err := b.sem.Acquire(ctx, n); err != nil {
		return err
	}
	if b.whole == nil {
		return nil
	}
	err := b.whole.wait(ctx, n)
	if err != nil {
		b.sem.Release(n)
	}
	return err
}

func (b *Budget) give(n int64) {
	for ; n > 0 && b != nil; b = b.whole {
		b.sem.Release(n)
	}
}
