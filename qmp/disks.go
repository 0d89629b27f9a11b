package qmp

import (
	"encoding/xml"
	"fmt"
	"slices"
	"strings"

	"libvirt.org/go/libvirtxml"
)

// Disk is one disk of a VM as its definition has it: the running one if the VM
// runs, else the stored one.
type Disk struct {
	Target    string // vda, sda, …
	Bus       string // virtio, scsi, sata, …
	Device    string // disk, cdrom, floppy or lun
	Kind      string // file, block, network, volume, …; empty: no medium
	Source    string // path of a file or block device, else words that name the source
	Socket    string // of an NBD export on a unix socket
	Export    string // its name
	Format    string // raw, qcow2, …
	Cache     string // none, writeback, …; empty: the hypervisor's default
	Serial    string
	Size      int64 // bytes the guest sees; 0 if libvirt cannot tell
	Boot      int   // place in the boot order from 1; 0: not booted from, or not known
	ReadOnly  bool
	Shareable bool
	Encrypted bool // by libvirt
	Transient bool // changes are thrown away at the end
	Job       bool // a block job is running on it
	Running   bool // the VM runs

	alias   string // device id in QEMU; only of a running VM
	discard string
}

// parseDisk reads one <disk> element.
func parseDisk(element string) (*libvirtxml.DomainDisk, error) {
	var d libvirtxml.DomainDisk
	if err := xml.Unmarshal([]byte(element), &d); err != nil {
		return nil, fmt.Errorf("read a <disk>: %w", err)
	}
	if d.Target == nil || d.Target.Dev == "" {
		return nil, fmt.Errorf("read a <disk>: %w", fmt.Errorf("it has no target"))
	}
	return &d, nil
}

// findDisk is the <disk> element of a target.
func findDisk(doc, vm, target string) (span, *libvirtxml.DomainDisk, error) {
	spans, err := elements(doc, "domain", "devices", "disk")
	if err != nil {
		return span{}, nil, err
	}
	var have []string
	for _, s := range spans {
		d, err := parseDisk(s.of(doc))
		if err != nil {
			return span{}, nil, err
		}
		if d.Target.Dev == target {
			return s, d, nil
		}
		have = append(have, d.Target.Dev)
	}
	return span{}, nil, advise(ErrNoDisk, "%s has no disk %q: it has %s", vm, target, list(have))
}

func list(names []string) string {
	if len(names) == 0 {
		return "none"
	}
	return strings.Join(names, ", ")
}

// parseDisks reads all disks of a definition.
func parseDisks(doc string) ([]Disk, error) {
	spans, err := elements(doc, "domain", "devices", "disk")
	if err != nil {
		return nil, err
	}
	var ds []Disk
	for _, s := range spans {
		x, err := parseDisk(s.of(doc))
		if err != nil {
			return nil, err
		}
		ds = append(ds, diskOf(x))
	}
	return ds, bootOrder(doc, ds)
}

func diskOf(x *libvirtxml.DomainDisk) Disk {
	d := Disk{
		Target: x.Target.Dev, Bus: x.Target.Bus, Device: x.Device, Serial: x.Serial,
		ReadOnly: x.ReadOnly != nil, Shareable: x.Shareable != nil, Transient: x.Transient != nil,
		Encrypted: x.Encryption != nil, Job: x.Mirror != nil,
	}
	if d.Device == "" {
		d.Device = "disk"
	}
	if x.Driver != nil {
		d.Format, d.Cache, d.discard = x.Driver.Type, x.Driver.Cache, x.Driver.Discard
	}
	if x.Boot != nil {
		d.Boot = int(x.Boot.Order)
	}
	if x.Alias != nil {
		d.alias = x.Alias.Name
	}
	if x.Source != nil {
		d.source(x.Source)
	}
	return d
}

func (d *Disk) source(s *libvirtxml.DomainDiskSource) {
	d.Encrypted = d.Encrypted || s.Encryption != nil
	switch {
	case s.File != nil && s.File.File != "":
		d.Kind, d.Source = "file", s.File.File
	case s.Block != nil && s.Block.Dev != "":
		d.Kind, d.Source = "block", s.Block.Dev
	case s.Volume != nil:
		d.Kind, d.Source = "volume", s.Volume.Pool+"/"+s.Volume.Volume
	case s.Network != nil:
		d.Kind = "network"
		d.network(s.Network)
	case s.Dir != nil:
		d.Kind, d.Source = "dir", s.Dir.Dir
	case s.NVME != nil:
		d.Kind, d.Source = "nvme", "a passed-through NVMe device"
	case s.VHostUser != nil, s.VHostVDPA != nil:
		d.Kind, d.Source = "vhost", "a vhost device"
	}
}

func (d *Disk) network(n *libvirtxml.DomainDiskSourceNetwork) {
	d.Source = strings.TrimSuffix(n.Protocol+" "+n.Name, " ")
	if n.Protocol == "nbd" && len(n.Hosts) == 1 && n.Hosts[0].Transport == "unix" {
		d.Socket, d.Export = n.Hosts[0].Socket, n.Name
		d.Source += " at " + d.Socket
	}
}

// bootOrder gives the first hard disk place 1 when the definition boots from
// "hd" and not by places of its own.
func bootOrder(doc string, ds []Disk) error {
	if slices.ContainsFunc(ds, func(d Disk) bool { return d.Boot > 0 }) {
		return nil
	}
	spans, err := elements(doc, "domain", "os", "boot")
	if err != nil {
		return err
	}
	place := 0
	for _, s := range spans {
		var b libvirtxml.DomainBootDevice
		if err := xml.Unmarshal([]byte(s.of(doc)), &b); err != nil {
			return fmt.Errorf("read the boot order: %w", err)
		}
		place++
		i := slices.IndexFunc(ds, func(d Disk) bool { return d.Device == "disk" || d.Device == "lun" })
		if b.Dev == "hd" && i >= 0 {
			ds[i].Boot = place
		}
	}
	return nil
}

// Unsuited says why a disk cannot be protected; nil if it can.
func (d Disk) Unsuited() error {
	no := func(why, todo string) error {
		return advise(ErrUnsuited, "disk %s cannot be protected: %s; %s", d.Target, why, todo)
	}
	switch {
	case d.Device != "disk":
		return no("it is a "+d.Device, "protect the other disks")
	case d.Kind == "":
		return no("it has no source", "give it one or leave it out")
	case d.ReadOnly:
		return no("it is read-only", "map a copy of it at the replica site instead")
	case d.Shareable:
		return no("it is shareable, and so may be written by another VM", "protect disks of one VM only")
	case d.Transient:
		return no("it is transient, its changes are thrown away", "leave it out")
	case d.Cache == "unsafe":
		return no("its cache mode 'unsafe' ignores the guest's flushes", "set another cache mode (virsh edit) and restart the VM")
	case d.Encrypted:
		return no("libvirt encrypts it, and the copies would not be encrypted", "encrypt inside the guest instead")
	case d.Kind == "dir", d.Kind == "nvme", d.Kind == "vhost":
		return no("its source is "+d.Source+", which QEMU cannot copy from", "move it to a file first")
	case d.Job:
		return advise(ErrJobRunning, "a block job is running on disk %s: wait for it or end it (virsh blockjob), then try again", d.Target)
	}
	return nil
}
