package qmp

import (
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"path"
	"slices"
	"strings"
)

// A definition is shipped by another site, which is an enemy until proven
// otherwise, and libvirt acts on it as root: a disk or kernel is given to QEMU's
// user, a console's file is written, a script is run. So what it may name of
// this host is decided by this host's configuration alone:
//
//   - files the Mapping names: Disks, Kernel, Initrd
//   - what lies below the To of one of its Paths
//   - firmware below /usr/share, kernels below /boot, sources of random numbers
//
// places looks at the finished definition as a whole, at every attribute and text that
// is an absolute path, so that an element nobody thought of is covered too.

// Words of the configuration's qemu_arguments.
const (
	KeepArguments = "keep"
	DropArguments = "drop"
)

var (
	// packaged are elements of the definition, and where packages put what they name.
	packaged = map[string]string{"domain/os/loader": "/usr/share/", "domain/os/nvram@template": "/usr/share/",
		"domain/os/kernel": "/boot/", "domain/os/initrd": "/boot/"}
	randomness = []string{"/dev/urandom", "/dev/random", "/dev/hwrng"}
	// words are elements whose text is for people or for the guest.
	words = []string{"domain/title", "domain/description", "domain/os/cmdline"}
	// libvirtDirs are where libvirt itself puts sockets and firmware variables when
	// a definition names no place.
	libvirtDirs = []string{"/var/lib/libvirt/qemu/", "/run/libvirt/qemu/"}
)

// places reports every path of the finished definition that is not allowed.
func (m *mapper) places(doc string) error {
	var stack []string
	d := xml.NewDecoder(strings.NewReader(doc))
	for {
		t, err := d.Token()
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("read the replica's definition: %w", err)
		}
		switch t := t.(type) {
		case xml.StartElement:
			stack = append(stack, t.Name.Local)
			for _, a := range t.Attr {
				m.place(strings.Join(stack, "/")+"@"+a.Name.Local, a.Value)
			}
		case xml.EndElement:
			stack = stack[:len(stack)-1]
		case xml.CharData:
			m.place(strings.Join(stack, "/"), strings.TrimSpace(string(t)))
		}
	}
}

// place reports a value at a place of the definition if it is a path that is not allowed.
func (m *mapper) place(where, value string) {
	if !strings.HasPrefix(value, "/") || slices.Contains(words, where) || strings.HasPrefix(where, "domain/metadata") {
		return
	}
	if slices.ContainsFunc(m.problems, func(p Problem) bool { return p.Fatal && strings.Contains(p.Text, value) }) {
		return // it is being refused already
	}
	device := strings.TrimPrefix(strings.TrimPrefix(where, "domain/"), "devices/")
	switch {
	case m.named(value):
	case path.Clean(value) != strings.TrimSuffix(value, "/"):
		m.fatal(device, "the path %s is not a plain one: map it in the group's domain section", value)
	case slices.ContainsFunc(m.m.Closed, func(dir string) bool { return within(value, dir) }):
		m.fatal(device, "%s belongs to kagami at this site", value)
	case m.allowed(value), packaged[where] != "" && strings.HasPrefix(value, packaged[where]), slices.Contains(randomness, value):
	default:
		m.fatal(device, "the VM's definition names %s of this site: allow it in the group's domain section (paths, from: %s, to: %s), or map it to another", value, value, value)
	}
}

// named reports a file that the mapping itself names.
func (m *mapper) named(p string) bool {
	for _, d := range m.m.Disks {
		if p == d.Socket || p == d.File {
			return true
		}
	}
	return p == m.m.Kernel || p == m.m.Initrd
}

// allowed reports that a rule for paths leads to p.
func (m *mapper) allowed(p string) bool {
	return slices.ContainsFunc(m.m.Paths, func(r Rename) bool { return r.To != "" && strings.HasPrefix(p, r.To) })
}

// within reports that p is dir or lies below it.
func within(p, dir string) bool {
	return dir != "" && (p == dir || strings.HasPrefix(p, strings.TrimSuffix(dir, "/")+"/"))
}

// programs removes what the source's definition would have this host run.
func (m *mapper) programs() {
	d := m.d.Devices
	if e := m.path(d.Emulator); m.allowed(e) && m.exists(e) {
		d.Emulator = e
	} else {
		d.Emulator = "" // libvirt finds its own
	}
	for i := range d.Interfaces {
		n := &d.Interfaces[i]
		if n.Script != nil || n.DownScript != nil {
			m.note("interface", "a script of the source's host is left out")
			n.Script, n.DownScript = nil, nil
		}
	}
	for i := range d.Filesystems {
		if b := d.Filesystems[i].Binary; b != nil {
			if b.Path = m.path(b.Path); !m.allowed(b.Path) {
				b.Path = "" // libvirt finds its own
			}
		}
	}
	m.qemuArguments()
}

// qemuArguments keeps or drops what is given to QEMU past libvirt, as the
// configuration says.
func (m *mapper) qemuArguments() {
	d := m.d
	if d.QEMUCommandline == nil && d.QEMUOverride == nil && d.QEMUCapabilities == nil && d.QEMUDeprecation == nil {
		return
	}
	switch m.m.QEMUArguments {
	case KeepArguments:
		m.note("qemu:commandline", "arguments are given to QEMU past libvirt: see that they fit this site")
		return
	case DropArguments:
		m.note("qemu:commandline", "arguments given to QEMU past libvirt are left out")
	default:
		m.fatal("qemu:commandline", "arguments are given to QEMU past libvirt: say in the group's domain section whether this site keeps them (qemu_arguments: keep or drop)")
	}
	d.QEMUCommandline, d.QEMUOverride, d.QEMUCapabilities, d.QEMUDeprecation = nil, nil, nil, nil
}

// libvirtsOwn is true for a path that libvirt made up at the source and makes
// up anew here.
func libvirtsOwn(p string) bool {
	return slices.ContainsFunc(libvirtDirs, func(dir string) bool { return strings.HasPrefix(p, dir) })
}
