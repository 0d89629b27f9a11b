package nbd

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// ErrInUse is returned by ListenUnix when somebody listens at the path.
var ErrInUse = errors.New("somebody is listening there")

// MaxSocketPath is the longest path of a socket, bytes: what fits into
// sockaddr_un with its final NUL (unix(7)).
const MaxSocketPath = 107

const lockSuffix = ".lock"

// ListenUnix listens on a unix socket at path. It has group gid (unless that
// is negative) and mode before the first client can connect. What is at path is
// replaced only if it is a socket that nobody listens on, as a crash leaves it.
// path+".lock" is locked for as long as the listener is open, which keeps
// processes apart that do this at the same moment; that file stays.
func ListenUnix(path string, gid int, mode fs.FileMode) (net.Listener, error) {
	if len(path) > MaxSocketPath {
		return nil, fmt.Errorf("listen at %s: the path has %d bytes, %d are possible", path, len(path), MaxSocketPath)
	}
	lock, err := lockFile(path + lockSuffix)
	if err != nil {
		return nil, fmt.Errorf("listen at %s: %w", path, err)
	}
	l, err := listenAt(path, gid, mode)
	if err != nil {
		return nil, errors.Join(fmt.Errorf("listen at %s: %w", path, err), lock.Close())
	}
	l.lock = lock
	return l, nil
}

// lockFile takes the lock, which ends with the file. Nobody else can open it.
func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.FcntlFlock(f.Fd(), unix.F_OFD_SETLK, &unix.Flock_t{Type: unix.F_WRLCK})
	if errors.Is(err, unix.EAGAIN) || errors.Is(err, unix.EACCES) {
		err = ErrInUse
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

// removeStale removes the socket of a process that is gone, and says why not
// if it must not.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if st.Mode().Type() != fs.ModeSocket {
		return fmt.Errorf("%w and is no socket", fs.ErrExist)
	}
	nc, err := net.Dial("unix", path)
	if err == nil {
		return errors.Join(ErrInUse, nc.Close())
	}
	if errors.Is(err, unix.ECONNREFUSED) {
		return os.Remove(path)
	}
	return fmt.Errorf("cannot tell whether it is in use: %w", err)
}

// listenAt makes the socket. Until listen(2) is called, when all about it is
// right, it refuses connections.
func listenAt(path string, gid int, mode fs.FileMode) (*unixListener, error) {
	if err := removeStale(path); err != nil {
		return nil, err
	}
	f, err := bindUnix(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // net has its own descriptor
	l, err := openUnix(f, gid, mode)
	if err != nil {
		return nil, errors.Join(err, os.Remove(path))
	}
	return l, nil
}

// bindUnix makes a socket file that refuses connections as yet.
func bindUnix(path string) (*os.File, error) {
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC|unix.SOCK_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("socket: %w", err)
	}
	f := os.NewFile(uintptr(fd), path)
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: path}); err != nil {
		return nil, errors.Join(fmt.Errorf("bind: %w", err), f.Close())
	}
	return f, nil
}

func openUnix(f *os.File, gid int, mode fs.FileMode) (*unixListener, error) {
	path := f.Name()
	if gid >= 0 {
		if err := os.Chown(path, -1, gid); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(path, mode); err != nil { // after chown, which may clear bits
		return nil, err
	}
	st, err := os.Lstat(path)
	if err != nil {
		return nil, err
	}
	if err := unix.Listen(int(f.Fd()), unix.SOMAXCONN); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	if ul, ok := l.(*net.UnixListener); ok {
		ul.SetUnlinkOnClose(false) // our Close looks first whose it is
	}
	return &unixListener{Listener: l, path: path, made: st}, nil
}

// unixListener removes its socket file when it is closed, if it is still its own.
type unixListener struct {
	net.Listener
	path string
	made os.FileInfo
	lock *os.File
	once sync.Once
	err  error
}

func (l *unixListener) Close() error {
	l.once.Do(func() { l.err = errors.Join(l.unlink(), l.Listener.Close(), l.lock.Close()) })
	return l.err
}

func (l *unixListener) unlink() error {
	st, err := os.Lstat(l.path)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !os.SameFile(st, l.made) {
		return nil
	}
	if err != nil {
		return err
	}
	return os.Remove(l.path)
}
