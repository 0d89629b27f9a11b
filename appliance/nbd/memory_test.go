package nbd

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"testing"
	"testing/iotest"
)

func TestPieceLen(t *testing.T) {
	for _, c := range []struct{ off, n, want int64 }{
		{0, 0, 0}, {5, 1, 1}, {0, maxPiece, maxPiece}, {4095, maxPiece, maxPiece},
		{0, maxPiece + 1, maxPiece}, {1, maxPiece + 1, maxPiece - 1}, {4095, 1 << 30, maxPiece - 4095}, {1 << 40, 1 << 30, maxPiece},
	} {
		if got := pieceLen(c.off, c.n); got != c.want {
			t.Errorf("pieceLen(%d, %d) = %d, want %d", c.off, c.n, got, c.want)
		}
	}
}

func TestGetBuffer(t *testing.T) {
	for _, n := range []int{0, 1, 4096, 4097, 64 << 10, maxPiece, maxPiece + 1, MaxPayload} {
		b := getBuffer(n)
		if len(b.b) != 0 || cap(b.b) < n+maxHead || cap(b.b) > 4*n+2*4096 {
			t.Errorf("buffer for %d: length %d, capacity %d", n, len(b.b), cap(b.b))
		}
		if (b.pool == nil) != (n > maxPiece) {
			t.Errorf("buffer for %d: pooled %v", n, b.pool != nil)
		}
		b.b = append(b.b, 1)
		b.release()
		if len(getBuffer(n).b) != 0 {
			t.Error("buffer not empty")
		}
	}
}

// TestBudgetParts: a part is bounded by itself and by the whole, at any depth;
// what was taken of one and not of the other comes back.
func TestBudgetParts(t *testing.T) {
	floor := int64(MaxPayload + maxHead + requestCost)
	whole := NewBudget(2 * floor)
	a, b := whole.Part(floor).Part(2*floor), whole.Part(2*floor)
	if !a.try(floor) || a.try(1) {
		t.Fatal("the part does not bind")
	}
	if !b.try(floor) || b.try(1) {
		t.Fatal("the whole does not bind")
	}
	a.give(floor)
	if !b.try(1) { // and its own part was given back by the try that failed
		t.Fatal("nothing came back")
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	if err := a.wait(ctx, floor); !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	b.give(floor + 1)
	if err := a.wait(context.Background(), floor); err != nil || !b.try(floor) {
		t.Fatal(err)
	}
	a.give(0)
}

func TestInput(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	data := make([]byte, 3<<20)
	for i := range data {
		data[i] = byte(rnd.Uint32())
	}
	for _, src := range []io.Reader{bytes.NewReader(data), iotest.HalfReader(bytes.NewReader(data)), iotest.DataErrReader(bytes.NewReader(data))} {
		in := newInput(src)
		in.large = true
		idle := 0
		in.idle = func() error { idle++; return nil }
		for at := 0; at < len(data); {
			n := min(1+rnd.IntN(1<<rnd.IntN(19)), maxPiece, len(data)-at)
			p, err := in.peek(n)
			if err != nil || !bytes.Equal(p, data[at:at+n]) {
				t.Fatalf("%d bytes at %d: %v", n, at, err)
			}
			if rnd.IntN(3) == 0 {
				must(t, in.skip(int64(n)))
			} else {
				in.consume(n)
			}
			at += n
		}
		if _, err := in.peek(1); err != io.EOF {
			t.Fatal(err)
		}
		if idle == 0 {
			t.Fatal("idle was not called before reading")
		}
	}
}

func TestInputErrors(t *testing.T) {
	in := newInput(bytes.NewReader([]byte("abc")))
	if _, err := in.peek(4); err != io.ErrUnexpectedEOF {
		t.Error(err)
	}
	if err := newInput(bytes.NewReader(nil)).skip(1 << 40); err != io.EOF {
		t.Error(err)
	}
	if _, err := newInput(noProgress{}).peek(1); err != io.ErrNoProgress {
		t.Error(err)
	}
	boom := errors.New("boom")
	in = newInput(bytes.NewReader([]byte("abc")))
	in.idle = func() error { return boom }
	if _, err := in.peek(1); err != boom {
		t.Error(err)
	}
	// In the handshake it never grows.
	in = newInput(bytes.NewReader(make([]byte, 1<<20)))
	must(t, in.skip(1<<20))
	if len(in.buf) != smallInput {
		t.Error(len(in.buf))
	}
}

type noProgress struct{}

func (noProgress) Read([]byte) (int, error) { return 0, nil }
