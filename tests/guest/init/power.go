package main

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// stop ends the writer, syncs and powers off. The answer is sent before.
func stop(g *guest, _ args, _ func(string)) error { return g.down(unix.LINUX_REBOOT_CMD_POWER_OFF) }

// restart is stop with a reboot.
func restart(g *guest, _ args, _ func(string)) error { return g.down(unix.LINUX_REBOOT_CMD_RESTART) }

func (g *guest) down(cmd int) error {
	g.leaving.Store(true)
	if w := g.takeWriter(); w != nil {
		w.Stop()
	}
	unix.Sync()
	unmountAll()
	go func() {
		time.Sleep(100 * time.Millisecond)
		say("going down: %v", unix.Reboot(cmd))
	}()
	return nil
}

// unmountAll leaves ext4 file systems clean: unmounted, or read-only if in use.
func unmountAll() {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		return
	}
	lines := strings.Split(string(b), "\n")
	slices.Reverse(lines)
	for _, l := range lines {
		w := strings.Fields(l)
		if len(w) < 3 || w[2] != "ext4" || unix.Unmount(w[1], 0) == nil {
			continue
		}
		if err := unix.Mount("", w[1], "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
			say("make %s read-only: %v", w[1], err)
		}
	}
}

// crash restarts at once, nothing synced.
func crash(*guest, args, func(string)) error {
	return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
}

// fitrim is FITRIM of linux/fs.h, _IOWR('X', 121, struct fstrim_range).
const fitrim = 0xc0185879

func fstrim(_ *guest, a args, out func(string)) error {
	dir, err := a.word(0)
	if err != nil {
		return err
	}
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	r := [3]uint64{0, 1<<64 - 1, 0}
	if _, _, e := unix.Syscall(unix.SYS_IOCTL, f.Fd(), fitrim, uintptr(unsafe.Pointer(&r))); e != 0 {
		return e
	}
	out(fmt.Sprint(r[1])) // bytes trimmed
	return nil
}
