package guest

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// DomainType is "kvm" where a guest really boots under KVM within 20 seconds,
// else "qemu", software emulation. That /dev/kvm is there, or that libvirt lists
// KVM, proves nothing: nested KVM may abort on a stock kernel.
func DomainType(ctx context.Context, kernel, initrd string) string {
	if _, err := os.Stat("/dev/kvm"); err != nil {
		return "qemu"
	}
	dir, err := os.MkdirTemp("", "kagami-kvm-")
	if err != nil {
		return "qemu"
	}
	defer os.RemoveAll(dir)
	log := filepath.Join(dir, "console")
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c := exec.CommandContext(ctx, "qemu-system-x86_64", "-M", "q35,accel=kvm", "-cpu", "host", "-m", "256", "-nodefaults",
		"-display", "none", "-no-reboot", "-serial", "file:"+log, "-kernel", kernel, "-initrd", initrd, "-append", Cmdline)
	if c.Start() != nil {
		return "qemu"
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = c.Wait() // killed, or it could not boot: both are told below
	}()
	for {
		b, _ := os.ReadFile(log) // not there yet: nothing read
		if bytes.Contains(b, []byte("READY")) {
			cancel()
			<-ended
			return "kvm"
		}
		select {
		case <-ended:
			return "qemu"
		case <-time.After(50 * time.Millisecond):
		}
	}
}
