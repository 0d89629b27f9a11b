package stage

import (
	"strings"
	"testing"
)

// TestScreen: bars are redrawn on a terminal, and are lines elsewhere.
func TestScreen(t *testing.T) {
	const text = "check one\r\n\rsync 10%\x1b[K\rsync 50%\x1b[K\rsync 100%\x1b[K\r\ndone\r\n"
	for redraws, want := range map[bool]string{
		false: "     check one\n     sync 10%\n     sync 100%\n     done\n",
		true:  "     check one\n\r     sync 10%\x1b[K\r     sync 50%\x1b[K\r     sync 100%\x1b[K\n     done\n",
	} {
		var out strings.Builder
		s := screen{out: &out, redraws: redraws}
		if err := s.copy(strings.NewReader(text)); err != nil {
			t.Fatal(err)
		}
		if out.String() != want {
			t.Errorf("redraws %v: %q, want %q", redraws, out.String(), want)
		}
		if bar := s.bar.String(); bar != "sync 10%\nsync 50%\nsync 100%\n" {
			t.Errorf("bar %q", bar)
		}
	}
}

// TestTerminal: a program's output comes out of it until the program ends.
func TestTerminal(t *testing.T) {
	master, slave, err := openTerminal(100)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if _, err := slave.WriteString("one\n"); err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	s := screen{out: &out}
	done := make(chan error)
	go func() { done <- s.copy(master) }()
	if err := slave.Close(); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err != nil || out.String() != "     one\n" {
		t.Errorf("%q, %v", out.String(), err)
	}
}
