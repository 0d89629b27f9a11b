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

// Budget bounds the memory of the requests of several servers, bytes.
type Budget struct {
	sem *semaphore.Weighted
}

// NewBudget makes a budget. It holds at least the largest request.
func NewBudget(bytes int64) *Budget {
	return &Budget{semaphore.NewWeighted(max(bytes, MaxPayload+maxHead+requestCost))}
}

// account is one server's share of a budget.
type account struct {
	share  *Budget
	budget *Budget
}

func (a account) try(n int64) bool {
	if !a.share.sem.TryAcquire(n) {
		return false
	}
	if !a.budget.sem.TryAcquire(n) {
		a.share.sem.Release(n)
		return false
	}
	return true
}

// wait waits for its turn; others go on with their reserves meanwhile.
func (a account) wait(ctx context.Context, n int64) error {
	if err := a.share.sem.Acquire(ctx, n); err != nil {
		return err
	}
	if err := a.budget.sem.Acquire(ctx, n); err != nil {
		a.share.sem.Release(n)
		return err
	}
	return nil
}

func (a account) give(n int64) {
	if n > 0 {
		a.share.sem.Release(n)
		a.budget.sem.Release(n)
	}
}
