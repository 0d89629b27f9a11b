package acked

import (
	"context"
	"errors"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Bridge is the program that makes a file of an NBD export.
type Bridge string

// The bridges. Both pass an fsync of the loop device on as an NBD flush; the
// loop device never sends FUA, and has one flush under way at a time.
const (
	// NBDFuse gives I/O errors when the server dies: the disaster.
	NBDFuse Bridge = "nbdfuse"
	// StorageDaemon (QEMU's) waits Reconnect for a server that died and then
	// sends the requests again, as a VM's disk does.
	StorageDaemon Bridge = "qemu-storage-daemon"
)

// NBDOptions describe a file system on an NBD export.
type NBDOptions struct {
	Socket    string        // path of the server's unix socket
	Export    string        // default: the empty name
	Bridge    Bridge        // default NBDFuse
	Reconnect time.Duration // of StorageDaemon, in whole seconds; default 60 s
	Mkfs      bool          // make a new ext4 first
	MkfsArgs  []string      // further options of mkfs.ext4
	Data      string        // mount options of ext4, such as "data=journal"
	ReadOnly  bool
	Offset    int64 // of the file system in the export, bytes
	Size      int64 // 0: to the end
}

// Mount is a mounted ext4 with everything under it that this package made: a
// loop device (which the kernel frees by itself at its last use) and, on NBD,
// a bridge process with its FUSE mount.
type Mount struct {
	Dir string // where it is mounted

	work    string    // temporary folder that holds all mount points
	bridge  *exec.Cmd // nil on an image
	log     *os.File
	ended   chan struct{} // closed when the bridge has ended
	fuse    string        // what the bridge is mounted on
	mounted bool
	once    sync.Once
}

// MountNBD mounts an ext4 that lies on an NBD export. Call Close in any case
// when err is nil.
func MountNBD(ctx context.Context, o NBDOptions) (*Mount, error) {
	m, err := newMount()
	if err != nil {
		return nil, err
	}
	file, err := m.startBridge(ctx, o)
	if err == nil {
		// A server that stops answering blocks the mount; pulling the cord ends it.
		stop := context.AfterFunc(ctx, m.Kill)
		if err = m.mountFile(ctx, file, o); !stop() && err == nil {
			err = ctx.Err()
		}
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", o.Socket, err), m.Close())
	}
	return m, nil
}

// MountImage mounts an ext4 that lies in an image file, at offset. A journal
// that needs recovery is replayed into the image; with readOnly that is
// impossible, and such an image is refused by the kernel.
func MountImage(ctx context.Context, path string, offset int64, readOnly bool) (*Mount, error) {
	m, err := newMount()
	if err != nil {
		return nil, err
	}
	if err := m.mountFile(ctx, path, NBDOptions{ReadOnly: readOnly, Offset: offset}); err != nil {
		return nil, errors.Join(fmt.Errorf("mount %s: %w", path, err), m.Close())
	}
	return m, nil
}

func newMount() (*Mount, error) {
	work, err := os.MkdirTemp("", "kagami-acked-")
	if err != nil {
		return nil, fmt.Errorf("mount: %w", err)
	}
	m := &Mount{work: work, Dir: filepath.Join(work, "mnt")}
	if err := os.Mkdir(m.Dir, 0o700); err != nil {
		return nil, errors.Join(fmt.Errorf("mount: %w", err), os.RemoveAll(work))
	}
	return m, nil
}

// command is the bridge's command line; file is where the export appears.
func (o NBDOptions) command(work string) (cmd *exec.Cmd, fuse, file string) {
	if o.Bridge == StorageDaemon {
		file = filepath.Join(work, "disk")
		wait := o.Reconnect
		if wait == 0 {
			wait = time.Minute
		}
		node := fmt.Sprintf("driver=nbd,node-name=disk,server.type=unix,server.path=%s,export=%s,reconnect-delay=%d,read-only=%s",
			qemuEscape(o.Socket), qemuEscape(o.Export), int(wait.Seconds()), onOff(o.ReadOnly))
		export := fmt.Sprintf("fuse,id=disk,node-name=disk,mountpoint=%s,writable=%s", qemuEscape(file), onOff(!o.ReadOnly))
		return exec.Command(string(StorageDaemon), "--blockdev", node, "--export", export), file, file
	}
	fuse = filepath.Join(work, "fuse")
	file = filepath.Join(fuse, "disk")
	uri := "nbd+unix:///" + url.PathEscape(o.Export) + "?socket=" + url.QueryEscape(o.Socket)
	args := []string{file, uri}
	if o.ReadOnly {
		args = append([]string{"-r"}, args...)
	}
	return exec.Command(string(NBDFuse), args...), fuse, file
}

// qemuEscape doubles commas, as QEMU's option parser wants it.
func qemuEscape(s string) string { return strings.ReplaceAll(s, ",", ",,") }

func onOff(b bool) string {
	if b {
		return "on"
	}
	return "off"
}

// startBridge starts the bridge and waits until its file is there.
func (m *Mount) startBridge(ctx context.Context, o NBDOptions) (file string, err error) {
	cmd, fuse, file := o.command(m.work)
	if fuse == file {
		err = os.WriteFile(fuse, nil, 0o600)
	} else {
		err = os.Mkdir(fuse, 0o700)
	}
	if err != nil {
		return "", err
	}
	if m.log, err = os.Create(filepath.Join(m.work, "bridge.log")); err != nil {
		return "", err
	}
	cmd.Stdout, cmd.Stderr = m.log, m.log
	if err := cmd.Start(); err != nil {
		return "", fmt.Errorf("start %s: %w", cmd.Path, err)
	}
	m.bridge, m.fuse, m.ended = cmd, fuse, make(chan struct{})
	go func() {
		_ = cmd.Wait() // its end is what counts; Kill makes it a failure
		close(m.ended)
	}()
	return file, m.waitForFile(ctx, file)
}

func (m *Mount) waitForFile(ctx context.Context, file string) error {
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	for {
		if st, err := os.Stat(file); err == nil && st.Size() > 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w: %s", m.bridge.Path, ctx.Err(), m.bridgeLog())
		case <-m.ended:
			return fmt.Errorf("%s ended: %s", m.bridge.Path, m.bridgeLog())
		}
	}
}

func (m *Mount) bridgeLog() string {
	b, err := os.ReadFile(m.log.Name())
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b[:min(len(b), 2000)]))
}

// mountFile puts a loop device over file and mounts it.
func (m *Mount) mountFile(ctx context.Context, file string, o NBDOptions) error {
	// The loop device lives as long as loop is open or it is mounted.
	loop, err := openLoop(file, o)
	if err != nil {
		return err
	}
	defer loop.Close()
	if o.Mkfs {
		out, err := exec.CommandContext(ctx, "mkfs.ext4", append(append([]string{"-q", "-F"}, o.MkfsArgs...), loop.Name())...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("mkfs.ext4: %w: %s", err, strings.TrimSpace(string(out)))
		}
	}
	var flags uintptr = unix.MS_NOATIME
	if o.ReadOnly {
		flags |= unix.MS_RDONLY
	}
	if err := unix.Mount(loop.Name(), m.Dir, "ext4", flags, o.Data); err != nil {
		return fmt.Errorf("mount %s on %s: %w", loop.Name(), m.Dir, err)
	}
	m.mounted = true
	return nil
}

// openLoop attaches file to a free loop device that detaches itself at its
// last close.
func openLoop(file string, o NBDOptions) (*os.File, error) {
	mode := os.O_RDWR
	c := unix.LoopConfig{Info: unix.LoopInfo64{Offset: uint64(o.Offset), Sizelimit: uint64(o.Size), Flags: unix.LO_FLAGS_AUTOCLEAR}}
	if o.ReadOnly {
		mode = os.O_RDONLY
		c.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	backing, err := os.OpenFile(file, mode, 0)
	if err != nil {
		return nil, err
	}
	defer backing.Close()
	c.Fd = uint32(backing.Fd())
	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	defer control.Close()
	for range 100 { // another process may be quicker
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("LOOP_CTL_GET_FREE: %w", err)
		}
		loop, err := os.OpenFile(fmt.Sprintf("/dev/loop%d", n), mode, 0)
		if err != nil {
			return nil, err
		}
		err = unix.IoctlLoopConfigure(int(loop.Fd()), &c)
		if err == nil {
			return loop, nil
		}
		loop.Close()
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("LOOP_CONFIGURE %s: %w", loop.Name(), err)
		}
	}
	return nil, errors.New("no free loop device")
}

// Unmount ends the file system in good order: everything is written back, and
// the journal is empty. It fails while files are open.
func (m *Mount) Unmount() error {
	if !m.mounted {
		return nil
	}
	// A mount namespace that was made meanwhile, for a libvirt of another test say,
	// has a copy of this mount and keeps the file system in use beyond the
	// unmount. Made read-only, it is in good order for all of them.
	if err := unix.Mount("", m.Dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("make %s read-only: %w", m.Dir, err)
	}
	if err := unix.Unmount(m.Dir, 0); err != nil {
		return fmt.Errorf("unmount %s: %w", m.Dir, err)
	}
	m.mounted = false
	return nil
}

// Kill kills the bridge: for the file system on it the power cord is pulled.
// Every later request of the file system fails, those that wait for a server
// that does not answer included. It may be called at any time, also at the
// same time as Unmount and Close.
func (m *Mount) Kill() {
	if m.bridge == nil {
		return
	}
	_ = m.bridge.Process.Kill() // it may have ended by itself
	<-m.ended
}

// Close takes down what is left, in whatever state it is, and nothing else's.
func (m *Mount) Close() error {
	var err error
	m.once.Do(func() { err = m.close() })
	return err
}

func (m *Mount) close() error {
	var errs []error
	if m.mounted && m.Unmount() != nil {
		// Open files, or a device that is gone: off the tree at least.
		if err := unix.Unmount(m.Dir, unix.MNT_DETACH); err != nil {
			errs = append(errs, fmt.Errorf("detach %s: %w", m.Dir, err))
		}
		m.mounted = false
	}
	if m.bridge != nil {
		errs = append(errs, m.endBridge())
	}
	if m.log != nil {
		errs = append(errs, m.log.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return err // what is still mounted must not be deleted
	}
	return os.RemoveAll(m.work)
}

// endBridge ends the bridge in good order when it is alive: the loop device
// has let go of its file, so nothing is under way.
func (m *Mount) endBridge() error {
	_ = m.bridge.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	select {
	case <-m.ended:
	case <-time.After(5 * time.Second):
		m.Kill()
	}
	// A killed bridge leaves its mount behind, one that ended well does not.
	err := unix.Unmount(m.fuse, unix.MNT_DETACH)
	if err != nil && !errors.Is(err, unix.EINVAL) && !errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("detach %s: %w", m.fuse, err)
	}
	return nil
}
