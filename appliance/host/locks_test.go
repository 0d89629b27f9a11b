package host

import (
	"context"
	"os/exec"
	"strings"
	"testing"

	"kagami/appliance/control"
	"kagami/images"
	"kagami/qmp"
)

// lockedForQEMU checks that QEMU refuses to use a file.
func lockedForQEMU(t *testing.T, file string) {
	t.Helper()
	out, err := exec.Command("qemu-io", "-f", "raw", "-c", "read 0 512", file).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "lock") {
		t.Errorf("%s can be used: %v, %s", file, err, out)
	}
}

// TestOldFilesAreLocked: QEMU cannot be started from the file that a VM ran
// from before protect, over restarts, nor from what a fenced source has.
func TestOldFilesAreLocked(t *testing.T) {
	if _, err := exec.LookPath("qemu-io"); err != nil {
		missing(t, "qemu-io")
	}
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	old, image := p.main.path("disks", "vm1-vda.raw"), p.main.path("state", "images", testVM, "vda.raw")
	if out, err := exec.Command("qemu-io", "-f", "raw", "-c", "read 0 512", old).CombinedOutput(); err != nil {
		t.Fatalf("before protect: %v, %s", err, out)
	}
	p.main.mustProtect(testVM)
	lockedForQEMU(t, old)
	p.main.stop()
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "streaming")
	lockedForQEMU(t, old)
	vm.destroy()
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM, NoStart: true})
	must(t, err)
	for range 2 { // the second is fenced from its beginning
		p.start(p.main, p.dr)
		p.main.awaitState(testVM, "fenced")
		lockedForQEMU(t, old)
		lockedForQEMU(t, image)
		p.main.stop()
	}
}

// TestOldFileInUse: an old file that cannot be locked is an alarm.
func TestOldFileInUse(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	old := p.main.path("disks", "vm1-vda.raw")
	taken := make(chan *images.Image, 1)
	p.main.host.setFault(func(_ context.Context, step string) error {
		if step == "attach vda moved" {
			img, err := images.OpenImage(images.OS{}, old, images.Want{})
			if err != nil {
				return err
			}
			taken <- img
		}
		return nil
	})
	p.main.mustProtect(testVM)
	g := p.main.group(testVM)
	if len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "the old file "+old+" of disk vda cannot be locked") {
		t.Errorf("alarms: %q", g.Alarms)
	}
	must(t, (<-taken).Close())
	p.main.stop()
	p.start(p.main, p.dr)
	if g := p.main.awaitState(testVM, "streaming"); len(g.Alarms) > 0 {
		t.Errorf("alarms: %q", g.Alarms)
	}
}

// TestFailoverBrokenOffIsAnAlarm: from the moment when it fails, not from the
// next restart on.
func TestFailoverBrokenOffIsAnAlarm(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	p.dr.host.setFault(failAt("start vm1"))
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitFailed, "promoted here, its failover has not ended")
	if g := p.dr.group(testVM); len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "the failover was broken off (") {
		t.Errorf("alarms: %q", g.Alarms)
	}
	p.dr.host.setFault(nil)
	_, err = p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	if g := p.dr.group(testVM); len(g.Alarms) > 0 {
		t.Errorf("alarms: %q", g.Alarms)
	}
}

// TestLibvirtAwayIsAnAlarm: of the site, said once in the log however often it
// is tried again, and over when libvirt is back.
func TestLibvirtAwayIsAnAlarm(t *testing.T) {
	p := newPair(t)
	p.main.setDialErr(qmp.ErrClosed)
	p.start(p.main, p.dr)
	for range 3 {
		<-p.main.dialled
	}
	if st := p.main.status(); len(st.Alarms) != 1 || !strings.Contains(st.Alarms[0], "libvirt is not reachable") {
		t.Errorf("alarms: %q", st.Alarms)
	}
	if n := strings.Count(p.main.log.String(), qmp.ErrClosed.Error()); n != 1 {
		t.Errorf("said %d times:\n%s", n, p.main.log)
	}
	p.main.setDialErr(nil)
	await(t, "the alarm to be over", func() bool { return len(p.main.status().Alarms) == 0 })
}
