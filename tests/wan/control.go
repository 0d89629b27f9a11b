package wan

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"sync"
	"time"
)

// The control protocol: one line in, one line out, over a unix socket. The
// answer is "ok", "error: …" or, to stats, a JSON object.
//
//	cut [a|b]        drop everything (that leaves side a or b)
//	restore [a|b]
//	delay 10ms       one way
//	jitter 1ms
//	rate 1gbit       or unlimited
//	queue 262144     bytes; 0: the default
//	loss 0.01
//	stats
const (
	maxLine  = 256
	maxConns = 8
)

// Serve answers control connections until ctx ends, then closes ln and every
// connection and returns.
func (l *Link) Serve(ctx context.Context, ln net.Listener) error {
	var wg sync.WaitGroup
	defer wg.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	context.AfterFunc(ctx, func() { ln.Close() })
	free := make(chan struct{}, maxConns)
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return fmt.Errorf("accept on the control socket: %w", err)
		}
		select {
		case free <- struct{}{}:
			wg.Go(func() { l.serveConn(ctx, c); <-free })
		default:
			c.Close()
		}
	}
}

func (l *Link) serveConn(ctx context.Context, c net.Conn) {
	defer c.Close()
	defer context.AfterFunc(ctx, func() { c.Close() })()
	sc := bufio.NewScanner(c)
	sc.Buffer(make([]byte, maxLine), maxLine)
	for sc.Scan() {
		answer, err := l.Control(sc.Text())
		if err != nil {
			answer = "error: " + err.Error()
		}
		if _, err := fmt.Fprintln(c, answer); err != nil {
			return
		}
	}
}

// Control carries out one line of the control protocol and returns the answer.
func (l *Link) Control(line string) (string, error) {
	f := strings.Fields(line)
	if len(f) == 0 || len(f) > 2 {
		return "", errors.New("want one of: cut, restore, delay, jitter, rate, queue, loss, stats")
	}
	if f[0] == "stats" {
		return l.statsLine()
	}
	if f[0] == "cut" || f[0] == "restore" {
		return "ok", l.controlCut(f[0] == "cut", f[1:])
	}
	if len(f) != 2 {
		return "", fmt.Errorf("%s: a value is missing, or the command is not known", f[0])
	}
	set, err := parseSetting(f[0], f[1])
	if err != nil {
		return "", err
	}
	return "ok", l.Change(set)
}

func (l *Link) controlCut(cut bool, sides []string) error {
	for _, s := range []Side{A, B} {
		if len(sides) == 1 && sides[0] != A.String() && sides[0] != B.String() {
			return fmt.Errorf("%q is not a side, want a or b", sides[0])
		}
		if len(sides) == 0 || sides[0] == s.String() {
			l.dir[s].setCut(cut)
		}
	}
	return nil
}

func parseSetting(name, value string) (func(*Params), error) {
	switch name {
	case "delay", "jitter":
		d, err := time.ParseDuration(value)
		if err != nil {
			return nil, fmt.Errorf("%s: %q is not a duration such as 10ms", name, value)
		}
		if name == "delay" {
			return func(p *Params) { p.Delay = d }, nil
		}
		return func(p *Params) { p.Jitter = d }, nil
	case "rate":
		r, err := ParseRate(value)
		return func(p *Params) { p.Rate = r }, err
	case "queue":
		n, err := strconv.ParseInt(value, 10, 64)
		if err != nil {
			return nil, fmt.Errorf("queue: %q is not a number of bytes", value)
		}
		return func(p *Params) { p.Queue = n }, nil
	case "loss":
		v, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return nil, fmt.Errorf("loss: %q is not a probability", value)
		}
		return func(p *Params) { p.Loss = v }, nil
	}
	return nil, fmt.Errorf("%q is not a command", name)
}

func (l *Link) statsLine() (string, error) {
	b, err := json.Marshal(map[string]Stats{"a": l.Stats(A), "b": l.Stats(B)})
	return string(b), err
}

// ListenControl makes the unix socket for Serve, replacing one that a dead
// process left behind.
func ListenControl(path string) (net.Listener, error) {
	if c, err := net.Dial("unix", path); err == nil {
		c.Close()
		return nil, fmt.Errorf("control socket %s: somebody answers on it", path)
	} else if !errors.Is(err, os.ErrNotExist) {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("remove the stale control socket: %w", err)
		}
	}
	ln, err := net.Listen("unix", path)
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return ln, nil
}
