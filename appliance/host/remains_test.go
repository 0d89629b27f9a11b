package host

import (
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
