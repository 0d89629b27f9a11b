package qmp

import (
	"errors"
	"strings"
	"testing"
	"time"
)

// An attach changes one <disk> and adds metadata; a detach puts back all but the source.
func TestDefinitionRoundTrip(t *testing.T) {
	for _, c := range []struct{ file, target string }{{"debian", "vda"}, {"debian", "vdb"}, {"windows", "vda"}, {"db", "sda"}, {"db", "vda"}} {
		doc := readDefinition(t, c.file)
		s, x, err := findDisk(doc, "vm", c.target)
		if err != nil {
			t.Fatal(err)
		}
		was := s.of(doc)
		attached, err := attachDefinition(doc, "vm", c.target, was, "/run/k.sock", "e", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		rest := doc[:s.from] + doc[s.to:]
		if got := withoutDiskAndMetadata(t, attached, c.target); got != strings.Replace(rest, "<metadata></metadata>", "", 1) {
			t.Fatalf("%s %s: something else changed:\n%s\nis not\n%s", c.file, c.target, got, rest)
		}
		_, a, err := findDisk(attached, "vm", c.target)
		if err != nil {
			t.Fatal(err)
		}
		d := diskOf(a)
		if d.Socket != "/run/k.sock" || d.Export != "e" || d.Format != "raw" || d.Cache != "none" ||
			a.Driver.ErrorPolicy != "stop" || a.Driver.RErrorPolicy != "stop" || a.Driver.IO != "" || a.Serial != x.Serial || a.WWN != x.WWN {
			t.Fatalf("%s %s: attached as %+v %+v", c.file, c.target, d, a.Driver)
		}
		again, err := attachDefinition(attached, "vm", c.target, was, "/run/k.sock", "e", time.Hour)
		if err != nil || again != attached {
			t.Fatalf("%s %s: attached again: %v\n%s", c.file, c.target, err, again)
		}
		back, err := detachDefinition(attached, "vm", c.target, "/new.raw", "raw")
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(back, metaNS) {
			t.Fatalf("metadata is left:\n%s", back)
		}
		_, b, err := findDisk(back, "vm", c.target)
		if err != nil {
			t.Fatal(err)
		}
		if d := diskOf(b); d.Source != "/new.raw" || d.Format != "raw" || d.Cache != diskOf(x).Cache || b.Driver.IO != x.Driver.IO ||
			b.Driver.ErrorPolicy != x.Driver.ErrorPolicy || b.Driver.Discard != x.Driver.Discard || b.Serial != x.Serial {
			t.Fatalf("%s %s: detached as %+v %+v, was %+v", c.file, c.target, d, b.Driver, x.Driver)
		}
	}
}

// withoutDiskAndMetadata cuts out what an attach may change.
func withoutDiskAndMetadata(t *testing.T, doc, target string) string {
	t.Helper()
	doc, err := dropAttached(doc, target)
	if err != nil {
		t.Fatal(err)
	}
	s, _, err := findDisk(doc, "vm", target)
	if err != nil {
		t.Fatal(err)
	}
	return doc[:s.from] + doc[s.to:]
}

func TestMetadataOfOthersStays(t *testing.T) {
	doc := readDefinition(t, "debian")
	if !strings.Contains(doc, "libosinfo") {
		t.Fatal("the test definition has no metadata")
	}
	s, _, err := findDisk(doc, "vm", "vda")
	if err != nil {
		t.Fatal(err)
	}
	was := s.of(doc)
	for _, target := range []string{"vda", "vdb"} {
		if doc, err = attachDefinition(doc, "vm", target, was, "/s", "e", time.Hour); err != nil {
			t.Fatal(err)
		}
	}
	if doc, err = detachDefinition(doc, "vm", "vda", "/f", "raw"); err != nil {
		t.Fatal(err)
	}
	if strings.Count(doc, "kagami:attached ") != 1 || !strings.Contains(doc, `<libosinfo:os id="http://debian.org/debian/12"/>`) {
		t.Fatalf("metadata:\n%s", doc)
	}
}

func TestEmptyMetadata(t *testing.T) {
	for _, meta := range []string{"<metadata/>", "<metadata></metadata>", ""} {
		doc := "<domain><name>a</name>" + meta + "<devices><disk type='file'><target dev='vda'/></disk></devices></domain>"
		out, err := attachDefinition(doc, "a", "vda", "<disk type='file'><source file='/was'/><target dev='vda'/></disk>", "/s", "e", time.Hour)
		if err != nil {
			t.Fatal(err)
		}
		_, was, err := wasBefore(out, "vda")
		if err != nil || was == nil || diskOf(was).Source != "/was" {
			t.Fatalf("%q: %v %v\n%s", meta, was, err, out)
		}
	}
}

func TestParseDisks(t *testing.T) {
	ds, err := parseDisks(readDefinition(t, "debian"))
	if err != nil || len(ds) != 3 {
		t.Fatal(ds, err)
	}
	if d := ds[0]; d.Target != "vda" || d.Kind != "file" || d.Format != "qcow2" || d.Boot != 1 || d.Bus != "virtio" {
		t.Errorf("%+v", d)
	}
	if d := ds[1]; d.Boot != 0 || d.Serial != "DATA0001" || d.Cache != "none" {
		t.Errorf("%+v", d)
	}
	if d := ds[2]; d.Device != "cdrom" || !d.ReadOnly || !errors.Is(d.Unsuited(), ErrUnsuited) {
		t.Errorf("%+v", d)
	}
	ds, err = parseDisks(readDefinition(t, "guest"))
	if err != nil || len(ds) != 1 || ds[0].Socket != "/run/kagami/g1-vda.sock" || ds[0].Export != "g1-vda" || ds[0].Boot != 1 {
		t.Fatal(ds, err)
	}
}

func TestUnsuited(t *testing.T) {
	element := func(driver, rest string) string {
		return "<domain><devices><disk type='file' device='disk'><driver name='qemu' type='raw' " + driver +
			"/><source file='/x'>" + "</source><target dev='vda' bus='virtio'/>" + rest + "</disk></devices></domain>"
	}
	for doc, want := range map[string]error{
		element("", ""):                      nil,
		element("cache='writeback'", ""):     nil,
		element("cache='unsafe'", ""):        ErrUnsuited,
		element("", "<readonly/>"):           ErrUnsuited,
		element("", "<shareable/>"):          ErrUnsuited,
		element("", "<transient/>"):          ErrUnsuited,
		element("", "<mirror type='file'/>"): ErrJobRunning,
		element("", "<encryption format='luks'><secret type='passphrase' uuid='a'/></encryption>"):                                           ErrUnsuited,
		"<domain><devices><disk type='file' device='disk'><target dev='vda' bus='virtio'/></disk></devices></domain>":                        ErrUnsuited,
		"<domain><devices><disk type='file' device='floppy'><target dev='fda' bus='fdc'/></disk></devices></domain>":                         ErrUnsuited,
		"<domain><devices><disk type='vhostuser' device='disk'><source type='unix' path='/x'/><target dev='vda'/></disk></devices></domain>": ErrUnsuited,
	} {
		ds, err := parseDisks(doc)
		if err != nil || len(ds) != 1 {
			t.Fatalf("%s: %v %v", doc, ds, err)
		}
		if got := ds[0].Unsuited(); !errors.Is(got, want) || (want == nil) != (got == nil) {
			t.Errorf("%s: %v, want %v", doc, got, want)
		}
	}
}

func TestQEMUUser(t *testing.T) {
	uid, gid, err := qemuUser(`<capabilities><host><secmodel><model>apparmor</model></secmodel><secmodel><model>dac</model>
<baselabel type='kvm'>+64055:+107</baselabel><baselabel type='qemu'>+64055:+107</baselabel></secmodel></host></capabilities>`)
	if err != nil || uid != 64055 || gid != 107 {
		t.Fatal(uid, gid, err)
	}
	for _, c := range []string{"", "<capabilities/>", "<capabilities><host><secmodel><model>dac</model><baselabel>x</baselabel></secmodel></host></capabilities>"} {
		if _, _, err := qemuUser(c); err == nil {
			t.Errorf("%q was taken", c)
		}
	}
}

func FuzzDefinition(f *testing.F) {
	for _, n := range []string{"guest", "debian", "windows", "db"} {
		f.Add(readDefinition(f, n), "vda")
	}
	f.Fuzz(func(t *testing.T, doc, target string) {
		if _, err := parseDisks(doc); err != nil {
			return
		}
		out, err := attachDefinition(doc, "vm", target, "<disk><target dev='x'/></disk>", "/s", "e", time.Hour)
		if err != nil {
			return
		}
		if _, x, err := findDisk(out, "vm", target); err != nil || diskOf(x).Socket != "/s" {
			t.Fatalf("the attached disk is lost: %v\n%s", err, out)
		}
	})
}
