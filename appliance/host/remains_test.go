package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kagami/appliance/control"
)

// TestNewReplicaIgnoresRemains: the removal of a replica is broken off after
// its file is gone: spool and marks stay, or one of them. A new replica of that
// name starts from nothing, and is a copy only when the first sync has ended.
func TestNewReplicaIgnoresRemains(t *testing.T) {
	for left, gone := range map[string]string{"everything": "", "marks": "spool", "spool": "applied"} {
		t.Run(left, func(t *testing.T) { protectOverRemains(t, gone) })
	}
}

func protectOverRemains(t *testing.T, gone string) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	must(t, vm.disk("vda").write([]byte("of the first life"), 4096))
	sameAtReplica(t, p, vm)
	state := p.dr.path("state", "groups", testVM)
	p.dr.fs.set(func() {
		p.dr.fs.fail = func(op, path string) error {
			if op == "remove" && strings.HasPrefix(path, state) && filepath.Base(path) != "group.json" {
				return errors.New("broken off")
			}
			return nil
		}
	})
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	await(t, "the removal to be broken off", func() bool {
		_, err := os.Stat(state + "/group.json")
		return errors.Is(err, os.ErrNotExist)
	})
	p.dr.kill()
	p.start(p.dr, p.main)
	p.awaitLinks()
	await(t, "the source to be done", func() bool { return len(p.main.status().Groups) == 0 })
	for _, name := range []string{"applied", "spool"} {
		if _, err := os.Stat(state + "/" + name); err != nil {
			t.Fatalf("nothing remained: %v", err)
		}
	}
	if gone != "" {
		must(t, os.RemoveAll(state+"/"+gone))
	}
	must(t, os.WriteFile(state+"/domain.xml", []byte("<domain/>"), 0o600))

	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	if n := strings.Count(p.main.log.String(), "the block copy fills both images"); n != 2 {
		t.Errorf("%d first syncs began with a replica that is new and empty, want 2", n)
	}
	if xml := string(readFile(t, state+"/domain.xml")); !strings.Contains(xml, testUUID) {
		t.Errorf("the VM's definition is %q", xml)
	}
}

// TestSourceIgnoresRemains: the same at the source, whose active log names the
// group that it belonged to.
func TestSourceIgnoresRemains(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	log := readFile(t, p.main.path("state", "groups", testVM, "active.log"))
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	await(t, "the group to be gone", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
	must(t, os.MkdirAll(p.main.path("state", "groups", testVM), 0o700))
	must(t, os.WriteFile(p.main.path("state", "groups", testVM, "active.log"), log, 0o600))
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}

// TestPivotLost: the power fails between a pivot and the change of the VM's
// definition. The VM comes back on its old file, but what the guest wrote last
// is in the image only, which is kept.
func TestPivotLost(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	d := vm.disk("vda")
	was := d.definition()
	moved := make(chan struct{})
	p.main.host.setFault(func(_ context.Context, step string) error {
		if step == "attach vda moved" {
			close(moved)
			<-p.main.conn.died
		}
		return nil
	})
	ended := make(chan error, 1)
	go func() { ended <- p.main.protect(context.Background(), control.ProtectRequest{VM: testVM, To: "dr"}) }()
	<-moved
	must(t, d.write([]byte("written after the pivot"), 0))
	p.main.kill()
	if err := <-ended; err == nil {
		t.Error("the command was told of a success")
	}
	vm.destroy()
	d.mu.Lock()
	d.def = was
	d.mu.Unlock()
	p.main.host.setFault(nil)
	p.start(p.main, p.dr)
	await(t, "protect to be taken back", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
	kept := p.main.keptImages()
	if len(kept) != 1 {
		t.Fatalf("images kept: %v of %v", kept, p.main.traces())
	}
	if b := readFile(t, p.main.path(kept[0])); !strings.HasPrefix(string(b), "written after the pivot") {
		t.Error("the image that was kept lacks what the guest wrote last")
	}
	if !strings.Contains(p.main.log.String(), "may have run from kagami") {
		t.Error("nobody was told")
	}
	must(t, vm.start())
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}
