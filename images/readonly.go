package images

import (
	"os"

	"golang.org/x/sys/unix"
)

// ReadOnly is the real file system for looking at files: Open opens them for
// reading, and every change of an opened file is an error of the kernel's (EBADF).
type ReadOnly struct {
	OS
	// InUse accepts files that somebody else has locked. What is read of them may
	// be of different moments.
	InUse bool
}

// Open opens an existing regular file for reading. Its Lock takes no lock and only
// looks: ErrLocked when another process holds the file locked, unless InUse is set.
func (r ReadOnly) Open(name string) (File, error) {
	f, err := openOS(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return &readOnlyFile{osFile: f, inUse: r.InUse}, nil
}

type readOnlyFile struct {
	*osFile
	inUse bool
}

func (f *readOnlyFile) Lock() error {
	if f.inUse {
		return nil
	}
	return f.look()
}

// look is Lock without taking the lock.
func (o *osFile) look() error {
	lock := unix.Flock_t{Type: unix.F_WRLCK}
	err := o.control("look for locks of", func(fd int) error {
		return unix.FcntlFlock(uintptr(fd), unix.F_OFD_GETLK, &lock)
	})
	if err == nil && lock.Type != unix.F_UNLCK {
		return ErrLocked
	}
	return err
}
