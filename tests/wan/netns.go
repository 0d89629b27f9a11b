package wan

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"

	"github.com/vishvananda/netns"
)

// folder is where ip-netns(8) keeps named network namespaces.
const folder = "/run/netns"

// space is a named network namespace.
type space struct {
	name   string
	handle netns.NsHandle
}

var nameRE = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9_.-]{0,63}$`)

// newSpace makes the namespace. The thread that is moved into it while it is
// made is moved back; should that fail, the thread dies with its goroutine.
func newSpace(name string) (*space, error) {
	if !nameRE.MatchString(name) {
		return nil, fmt.Errorf("%q cannot be the name of a network namespace", name)
	}
	if _, err := os.Lstat(filepath.Join(folder, name)); err == nil {
		return nil, fmt.Errorf("network namespace %s: %w", name, fs.ErrExist)
	}
	var s *space
	err := onThread(func() error {
		h, err := netns.NewNamed(name)
		s = &space{name: name, handle: h}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("make network namespace %s: %w", name, err)
	}
	return s, nil
}

// onThread runs f on a locked thread of its own and puts the thread back into
// its network namespace. A thread that cannot be put back is not used again:
// its goroutine ends locked.
func onThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		home, err := netns.Get()
		if err != nil {
			runtime.UnlockOSThread()
			done <- fmt.Errorf("open own network namespace: %w", err)
			return
		}
		err = f()
		if back := netns.Set(home); back == nil {
			runtime.UnlockOSThread()
		}
		home.Close()
		done <- err
	}()
	return <-done
}

// do runs f with the calling thread in the namespace. Sockets that f itself
// opens, and processes it starts, are in the namespace; goroutines it starts are not.
func (s *space) do(f func() error) error {
	return onThread(func() error {
		if err := netns.Set(s.handle); err != nil {
			return fmt.Errorf("enter network namespace %s: %w", s.name, err)
		}
		return f()
	})
}

// remove deletes the name; the kernel frees the namespace when its last
// process and socket are gone. Processes that are still inside are an error.
func (s *space) remove() error {
	var errs []error
	if pids := s.processes(); len(pids) > 0 {
		errs = append(errs, fmt.Errorf("processes still run in network namespace %s: %s", s.name, strings.Join(pids, ", ")))
	}
	errs = append(errs, s.handle.Close())
	if err := netns.DeleteNamed(s.name); err != nil {
		errs = append(errs, fmt.Errorf("remove network namespace %s: %w", s.name, err))
	}
	return errors.Join(errs...)
}

// processes lists the processes (but for this one) inside, as "pid (name)".
func (s *space) processes() []string {
	want, err := os.Stat(filepath.Join(folder, s.name))
	if err != nil {
		return nil
	}
	entries, _ := os.ReadDir("/proc")
	var out []string
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid == os.Getpid() {
			continue
		}
		got, err := os.Stat(filepath.Join("/proc", e.Name(), "ns/net"))
		if err == nil && os.SameFile(want, got) {
			comm, _ := os.ReadFile(filepath.Join("/proc", e.Name(), "comm"))
			out = append(out, fmt.Sprintf("%d (%s)", pid, strings.TrimSpace(string(comm))))
		}
	}
	return out
}

// removeStale removes a namespace that an earlier run left behind, unless a
// process still lives in it. A missing one is fine.
func removeStale(name string) error {
	if !nameRE.MatchString(name) {
		return fmt.Errorf("%q cannot be the name of a network namespace", name)
	}
	s := &space{name: name}
	if pids := s.processes(); len(pids) > 0 {
		return fmt.Errorf("network namespace %s is in use by %s", name, strings.Join(pids, ", "))
	}
	err := netns.DeleteNamed(name)
	if err == nil || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	// A name that was never mounted: a run that died between the two steps.
	if err := os.Remove(filepath.Join(folder, name)); err != nil {
		return fmt.Errorf("remove stale network namespace %s: %w", name, err)
	}
	return nil
}

// Side is one end of a link.
type Side int

// The two ends.
const (
	A Side = 0
	B Side = 1
)

func (s Side) String() string { return [...]string{"a", "b"}[s&1] }

// Peer is the other end.
func (s Side) Peer() Side { return 1 - s }

// Name is the name of a side's network namespace.
func (l *Link) Name(s Side) string { return l.space[s].name }

// Do runs f on a thread inside the side's namespace: sockets that f opens and
// processes it starts live there. Goroutines that f starts do not.
func (l *Link) Do(s Side, f func() error) error { return l.space[s].do(f) }

// Listen opens a listening socket inside the side's namespace.
func (l *Link) Listen(s Side, network, address string) (ln net.Listener, err error) {
	err = l.Do(s, func() error {
		ln, err = net.Listen(network, address)
		return err
	})
	return ln, err
}

// Dial connects from inside the side's namespace. address must be a literal
// IP address and port, because a resolver would work outside.
func (l *Link) Dial(ctx context.Context, s Side, network, address string) (c net.Conn, err error) {
	err = l.Do(s, func() error {
		c, err = new(net.Dialer).DialContext(ctx, network, address)
		return err
	})
	return c, err
}

// Command changes cmd, before it is started, so that it runs inside the
// side's namespace. The process keeps its pid: nsenter(1) executes it in its
// place. Files and unix sockets are shared with the outside.
func (l *Link) Command(s Side, cmd *exec.Cmd) (*exec.Cmd, error) {
	if cmd.Err != nil {
		return nil, cmd.Err
	}
	enter, err := exec.LookPath("nsenter")
	if err != nil {
		return nil, fmt.Errorf("run %s in network namespace %s: %w", cmd.Path, l.Name(s), err)
	}
	args := []string{enter, "--net=" + filepath.Join(folder, l.Name(s)), "--", cmd.Path}
	cmd.Args = append(args, cmd.Args[1:]...)
	cmd.Path = enter
	return cmd, nil
}

// Exec runs a program to its end inside the side's namespace and returns what
// it printed on both outputs.
func (l *Link) Exec(ctx context.Context, s Side, name string, args ...string) ([]byte, error) {
	cmd, err := l.Command(s, exec.CommandContext(ctx, name, args...))
	if err != nil {
		return nil, err
	}
	out, err := cmd.CombinedOutput()
	if err != nil {
		return out, fmt.Errorf("%s in network namespace %s: %w: %s", name, l.Name(s), err, strings.TrimSpace(string(out)))
	}
	return out, nil
}
