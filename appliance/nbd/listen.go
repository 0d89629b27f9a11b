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
// sockaddr_un with its final NUL (unix(7)), less the suffix of the temporary name.
const MaxSocketPath = 107 - len(tempSuffix)

const (
	tempSuffix = "~"
	lockSuffix = ".lock"
)

// ListenUnix listens on a unix socket at path. When the socket appears there
// it has group gid (unless that is negative) and mode already, and accepts: it
// is made under another name in the same folder and renamed. What is at path
// is replaced only if it is a socket that nobody listens on, as a crash leaves
// it. path+".lock" is locked for as long as the listener is open, which keeps
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

// checkStale says why path must not be replaced, if so.
func checkStale(path string) error {
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
	if errors.Is(err, unix.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return fmt.Errorf("cannot tell whether it is in use: %w", err)
}

// listenAt makes the socket under a temporary name, and moves it to path when
// all about it is right.
func listenAt(path string, gid int, mode fs.FileMode) (*unixListener, error) {
	if err := checkStale(path); err != nil {
		return nil, err
	}
	temp := path + tempSuffix
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	f, err := bindUnix(temp)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // net has its own descriptor
	l, err := openUnix(f, path, gid, mode)
	if err != nil {
		return nil, errors.Join(err, os.Remove(temp))
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

func openUnix(f *os.File, path string, gid int, mode fs.FileMode) (*unixListener, error) {
	temp := f.Name()
	if gid >= 0 {
		if err := os.Chown(temp, -1, gid); err != nil {
			return nil, err
		}
	}
	if err := os.Chmod(temp, mode); err != nil { // after chown, which may clear bits
		return nil, err
	}
	if err := unix.Listen(int(f.Fd()), unix.SOMAXCONN); err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	st, err := os.Lstat(temp)
	if err != nil {
		return nil, err
	}
	l, err := net.FileListener(f)
	if err != nil {
		return nil, err
	}
	if err := os.Rename(temp, path); err != nil {
		return nil, errors.Join(err, l.Close())
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

// Addr is the path that clients connect to.
func (l *unixListener) Addr() net.Addr { return &net.UnixAddr{Name: l.path, Net: "unix"} }
