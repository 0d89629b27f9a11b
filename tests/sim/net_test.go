package sim

import (
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

func pair(t *testing.T, n *Net) (net.Conn, net.Conn) {
	t.Helper()
	l := n.Listen()
	a, err := n.Dial(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	return a, b
}

// TestNetCarries: bytes arrive in order and whole, late, through a small window.
func TestNetCarries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1, 10*time.Millisecond, 5*time.Millisecond, 1000)
		a, b := pair(t, n)
		rng := rand.New(rand.NewPCG(1, 1))
		sent := make([]byte, 50_000)
		for i := range sent {
			sent[i] = byte(rng.Uint32())
		}
		var wg sync.WaitGroup
		wg.Go(func() {
			for rest := sent; len(rest) > 0; {
				k := min(1+rng.IntN(3000), len(rest))
				if _, err := a.Write(rest[:k]); err != nil {
					t.Error(err)
				}
				rest = rest[k:]
			}
			_ = a.Close()
		})
		began := time.Now()
		got, err := io.ReadAll(b)
		wg.Wait()
		if err != nil || !bytes.Equal(got, sent) {
			t.Errorf("%d of %d bytes arrived: %v", len(got), len(sent), err)
		}
		if d := time.Since(began); d < 500*time.Millisecond {
			t.Errorf("50 windows of 10 ms took %v", d)
		}
		if _, err := b.Write([]byte("x")); !errors.Is(err, syscall.EPIPE) {
			t.Errorf("write to a closed end: %v", err)
		}
		_ = b.Close()
		if n.Conns() != 0 {
			t.Errorf("%d connections are open", n.Conns())
		}
	})
}

func TestNetCutsAndKills(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1, time.Millisecond, 0, 1<<20)
		a, b := pair(t, n)
		n.Cut(true)
		if _, err := a.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		if err := b.SetReadDeadline(time.Now().Add(time.Second)); err != nil {
			t.Fatal(err)
		}
		buf := make([]byte, 10)
		if _, err := b.Read(buf); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("read through a cut: %v", err)
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Second)
		if _, err := n.Dial(ctx); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("dial through a cut: %v", err)
		}
		cancel()
		n.Cut(false)
		_ = b.SetReadDeadline(time.Time{})
		if k, err := b.Read(buf); err != nil || string(buf[:k]) != "hello" {
			t.Errorf("after the cut: %q, %v", buf[:k], err)
		}
		if !n.Kill() || n.Kill() {
			t.Error("there was one connection to kill")
		}
		for i, f := range []func() (int, error){func() (int, error) { return a.Read(buf) }, func() (int, error) { return b.Write(buf) }} {
			if _, err := f(); !errors.Is(err, syscall.ECONNRESET) {
				t.Errorf("end %d of a killed connection: %v", i, err)
			}
		}
	})
}
