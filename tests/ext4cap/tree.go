package ext4cap

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"sort"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"kagami/ext4j/recover"
)

// Judge shows what an application would find after a disaster: it replays the
// journal of a state of the disk in user space and lets the kernel read the result.
type Judge struct {
	// Options are given to every mount; a journal of one kind becomes another without its own.
	Options string

	dir  string
	file *os.File
	dev  string
	now  []byte // what the file holds
}

// NewJudge makes a judge for disks of size bytes; dir should be a tmpfs.
func NewJudge(dir string, size int64) (*Judge, error) {
	j := &Judge{dir: filepath.Join(dir, "mnt"), now: make([]byte, size)}
	f, err := os.OpenFile(filepath.Join(dir, "state"), os.O_RDWR|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return nil, err
	}
	j.file = f
	if err := errors.Join(f.Truncate(size), os.Mkdir(j.dir, 0o700)); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	for range 20 {
		out, _ := exec.Command("losetup", "-f", "--show", f.Name()).CombinedOutput()
		if dev := strings.TrimSpace(string(out)); strings.HasPrefix(dev, "/dev/loop") {
			j.dev = dev
			return j, nil
		}
		time.Sleep(50 * time.Millisecond)
	}
	return nil, errors.Join(errors.New("no loop device to be had"), f.Close())
}

// Close detaches the loop device.
func (j *Judge) Close() error {
	return errors.Join(exec.Command("losetup", "-d", j.dev).Run(), j.file.Close())
}

// memory is a state of the disk as recover's device.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m memory) WriteAt(p []byte, off int64) (int, error) { return copy(m[off:], p), nil }
func (m memory) Datasync() error                          { return nil }

// Look returns every name with its attributes and a hash of its content, one a
// line, as they are after recovery of the state; or, in words, why that cannot be.
func (j *Judge) Look(state []byte) (string, error) {
	img := memory(append([]byte(nil), state...))
	rep, err := recover.Run(img, 0, int64(len(img)), recover.Options{})
	if why := words(err); why != "" {
		return "not recovered: " + why, nil
	}
	return j.Mount(img, rep.Orphans)
}

// Mount is Look without the replay in user space: the kernel recovers what has to
// be. writes tells that it will write, and what it leaves is wanted (Left).
func (j *Judge) Mount(img []byte, writes bool) (string, error) {
	if err := j.load(img); err != nil {
		return "", err
	}
	tree, err := j.look()
	if writes {
		_, e := j.file.ReadAt(j.now, 0) // a mount that failed may have written as well
		err = errors.Join(err, e)
	}
	return tree, err
}

func (j *Judge) look() (string, error) {
	if why := words(unix.Mount(j.dev, j.dir, "ext4", unix.MS_RDONLY, j.Options)); why != "" {
		return "not mounted: " + why, nil
	}
	tree, err := walk(j.dir)
	return tree, errors.Join(err, j.unmount())
}

// Left is what the last Mount left of the disk. It is valid until the next one.
func (j *Judge) Left() []byte { return j.now }

// Path names the file that holds what Left returns.
func (j *Judge) Path() string { return j.file.Name() }

func (j *Judge) unmount() error {
	for range 100 {
		if err := unix.Unmount(j.dir, 0); err == nil {
			return nil
		}
		time.Sleep(5 * time.Millisecond)
	}
	return errors.New("cannot unmount")
}

// words is what a refusal says; empty when there is none. A refusal is a result
// here, compared like any other.
func words(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// load brings the loop device's file to a state.
func (j *Judge) load(img []byte) error {
	const step = 64 << 10
	for o := 0; o < len(img); o += step {
		end := min(o+step, len(img))
		if string(img[o:end]) != string(j.now[o:end]) {
			if _, err := j.file.WriteAt(img[o:end], int64(o)); err != nil {
				return err
			}
			copy(j.now[o:end], img[o:end])
		}
	}
	return nil
}

// walk lists a tree.
func walk(dir string) (string, error) {
	var lines []string
	err := filepath.WalkDir(dir, func(path string, e fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name := strings.TrimPrefix(path, dir)
		content := ""
		switch e.Type() {
		case 0:
			sum, err := hashFile(path)
			if err != nil {
				return err
			}
			content = sum
		case fs.ModeSymlink:
			if content, err = os.Readlink(path); err != nil {
				return err
			}
		}
		attrs, err := xattrs(path)
		if err != nil {
			return err
		}
		lines = append(lines, fmt.Sprintf("%q %o %d:%d %d links %d bytes, %d.%09d %s%s", name, st.Mode, st.Uid, st.Gid, st.Nlink, st.Size, st.Mtim.Sec, st.Mtim.Nsec, content, attrs))
		return nil
	})
	sort.Strings(lines)
	return strings.Join(lines, "\n"), err
}

// xattrs lists the extended attributes of a name, symbolic links not followed.
func xattrs(path string) (string, error) {
	list, value := make([]byte, 64<<10), make([]byte, 64<<10)
	n, err := unix.Llistxattr(path, list)
	if err != nil {
		return "", fmt.Errorf("%s: list attributes: %w", path, err)
	}
	var all []string
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		if name == "" {
			continue
		}
		n, err := unix.Lgetxattr(path, name, value)
		if err != nil {
			return "", fmt.Errorf("%s: attribute %s: %w", path, name, err)
		}
		all = append(all, fmt.Sprintf(" %s=%x", name, value[:n]))
	}
	sort.Strings(all)
	return strings.Join(all, ""), nil
}

func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", err
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8]), nil
}
