package qmp

import (
	"fmt"
	"strings"
	"testing"
)

// hostileDefinition has an element of the definition's devices, os or root.
func hostileDefinition(devices, os, root string) string {
	return fmt.Sprintf(`<domain type='qemu' xmlns:qemu='http://libvirt.org/schemas/domain/qemu/1.0'><name>a</name>
<uuid>6b1d2c9e-0000-4000-8000-000000000001</uuid><title>/etc/title</title><memory>65536</memory><os><type>hvm</type>%s</os>%s
<devices><disk type='file' device='disk'><source file='/srv/a.raw'/><target dev='vda' bus='virtio'/></disk>%s</devices></domain>`, os, root, devices)
}

// TestHostileDefinition: what a site ships names nothing of this host that the
// configuration does not allow.
func TestHostileDefinition(t *testing.T) {
	for name, c := range map[string]struct{ devices, os, root, path string }{
		"disk of another group": {devices: `<disk type='file' device='disk'><source file='/var/lib/kagami/images/b/vda.raw'/><target dev='vdb' bus='virtio'/></disk>`, path: "/var/lib/kagami/images/b/vda.raw"},
		"export of another group": {devices: `<disk type='network' device='disk'><source protocol='nbd' name='vda'><host transport='unix' socket='/run/kagami/b-vda.sock'/></source><target dev='vdb' bus='virtio'/></disk>`,
			path: "/run/kagami/b-vda.sock"},
		"through an allowed folder": {devices: `<disk type='file' device='disk'><source file='/srv/vm/../../etc/passwd'/><target dev='vdb' bus='virtio'/></disk>`, path: "/srv/vm/../../etc/passwd"},
		"any file":                  {devices: `<disk type='file' device='disk'><source file='/etc/passwd'/><target dev='vdb' bus='virtio'/></disk>`, path: "/etc/passwd"},
		"block device":              {devices: `<disk type='block' device='disk'><source dev='/dev/sda'/><target dev='vdb' bus='virtio'/></disk>`, path: "/dev/sda"},
		"vhost-user disk":           {devices: `<disk type='vhostuser' device='disk'><source type='unix' path='/run/x.sock'/><target dev='vdb' bus='virtio'/></disk>`, path: "/run/x.sock"},
		"reservations":              {devices: `<disk type='network' device='disk'><source protocol='iscsi' name='a/1'><host name='h'/><reservations managed='no'><source type='unix' path='/run/pr.sock' mode='client'/></reservations></source><target dev='vdb' bus='scsi'/></disk>`, path: "/run/pr.sock"},
		"console written as root":   {devices: `<serial type='file'><source path='/etc/cron.d/x'/></serial>`, path: "/etc/cron.d/x"},
		"console's log":             {devices: `<serial type='pty'><log file='/etc/cron.d/x' append='on'/></serial>`, path: "/etc/cron.d/x"},
		"firmware's folder":         {devices: `<serial type='file'><source path='/usr/share/bash-completion/x'/></serial>`, path: "/usr/share/bash-completion/x"},
		"pipe":                      {devices: `<parallel type='pipe'><source path='/run/initctl'/></parallel>`, path: "/run/initctl"},
		"device":                    {devices: `<channel type='dev'><source path='/dev/mem'/><target type='virtio' name='x'/></channel>`, path: "/dev/mem"},
		"shared folder":             {devices: `<filesystem type='mount'><source dir='/etc'/><target dir='x'/></filesystem>`, path: "/etc"},
		"randomness":                {devices: `<rng model='virtio'><backend model='random'>/etc/shadow</backend></rng>`, path: "/etc/shadow"},
		"smart card":                {devices: `<smartcard mode='host-certificates'><certificate>a</certificate><certificate>b</certificate><certificate>c</certificate><database>/etc/pki/nssdb</database></smartcard>`, path: "/etc/pki/nssdb"},
		"persistent memory":         {devices: `<memory model='nvdimm'><source><path>/srv/pmem</path></source><target><size>1024</size></target></memory>`, path: "/srv/pmem"},
		"vhost-user network":        {devices: `<interface type='vhostuser'><source type='unix' path='/run/vhost.sock' mode='client'/></interface>`, path: "/run/vhost.sock"},
		"display socket":            {devices: `<graphics type='vnc' socket='/root/vnc.sock'/>`, path: "/root/vnc.sock"},
		"render node":               {devices: `<graphics type='egl-headless'><gl rendernode='/dev/dri/card0'/></graphics>`, path: "/dev/dri/card0"},
		"TPM's state":               {devices: `<tpm><backend type='emulator'><source type='dir' path='/var/lib/x'/></backend></tpm>`, path: "/var/lib/x"},
		"a kernel elsewhere":        {os: `<initrd>/usr/share/x</initrd>`, path: "/usr/share/x"},
		"kernel":                    {os: `<kernel>/etc/shadow</kernel>`, path: "/etc/shadow"},
		"initrd":                    {os: `<initrd>/etc/shadow</initrd>`, path: "/etc/shadow"},
		"device tree":               {os: `<dtb>/etc/shadow</dtb>`, path: "/etc/shadow"},
		"ACPI table":                {os: `<acpi><table type='slic'>/etc/shadow</table></acpi>`, path: "/etc/shadow"},
		"firmware":                  {os: `<loader readonly='yes' type='pflash'>/etc/shadow</loader>`, path: "/etc/shadow"},
		"firmware variables":        {os: `<nvram>/srv/other_VARS.fd</nvram>`, path: "/srv/other_VARS.fd"},
		"fw_cfg":                    {root: `<sysinfo type='fwcfg'><entry name='opt/x' file='/etc/shadow'/></sysinfo>`, path: "/etc/shadow"},
	} {
		t.Run(name, func(t *testing.T) {
			_, problems, err := MapDomain(hostileDefinition(c.devices, c.os, c.root), Mapping{
				Disks:  map[string]DiskMap{"vda": {Socket: "/run/kagami/a-vda.sock", Export: "vda"}},
				Paths:  []Rename{{"/srv/vm", "/srv/vm"}},
				Closed: []string{"/var/lib/kagami", "/run/kagami"},
			})
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range problems {
				t.Log(p)
				if p.Fatal && strings.Contains(p.Text, c.path) {
					return
				}
			}
			t.Errorf("nothing says that %s must not be named", c.path)
		})
	}
}

// TestHostilePrograms: nothing that a site ships says what this host runs.
func TestHostilePrograms(t *testing.T) {
	doc := hostileDefinition(`<emulator>/bin/sh</emulator>
<interface type='ethernet'><script path='evil'/><downscript path='/tmp/evil'/></interface>
<filesystem type='mount'><driver type='virtiofs'/><binary path='evil'/><source dir='/srv/vm/x'/><target dir='x'/></filesystem>`, "",
		`<qemu:commandline><qemu:arg value='-chardev'/><qemu:arg value='file,path=evil,id=x'/><qemu:env name='LD_PRELOAD' value='evil'/></qemu:commandline>`)
	m := Mapping{Disks: map[string]DiskMap{"vda": {Socket: "/run/kagami/a-vda.sock", Export: "vda"}}, Paths: []Rename{{"/srv/vm", "/srv/vm"}}}
	out, problems, err := MapDomain(doc, m)
	if err != nil {
		t.Fatal(err)
	}
	for _, word := range []string{"evil", "/bin/sh"} {
		if strings.Contains(out, word) {
			t.Errorf("%q is left:\n%s", word, out)
		}
	}
	if len(problems) == 0 || !problems[len(problems)-1].Fatal {
		t.Errorf("that QEMU's arguments are undecided is not fatal: %v", problems)
	}
	m.QEMUArguments = KeepArguments
	if out, _, err = MapDomain(doc, m); err != nil || !strings.Contains(out, "LD_PRELOAD") {
		t.Errorf("arguments that may be kept are not: %v\n%s", err, out)
	}
}

// TestAllowedPlaces: what a rule leads to, firmware, and what libvirt makes up is no problem.
func TestAllowedPlaces(t *testing.T) {
	doc := hostileDefinition(`<serial type='file'><source path='/srv/vm/console.log'/></serial>
<channel type='unix'><source mode='bind' path='/var/lib/libvirt/qemu/channel/target/domain-1-a/org.qemu.guest_agent.0'/><target type='virtio' name='org.qemu.guest_agent.0'/></channel>
<rng model='virtio'><backend model='random'>/dev/urandom</backend></rng>`,
		`<loader readonly='yes' type='pflash'>/usr/share/OVMF/OVMF_CODE.fd</loader><nvram template='/usr/share/OVMF/OVMF_VARS.fd'>/var/lib/libvirt/qemu/nvram/b_VARS.fd</nvram>
<kernel>/srv/vmlinuz-a</kernel><initrd>/boot/initrd-a</initrd><cmdline>/sbin/init</cmdline>`, "")
	out, problems, err := MapDomain(doc, Mapping{Disks: map[string]DiskMap{"vda": {Socket: "/run/kagami/a-vda.sock", Export: "vda"}},
		Paths: []Rename{{"/srv/vm", "/srv/vm"}}, Kernel: "/srv/vmlinuz-b", Closed: []string{"/run/kagami"}})
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Fatal {
			t.Errorf("%v", p)
		}
	}
	if strings.Contains(out, "b_VARS.fd") || strings.Contains(out, "domain-1-a") {
		t.Errorf("paths that libvirt made up at the source are left:\n%s", out)
	}
}
