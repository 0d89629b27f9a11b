package guest

import (
	"fmt"
	"path/filepath"
	"strings"
)

// Cmdline is the kernel's command line of test guests. Errors of the block
// layer are printed on the console.
const Cmdline = "console=ttyS0 loglevel=4 panic=-1 mitigations=off nokaslr"

// Names of the files a guest of Domain has in its folder.
const (
	ConsoleFile = "console.log"  // ttyS0: the kernel's and init's messages
	AckFile     = "acks.log"     // ttyS1: what the writer acknowledged
	ControlSock = "control.sock" // commands, see Console
)

// Domain says what a test guest is made of.
type Domain struct {
	Name string
	UUID string // empty: libvirt makes one
	Type string // "qemu" or "kvm"; qemu when empty
	// Dir holds console, acknowledgements and sockets. QEMU's user must be able to
	// enter it and make files in it.
	Dir string
	// Kernel and Initrd boot the guest; both empty: it boots from its first disk.
	Kernel, Initrd string
	Disks          []string // <disk> elements, see FileDisk
	Extra          string   // further device elements
	MemoryMiB      int      // 256 when 0
}

// FileDisk is a <disk> element of a raw file, cache mode none.
func FileDisk(path, target string) string {
	return fmt.Sprintf(`<disk type='file' device='disk'>
      <driver name='qemu' type='raw' cache='none' discard='unmap'/>
      <source file='%s'/>
      <target dev='%s' bus='virtio'/>
    </disk>`, path, target)
}

// NIC is an <interface> element on a libvirt network, for Domain.Extra.
func NIC(network, mac string) string {
	return fmt.Sprintf("<interface type='network'><mac address='%s'/><source network='%s'/><model type='virtio'/></interface>", mac, network)
}

// XML is the domain's definition. Paths must need no quoting.
func (d Domain) XML() string {
	kind, mem, uuid, boot := d.Type, d.MemoryMiB, "", "<boot dev='hd'/>"
	if kind == "" {
		kind = "qemu"
	}
	if mem == 0 {
		mem = 256
	}
	if d.UUID != "" {
		uuid = "<uuid>" + d.UUID + "</uuid>"
	}
	if d.Kernel != "" {
		boot = fmt.Sprintf("<kernel>%s</kernel><initrd>%s</initrd><cmdline>%s</cmdline>", d.Kernel, d.Initrd, Cmdline)
	}
	file := func(n string) string { return filepath.Join(d.Dir, n) }
	return fmt.Sprintf(domainXML, kind, d.Name, uuid, mem, boot, strings.Join(d.Disks, "\n    "),
		file(ConsoleFile), file(AckFile), file(ControlSock), d.Extra)
}

const domainXML = `<domain type='%s'>
  <name>%s</name>
  %s
  <memory unit='MiB'>%d</memory>
  <vcpu>1</vcpu>
  <os><type arch='x86_64' machine='q35'>hvm</type>%s</os>
  <features><acpi/></features>
  <cpu mode='maximum'/>
  <on_poweroff>destroy</on_poweroff>
  <on_reboot>restart</on_reboot>
  <on_crash>destroy</on_crash>
  <devices>
    %s
    <serial type='file'><source path='%s'/><target port='0'/></serial>
    <serial type='file'><source path='%s'/><target port='1'/></serial>
    <channel type='unix'>
      <source mode='bind' path='%s'/>
      <target type='virtio' name='org.kagami.control'/>
    </channel>
    <channel type='unix'><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
    <memballoon model='none'/>
    <rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>
    %s
  </devices>
</domain>
`
