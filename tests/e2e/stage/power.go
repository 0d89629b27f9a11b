package stage

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// makeDisk puts the site's folder on an ext4 of its own, in an image beside it.
func (s *Site) makeDisk(ctx context.Context) error {
	size := s.stage.o.Disk[s.Name]
	if size == 0 {
		return nil
	}
	name := s.path() + ".disk"
	f, err := os.Create(name)
	if err != nil {
		return err
	}
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		return err
	}
	if out, err := exec.CommandContext(ctx, "mkfs.ext4", "-q", "-m", "0", name).CombinedOutput(); err != nil {
		return fmt.Errorf("mkfs.ext4: %w: %s", err, out)
	}
	s.disk = name
	return s.mount(ctx)
}

// mount takes a loop device of its own each time: mount -o loop would take the
// one of before, shut down as it is, if a mount namespace that somebody made
// meanwhile still holds it.
func (s *Site) mount(ctx context.Context) error {
	out, err := exec.CommandContext(ctx, "losetup", "--find", "--show", s.disk).Output()
	if err != nil {
		return fmt.Errorf("loop device for the disk of site %s: %w", s.Name, err)
	}
	dev := strings.TrimSpace(string(out))
	text, err := exec.CommandContext(ctx, "mount", dev, s.path()).CombinedOutput()
	if err != nil {
		err = fmt.Errorf("mount the disk of site %s: %w: %s", s.Name, err, text)
	}
	// The kernel frees it at its last use.
	if text, derr := exec.CommandContext(ctx, "losetup", "--detach", dev).CombinedOutput(); derr != nil {
		err = errors.Join(err, fmt.Errorf("detach %s: %w: %s", dev, derr, text))
	}
	return err
}

// unmount takes the site's own file system off, if it is there.
func (s *Site) unmount() error {
	if s.disk == "" {
		return nil
	}
	var err error
	for range 50 {
		err = unix.Unmount(s.path(), 0)
		if err == nil || errors.Is(err, unix.EINVAL) { // EINVAL: it is not mounted
			return nil
		}
		time.Sleep(100 * time.Millisecond) // a killed process may not have let go yet
	}
	return fmt.Errorf("unmount the disk of site %s: %w", s.Name, err)
}

// shutdownIoctl is EXT4_IOC_SHUTDOWN, and its flag for dropping the journal's
// unwritten part too (fs/ext4/ext4.h).
const (
	shutdownIoctl     = 0x8004587d
	noLogFlush    int = 2
)

// PowerLoss is what a loss of power of the site's host does to the daemon: it
// stops between two instructions, and of what it had written to files only
// what the kernel had brought to the disk is there afterwards: what was
// fsynced, and whatever else was written out meanwhile. Site.Start is the
// machine's next start. It needs Options.Disk.
//
// The ext4 under the site is shut down (no more writes reach its device, the
// page cache is never written out), then mounted again. The device's own cache
// is not lost: that an fsync also empties that one is the kernel's part.
func (s *Site) PowerLoss(ctx context.Context) error {
	if s.disk == "" {
		return fmt.Errorf("site %s has no disk of its own", s.Name)
	}
	if s.daemon != nil {
		if err := freeze(ctx, s.daemon.Process.Pid); err != nil {
			return fmt.Errorf("stop daemon of site %s: %w", s.Name, err)
		}
	}
	if err := s.shutdown(); err != nil {
		return err
	}
	if err := errors.Join(s.Kill(), s.unmount()); err != nil {
		return err
	}
	return s.mount(ctx)
}

// freeze stops a process and waits until none of its threads runs: one that
// waits for the disk stops before it sees the answer.
func freeze(ctx context.Context, pid int) error {
	if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
		return err
	}
	for {
		running, err := runningThreads(pid)
		if err != nil || running == 0 {
			return err
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%d threads still run: %w", running, ctx.Err())
		case <-time.After(time.Millisecond):
		}
	}
}

// runningThreads counts a process's threads that are neither stopped nor in an
// uninterruptible wait: the state in /proc/PID/task/TID/stat (proc(5)).
func runningThreads(pid int) (int, error) {
	stats, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", pid))
	if err != nil {
		return 0, err
	}
	n := 0
	for _, name := range stats {
		b, err := os.ReadFile(name)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, syscall.ESRCH) {
			continue // the thread has ended
		}
		if err != nil {
			return 0, err
		}
		// pid (name) state …; the name may hold anything.
		_, after, ok := strings.Cut(string(b[bytes.LastIndexByte(b, ')')+1:]), " ")
		if !ok || after == "" {
			return 0, fmt.Errorf("%s: unexpected %q", name, b)
		}
		if !strings.ContainsRune("TtDZX", rune(after[0])) {
			n++
		}
	}
	return n, nil
}

func (s *Site) shutdown() error {
	dir, err := os.Open(s.path())
	if err != nil {
		return err
	}
	err = unix.IoctlSetPointerInt(int(dir.Fd()), shutdownIoctl, noLogFlush)
	if err != nil {
		err = fmt.Errorf("shut the disk of site %s down: %w", s.Name, err)
	}
	return errors.Join(err, dir.Close())
}

// Sync brings everything at the site to its disk: what was set up before the
// daemon first ran is not what a loss of power may take.
func (s *Site) Sync() error {
	if s.disk == "" {
		return nil
	}
	dir, err := os.Open(s.path())
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(dir.Fd())), dir.Close())
}

// WriteOut brings part of a file to the site's disk, as the kernel may at any
// moment: its data, not what belongs to it.
func WriteOut(path string, off, n int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	const wait = unix.SYNC_FILE_RANGE_WAIT_BEFORE | unix.SYNC_FILE_RANGE_WRITE | unix.SYNC_FILE_RANGE_WAIT_AFTER
	if err := unix.SyncFileRange(int(f.Fd()), off, n, wait); err != nil {
		return errors.Join(fmt.Errorf("write out %s: %w", path, err), f.Close())
	}
	return f.Close()
}

// Trouble lists the lines of the daemon's log that no run may contain: panics,
// data races, and the like.
func (s *Site) Trouble() []string {
	b, err := os.ReadFile(s.LogPath())
	if err != nil {
		return nil // never started
	}
	var found []string
	for line := range strings.Lines(string(b)) {
		for _, bad := range []string{"panic:", "fatal error:", "WARNING: DATA RACE", "negative WaitGroup"} {
			if strings.Contains(line, bad) {
				found = append(found, strings.TrimSpace(line))
			}
		}
	}
	return found
}

// Tail is the end of the daemon's log.
func (s *Site) Tail() string { return s.tail() }

// Control is the daemon's control socket.
func (s *Site) Control() string { return s.path("run", "control.sock") }

// Dump makes the daemon write what all its goroutines do into its log, and end.
func (s *Site) Dump() error {
	if s.daemon == nil {
		return nil
	}
	if err := s.daemon.Process.Signal(syscall.SIGQUIT); err != nil {
		return fmt.Errorf("dump daemon of site %s: %w", s.Name, err)
	}
	s.ended <- <-s.ended
	return nil
}
