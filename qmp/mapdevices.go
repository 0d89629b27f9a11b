package qmp

import (
	"encoding/xml"
	"fmt"
	"maps"
	"slices"

	"libvirt.org/go/libvirtxml"
)

// disks maps each disk: to an export, to a file, to nothing, or as it is.
func (m *mapper) disks() error {
	var kept []libvirtxml.DomainDisk
	seen := map[string]bool{}
	for i := range m.d.Devices.Disks {
		d := m.d.Devices.Disks[i]
		if d.Target == nil || d.Target.Dev == "" {
			return fmt.Errorf("read the VM's definition: a disk has no target")
		}
		dropAlias(&d)
		d.Mirror = nil
		seen[d.Target.Dev] = true
		n, err := m.disk(d, m.m.Disks[d.Target.Dev])
		if err != nil {
			return err
		}
		if n != nil {
			kept = append(kept, *n)
		}
	}
	m.d.Devices.Disks = kept
	for _, t := range slices.Sorted(maps.Keys(m.m.Disks)) {
		if !seen[t] && !m.m.Disks[t].Drop {
			m.fatal(t, "the VM has no such disk: take it out of the mapping")
		}
	}
	return nil
}

// disk is what one disk becomes; nil: nothing.
func (m *mapper) disk(d libvirtxml.DomainDisk, to DiskMap) (*libvirtxml.DomainDisk, error) {
	var element string
	var err error
	switch {
	case to.Drop:
		return nil, nil
	case to.Socket != "":
		element, err = attachedDisk(&d, to.Socket, to.Export, to.ReconnectDelay)
	case to.File != "":
		if !m.exists(to.File) {
			m.fatal(d.Target.Dev, "its file %s is not at this site: put it there, or map the disk to another", to.File)
		}
		format := to.Format
		if format == "" {
			format = "raw"
		}
		element, err = fileDisk(&d, &d, to.File, format)
	default:
		return m.unmapped(d), nil
	}
	if err != nil {
		return nil, err
	}
	var n libvirtxml.DomainDisk
	if err := xml.Unmarshal([]byte(element), &n); err != nil {
		return nil, fmt.Errorf("map disk %s: %w", d.Target.Dev, err)
	}
	return &n, nil
}

// unmapped is a disk that is neither protected nor mapped.
func (m *mapper) unmapped(d libvirtxml.DomainDisk) *libvirtxml.DomainDisk {
	x := diskOf(&d)
	d.BackingStore = nil // libvirt looks again
	if x.Device == "cdrom" || x.Device == "floppy" {
		if x.Kind != "" {
			m.note(x.Target, "the medium %s is left out: the replica's drive is empty", x.Source)
		}
		d.Source = nil
		return &d
	}
	switch x.Kind {
	case "file":
		d.Source.File.File = m.path(x.Source)
		d.Source.File.SecLabel = nil
		if !m.exists(d.Source.File.File) {
			m.fatal(x.Target, "it is not protected and its file %s is not at this site: protect it, map it to a file of this site, or drop it", d.Source.File.File)
		} else {
			m.note(x.Target, "it is not protected: the replica uses this site's file %s", d.Source.File.File)
		}
	case "network":
		m.note(x.Target, "it is not protected: the replica uses %s, which this site must reach, and the source must not use any more", x.Source)
	default:
		m.fatal(x.Target, "it is not protected and its source (%s %s) belongs to the other host: protect it, map it to a file of this site, or drop it", x.Kind, x.Source)
	}
	return &d
}

// rename maps a network, bridge or interface name; mapped tells if a rule did.
func (m *mapper) rename(name string) (to string, mapped bool) {
	for _, r := range m.m.Networks {
		if r.From == name {
			return r.To, true
		}
	}
	return name, false
}

// interfaces maps network interfaces; one whose network is mapped to nothing is left out.
func (m *mapper) interfaces() {
	var kept []libvirtxml.DomainInterface
	for i := range m.d.Devices.Interfaces {
		n := m.d.Devices.Interfaces[i]
		if n.MAC != nil && m.m.MAC == "derive" {
			n.MAC.Address = deriveMAC(m.m.Site, n.MAC.Address)
		}
		if n.FilterRef != nil {
			m.note("interface", "it uses the network filter %s: define it at this site", n.FilterRef.Filter)
		}
		if n.Source == nil || m.attachment(n.Source) {
			kept = append(kept, n)
		}
	}
	m.d.Devices.Interfaces = kept
}

// attachment maps what an interface is plugged into; false: into nothing.
func (m *mapper) attachment(s *libvirtxml.DomainInterfaceSource) bool {
	switch {
	case s.Network != nil:
		s.Network.Bridge, s.Network.PortID = "", ""
		return m.network("network", &s.Network.Network)
	case s.Bridge != nil:
		return m.network("bridge", &s.Bridge.Bridge)
	case s.Direct != nil:
		return m.network("host interface", &s.Direct.Dev)
	case s.User != nil, s.Null != nil, s.Internal != nil:
		return true
	case s.VHostUser != nil && s.VHostUser.Chardev != nil:
		if u := s.VHostUser.Chardev.UNIX; u != nil {
			u.Path = m.bootFile("interface", u.Path, "")
		}
		return true
	case s.Hostdev != nil, s.VDPA != nil:
		m.note("interface", "a network device of the source's host is passed through: the replica comes without it")
		return false
	}
	m.note("interface", "it is connected in a way of the source's host: see that it fits this site")
	return true
}

func (m *mapper) network(what string, name *string) bool {
	to, mapped := m.rename(*name)
	if mapped && to == "" {
		m.note(what+" "+*name, "it is mapped to nothing: the replica comes without this interface")
		return false
	}
	if m.m.Network != nil {
		switch m.m.Network(to) {
		case NetworkMissing:
			m.fatal(what+" "+*name, "%s is not at this site: define it, or map it to another in the group's domain section", to)
		case NetworkInactive:
			m.fatal(what+" "+*name, "%s is defined at this site but not active: virsh net-start %s, and virsh net-autostart %s", to, to, to)
		}
	}
	*name = to
	return true
}
