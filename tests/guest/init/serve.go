package main

import (
	"fmt"
	"io"
	"os"
	"runtime/debug"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const controlPort = "/dev/virtio-ports/org.kagami.control"

// port is a serial device used with blocking system calls: the runtime's poller
// and a virtio port without a listener do not go well together.
type port struct {
	fd int
	mu sync.Mutex // orders whole writes
}

func openPort(path string) (*port, error) {
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_NOCTTY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	// Not a terminal (a virtio port): nothing to set.
	if t, err := unix.IoctlGetTermios(fd, unix.TCGETS); err == nil {
		t.Iflag, t.Oflag, t.Lflag = 0, 0, 0
		t.Cc[unix.VMIN], t.Cc[unix.VTIME] = 1, 0
		if err := unix.IoctlSetTermios(fd, unix.TCSETS, t); err != nil {
			return nil, fmt.Errorf("set up %s: %w", path, err)
		}
	}
	return &port{fd: fd}, nil
}

// Write writes all of b in one piece.
func (p *port) Write(b []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for done := 0; done < len(b); {
		n, err := unix.Write(p.fd, b[done:])
		if err == unix.EINTR || err == unix.EAGAIN {
			continue
		} else if err != nil {
			return done, err
		}
		done += n
	}
	return len(b), nil
}

// Read waits while nobody listens at the host's end.
func (p *port) Read(b []byte) (int, error) {
	for {
		n, err := unix.Read(p.fd, b)
		if n > 0 {
			return n, nil
		}
		if err != nil && err != unix.EINTR && err != unix.EAGAIN {
			return 0, err
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// ackPort is ttyS1 if there is such a device, else the console.
func ackPort() io.Writer {
	if p, err := openPort("/dev/ttyS1"); err == nil {
		return p
	}
	return os.Stderr
}

// serve answers commands for ever.
func serve() {
	path := controlPort
	if !exists(path) {
		path = "/dev/ttyS0"
	}
	p, err := openPort(path)
	for err != nil {
		say("%v", err)
		time.Sleep(time.Second)
		p, err = openPort(path)
	}
	g := &guest{acks: ackPort()}
	say("READY after %s s, commands on %s", uptime(), path)
	readLines(p, func(l string) { g.command(p, l) })
}

const maxLine = 1 << 16

// readLines calls f for each line; what is longer than 64 KiB is dropped.
func readLines(r io.Reader, f func(string)) {
	var line []byte
	buf := make([]byte, 4096)
	for {
		n, err := r.Read(buf)
		for _, c := range buf[:n] {
			if c != '\n' && len(line) < maxLine {
				line = append(line, c)
			} else if c == '\n' {
				f(strings.TrimSpace(string(line)))
				line = line[:0]
			}
		}
		if err != nil {
			say("control port: %v", err)
			time.Sleep(time.Second)
		}
	}
}

// command runs one line of the protocol in a goroutine of its own.
func (g *guest) command(p io.Writer, line string) {
	w := strings.Fields(line)
	if len(w) < 3 || w[0] != "CMD" {
		return
	}
	go func() {
		out := func(l string) { fmt.Fprintf(p, "OUT %s %s\n", w[1], strings.TrimRight(l, "\r\n")) }
		rc := 0
		if err := g.safely(w[2:], out); err != nil {
			out(strings.ReplaceAll(err.Error(), "\n", "; "))
			rc = 1
		}
		fmt.Fprintf(p, "RC %s %d\n", w[1], rc)
	}()
}

// safely keeps a mistake in a command from taking the guest down.
func (g *guest) safely(args []string, out func(string)) (err error) {
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("panic in %v: %v %s", args, r, debug.Stack())
		}
	}()
	return g.run(args, out)
}

func uptime() string {
	b, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return "?"
	}
	s, _, _ := strings.Cut(string(b), " ")
	return s
}
