package qmp

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// gate counts the calls to libvirt under way on one connection.
type gate struct {
	mu     sync.Mutex
	closed bool
	wg     sync.WaitGroup
}

func (g *gate) enter() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.closed {
		return ErrClosed
	}
	g.wg.Add(1)
	return nil
}

// close lets no further call begin and waits up to limit for those under way.
func (g *gate) close(limit time.Duration) error {
	g.mu.Lock()
	g.closed = true
	g.mu.Unlock()
	done := make(chan struct{})
	go func() {
		g.wg.Wait()
		close(done)
	}()
	select {
	case <-done:
		return nil
	case <-time.After(limit):
		return errors.New("libvirt does not answer a call that is under way")
	}
}

// calls are the calls of one piece of work. libvirt's C functions know no
// contexts: when a caller gives up, the call goes on in its goroutine and ends by itself.
type calls struct {
	gate *gate
	wg   sync.WaitGroup
}

// await runs f and returns its result, or ctx's error if that comes first.
func await[T any](ctx context.Context, c *calls, what string, f func() (T, error)) (T, error) {
	var zero T
	err := ctx.Err()
	if err == nil {
		err = c.gate.enter()
	}
	if err != nil {
		return zero, fmt.Errorf("%s: %w", what, err)
	}
	type result struct {
		v   T
		err error
	}
	done := make(chan result, 1)
	c.wg.Add(1)
	go func() {
		defer c.gate.wg.Done()
		defer c.wg.Done()
		v, err := f()
		done <- result{v, err}
	}()
	select {
	case r := <-done:
		if r.err != nil {
			return zero, fmt.Errorf("%s: %w", what, r.err)
		}
		return r.v, nil
	case <-ctx.Done():
		return zero, fmt.Errorf("%s: %w", what, ctx.Err())
	}
}

// awaitErr is await for calls without a result.
func awaitErr(ctx context.Context, c *calls, what string, f func() error) error {
	_, err := await(ctx, c, what, func() (struct{}, error) { return struct{}{}, f() })
	return err
}

// finish runs f, which frees what the calls used, when all calls of c have
// ended. No call may begin after it. The caller has entered the gate.
func (c *calls) finish(f func()) {
	c.gate.wg.Add(1)
	go func() {
		defer c.gate.wg.Done()
		c.wg.Wait()
		f()
	}()
}

// locks are named locks. See the package comment for their names and order.
type locks struct {
	mu   sync.Mutex
	held map[string]chan struct{}
}

// lock waits for its turn; the caller calls unlock when done.
func (l *locks) lock(ctx context.Context, name string) (unlock func(), err error) {
	l.mu.Lock()
	if l.held == nil {
		l.held = map[string]chan struct{}{}
	}
	c := l.held[name]
	if c == nil {
		c = make(chan struct{}, 1)
		l.held[name] = c
	}
	l.mu.Unlock()
	select {
	case c <- struct{}{}:
		return func() { <-c }, nil
	case <-ctx.Done():
		return nil, fmt.Errorf("wait for other work on %s: %w", name, ctx.Err())
	}
}
