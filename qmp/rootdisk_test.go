package qmp

import (
	"errors"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"kagami/tests/guest"
	"kagami/tests/lab"
)

const rootSize = 192 << 20

// A VM that boots from a disk of its own, and has a second one: both are
// attached at once while the writer runs on the root, and the guest reboots.
func TestRootDisk(t *testing.T) {
	notShort(t)
	r := newLab(t)
	r.disk = filepath.Join(r.dir, "root.raw")
	data := filepath.Join(r.dir, "data.raw")
	if err := errors.Join(guest.BuildGPTDisk(r.disk, guest.GPTOptions{Size: rootSize}), guest.BuildExt4(data, diskSize)); err != nil {
		t.Fatal(err)
	}
	g := guest.Domain{Name: r.vm, Dir: r.dir, Disks: []string{guest.FileDisk(r.disk, "vda"), guest.FileDisk(data, "vdb")}}
	if err := r.l.Define(t.Context(), g.XML()); err != nil {
		t.Fatal(err)
	}
	if err := r.l.Start(t.Context(), r.vm); err != nil {
		t.Fatal(err)
	}
	r.dial()
	r.in("writer start /data slots=64")
	r.progress()
	a, b := r.serve("a", rootSize), r.serve("b", diskSize)
	sa, sb := a.spec(), b.spec()
	sb.Target = "vdb"
	var wg sync.WaitGroup
	for _, s := range []AttachSpec{sa, sb} {
		wg.Go(func() {
			if err := r.l.Attach(t.Context(), s, nil); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	ds, err := r.l.Disks(t.Context(), r.vm)
	if err != nil || len(ds) != 2 || ds[0].Socket != a.socket || ds[1].Socket != b.socket || ds[0].Boot != 1 {
		t.Fatal(ds, err)
	}
	if !r.treated(a.socket) || !r.treated(b.socket) {
		t.Fatal("not treated")
	}
	if err := os.Rename(r.disk, r.disk+".away"); err != nil { // nobody uses it any more
		t.Fatal(err)
	}
	r.rebootsWell()
	a.kill()
	r.stalls()
	a.start()
	r.progress()
	r.noErrors()
}

// rebootsWell restarts the guest in the same QEMU and finds all its records.
func (r *rig) rebootsWell() {
	r.t.Helper()
	r.progress()
	r.in("restart")
	r.con.Close()
	r.dial()
	rep, err := r.con.Check(r.t.Context(), "/data")
	if err != nil || !rep.OK() {
		r.t.Fatal(rep, err)
	}
	if x, y := r.acks().Lost(rep); x+y > 0 {
		r.t.Fatalf("%d and %d acknowledged records are lost", x, y)
	}
	r.in("writer start /data slots=64")
	r.progress()
}

// libvirt takes what MapDomain makes.
func TestGoldensAreTakenByLibvirt(t *testing.T) {
	notShort(t)
	l := lab.ForTest(t, lab.Options{})
	c, err := Connect(t.Context(), l.URI)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	for _, m := range mapCases {
		doc := readDefinition(t, m.file)
		m.m.Type = "qemu"
		// This machine may have no swtpm.
		doc = regexp.MustCompile(`(?s)<tpm.*</tpm>`).ReplaceAllString(doc, "")
		out, _, err := MapDomain(doc, m.m)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Define(t.Context(), out); err != nil {
			t.Errorf("%s: %v\n%s", m.name, err, out)
			continue
		}
		name := m.m.Name
		if name == "" {
			name = regexp.MustCompile(`<name>(.*)</name>`).FindStringSubmatch(doc)[1]
		}
		back, err := c.DomainXML(t.Context(), name)
		if err != nil {
			t.Fatal(err)
		}
		ds, err := parseDisks(back)
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range ds {
			if want := m.m.Disks[d.Target]; d.Socket != want.Socket || d.Export != want.Export {
				t.Errorf("%s: disk %+v, want %+v", m.name, d, want)
			}
		}
		if strings.Contains(back, metaNS) {
			t.Errorf("%s: kagami's metadata went along", m.name)
		}
		if err := c.Undefine(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
}
