package ext4cap

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Env is what a workload works with: a formatted disk, mounted at Dir.
type Env struct {
	Disk  *Disk
	Dir   string
	Rand  *rand.Rand
	opts  string
	mount bool
}

// Workload is a named use of a file system.
type Workload struct {
	Name  string
	Mkfs  []string // arguments of mke2fs, after -q -F -t ext4
	Mount string   // mount options
	MiB   int64
	Run   func(e *Env) error
	Dirty bool // the stream ends before the unmount
	// Waits is the most FLUSHes that may wait for the replica; 0: not bounded.
	Waits int
}

// Capture runs a workload on a new disk and returns what was written from the
// first mount on.
func Capture(dir string, w Workload, seed uint64) (s Stream, err error) {
	mib := w.MiB
	if mib == 0 {
		mib = 64
	}
	d, err := New(dir, mib<<20)
	if err != nil {
		return s, err
	}
	defer func() { err = errors.Join(err, d.Close()) }()
	if err := command("mke2fs", append(append([]string{"-q", "-F", "-t", "ext4"}, w.Mkfs...), d.Dev)...); err != nil {
		return s, err
	}
	e := &Env{Disk: d, Dir: filepath.Join(dir, "mnt"), Rand: rand.New(rand.NewPCG(seed, 1)), opts: w.Mount}
	if err := os.Mkdir(e.Dir, 0o700); err != nil {
		return s, err
	}
	d.Log()
	if strings.Contains(w.Mount, "journal_") {
		s.Mount = w.Mount
	}
	if s.Base, err = d.Image(); err != nil {
		return s, err
	}
	if err := e.Mount(w.Mount); err != nil {
		return s, err
	}
	err = w.Run(e)
	if w.Dirty {
		s.Log = d.Log()
	}
	if e.mount {
		err = errors.Join(err, e.Unmount())
	}
	if !w.Dirty {
		s.Log = d.Log()
	}
	return s, err
}

func command(name string, args ...string) error {
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s %v: %w\n%s", name, args, err, out)
	}
	return nil
}

// Mount mounts the disk.
func (e *Env) Mount(opts string) error {
	e.opts = opts
	if err := unix.Mount(e.Disk.Dev, e.Dir, "ext4", 0, opts); err != nil {
		return fmt.Errorf("mount with %q: %w", opts, err)
	}
	e.mount = true
	return nil
}

// Unmount unmounts it.
func (e *Env) Unmount() error {
	for range 200 {
		err := unix.Unmount(e.Dir, 0)
		if err == nil {
			e.mount = false
			return nil
		}
		if !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("unmount: %w", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errors.New("unmount: busy")
}

// Path is a file's path.
func (e *Env) Path(name string) string { return filepath.Join(e.Dir, name) }

// fork makes a source of chance of its own for a goroutine.
func fork(r *rand.Rand) *rand.Rand { return rand.New(rand.NewPCG(r.Uint64(), r.Uint64())) }

// Bytes are n random bytes.
func (e *Env) Bytes(n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(e.Rand.Uint32())
	}
	return b
}

// Append appends n bytes to a file, count times, each followed by fsync.
func (e *Env) Append(name string, n, count int) error {
	f, err := os.OpenFile(e.Path(name), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return err
	}
	defer f.Close()
	for range count {
		if _, err := f.Write(e.Bytes(n)); err != nil {
			return err
		}
		if err := f.Sync(); err != nil {
			return err
		}
	}
	return nil
}

// Prepare makes a file of n bytes and brings it home.
func (e *Env) Prepare(name string, n int) error {
	if err := os.WriteFile(e.Path(name), e.Bytes(n), 0o600); err != nil {
		return err
	}
	unix.Sync()
	return nil
}

// Overwrite overwrites random 4 KiB pages of a file; data: fdatasync, else fsync.
func (e *Env) Overwrite(name string, pages, count int, data bool) error {
	f, err := os.OpenFile(e.Path(name), os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	for range count {
		if _, err := f.WriteAt(e.Bytes(4096), int64(e.Rand.IntN(pages))*4096); err != nil {
			return err
		}
		if data {
			err = unix.Fdatasync(int(f.Fd()))
		} else {
			err = f.Sync()
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// Create makes count files of n bytes, each followed by fsync.
func (e *Env) Create(prefix string, n, count int) error {
	for i := range count {
		f, err := os.Create(e.Path(fmt.Sprintf("%s%d", prefix, i)))
		if err != nil {
			return err
		}
		_, err = f.Write(e.Bytes(n))
		if err := errors.Join(err, f.Sync(), f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// Table are the workloads of the table in ARCHITECTURE.md.
func Table() []Workload {
	return []Workload{
		{Name: "append 4096", Run: func(e *Env) error { return e.Append("a", 4096, 200) }, Waits: 212},
		{Name: "create 5000", Run: func(e *Env) error { return e.Create("c", 5000, 200) }, Waits: 225},
		{Name: "append 200", Run: func(e *Env) error { return e.Append("a", 200, 200) }, Waits: 225},
		{Name: "overwrite fdatasync", Run: func(e *Env) error {
			return errors.Join(e.Prepare("o", 1<<20), e.Overwrite("o", 256, 200, true))
		}},
		{Name: "overwrite fsync", Run: func(e *Env) error {
			return errors.Join(e.Prepare("o", 1<<20), e.Overwrite("o", 256, 200, false))
		}},
	}
}
