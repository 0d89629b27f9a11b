package qmp

import (
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	gq "github.com/digitalocean/go-qemu/qmp"
	"libvirt.org/go/libvirtxml"
)

// fakeDomain is a VM with one disk, vdb, kept as libvirt keeps it: a live and a
// stored definition, and a copy job that gets on with each look at it.
type fakeDomain struct {
	mu      sync.Mutex
	vm      string
	live    string // empty: it does not run
	stored  string
	st      State
	size    int64
	temp    bool // not persistent
	saved   bool // has a managed save
	q       *fakeQEMU
	job     *fakeCopy
	fails   map[string]error // what fails, by the name of the method, "pivot" and "abort"
	pivoted int
	dies    uint64 // the job fails at this many bytes; 0: never
	late    int    // pivots that come too early
	after   func() // called when a pivot was made but is to be reported as failed
	freed   bool
	aborted bool // a job was cancelled
	modern  bool // libvirt knows <reconnect>
}

type fakeCopy struct {
	cur, end uint64
	dest     string // the destination's <disk>
}

const fakeSize = 1000

func newFakeDomain(st State) *fakeDomain {
	disk := `<disk type='file' device='disk'><driver name='qemu' type='qcow2' cache='writeback' io='threads'/><source file='/srv/b.qcow2'/><target dev='vdb' bus='virtio'/>%s</disk>`
	doc := `<domain type='kvm'><name>vm</name><uuid>u</uuid><devices>` + disk + `</devices></domain>`
	d := &fakeDomain{vm: "vm", st: st, stored: fmt.Sprintf(doc, ""), size: fakeSize, fails: map[string]error{}, q: stockQEMU(testSocket)}
	if st.Active() {
		d.live = fmt.Sprintf(doc, "<alias name='virtio-disk1'/>")
	}
	return d
}

func (d *fakeDomain) enter(what string) (func(), error) {
	d.mu.Lock()
	return d.mu.Unlock, d.fails[what]
}

func (d *fakeDomain) name() string { return d.vm }
func (d *fakeDomain) free()        { d.freed = true }

func (d *fakeDomain) xml(inactive bool) (string, error) {
	leave, err := d.enter("xml")
	defer leave()
	if inactive {
		return d.stored, err
	}
	doc := d.live
	if d.job != nil && d.job.cur == d.job.end {
		doc = strings.Replace(doc, "<target", "<mirror type='network' job='copy' ready='yes'/><target", 1)
	}
	return doc, err
}

func (d *fakeDomain) state() (State, error) {
	leave, err := d.enter("state")
	defer leave()
	return d.st, err
}

func (d *fakeDomain) persistent() (bool, error)      { return !d.temp, d.fails["persistent"] }
func (d *fakeDomain) hasManagedSave() (bool, error)  { return d.saved, d.fails["hasManagedSave"] }
func (d *fakeDomain) capacity(string) (int64, error) { return d.size, d.fails["capacity"] }
func (d *fakeDomain) monitor() gq.Monitor            { return d.q }

func (d *fakeDomain) blockCopy(target, dest string, reuse bool, _ uint64) error {
	leave, err := d.enter("blockCopy")
	defer leave()
	if err != nil {
		return err
	}
	if !reuse {
		x, err := parseDisk(dest)
		if err != nil {
			return err
		}
		if err := os.WriteFile(diskOf(x).Source, nil, 0o600); err != nil {
			return err
		}
	}
	d.job = &fakeCopy{end: fakeSize, dest: dest}
	return nil
}

func (d *fakeDomain) blockJob(string) (*blockJob, error) {
	leave, err := d.enter("blockJob")
	defer leave()
	if err != nil || d.job == nil {
		return nil, err
	}
	d.job.cur = min(d.job.cur+300, d.job.end)
	if d.dies > 0 && d.job.cur >= d.dies {
		d.job = nil
		return nil, nil
	}
	return &blockJob{d.job.cur, d.job.end}, nil
}

func (d *fakeDomain) abortJob(target string, pivot bool) error {
	what := "abort"
	if pivot {
		what = "pivot"
	}
	leave, err := d.enter(what)
	defer leave()
	switch {
	case d.job == nil:
		return errors.New("no job")
	case pivot && d.late > 0:
		d.late--
		return errors.New("block copy still active: disk 'vdb' not ready for pivot yet")
	case err != nil && d.after == nil:
		return err
	case !pivot:
		d.job, d.aborted = nil, true
		return err
	}
	d.pivoted++
	to, err2 := parseDisk(d.job.dest)
	if err2 != nil {
		return err2
	}
	d.job = nil
	for _, doc := range []*string{&d.live, &d.stored} {
		*doc = d.moveTo(*doc, target, to.Source)
	}
	if d.after != nil {
		d.after()
	}
	return err
}

// moveTo is what libvirt does to its definitions on a pivot: it changes the source.
func (d *fakeDomain) moveTo(doc, target string, src *libvirtxml.DomainDiskSource) string {
	s, x, err := findDisk(doc, d.vm, target)
	if err != nil {
		panic(err)
	}
	x.Source = src
	if x.Source.Network != nil && !d.modern {
		x.Source.Network.Reconnect = nil // as libvirt 9.0 does
	}
	x.Driver.Type = "raw"
	e, err := marshalDisk(x)
	if err != nil {
		panic(err)
	}
	return replace(doc, s, e)
}

func (d *fakeDomain) define(xml string) error {
	leave, err := d.enter("define")
	defer leave()
	if err == nil {
		d.stored = xml
	}
	return err
}

func (d *fakeDomain) startPaused() error { return d.fails["start"] }
func (d *fakeDomain) resume() error      { return d.fails["resume"] }
func (d *fakeDomain) destroy() error     { return d.fails["destroy"] }
func (d *fakeDomain) shutdown() error    { return d.fails["shutdown"] }
func (d *fakeDomain) undefine() error    { return d.fails["undefine"] }
func (d *fakeDomain) autostart() error   { return d.fails["autostart"] }
func (d *fakeDomain) freeze() error      { return d.fails["freeze"] }
func (d *fakeDomain) thaw() error        { return d.fails["thaw"] }
