package host

import (
	"bytes"
	"os"
	"testing"

	"kagami/appliance/control"
)

// TestProtectAndFailover is the good day, so that the bad ones mean something:
// what the guest wrote and flushed is at the replica, which boots.
func TestProtectAndFailover(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	must(t, vm.disk("vda").write([]byte("before"), 4096))
	p.main.mustProtect(testVM)
	must(t, vm.disk("vdb").write([]byte("protected"), 8192))
	want := map[string][]byte{}
	for _, d := range vm.disks {
		if !d.isTreated() {
			t.Errorf("disk %s got no reconnect treatment", d.def.Target)
		}
		var err error
		want[d.def.Target], err = d.content()
		must(t, err)
	}
	if _, err := os.Stat(vm.disk("vda").def.Socket); err != nil {
		t.Error(err)
	}
	vm.destroy()
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	rep, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	if rep.Domain != testVM {
		t.Errorf("report: %+v", rep)
	}
	replica := p.dr.host.vm(testVM)
	t.Cleanup(replica.destroy)
	for target, w := range want {
		got, err := replica.disk(target).content()
		must(t, err)
		if !bytes.Equal(got, w) {
			t.Errorf("disk %s differs at the replica", target)
		}
	}
	must(t, replica.disk("vda").write([]byte("at dr"), 0))
}
