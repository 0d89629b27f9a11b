package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

type mountPoint struct{ dev, dir, kind string }

func boot() error {
	err := mountAll([]mountPoint{{"proc", "/proc", "proc"}, {"sys", "/sys", "sysfs"}, {"dev", "/dev", "devtmpfs"}})
	err = errors.Join(err, loadModules())
	if root := cmdline("kagami.root"); root != "" && !exists("/etc/kagami-root") {
		return errors.Join(err, switchRoot(root))
	}
	err = errors.Join(err, mountAll([]mountPoint{{"run", "/run", "tmpfs"}, {"tmp", "/tmp", "tmpfs"}}))
	err = errors.Join(err, os.MkdirAll("/mnt", 0o755), awaitPort(controlPort))
	go runAgent()
	return err
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func mountAll(ms []mountPoint) error {
	var errs []error
	for _, m := range ms {
		err := os.MkdirAll(m.dir, 0o755)
		if err == nil {
			err = unix.Mount(m.dev, m.dir, m.kind, 0, "")
		}
		if err != nil && !errors.Is(err, unix.EBUSY) {
			errs = append(errs, fmt.Errorf("mount %s: %w", m.dir, err))
		}
	}
	return errors.Join(errs...)
}

// cmdline is the value of a word KEY=VALUE of the kernel's command line.
func cmdline(key string) string {
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		return ""
	}
	for w := range strings.FieldsSeq(string(b)) {
		if v, ok := strings.CutPrefix(w, key+"="); ok {
			return v
		}
	}
	return ""
}

// loadModules loads what is listed in /lib/mod/order; a root disk has no such
// list, its modules are loaded before the switch to it.
func loadModules() error {
	list, err := os.ReadFile("/lib/mod/order")
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	var errs []error
	for name := range strings.FieldsSeq(string(list)) {
		errs = append(errs, loadModule(filepath.Join("/lib/mod", name)))
	}
	return errors.Join(errs...)
}

func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("load %s: %w", path, err)
	}
	return nil
}

// switchRoot makes the ext4 file system on dev the root and goes on as its /sbin/init.
func switchRoot(dev string) error {
	for end := time.Now().Add(30 * time.Second); !exists(dev); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(end) {
			return fmt.Errorf("root disk %s did not appear", dev)
		}
	}
	if err := os.MkdirAll("/new", 0o755); err != nil {
		return err
	}
	if err := unix.Mount(dev, "/new", "ext4", 0, cmdline("kagami.rootflags")); err != nil {
		return fmt.Errorf("mount root disk %s: %w", dev, err)
	}
	for _, d := range []string{"/dev", "/proc", "/sys"} {
		if err := unix.Mount(d, "/new"+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("move %s: %w", d, err)
		}
	}
	if err := errors.Join(unix.Chdir("/new"), unix.Mount(".", "/", "", unix.MS_MOVE, ""), unix.Chroot("."), unix.Chdir("/")); err != nil {
		return fmt.Errorf("switch to the root disk: %w", err)
	}
	return fmt.Errorf("start /sbin/init of the root disk: %w", unix.Exec("/sbin/init", []string{"/sbin/init"}, os.Environ()))
}

// namePorts makes /dev/virtio-ports/NAME for each named virtio-serial port.
func namePorts() error {
	if err := os.MkdirAll("/dev/virtio-ports", 0o755); err != nil {
		return err
	}
	names, err := filepath.Glob("/sys/class/virtio-ports/*/name")
	if err != nil {
		return err
	}
	for _, n := range names {
		b, err := os.ReadFile(n)
		if name := strings.TrimSpace(string(b)); err == nil && name != "" {
			err = os.Symlink("/dev/"+filepath.Base(filepath.Dir(n)), "/dev/virtio-ports/"+name)
		}
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return err
		}
	}
	return nil
}

const (
	agentPath = "/usr/sbin/qemu-ga"
	agentPort = "/dev/virtio-ports/org.qemu.guest_agent.0"
)

// portPatience is how long a port may take: the kernel learns of ports and
// their names from QEMU, some time after it has found the device.
const portPatience = 10 * time.Second

// awaitPort waits for a virtio-serial port, if there is a device that could have it.
func awaitPort(path string) error {
	for end := time.Now().Add(portPatience); ; time.Sleep(20 * time.Millisecond) {
		if err := namePorts(); err != nil {
			return err
		}
		devices, err := filepath.Glob("/sys/bus/virtio/drivers/virtio_console/virtio*")
		if err != nil || len(devices) == 0 || exists(path) || time.Now().After(end) {
			return err
		}
	}
}

// runAgent runs the guest agent for as long as the guest runs.
func runAgent() {
	if err := awaitPort(agentPort); err != nil {
		say("guest agent: %v", err)
	}
	if !exists(agentPath) || !exists(agentPort) {
		return
	}
	c := exec.Command(agentPath, "-m", "virtio-serial", "-p", agentPort, "-t", "/run", "-f", "/run/qga.pid")
	c.Stdout, c.Stderr = os.Stderr, os.Stderr
	if err := c.Run(); err != nil {
		say("guest agent: %v", err)
	}
}
