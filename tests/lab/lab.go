// Package lab starts private libvirt daemons for tests and the demo.
//
// Each Lab is a libvirtd and a virtlogd in a mount namespace of their own, in which
// the places libvirt has compiled in (/etc, /run, /var/lib and /var/log/libvirt) are
// folders of the Lab. So it clashes neither with the machine's own libvirt nor with
// other Labs, and two of them are like two hosts. Guests run as QEMU's
// unprivileged user, as they do on a real host. It needs root.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Programs that must be installed.
var Programs = []string{"/usr/sbin/libvirtd", "/usr/sbin/virtlogd", "/usr/bin/unshare", "/usr/bin/qemu-system-x86_64"}

// Options of a Lab.
type Options struct {
	// NetNS is the name of the network namespace the daemons and guests run in;
	// empty: the caller's.
	NetNS string
}

// Lab is one private libvirt.
type Lab struct {
	URI string // for libvirt's clients
	Dir string // everything of this Lab, removed by Stop

	opts       Options
	sock       string
	virtlogd   *process
	libvirtd   *process
	uid, group int
}

// Start starts the daemons and waits until libvirtd answers on its socket.
func Start(ctx context.Context, o Options) (*Lab, error) {
	uid, gid, err := QEMUUser()
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "klab-") // short: socket paths end at 107 bytes
	if err != nil {
		return nil, err
	}
	l := &Lab{Dir: dir, opts: o, uid: uid, group: gid, sock: filepath.Join(dir, "run/libvirt-sock")}
	l.URI = "qemu+unix:///system?socket=" + l.sock
	if err := l.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("start a private libvirt: %w", err), l.Stop())
	}
	return l, nil
}

func (l *Lab) start(ctx context.Context) error {
	if err := os.Chmod(l.Dir, 0o755); err != nil {
		return err
	}
	if err := l.configure(); err != nil {
		return err
	}
	var err error
	if l.virtlogd, err = l.spawn("virtlogd"); err != nil {
		return err
	}
	if err := waitSocket(ctx, filepath.Join(l.Dir, "run/virtlogd-sock"), l.virtlogd); err != nil {
		return err
	}
	return l.StartLibvirtd(ctx)
}

// places are what is mounted over libvirt's own folders.
func (l *Lab) places() ([][2]string, error) {
	// The capabilities libvirtd finds out of QEMU, in 4 seconds, are kept.
	cache, err := os.UserCacheDir()
	if err != nil {
		cache = l.Dir
	}
	cache = filepath.Join(cache, "kagami-lab")
	ps := [][2]string{{cache, "/var/cache/libvirt"}}
	for d, to := range map[string]string{"etc": "/etc/libvirt", "run": "/run/libvirt", "lib": "/var/lib/libvirt", "log": "/var/log/libvirt"} {
		ps = append(ps, [2]string{filepath.Join(l.Dir, d), to})
	}
	for _, p := range ps {
		if err := errors.Join(os.MkdirAll(p[0], 0o755), os.MkdirAll(p[1], 0o755)); err != nil {
			return nil, err
		}
	}
	return ps, nil
}

func (l *Lab) configure() error {
	if _, err := l.places(); err != nil {
		return err
	}
	hooks := filepath.Join(l.Dir, "etc/hooks")
	if err := os.MkdirAll(hooks, 0o755); err != nil {
		return err
	}
	hook := fmt.Sprintf("#!/bin/sh\n[ \"$2\" != prepare ] || [ ! -x '%[1]s' ] || exec '%[1]s' \"$1\"\n", l.beforeStart())
	if err := os.WriteFile(filepath.Join(hooks, "qemu"), []byte(hook), 0o755); err != nil {
		return err
	}
	for name, text := range map[string]string{
		"libvirtd.conf": "auth_unix_rw = \"none\"\nunix_sock_rw_perms = \"0770\"\nlog_outputs = \"2:file:" + filepath.Join(l.Dir, "log/libvirtd.log") + "\"\n",
		// Two libvirts of one host would make control groups of the same names.
		"qemu.conf":     "security_driver = \"none\"\ncgroup_controllers = []\nnamespaces = []\n",
		"virtlogd.conf": "",
	} {
		if err := os.WriteFile(filepath.Join(l.Dir, "etc", name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// Log is the path of libvirtd's log, warnings and errors.
func (l *Lab) Log() string { return filepath.Join(l.Dir, "log/libvirtd.log") }

func (l *Lab) beforeStart() string { return filepath.Join(l.Dir, "before-start") }

// BeforeStart has libvirt run a shell script before it starts QEMU for a
// guest, with the guest's name as $1; the guest starts only if it succeeds.
func (l *Lab) BeforeStart(script string) error {
	return os.WriteFile(l.beforeStart(), []byte("#!/bin/sh\nset -e\n"+script+"\n"), 0o755)
}

// Network defines and starts a libvirt network: a bridge without addresses,
// in the Lab's own network namespace, whose end is also the bridge's.
func (l *Lab) Network(ctx context.Context, name string) error {
	if l.opts.NetNS == "" {
		return fmt.Errorf("network %s needs a Lab with a network namespace", name)
	}
	file := filepath.Join(l.Dir, "network-"+name+".xml")
	if err := os.WriteFile(file, []byte("<network><name>"+name+"</name></network>"), 0o644); err != nil {
		return err
	}
	for _, args := range [][]string{{"net-define", file}, {"net-start", name}} {
		out, err := exec.CommandContext(ctx, "virsh", append([]string{"-q", "-c", l.URI}, args...)...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("virsh %v: %w: %s", args, err, out)
		}
	}
	return nil
}

// GuestDir makes a folder in which QEMU's user may make consoles, images and sockets.
func (l *Lab) GuestDir(name string) (string, error) {
	d := filepath.Join(l.Dir, name)
	if err := os.MkdirAll(d, 0o770); err != nil {
		return "", err
	}
	return d, errors.Join(os.Chmod(d, 0o775), os.Chown(d, -1, l.group))
}

// AllowQEMU lets QEMU's user connect to a socket or use a file.
func (l *Lab) AllowQEMU(path string) error {
	return errors.Join(os.Chown(path, -1, l.group), os.Chmod(path, 0o660))
}

// QEMUUser finds the user and group libvirt runs QEMU as on this machine.
func QEMUUser() (uid, gid int, err error) {
	for _, n := range []string{"libvirt-qemu", "qemu"} {
		u, err1 := user.Lookup(n)
		g, err2 := user.LookupGroup(n)
		if err1 != nil || err2 != nil {
			continue
		}
		uid, err1 = strconv.Atoi(u.Uid)
		gid, err2 = strconv.Atoi(g.Gid)
		return uid, gid, errors.Join(err1, err2)
	}
	return 0, 0, errors.New("no user libvirt-qemu: install libvirt-daemon-system")
}

// StartLibvirtd starts libvirtd again after KillLibvirtd.
func (l *Lab) StartLibvirtd(ctx context.Context) error {
	if err := os.Remove(l.sock); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	var err error
	if l.libvirtd, err = l.spawn("libvirtd"); err != nil {
		return err
	}
	return waitSocket(ctx, l.sock, l.libvirtd)
}

// KillLibvirtd kills libvirtd, as a crash would. Guests go on.
func (l *Lab) KillLibvirtd() error { return l.libvirtd.end(syscall.SIGKILL) }

// Stop ends all guests and daemons of the Lab and removes its folder.
func (l *Lab) Stop() error {
	var errs []error
	if l.libvirtd != nil {
		errs = append(errs, l.libvirtd.end(syscall.SIGTERM))
	}
	errs = append(errs, l.killGuests())
	if l.virtlogd != nil {
		errs = append(errs, l.virtlogd.end(syscall.SIGTERM))
	}
	return errors.Join(append(errs, os.RemoveAll(l.Dir))...)
}

// killGuests kills the QEMU processes libvirt wrote pid files of.
func (l *Lab) killGuests() error {
	files, err := filepath.Glob(filepath.Join(l.Dir, "run/qemu/*.pid"))
	if err != nil {
		return err
	}
	for _, f := range files {
		if filepath.Base(f) == "driver.pid" {
			continue
		}
		pid, err := readPID(f)
		if err != nil {
			return err
		}
		if err := killGuest(pid); err != nil {
			return err
		}
	}
	return nil
}

// GuestPID is the process of a running guest.
func (l *Lab) GuestPID(name string) (int, error) {
	return readPID(filepath.Join(l.Dir, "run/qemu", name+".pid"))
}

func readPID(file string) (int, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(b)))
}

// killGuest makes sure that the pid still is a QEMU's, then kills it and waits.
func killGuest(pid int) error {
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return err
	}
	defer unix.Close(fd)
	exe, err := os.Readlink(fmt.Sprintf("/proc/%d/exe", pid))
	if err != nil || !strings.Contains(exe, "qemu") {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	_, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 10_000)
	return err
}

func waitSocket(ctx context.Context, path string, p *process) error {
	for {
		c, err := net.Dial("unix", path)
		if err == nil {
			return c.Close()
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended: %w", p.name, p.err)
		case <-ctx.Done():
			return fmt.Errorf("%s does not answer: %w", p.name, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// process is a daemon of the Lab.
type process struct {
	name string
	cmd  *exec.Cmd
	done chan struct{}
	err  error // of Wait; valid when done is closed
}

// spawn runs a daemon in its own mount namespace.
func (l *Lab) spawn(name string) (*process, error) {
	ps, err := l.places()
	if err != nil {
		return nil, err
	}
	var script strings.Builder
	// What other tests have mounted they must be able to unmount: a copy in this
	// namespace would keep their file systems in use.
	fmt.Fprintf(&script, "grep -E '^/dev/loop|^[^ ]+ [^ ]+ fuse' /proc/self/mounts | cut -d' ' -f2 | grep '^%s/' | tac | while read -r d; do umount -l \"$d\"; done\n", os.TempDir())
	for _, p := range ps {
		fmt.Fprintf(&script, "mount --bind '%s' '%s' || exit 1\n", p[0], p[1])
	}
	fmt.Fprintf(&script, "exec /usr/sbin/%s -p '%s'\n", name, filepath.Join(l.Dir, name+".pid"))
	args := []string{"unshare", "-m", "--propagation", "private", "sh", "-c", script.String()}
	if l.opts.NetNS != "" {
		args = append([]string{"ip", "netns", "exec", l.opts.NetNS}, args...)
	}
	log, err := os.OpenFile(filepath.Join(l.Dir, name+".out"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	p := &process{name: name, cmd: exec.Command(args[0], args[1:]...), done: make(chan struct{})}
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.Dir = log, log, "/"
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

// end sends a signal and waits; what does not end within 10 seconds is killed.
func (p *process) end(s syscall.Signal) error {
	select {
	case <-p.done:
		return nil
	default:
	}
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return err
	}
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			return err
		}
		<-p.done
	}
	return nil
}
