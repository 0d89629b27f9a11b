package qmp

import (
	"path"
	"regexp"

	"libvirt.org/go/libvirtxml"
)

var uuidForm = regexp.MustCompile(`^[0-9a-fA-F]{8}(-[0-9a-fA-F]{4}){3}-[0-9a-fA-F]{12}$`)

// boot maps what firmware and direct boot need from files.
func (m *mapper) boot() {
	os := m.d.OS
	if os == nil {
		return
	}
	os.Kernel = m.bootFile("kernel", os.Kernel, m.m.Kernel)
	os.Initrd = m.bootFile("initrd", os.Initrd, m.m.Initrd)
	os.DTB = m.bootFile("dtb", os.DTB, "")
	os.Shim = m.bootFile("shim", os.Shim, "")
	if m.m.Cmdline != "" && os.Kernel != "" {
		os.Cmdline = m.m.Cmdline
	}
	if os.Loader != nil {
		os.Loader.Path = m.bootFile("firmware", os.Loader.Path, "")
	}
	if n := os.NVRam; n != nil {
		if n.NVRam = m.path(n.NVRam); libvirtsOwn(n.NVRam) && !m.allowed(n.NVRam) {
			n.NVRam = "" // libvirt makes one
		}
		if n.Source != nil && n.Source.File != nil {
			n.Source.File.File = m.path(n.Source.File.File)
		}
		n.Template = m.bootFile("firmware template", n.Template, "")
	}
	if os.Firmware != "" || os.NVRam != nil {
		m.note("firmware", "the UEFI variables are not replicated: the replica starts with fresh ones, so the boot entry must be the default one (EFI/BOOT)")
	}
}

func (m *mapper) bootFile(what, source, mapped string) string {
	if source == "" {
		return ""
	}
	p := mapped
	if p == "" {
		p = m.path(source)
	}
	if !m.exists(p) {
		m.fatal(what, "%s is not at this site: provide it, or map its path in the group's domain section", p)
	}
	return p
}

// host removes what binds a VM to the source's host.
func (m *mapper) host() {
	d := m.d
	d.SecLabel = nil
	if d.VCPU != nil {
		d.VCPU.CPUSet = ""
	}
	if c := d.CPUTune; c != nil {
		c.VCPUPin, c.EmulatorPin, c.IOThreadPin, c.CacheTune, c.MemoryTune = nil, nil, nil, nil, nil
	}
	d.NUMATune = nil
	if d.BlockIOTune != nil {
		d.BlockIOTune.Device = nil
	}
	d.Resource = nil
	if b := d.MemoryBacking; b != nil && b.MemoryHugePages != nil {
		m.note("memory", "the VM uses huge pages: reserve as many at this site, or it will not start")
	}
	if d.LaunchSecurity != nil {
		m.note("launch security", "the VM is encrypted by its host's processor: this site's must be able to, too")
	}
	if c := d.CPU; c != nil && (c.Mode == "host-passthrough" || c.Mode == "custom" && c.Check == "full") {
		m.note("cpu", "the VM is given its host's processor as it is: this site's should be of the same kind")
	}
}

// chardevs maps consoles and channels.
func (m *mapper) chardevs() {
	d := m.d.Devices
	for i := range d.Serials {
		m.chardev("serial", d.Serials[i].Source, d.Serials[i].Log)
	}
	for i := range d.Parallels {
		m.chardev("parallel", d.Parallels[i].Source, d.Parallels[i].Log)
	}
	for i := range d.Consoles {
		m.chardev("console", d.Consoles[i].Source, d.Consoles[i].Log)
	}
	for i := range d.Channels {
		m.chardev("channel", d.Channels[i].Source, d.Channels[i].Log)
	}
	for i := range d.RedirDevs {
		m.chardev("redirdev", d.RedirDevs[i].Source, nil)
	}
	for i := range d.Smartcards {
		m.chardev("smartcard", d.Smartcards[i].Passthrough, nil)
	}
	for i := range d.RNGs {
		if b := d.RNGs[i].Backend; b != nil && b.EGD != nil {
			m.chardev("rng", b.EGD.Source, nil)
		}
	}
}

func (m *mapper) chardev(what string, s *libvirtxml.DomainChardevSource, log *libvirtxml.DomainChardevLog) {
	if log != nil {
		log.File = m.newFile(what+" log", log.File)
	}
	switch {
	case s == nil:
	case s.File != nil:
		s.File.Path, s.File.SecLabel = m.newFile(what, s.File.Path), nil
	case s.UNIX != nil && s.UNIX.Path != "":
		s.UNIX.SecLabel = nil
		if libvirtsOwn(s.UNIX.Path) && !m.allowed(m.path(s.UNIX.Path)) {
			s.UNIX.Path = "" // each start makes one
			return
		}
		s.UNIX.Path = m.newFile(what, s.UNIX.Path)
		if s.UNIX.Mode == "connect" {
			m.note(what, "it connects to %s: a server must listen there when the replica starts", s.UNIX.Path)
		}
	case s.Pipe != nil:
		s.Pipe.Path, s.Pipe.SecLabel = m.bootFile(what, s.Pipe.Path, ""), nil
	case s.Dev != nil:
		s.Dev.Path, s.Dev.SecLabel = m.bootFile(what, s.Dev.Path, ""), nil
	case s.Pty != nil:
		s.Pty.Path, s.Pty.SecLabel = "", nil // each start makes one
	}
}

// newFile maps the path of a file or socket that is made at start: its folder must be there.
func (m *mapper) newFile(what, p string) string {
	if p == "" {
		return ""
	}
	p = m.path(p)
	if dir := path.Dir(p); !m.exists(dir) {
		m.fatal(what, "its folder %s is not at this site: make it, or map its path in the group's domain section", dir)
	}
	return p
}

// graphics keeps a display from listening on an address of the source's host.
func (m *mapper) graphics() {
	for i := range m.d.Devices.Graphics {
		g := &m.d.Devices.Graphics[i]
		switch {
		case g.VNC != nil:
			g.VNC.Socket = m.newFile("graphics", g.VNC.Socket)
			m.listen("VNC", &g.VNC.Listen, g.VNC.Listeners)
		case g.Spice != nil:
			m.listen("SPICE", &g.Spice.Listen, g.Spice.Listeners)
		case g.RDP != nil:
			m.listen("RDP", &g.RDP.Listen, g.RDP.Listeners)
		}
	}
}

// anyHost are addresses every host has.
var anyHost = map[string]bool{"": true, "0.0.0.0": true, "127.0.0.1": true, "::": true, "::1": true, "localhost": true}

const loopback = "127.0.0.1"

func (m *mapper) listen(what string, attr *string, ls []libvirtxml.DomainGraphicListener) {
	if !anyHost[*attr] {
		m.note("graphics", "%s listens on %s at the source: the replica's listens on %s", what, *attr, loopback)
		*attr = loopback
	}
	for i := range ls {
		switch {
		case ls[i].Address != nil && !anyHost[ls[i].Address.Address]:
			ls[i].Address.Address = loopback
		case ls[i].Network != nil:
			m.note("graphics", "%s listens on network %s at the source: the replica's listens on %s", what, ls[i].Network.Network, loopback)
			ls[i] = libvirtxml.DomainGraphicListener{Address: &libvirtxml.DomainGraphicListenerAddress{Address: loopback}}
		case ls[i].Socket != nil:
			ls[i].Socket.Socket = m.newFile("graphics", ls[i].Socket.Socket)
		}
	}
}

// otherDevices deals with devices that are a piece of the source's host.
func (m *mapper) otherDevices() {
	d := m.d.Devices
	for range d.Hostdevs {
		m.note("hostdev", "a device of the source's host is passed through: the replica comes without it")
	}
	d.Hostdevs = nil
	var tpms []libvirtxml.DomainTPM
	for _, t := range d.TPMs {
		if t.Backend != nil && t.Backend.Emulator == nil {
			m.note("tpm", "the source's host's own TPM is passed through: the replica comes without one")
			continue
		}
		m.note("tpm", "the emulated TPM's state is not replicated: the replica's is empty, so have the recovery keys of encrypted disks at hand")
		tpms = append(tpms, t)
	}
	d.TPMs = tpms
	for i := range d.Filesystems {
		m.filesystem(&d.Filesystems[i])
	}
	for _, s := range d.Shmems {
		m.note("shmem", "memory %q is shared with other programs of the source's host", s.Name)
	}
	if len(d.Leases) > 0 {
		m.note("lease", "leases of the source's lock manager are left out")
		d.Leases = nil
	}
	m.smallDevices()
}

// smallDevices drops what names devices of a host without being worth a stop.
func (m *mapper) smallDevices() {
	d := m.d.Devices
	var inputs []libvirtxml.DomainInput
	for _, in := range d.Inputs {
		if in.Type == "passthrough" || in.Type == "evdev" {
			m.note("input", "an input device of the source's host is passed through: the replica comes without it")
			continue
		}
		inputs = append(inputs, in)
	}
	d.Inputs = inputs
	if d.PStore != nil {
		d.PStore.Path = m.newFile("pstore", d.PStore.Path)
	}
}

func (m *mapper) filesystem(f *libvirtxml.DomainFilesystem) {
	switch s := f.Source; {
	case s == nil:
	case s.Mount != nil && s.Mount.Socket != "":
		s.Mount.Socket = m.bootFile("filesystem", s.Mount.Socket, "")
	case s.Mount != nil:
		s.Mount.Dir = m.bootFile("filesystem", s.Mount.Dir, "")
		m.note("filesystem", "the shared folder %s is not replicated by kagami", s.Mount.Dir)
	case s.File != nil:
		s.File.File = m.bootFile("filesystem", s.File.File, "")
	default:
		m.note("filesystem", "a file system of the source's host is passed through, which kagami does not replicate")
	}
}
