package guest

import (
	"os/exec"
	"path/filepath"
)

// QEMU is the command that starts a guest without libvirt, under software
// emulation, with its console, acknowledgements and control socket in dir.
// args say what it boots from and what other devices it has.
func QEMU(dir string, args ...string) *exec.Cmd {
	file := func(n string) string { return filepath.Join(dir, n) }
	return exec.Command("qemu-system-x86_64", append(args, "-M", "q35,accel=tcg", "-cpu", "max", "-m", "256", "-nodefaults",
		"-display", "none", "-no-reboot",
		"-serial", "file:"+file(ConsoleFile), "-serial", "file:"+file(AckFile), "-device", "virtio-serial-pci",
		"-chardev", "socket,id=c,path="+file(ControlSock)+",server=on,wait=off",
		"-device", "virtserialport,chardev=c,name=org.kagami.control")...)
}
