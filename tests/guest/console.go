package guest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"time"

	"kagami/tests/guest/workload"
)

// Console runs commands in a guest over its control socket. Commands of
// several goroutines run side by side. When QEMU goes away all of them fail; a
// guest started again needs a new Console.
type Console struct {
	conn net.Conn
	done chan struct{} // closed when the reader ended

	mu      sync.Mutex
	next    int
	waiting map[string]*call
	err     error // why the reader ended
}

type call struct {
	lines []string
	end   chan error
}

// ErrCommand wraps what a command in the guest answered with an error.
var ErrCommand = errors.New("command failed in the guest")

// Dial connects to the control socket at path and waits until the guest
// answers, for as long as ctx allows.
func Dial(ctx context.Context, path string) (*Console, error) {
	var last error
	for {
		c, err := dialOnce(ctx, path)
		if err == nil {
			return c, nil
		}
		if last == nil || ctx.Err() == nil {
			last = err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("guest at %s does not answer: %w (last: %w)", path, ctx.Err(), last)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

func dialOnce(ctx context.Context, path string) (*Console, error) {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	c := &Console{conn: conn, done: make(chan struct{}), waiting: map[string]*call{}, next: int(time.Now().UnixNano() % 1e9)}
	go c.read()
	// The newline ends what an earlier client may have left half-sent. A
	// guest that is still booting loses the first pings, so it is asked again.
	for ctx.Err() == nil {
		one, cancel := context.WithTimeout(ctx, time.Second)
		_, err = c.Run(one, "ping")
		cancel()
		if err == nil {
			return c, nil
		}
		select {
		case <-c.done:
			c.Close()
			return nil, err
		case <-time.After(50 * time.Millisecond):
		}
	}
	c.Close()
	return nil, err
}

// Close ends the connection; the guest goes on.
func (c *Console) Close() {
	c.conn.Close()
	<-c.done
}

func (c *Console) read() {
	defer close(c.done)
	s := bufio.NewScanner(c.conn)
	s.Buffer(nil, 1<<20)
	for s.Scan() {
		c.line(strings.TrimRight(s.Text(), "\r"))
	}
	err := s.Err()
	if err == nil {
		err = errors.New("the guest's control socket was closed")
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.err = err
	for _, w := range c.waiting {
		w.end <- err
	}
	c.waiting = nil
}

// line handles OUT and RC; answers to commands nobody waits for are dropped.
func (c *Console) line(l string) {
	kind, rest, _ := strings.Cut(l, " ")
	id, text, _ := strings.Cut(rest, " ")
	c.mu.Lock()
	defer c.mu.Unlock()
	w := c.waiting[id]
	switch {
	case w == nil:
	case kind == "OUT":
		w.lines = append(w.lines, text)
	case kind == "RC":
		delete(c.waiting, id)
		w.end <- result(text, w.lines)
	}
}

func result(rc string, lines []string) error {
	if rc == "0" {
		return nil
	}
	if len(lines) == 0 {
		return ErrCommand
	}
	return fmt.Errorf("%w: %s", ErrCommand, lines[len(lines)-1])
}

// Run runs one command (see tests/guest/init) and returns its output lines.
func (c *Console) Run(ctx context.Context, format string, a ...any) (string, error) {
	cmd := fmt.Sprintf(format, a...)
	w := &call{end: make(chan error, 1)}
	c.mu.Lock()
	if c.err != nil {
		defer c.mu.Unlock()
		return "", fmt.Errorf("run %q in the guest: %w", cmd, c.err)
	}
	c.next++
	id := strconv.Itoa(c.next)
	c.waiting[id] = w
	_, err := fmt.Fprintf(c.conn, "\nCMD %s %s\n", id, cmd)
	c.mu.Unlock()
	if err == nil {
		select {
		case err = <-w.end:
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, id)
	if err != nil {
		return strings.Join(w.lines, "\n"), fmt.Errorf("run %q in the guest: %w", cmd, err)
	}
	return strings.Join(w.lines, "\n"), nil
}

// Check runs the checker on a folder in the guest. Damage is in the report, not an error.
func (c *Console) Check(ctx context.Context, dir string) (workload.Report, error) {
	out, err := c.Run(ctx, "check %s", dir)
	if err != nil && !(errors.Is(err, ErrCommand) && strings.HasPrefix(out, "FOUND ")) {
		return workload.Report{}, err
	}
	lines := strings.Split(out, "\n")
	if err != nil {
		lines = lines[:len(lines)-1] // the error itself
	}
	return workload.ParseReport(strings.Join(lines, "\n"))
}
