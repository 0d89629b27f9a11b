package acked

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// openFlags are the flags with which a writer opens its file.
func (s Sync) openFlags() int {
	switch s {
	case ODsync:
		return unix.O_DSYNC
	case OSync:
		return os.O_SYNC
	}
	return 0
}

// apply makes what was written to f durable. With O_DSYNC and O_SYNC the
// write has done so already.
func (s Sync) apply(f *os.File) error {
	var err error
	switch s {
	case Fsync:
		err = f.Sync()
	case Fdatasync:
		err = onFD(f, unix.Fdatasync)
	case Syncfs:
		err = onFD(f, unix.Syncfs)
	}
	if err != nil {
		return fmt.Errorf("%s %s: %w", s, f.Name(), err)
	}
	return nil
}

// onFD runs a system call on a file's descriptor, again when a signal interrupts it.
func onFD(f *os.File, call func(int) error) error {
	c, err := f.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	err = c.Control(func(fd uintptr) {
		for {
			if result = call(int(fd)); result != unix.EINTR {
				return
			}
		}
	})
	if err != nil {
		return err
	}
	return result
}

// syncDir makes the names in a folder durable.
func syncDir(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("open folder: %w", err)
	}
	defer f.Close()
	if err := f.Sync(); err != nil {
		return fmt.Errorf("fsync folder %s: %w", dir, err)
	}
	return nil
}
