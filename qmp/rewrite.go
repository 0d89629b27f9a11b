package qmp

import (
	"encoding/xml"
	"fmt"
	"strings"
	"time"

	"libvirt.org/go/libvirtxml"
)

// metaNS is the XML namespace of kagami's part of a definition's <metadata>,
// which keeps each attached disk as it was:
//
//	<kagami:attached xmlns:kagami="urn:kagami:attached:1" target="vdb"><disk …>…</disk></kagami:attached>
const metaNS = "urn:kagami:attached:1"

// attachedDisk is a disk element with its source an NBD export.
func attachedDisk(d *libvirtxml.DomainDisk, socket, export string, delay time.Duration) (string, error) {
	n := *d
	drv := libvirtxml.DomainDiskDriver{}
	if d.Driver != nil {
		drv = *d.Driver
	}
	drv.Name, drv.Type, drv.Cache = "qemu", "raw", "none"
	drv.ErrorPolicy, drv.RErrorPolicy = "stop", "stop"
	drv.IO, drv.MetadataCache, drv.DiscardNoUnref = "", nil, ""
	if drv.Discard == "" {
		drv.Discard = "unmap"
	}
	n.Driver = &drv
	n.Source = nbdSource(socket, export, delay)
	n.Auth, n.BackingStore, n.Mirror, n.Encryption, n.BackendDomain = nil, nil, nil, nil, nil
	n.Snapshot = "" // of the file that is left
	dropAlias(&n)
	return marshalDisk(&n)
}

// nbdSource also says what libvirt should do on a lost connection. libvirt 9.0
// ignores it (see Treat); a later one may not.
func nbdSource(socket, export string, delay time.Duration) *libvirtxml.DomainDiskSource {
	return &libvirtxml.DomainDiskSource{Network: &libvirtxml.DomainDiskSourceNetwork{
		Protocol: "nbd", Name: export,
		Hosts:     []libvirtxml.DomainDiskSourceHost{{Transport: "unix", Socket: socket}},
		Reconnect: &libvirtxml.DomainDiskSourceNetworkReconnect{Delay: fmt.Sprint(int64(delay / time.Second))},
	}}
}

// fileDisk is a disk element with its source a file. Attributes of the driver
// are those of was, the disk before it was attached, if that is known.
func fileDisk(d, was *libvirtxml.DomainDisk, file, format string) (string, error) {
	n := *d
	drv := libvirtxml.DomainDiskDriver{Discard: "unmap"}
	if was != nil && was.Driver != nil {
		drv = *was.Driver
	}
	if was != nil {
		n.Snapshot = was.Snapshot
	}
	drv.Name, drv.Type = "qemu", format
	if format != "qcow2" {
		drv.MetadataCache, drv.DiscardNoUnref = nil, ""
	}
	n.Driver = &drv
	n.Source = &libvirtxml.DomainDiskSource{File: &libvirtxml.DomainDiskSourceFile{File: file}}
	n.Auth, n.BackingStore, n.Mirror = nil, nil, nil
	dropAlias(&n)
	return marshalDisk(&n)
}

// dropAlias removes an alias libvirt made up; a user's begins with "ua-".
func dropAlias(d *libvirtxml.DomainDisk) {
	if d.Alias != nil && !strings.HasPrefix(d.Alias.Name, "ua-") {
		d.Alias = nil
	}
}

func marshalDisk(d *libvirtxml.DomainDisk) (string, error) {
	b, err := xml.MarshalIndent(d, "    ", "  ")
	if err != nil {
		return "", fmt.Errorf("write a <disk>: %w", err)
	}
	return strings.TrimSpace(string(b)), nil
}

// attachDefinition changes a stored definition: the disk becomes an NBD
// export, and was, its element before, is kept in the metadata.
func attachDefinition(doc, vm, target, was, socket, export string, delay time.Duration) (string, error) {
	s, d, err := findDisk(doc, vm, target)
	if err != nil {
		return "", err
	}
	element, err := attachedDisk(d, socket, export, delay)
	if err != nil {
		return "", err
	}
	doc, err = dropAttached(replace(doc, s, element), target)
	if err != nil {
		return "", err
	}
	return addMetadata(doc, fmt.Sprintf(`<kagami:attached xmlns:kagami="%s" target="%s">%s</kagami:attached>`, metaNS, escape(target), was))
}

// detachDefinition changes it back: the disk becomes a file.
func detachDefinition(doc, vm, target, file, format string) (string, error) {
	s, d, err := findDisk(doc, vm, target)
	if err != nil {
		return "", err
	}
	_, was, err := wasBefore(doc, target)
	if err != nil {
		return "", err
	}
	element, err := fileDisk(d, was, file, format)
	if err != nil {
		return "", err
	}
	return dropAttached(replace(doc, s, element), target)
}

// attachedElement is one of kagami's metadata elements.
type attachedElement struct {
	XMLName xml.Name `xml:"urn:kagami:attached:1 attached"`
	Target  string   `xml:"target,attr"`
	Disk    string   `xml:",innerxml"`
}

// wasBefore finds the disk as it was before it was attached; nil if that is not known.
func wasBefore(doc, target string) (span, *libvirtxml.DomainDisk, error) {
	spans, err := elements(doc, "domain", "metadata", "attached")
	if err != nil {
		return span{}, nil, err
	}
	for _, s := range spans {
		var a attachedElement
		if err := xml.Unmarshal([]byte(s.of(doc)), &a); err != nil || a.Target != target {
			continue // another namespace, or another disk
		}
		d, err := parseDisk(a.Disk)
		if err != nil {
			return span{}, nil, fmt.Errorf("read kagami's metadata: %w", err)
		}
		return s, d, nil
	}
	return span{}, nil, nil
}

// dropAttached removes the metadata of a target, and the <metadata> if nothing is left in it.
func dropAttached(doc, target string) (string, error) {
	s, was, err := wasBefore(doc, target)
	if err != nil || was == nil {
		return doc, err
	}
	doc = replace(doc, s, "")
	ms, err := elements(doc, "domain", "metadata")
	if err != nil {
		return "", err
	}
	for _, m := range ms {
		if strings.Join(strings.Fields(m.of(doc)), "") == "<metadata></metadata>" {
			return replace(doc, m, ""), nil
		}
	}
	return doc, nil
}

// addMetadata puts an element at the end of the <metadata>.
func addMetadata(doc, element string) (string, error) {
	ms, err := elements(doc, "domain", "metadata")
	if err != nil {
		return "", err
	}
	if len(ms) > 0 && strings.HasSuffix(ms[0].of(doc), "/>") {
		return replace(doc, ms[0], "<metadata>"+element+"</metadata>"), nil
	}
	outer := "domain"
	if len(ms) > 0 {
		outer = "metadata"
	} else {
		element = "<metadata>" + element + "</metadata>"
		if ms, err = elements(doc, outer); err != nil {
			return "", err
		}
	}
	if len(ms) == 0 {
		return "", fmt.Errorf("read the definition: it has no <%s>", outer)
	}
	at, err := before(doc, ms[0])
	if err != nil {
		return "", err
	}
	return replace(doc, at, element), nil
}

func escape(s string) string {
	var b strings.Builder
	// A strings.Builder never fails.
	_ = xml.EscapeText(&b, []byte(s))
	return b.String()
}

// copyTarget is the description of a block copy's destination.
func copyTarget(target, kind, driver, source string) string {
	return fmt.Sprintf("<disk type='%s' device='disk'><driver name='qemu' %s/>%s<target dev='%s'/></disk>", kind, driver, source, escape(target))
}

func nbdTarget(target, socket, export string, delay time.Duration) string {
	return copyTarget(target, "network", "type='raw' cache='none' discard='unmap'",
		fmt.Sprintf("<source protocol='nbd' name='%s'><host transport='unix' socket='%s'/><reconnect delay='%d'/></source>",
			escape(export), escape(socket), int64(delay/time.Second)))
}

func fileTarget(target, file, format string) string {
	return copyTarget(target, "file", fmt.Sprintf("type='%s' discard='unmap'", escape(format)), fmt.Sprintf("<source file='%s'/>", escape(file)))
}
