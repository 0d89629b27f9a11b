package control

import (
	"bufio"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"
)

func TestDaemonDies(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(socket, "")
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		_, _ = http.ReadRequest(bufio.NewReader(c))
		_, _ = io.WriteString(c, "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n10\r\n{\"step\":\"check\"}\r\n1\r\n\n\r\n")
		_ = c.Close()
		_ = l.Close()
	}()
	var seen []Event
	_, err = NewClient(socket).Failover(t.Context(), FailoverRequest{VM: "a"}, func(e Event) { seen = append(seen, e) })
	var e *Error
	if !errors.As(err, &e) || e.Code != "broken-off" || !strings.HasPrefix(e.Message, "the daemon went away while failover was running") || len(seen) != 1 {
		t.Errorf("%v, %v", err, seen)
	}
}

func TestAnswersThatMakeNoSense(t *testing.T) {
	for name, answer := range map[string]string{
		"no JSON":        "HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabc",
		"error is empty": "HTTP/1.1 500 X\r\nContent-Length: 2\r\n\r\n{}",
		"error is HTML":  "HTTP/1.1 500 X\r\nContent-Length: 6\r\n\r\n<html>",
	} {
		socket := filepath.Join(t.TempDir(), "c.sock")
		l, err := Listen(socket, "")
		if err != nil {
			t.Fatal(err)
		}
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				_, _ = http.ReadRequest(bufio.NewReader(c))
				_, _ = io.WriteString(c, answer)
				_ = c.Close()
			}
		}()
		var e *Error
		if _, err := NewClient(socket).Status(t.Context()); !errors.As(err, &e) || e.Code != "not-understood" {
			t.Errorf("%s: %v", name, err)
		}
		if err := NewClient(socket).Protect(t.Context(), ProtectRequest{VM: "a", To: "b"}, func(Event) {}); !errors.As(err, &e) || e.Code != "not-understood" {
			t.Errorf("%s, stream: %v", name, err)
		}
		_ = l.Close()
	}
}

func TestListen(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "c.sock")
	l, err := Listen(path, "root")
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", st.Mode(), err)
	}
	if _, err := Listen(path, ""); err == nil || !strings.Contains(err.Error(), "another daemon answers") {
		t.Errorf("taken: %v", err)
	}
	// A daemon that was killed leaves its socket behind.
	l.(*limited).Listener.(*net.UnixListener).SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatal(err)
	}
	l, err = Listen(path, "")
	if err != nil {
		t.Fatalf("over a dead socket: %v", err)
	}
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("left behind: %v", err)
	}
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(path, ""); err == nil || !strings.Contains(err.Error(), "is no socket") {
		t.Errorf("over a file: %v", err)
	}
	if _, err := Listen(filepath.Join(dir, "x"), "no-such-group"); err == nil {
		t.Error("unknown group")
	}
	if _, err := Listen(filepath.Join(dir, "no", "such"), ""); err == nil {
		t.Error("missing folder")
	}
}

func TestManyConnections(t *testing.T) {
	b := &fake{status: func(context.Context) (Status, error) { return Status{Site: "a"}, nil }}
	socket, c, _ := serve(t, b, ServerOptions{})
	var idle []net.Conn
	for range maxConns + 20 {
		conn, err := net.Dial("unix", socket)
		if err != nil {
			t.Fatal(err)
		}
		idle = append(idle, conn)
	}
	for _, conn := range idle {
		_ = conn.Close()
	}
	if _, err := c.Status(t.Context()); err != nil {
		t.Errorf("after idle connections: %v", err)
	}
}

func TestUnreachable(t *testing.T) {
	var e *Error
	if _, err := NewClient("/nonexistent/c.sock").Status(t.Context()); !errors.As(err, &e) || e.Exit != ExitUnreachable || !strings.Contains(e.Message, "no daemon answers on /nonexistent/c.sock") || e.Hint == "" {
		t.Errorf("%v", err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := NewClient("/nonexistent/c.sock").Status(ctx); !errors.As(err, &e) {
		t.Errorf("%v", err)
	}
}

func TestAskingIsBounded(t *testing.T) {
	// A handler must end with its client, or Close would wait for it.
	var asked atomic.Bool
	b := &fake{status: func(ctx context.Context) (Status, error) { asked.Store(true); <-ctx.Done(); return Status{}, ctx.Err() }}
	_, c, _ := serve(t, b, ServerOptions{})
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	var e *Error
	if _, err := c.Status(ctx); !errors.As(err, &e) || e.Exit != ExitUnreachable || !asked.Load() {
		t.Errorf("%v", err)
	}
}
