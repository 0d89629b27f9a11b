package main

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestRunAnswersAndCleansUp plays the command's whole life.
func TestRunAnswersAndCleansUp(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("root is missing")
		}
		t.Skip("root is missing")
	}
	name := fmt.Sprintf("kagami-wan-cmd-%d", os.Getpid())
	socket := filepath.Join(t.TempDir(), "wan.sock")
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	r, w := io.Pipe()
	done := make(chan error, 1)
	go func() {
		err := run(ctx, []string{"-a", name + "a", "-b", name + "b", "-control", socket, "-delay", "5ms"}, w)
		w.CloseWithError(io.EOF)
		done <- err
	}()
	line, err := bufio.NewReader(r).ReadString('\n')
	if err != nil || !strings.HasPrefix(line, "ready: "+name+"a 10.98.0.1") {
		t.Fatalf("printed %q (%v); ended with %v", line, err, <-done)
	}
	var out bytes.Buffer
	if err := run(ctx, []string{"-control", socket, "-send", "cut"}, &out); err != nil || out.String() != "ok\n" {
		t.Errorf("cut: %q, %v", out.String(), err)
	}
	if err := run(ctx, []string{"-control", socket, "-send", "fly"}, &out); err == nil {
		t.Error("an unknown command was taken")
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
	for _, left := range []string{socket, "/run/netns/" + name + "a", "/run/netns/" + name + "b"} {
		if _, err := os.Lstat(left); !os.IsNotExist(err) {
			t.Errorf("%s is still there (%v)", left, err)
		}
	}
}

func TestRunRefusesBadFlags(t *testing.T) {
	for _, args := range [][]string{{"-rate", "fast"}, {"-addr-a", "10.1.1.1"}, {"extra"}, {"-a", "x", "-b", "x"}, {"-loss", "2"}} {
		full := append([]string{"-control", filepath.Join(t.TempDir(), "s")}, args...)
		if err := run(t.Context(), full, io.Discard); err == nil {
			t.Errorf("%q was accepted", args)
		}
	}
}
