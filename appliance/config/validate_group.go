package config

import "strings"

// maxDiskSize bounds a disk, in bytes: the record format's largest offset.
const maxDiskSize = 1 << 60

const sectorSize = 512

// regionSize is the unit of the active log.
const regionSize = 1 << 20

func (v *validator) group(c *Config, g *Group, path string) {
	if v.named(g.Name, path+".name", ValidGroupName(g.Name), GroupNameForm) {
		v.unique("group", g.Name, path+".name")
	}
	v.groupPeer(c, g, path+".peer")
	for i := range g.Disks {
		v.disk(&g.Disks[i], g, at(path, "disks")+at(i))
	}
	if g.Domain != nil {
		v.domain(c, g.Domain, path+".domain")
	}
	limits := c.Limits
	if g.Limits != nil {
		limits = *g.Limits
		v.limits(limits, path+".limits")
	}
	if g.AsyncBytes > limits.QueueBytes {
		v.add(path+".async_bytes", FormatSize(g.AsyncBytes), "more than limits.queue_bytes (%s), where what is not acknowledged is kept", FormatSize(limits.QueueBytes))
	}
}

func (v *validator) groupPeer(c *Config, g *Group, path string) {
	if g.Peer == "" {
		if len(g.Disks) > 0 {
			v.add(path, "", "missing; a group with declared disks needs the peer it replicates with: %s", peerNames(c))
		}
		return
	}
	if _, ok := c.Peer(g.Peer); !ok {
		v.add(path, g.Peer, "no such peer; allowed: %s", peerNames(c))
	}
}

func peerNames(c *Config) string {
	names := make([]string, 0, len(c.Peers))
	for _, p := range c.Peers {
		names = append(names, p.Name)
	}
	if len(names) == 0 {
		return "none (the list peers is empty)"
	}
	return strings.Join(names, ", ")
}

func (v *validator) disk(d *Disk, g *Group, path string) {
	if v.name(d.Name, path+".name") {
		v.unique("disk of group "+g.Name, d.Name, path+".name")
	}
	if v.absolute(d.Image, path+".image") {
		v.unique("file", d.Image, path+".image")
	}
	if d.Size%sectorSize != 0 || d.Size > maxDiskSize {
		v.add(path+".size", FormatSize(d.Size), "allowed: a multiple of %d bytes, at most %s; 0 takes the image's", sectorSize, FormatSize(maxDiskSize))
	}
	v.socket(d.Socket, path+".socket")
}

func (v *validator) domain(c *Config, d *Domain, path string) {
	if !c.Libvirt.Enabled {
		v.add(path, "", "needs libvirt, and libvirt.enabled is false")
	}
	if d.Name != "" {
		if strings.Contains(d.Name, "/") || strings.TrimSpace(d.Name) != d.Name || len(d.Name) > 200 {
			v.add(path+".name", d.Name, "allowed: a libvirt domain's name: no slash, no space at its ends, at most 200 bytes")
		}
		v.unique("domain", d.Name, path+".name")
	}
	if d.UUID != "keep" && d.UUID != "derive" && !uuidRE.MatchString(d.UUID) {
		v.add(path+".uuid", d.UUID, "allowed: keep, derive, or a UUID in lower case")
	}
	v.maps(d.Networks, path+".networks", false)
	v.maps(d.Paths, path+".paths", true)
	for _, f := range []struct{ file, key string }{{d.Kernel, ".kernel"}, {d.Initrd, ".initrd"}} {
		if f.file != "" {
			v.absolute(f.file, path+f.key)
		}
	}
	for i := range d.Disks {
		v.domainDisk(&d.Disks[i], path, at("disks", i))
	}
}

func (v *validator) maps(ms []Map, path string, paths bool) {
	for i, m := range ms {
		for _, end := range []struct{ value, key string }{{m.From, ".from"}, {m.To, ".to"}} {
			key := path + at(i) + end.key
			switch {
			case paths:
				v.absolute(strings.TrimSuffix(end.value, "/"), key)
			case end.value == "":
				v.add(key, "", "missing; wanted: a network's or bridge's name")
			}
		}
		if m.From != "" {
			v.unique(path, m.From, path+at(i)+".from")
		}
	}
}

func (v *validator) domainDisk(d *DomainDisk, domain, key string) {
	path := domain + "." + key
	if !targetRE.MatchString(d.Target) {
		v.add(path+".target", d.Target, "allowed: a disk's target in the VM, such as vdb or sda")
	} else {
		v.unique("target in "+domain, d.Target, path+".target")
	}
	switch {
	case d.Drop && (d.File != "" || d.Format != ""):
		v.add(path+".drop", "true", "a dropped disk has neither file nor format")
	case !d.Drop && d.File == "":
		v.add(path+".file", "", "missing; name the file that stands for this disk here, or say drop: true")
	case d.File != "":
		v.absolute(d.File, path+".file")
	}
}

func (v *validator) limits(l Limits, path string) {
	if l.SpoolBytes <= l.ActiveLogBytes {
		v.add(path+".spool_bytes", FormatSize(l.SpoolBytes), "must exceed active_log_bytes (%s): a resync of all active regions goes through the spool", FormatSize(l.ActiveLogBytes))
	}
	if l.SpoolBytes < 4*l.SegmentBytes {
		v.add(path+".spool_bytes", FormatSize(l.SpoolBytes), "must hold at least 4 segments of segment_bytes (%s)", FormatSize(l.SegmentBytes))
	}
	if l.SegmentBytes%sectorAlign != 0 {
		v.add(path+".segment_bytes", FormatSize(l.SegmentBytes), "allowed: a multiple of %s", FormatSize(sectorAlign))
	}
	if l.ActiveLogBytes%regionSize != 0 {
		v.add(path+".active_log_bytes", FormatSize(l.ActiveLogBytes), "allowed: a multiple of a region, %s", FormatSize(regionSize))
	}
	if l.BacklogBytes != 0 && l.BacklogBytes < l.QueueBytes {
		v.add(path+".backlog_bytes", FormatSize(l.BacklogBytes), "allowed: 0, or at least queue_bytes (%s)", FormatSize(l.QueueBytes))
	}
	if l.EpochBytes > l.QueueBytes {
		v.add(path+".epoch_bytes", FormatSize(l.EpochBytes), "must not exceed queue_bytes (%s)", FormatSize(l.QueueBytes))
	}
	if l.ApplyBytes > l.SpoolBytes/2 {
		v.add(path+".apply_bytes", FormatSize(l.ApplyBytes), "must not exceed half of spool_bytes (%s)", FormatSize(l.SpoolBytes))
	}
	if l.LinkTimeout < 2*l.Heartbeat {
		v.add(path+".link_timeout", FormatDuration(l.LinkTimeout), "must be at least twice heartbeat (%s)", FormatDuration(l.Heartbeat))
	}
}

// sectorAlign is the block size of segment files, in bytes.
const sectorAlign = 4096
