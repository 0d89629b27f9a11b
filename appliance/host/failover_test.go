package host

import (
	"errors"
	"os"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
)

// TestFailoverOfStoppedSource: it had shipped everything and stopped cleanly,
// so nothing is lost, however long ago that was. One that was killed is another matter.
func TestFailoverOfStoppedSource(t *testing.T) {
	for _, clean := range []bool{true, false} {
		p := newPair(t).up()
		p.main.addVM(testVM, "vda")
		p.main.mustProtect(testVM)
		if clean {
			p.main.stop()
		} else {
			p.main.kill()
		}
		p.dr.awaitState(testVM, "waiting")
		time.Sleep(300 * time.Millisecond)
		if rpo := p.dr.group(testVM).RPOSeconds; clean != (rpo == 0) {
			t.Errorf("clean stop %v: status says %v s", clean, rpo)
		}
		preview, err := p.dr.failover(control.FailoverRequest{VM: testVM, DryRun: true})
		must(t, err)
		rep, err := p.dr.failover(control.FailoverRequest{VM: testVM})
		must(t, err)
		if clean != (preview.RPOSeconds == 0) || clean != (rep.RPOSeconds == 0) {
			t.Errorf("clean stop %v: an RPO of %v s, %v s announced", clean, rep.RPOSeconds, preview.RPOSeconds)
		}
	}
}

// TestStoppedSourceCameBack: what it wrote since then counts again.
func TestStoppedSourceCameBack(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.stop()
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "streaming")
	must(t, vm.disk("vda").write([]byte("more"), 0))
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	time.Sleep(100 * time.Millisecond)
	rep, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	if rep.RPOSeconds == 0 {
		t.Error("an RPO of 0 although the source was killed")
	}
}

// TestRTOOfAllAttempts: it is counted from the attempt that promoted.
func TestRTOOfAllAttempts(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	p.dr.host.setFault(failAt("start vm1"))
	if _, err := p.dr.failover(control.FailoverRequest{VM: testVM}); err == nil {
		t.Fatal("it did not fail")
	}
	p.dr.host.setFault(nil)
	p.dr.stop()
	time.Sleep(time.Second)
	p.start(p.dr, p.main)
	rep, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	if rep.RTOSeconds < 1 {
		t.Errorf("an RTO of %v s", rep.RTOSeconds)
	}
}

// TestFailoverSaysWhatIs: what runs, what is lost, and where to look.
func TestFailoverSaysWhatIs(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	rep, err := p.dr.failover(control.FailoverRequest{VM: testVM, DryRun: true, Force: true})
	must(t, err)
	if len(rep.Notes) != 1 || !strings.Contains(rep.Notes[0], "the source of vm1 at site main is alive and connected") || !strings.Contains(rep.Notes[0], "would be lost") {
		t.Errorf("the preview of a forced failover says %q", rep.Notes)
	}
	_, err = p.dr.failover(control.FailoverRequest{VM: testVM, Force: true, NoStart: true})
	must(t, err)
	if log := p.dr.log.String(); !strings.Contains(log, "its VM was not started") || strings.Contains(log, "vm1 runs at site dr") {
		t.Error("it claims that the VM runs")
	}
	p.main.awaitState(testVM, "fenced")
	_, err = p.main.failover(control.FailoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitRefused, "vm1 was failed over to site dr", "superseded", "kagami status vm1 at site dr")
	for _, s := range []*site{p.main, p.dr} {
		if g := s.group(testVM); !g.PeerUp {
			t.Errorf("site %s says that its peer is away: %+v", s.name, g)
		}
	}
}

// TestFailoverWithoutLibvirt: what keeps the VM from being started does not keep
// its disks from being served, and every refusal says so.
func TestFailoverWithoutLibvirt(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	p.dr.stop()
	p.dr.setDialErr(errors.New("connect to libvirt: no such socket"))
	p.start(p.dr, p.main)
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitFailed, "libvirt is not reachable", "systemctl status libvirtd", "or use --no-start")
	if g := p.dr.group(testVM); g.Role != "replica" {
		t.Fatalf("it was promoted all the same: %+v", g)
	}
	p.dr.stop()
	p.dr.setDialErr(nil)
	must(t, os.Remove(p.dr.path("state", "groups", testVM, "domain.xml")))
	p.start(p.dr, p.main)
	_, err = p.dr.failover(control.FailoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitFailed, "the definition of VM vm1 never arrived here", "or use --no-start")
	p.dr.stop()
	p.dr.libvirtOff = true
	p.start(p.dr, p.main)
	_, err = p.dr.failover(control.FailoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitRefused, "libvirt is not enabled at site dr", "or use --no-start")
	_, err = p.dr.failover(control.FailoverRequest{VM: testVM, NoStart: true})
	must(t, err)
	if g := p.dr.group(testVM); g.State != "unmirrored" {
		t.Errorf("%+v", g)
	}
}
