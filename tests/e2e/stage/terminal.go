package stage

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
	"golang.org/x/term"
)

// show runs a command and passes its output on, line by line.
func (t *story) show(site *Site, args ...string) error {
	r, w := io.Pipe()
	_, err := t.pass(site, r, w, args)
	return err
}

// showBar runs a command on a terminal of its own, where it draws progress
// bars, and returns all that it redrew. On a terminal the story redraws too,
// elsewhere it prints each state of a bar as a line.
func (t *story) showBar(site *Site, args ...string) (string, error) {
	r, w, err := openTerminal(100)
	if err != nil {
		return "", err
	}
	bar, err := t.pass(site, r, w, args)
	return bar, errors.Join(err, r.Close())
}

// pass runs a command with its output to w, which it closes, and passes on
// what comes out of r.
func (t *story) pass(site *Site, r io.Reader, w io.WriteCloser, args []string) (string, error) {
	t.say("   $ kagami %s", strings.Join(args, " "))
	cmd := site.Command(t.ctx, args...)
	cmd.Stdout, cmd.Stderr = w, w
	s := screen{out: t.o.Out}
	if f, ok := t.o.Out.(*os.File); ok {
		s.redraws = term.IsTerminal(int(f.Fd()))
	}
	done := make(chan error)
	go func() { done <- s.copy(r) }()
	err := cmd.Run()
	err = errors.Join(err, w.Close(), <-done)
	if err != nil {
		return "", fmt.Errorf("kagami %v at site %s: %w", args, site.Name, err)
	}
	return s.bar.String(), nil
}

// screen passes lines on, and lines that are drawn again and again: a carriage
// return, a text, and the escape sequence that erases the rest of the line.
type screen struct {
	out     io.Writer
	redraws bool // out is a terminal
	bar     strings.Builder
	drawn   string    // what was drawn last on the line that has not ended
	printed string    // what was printed last of it as a line
	at      time.Time // when
}

// eraseLine ends what is drawn over an older text.
const eraseLine = "\x1b[K"

// drawEvery is how often a line that is redrawn is printed where it cannot be.
const drawEvery = 500 * time.Millisecond

func (s *screen) copy(r io.Reader) error {
	var text strings.Builder
	for in := bufio.NewReader(r); ; {
		c, err := in.ReadByte()
		if errors.Is(err, io.EOF) || errors.Is(err, syscall.EIO) { // EIO: nobody has the terminal open any more
			return nil
		}
		if err != nil {
			return err
		}
		switch {
		case c == '\n':
			s.end(text.String())
			text.Reset()
		case c == '\r':
		default:
			text.WriteByte(c)
			if line, ok := strings.CutSuffix(text.String(), eraseLine); ok {
				s.draw(line)
				text.Reset()
			}
		}
	}
}

func (s *screen) draw(line string) {
	s.bar.WriteString(line + "\n")
	s.drawn = line
	switch {
	case s.redraws:
		fmt.Fprintf(s.out, "\r     %s%s", line, eraseLine)
	case time.Since(s.at) >= drawEvery:
		fmt.Fprintf(s.out, "     %s\n", line)
		s.printed, s.at = line, time.Now()
	}
}

// end ends a line: text, or, where that is empty, what was drawn.
func (s *screen) end(text string) {
	drawn := s.drawn
	s.drawn = ""
	switch {
	case drawn != "" && s.redraws:
		fmt.Fprintln(s.out)
	case drawn == "":
		fmt.Fprintf(s.out, "     %s\n", text)
	case drawn != s.printed:
		fmt.Fprintf(s.out, "     %s\n", drawn)
	}
}

// openTerminal makes a pseudo-terminal of so many columns and returns its two ends.
func openTerminal(columns uint16) (master, slave *os.File, err error) {
	master, err = os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make a terminal: %w", err)
	}
	fd := int(master.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err == nil {
		err = unix.IoctlSetWinsize(fd, unix.TIOCSWINSZ, &unix.Winsize{Row: 24, Col: columns})
	}
	if err == nil {
		slave, err = os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	}
	if err != nil {
		return nil, nil, errors.Join(fmt.Errorf("make a terminal: %w", err), master.Close())
	}
	return master, slave, nil
}
