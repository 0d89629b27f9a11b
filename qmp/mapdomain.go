package qmp

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"
)

// Mapping says how a VM's definition, as shipped by the source, becomes that of
// its replica at this site. The same definition and Mapping give the same result.
type Mapping struct {
	Name string // of the replica; "": the source's
	UUID string // "" or "keep": the source's; "derive": made from Site and the source's; else a UUID
	MAC  string // "" or "keep": the source's; "derive": made from Site and the source's
	Site string // this site, for what is derived
	Type string // domain type, "kvm" or "qemu"; "": the source's

	Disks    map[string]DiskMap // by target
	Networks []Rename           // names of networks, bridges and host interfaces; To "" leaves the interface out
	Paths    []Rename           // beginnings of paths, the longest that fits wins

	Kernel, Initrd, Cmdline string // of a direct boot; "": the source's, the paths by Paths

	QEMUArguments string   // what is given to QEMU past libvirt: KeepArguments, DropArguments, or "": undecided
	Closed        []string // folders of this host of which only Disks may be named

	// Exists reports that a file or folder is at this site; Network what there is
	// of a libvirt network, bridge or interface. Nil: not asked, taken to be there.
	Exists  func(path string) bool
	Network func(name string) NetworkState
}

// NetworkState is what there is of a network at a site.
type NetworkState int

// States of a network.
const (
	NetworkMissing  NetworkState = iota
	NetworkInactive              // libvirt has it defined, not started: no VM on it starts
	NetworkReady
)

// Rename maps From to To.
type Rename struct{ From, To string }

// DiskMap says what a disk becomes: an export (Socket set), a file (File set) or
// nothing (Drop).
type DiskMap struct {
	Socket, Export string
	ReconnectDelay time.Duration
	File, Format   string // Format "": raw
	Drop           bool
}

// Problem is something a replica needs beyond its protected disks.
type Problem struct {
	Device string // what it is about: a disk's target, "kernel", "network default", …
	Text   string // what is the matter and what to do
	Fatal  bool   // the replica would not start or would lack something the VM cannot do without
}

func (p Problem) String() string { return p.Device + ": " + p.Text }

// mapper is the work of one MapDomain.
type mapper struct {
	m        Mapping
	d        *libvirtxml.Domain
	problems []Problem
}

func (m *mapper) fatal(device, format string, a ...any) {
	m.problems = append(m.problems, Problem{device, fmt.Sprintf(format, a...), true})
}

func (m *mapper) note(device, format string, a ...any) {
	m.problems = append(m.problems, Problem{device, fmt.Sprintf(format, a...), false})
}

// MapDomain makes a replica's definition of a VM's. Problems are what an operator
// should settle today: Define and Start of the result may fail on those that are fatal.
// What belongs to the source's host alone (security labels, CPU pinning, passed-through
// devices, media in drives) is left out of the result. A path of this host that the Mapping does
// not allow (see places) is fatal: the result must then not be defined.
func MapDomain(doc string, mapping Mapping) (out string, problems []Problem, err error) {
	// The definition comes from another site, and libvirtxml was not written to read
	// what an enemy made.
	defer func() {
		if r := recover(); r != nil {
			err = fmt.Errorf("read the VM's definition: it makes libvirtxml panic: %v", r)
		}
	}()
	doc, err = dropAllAttached(doc)
	if err != nil {
		return "", nil, err
	}
	m := &mapper{m: mapping, d: &libvirtxml.Domain{}}
	if err := m.d.Unmarshal(doc); err != nil {
		return "", nil, fmt.Errorf("read the VM's definition: %w", err)
	}
	if m.d.Name == "" || m.d.UUID == "" {
		return "", nil, fmt.Errorf("read the VM's definition: it has no name or UUID")
	}
	if m.d.Devices == nil {
		m.d.Devices = &libvirtxml.DomainDeviceList{}
	}
	if err := m.identity(); err != nil {
		return "", nil, err
	}
	m.kind()
	m.boot()
	m.host()
	if err := m.disks(); err != nil {
		return "", nil, err
	}
	m.interfaces()
	m.chardevs()
	m.graphics()
	m.otherDevices()
	m.programs()
	out, err = m.d.Marshal()
	if err != nil {
		return "", nil, fmt.Errorf("write the replica's definition: %w", err)
	}
	if err := m.places(out); err != nil {
		return "", nil, err
	}
	return out + "\n", m.problems, nil
}

// dropAllAttached removes kagami's own metadata.
func dropAllAttached(doc string) (string, error) {
	spans, err := elements(doc, "domain", "metadata", "attached")
	if err != nil {
		return "", err
	}
	for _, s := range slices.Backward(spans) {
		if strings.Contains(s.of(doc), metaNS) {
			doc = replace(doc, s, "")
		}
	}
	return doc, nil
}

// derive makes n bytes of a site and a value.
func derive(site, what, value string, n int) []byte {
	h := sha256.Sum256([]byte(site + "\x00" + what + "\x00" + value))
	return h[:n]
}

// deriveUUID makes a UUID of version 8 (RFC 9562: made as its maker likes).
func deriveUUID(site, uuid string) string {
	b := derive(site, "uuid", strings.ToLower(uuid), 16)
	b[6], b[8] = b[6]&0x0f|0x80, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[0:4], b[4:6], b[6:8], b[8:10], b[10:16])
}

// deriveMAC makes an address with QEMU's own prefix.
func deriveMAC(site, mac string) string {
	b := derive(site, "mac", strings.ToLower(mac), 3)
	return fmt.Sprintf("52:54:00:%02x:%02x:%02x", b[0], b[1], b[2])
}

func (m *mapper) identity() error {
	m.d.ID = nil
	if m.m.Name != "" {
		m.d.Name = m.m.Name
	}
	switch m.m.UUID {
	case "", "keep":
		return nil
	case "derive":
		m.d.UUID = deriveUUID(m.m.Site, m.d.UUID)
	default:
		if !uuidForm.MatchString(m.m.UUID) {
			return fmt.Errorf("the replica's UUID is %q: allowed are keep, derive and a UUID", m.m.UUID)
		}
		m.d.UUID = m.m.UUID
	}
	// libvirt wants the UUID the guest's firmware tells to be the domain's.
	for _, s := range m.d.SysInfo {
		if s.SMBIOS == nil || s.SMBIOS.System == nil {
			continue
		}
		for i, e := range s.SMBIOS.System.Entry {
			if e.Name == "uuid" {
				s.SMBIOS.System.Entry[i].Value = m.d.UUID
			}
		}
	}
	return nil
}

// kind overrides the domain type. What only KVM can do is left out for QEMU's emulation.
func (m *mapper) kind() {
	was := m.d.Type
	if m.m.Type != "" {
		m.d.Type = m.m.Type
	}
	if m.d.Type != "qemu" || was == "qemu" {
		return
	}
	m.note("type", "the replica runs under software emulation, many times slower than %s: see that KVM works at this site", was)
	if c := m.d.CPU; c != nil {
		c.Mode, c.Match, c.Check, c.Migratable = "maximum", "", "", ""
		c.Model, c.Vendor, c.Features, c.Cache, c.MaxPhysAddr = nil, "", nil, nil, nil
	}
	if f := m.d.Features; f != nil {
		f.HyperV, f.KVM, f.PVSpinlock, f.PMU, f.Viridian = nil, nil, nil, nil, nil
	}
	if c := m.d.Clock; c != nil {
		c.Timer = slices.DeleteFunc(c.Timer, func(t libvirtxml.DomainTimer) bool {
			return t.Name == "kvmclock" || t.Name == "hypervclock" || t.Name == "tsc"
		})
	}
}

// path maps a path by its longest matching beginning.
func (m *mapper) path(p string) string {
	best := -1
	for i, r := range m.m.Paths {
		if r.From != "" && strings.HasPrefix(p, r.From) && (best < 0 || len(r.From) > len(m.m.Paths[best].From)) {
			best = i
		}
	}
	if best < 0 {
		return p
	}
	return m.m.Paths[best].To + strings.TrimPrefix(p, m.m.Paths[best].From)
}

func (m *mapper) exists(p string) bool { return m.m.Exists == nil || m.m.Exists(p) }
