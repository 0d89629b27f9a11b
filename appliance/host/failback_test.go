package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/qmp"
	"kagami/replica/wire"
)

func (s *site) reprotect(req control.ReprotectRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return s.control.Reprotect(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

func (s *site) switchover(req control.SwitchoverRequest) (control.FailoverReport, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return s.control.Switchover(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

func (s *site) failback(req control.SwitchoverRequest) (control.FailoverReport, error) {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return s.control.Failback(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

func (s *site) branches(group string) []control.Branch {
	s.t.Helper()
	bs, err := s.control.Branches(context.Background(), control.BranchesRequest{Group: group})
	must(s.t, err)
	return bs
}

// imagesEqual waits until both sites' images of a VM's disks are the same, and as the VM reads them.
func imagesEqual(t *testing.T, p *pair, vm *fakeVM) {
	t.Helper()
	for _, d := range vm.disks {
		want, err := d.content()
		must(t, err)
		for _, s := range []*site{p.main, p.dr} {
			awaitFor(t, 10*time.Second, "image of "+d.def.Target+" at "+s.name+" to be as the VM has it", func() bool {
				for _, df := range s.d.find(vm.name).snapshot().Disks {
					if df.Name == d.def.Target {
						return bytes.Equal(readFile(t, df.Image), want)
					}
				}
				return false
			})
		}
	}
}

// sector is a text as a guest writes it.
func sector(text string) []byte { return append([]byte(text), make([]byte, 512-len(text))...) }

const bigDisk = 64 << 20

// disaster protects a VM with one large disk, kills its site and fails it over.
func disaster(t *testing.T) (p *pair, there *fakeVM) {
	t.Helper()
	p = newPair(t).up()
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, bigDisk)})
	p.main.mustProtect(testVM)
	must(t, vm.disk("vda").write(sector("acknowledged"), 8<<20))
	p.main.kill()
	vm.destroy()
	p.dr.awaitState(testVM, "waiting")
	// What the site that died has and the replica never saw: its page cache, say.
	lostWrite(t, p.main, []byte("never left the site"), 8<<20)
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	there = p.dr.host.vm(testVM)
	if there == nil {
		t.Fatal("it does not run there")
	}
	return p, there
}

// lostWrite changes the image of a killed source in a region that its active log names.
func lostWrite(t *testing.T, s *site, b []byte, off int64) {
	t.Helper()
	f, err := loadGroupFile(images.OS{}, s.path("state", "groups", testVM))
	must(t, err)
	file, err := os.OpenFile(f.Disks[0].Image, os.O_RDWR, 0)
	must(t, err)
	defer file.Close()
	_, err = file.WriteAt(b, off)
	must(t, err)
}

// TestFailback: after a disaster the VM runs at the other site; the first one
// comes back, becomes the replica by delta, and takes the VM home.
func TestFailback(t *testing.T) {
	p, there := disaster(t)
	must(t, there.disk("vda").write(sector("written at the other site"), 20<<20))
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "fenced")
	must(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM, DryRun: true}))
	if g := p.main.group(testVM); g.State != "fenced" {
		t.Fatalf("a dry run changed site main: %+v", g)
	}
	must(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM}))
	g := p.dr.group(testVM)
	if g.Role != "source" || g.State != "streaming" || !g.Protected {
		t.Fatalf("after reprotect: %+v", g)
	}
	if g.Resynced > 8<<20 || g.Resynced == 0 {
		t.Errorf("%d bytes were shipped for two small changes", g.Resynced)
	}
	must(t, there.disk("vda").write(sector("and protected there"), 30<<20))
	imagesEqual(t, p, there)
	bs := p.main.branches(testVM)
	if len(bs) != 1 || len(bs[0].Disks) != 1 {
		t.Fatalf("branches: %+v", bs)
	}
	if kept := readFile(t, bs[0].Disks[0].File); !bytes.HasPrefix(kept[8<<20:], []byte("never left the site")) {
		t.Error("what the first site had beyond the failover was not kept")
	}
	rep, err := p.dr.failback(control.SwitchoverRequest{VM: testVM})
	must(t, err)
	if rep.Domain != testVM {
		t.Errorf("%+v", rep)
	}
	home := p.main.host.vm(testVM)
	if home == nil || !home.state().Active() || there.state().Active() {
		t.Fatal("the VM does not run at home alone")
	}
	g = p.main.awaitState(testVM, "streaming")
	if !g.Protected || g.Role != "source" {
		t.Errorf("after failback: %+v", g)
	}
	must(t, home.disk("vda").write(sector("home again"), 40<<20))
	for off, want := range map[int64]string{8 << 20: "acknowledged", 20 << 20: "written at the other site", 30 << 20: "and protected there", 40 << 20: "home again"} {
		if got, err := home.disk("vda").read(off, 512); err != nil || !bytes.Equal(got, sector(want)) {
			t.Errorf("at %d: %q, %v", off, got, err)
		}
	}
	imagesEqual(t, p, home)
	if n := p.main.group(testVM).Resynced; n > 8<<20 {
		t.Errorf("%d bytes were shipped on the way home", n)
	}
}

// TestSwitchover there and back: nothing is lost, next to nothing is shipped.
func TestSwitchover(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, bigDisk), "vdb": randomBytes(2, diskSize)})
	p.main.mustProtect(testVM)
	must(t, vm.disk("vda").write(sector("one"), 0))
	_, err := p.main.switchover(control.SwitchoverRequest{VM: testVM, DryRun: true})
	must(t, err)
	if !vm.state().Active() || p.main.group(testVM).State != "streaming" {
		t.Fatal("a dry run did something")
	}
	sites := []*site{p.dr, p.main}
	from := p.main
	for i, to := range []*site{p.dr, p.main, p.dr} {
		rep, err := from.switchover(control.SwitchoverRequest{VM: testVM})
		must(t, err)
		if rep.RPOSeconds != 0 || rep.Lost != "" {
			t.Errorf("%+v", rep)
		}
		g := to.awaitState(testVM, "streaming")
		if !g.Protected || g.Resynced > 2<<20 {
			t.Errorf("move %d: protected %v, %d bytes shipped", i+1, g.Protected, g.Resynced)
		}
		if g := from.group(testVM); g.Role != "replica" || len(g.Alarms) > 0 {
			t.Errorf("move %d: the site left is %s, alarms %q", i+1, g.Role, g.Alarms)
		}
		there := to.host.vm(testVM)
		if got, err := there.disk("vda").read(0, 512); err != nil || !bytes.Equal(got, sector("one")) {
			t.Errorf("move %d: %q, %v", i+1, got, err)
		}
		must(t, there.disk("vdb").write(sector(fmt.Sprint(i)), int64(i)*4096))
		imagesEqual(t, p, there)
		from = to
	}
	for _, s := range sites {
		if bs := s.branches(testVM); len(bs) > 0 {
			t.Logf("branches at %s: %+v", s.name, bs)
		}
	}
	if state, err := filepath.Glob(p.main.path("state", "groups", testVM, "changes-*")); err != nil || len(state) > 0 {
		t.Errorf("records of changes that nobody needs: %q, %v", state, err)
	}
}

// TestSwitchoverRefused: what stands in the way is found before anything is changed,
// and if the other site refuses late, the VM goes on here.
func TestSwitchoverRefused(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	_, err := p.dr.switchover(control.SwitchoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitRefused, "site dr holds the replica", "at site main: kagami switchover vm1")
	_, err = p.main.failback(control.SwitchoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitRefused, "it is at home", "kagami switchover vm1")
	_, err = p.dr.failback(control.SwitchoverRequest{VM: testVM})
	refusedAs(t, err, control.ExitRefused, "was not failed over to site dr")
	p.main.host.setFault(func(ctx context.Context, step string) error {
		if strings.HasPrefix(step, "shutdown") {
			<-ctx.Done()
			return ctx.Err()
		}
		return nil
	})
	_, err = p.main.switchover(control.SwitchoverRequest{VM: testVM, ShutdownSeconds: 0.3})
	refusedAs(t, err, control.ExitFailed, "did not shut down within 300ms; nothing was moved", "virsh destroy vm1")
	p.main.host.setFault(nil)
	if g := p.main.group(testVM); g.State != "streaming" || !vm.state().Active() {
		t.Fatalf("%+v", g)
	}
	// The replica's site cannot store the promotion.
	p.dr.fs.set(func() {
		failed := false
		p.dr.fs.fail = func(op, path string) error {
			if op == "rename" && strings.Contains(path, "group.json") && !failed {
				failed = true
				return errors.New("no such luck")
			}
			return nil
		}
	})
	_, err = p.main.switchover(control.SwitchoverRequest{VM: testVM})
	if err == nil || !strings.Contains(err.Error(), "VM vm1 was started again here") {
		t.Fatalf("%v", err)
	}
	p.main.awaitState(testVM, "streaming")
	must(t, p.main.host.vm(testVM).disk("vda").write(sector("goes on"), 0))
}

// TestReturnRefused: a site whose VM still runs is not overwritten.
func TestReturnRefused(t *testing.T) {
	p, _ := disaster(t)
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "fenced")
	p.main.host.vm(testVM).setState(qmp.StateRunning)
	err := p.dr.reprotect(control.ReprotectRequest{Group: testVM})
	refusedAs(t, err, control.ExitFailed, "VM vm1, whose disks are superseded, still runs at site main", "virsh destroy vm1")
	if g := p.dr.group(testVM); g.State != "unmirrored" {
		t.Errorf("%+v", g)
	}
	p.main.host.vm(testVM).setState(qmp.StateShutoff)
	must(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM}))
	must(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM})) // it is already
	refusedAs(t, p.main.reprotect(control.ReprotectRequest{Group: testVM}), control.ExitRefused, "was not failed over to site main")
}

// TestEndAfterReturn: a VM that is unprotected while its old site is the replica leaves
// there what that site kept, and its images.
func TestEndAfterReturn(t *testing.T) {
	p, _ := disaster(t)
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "fenced")
	must(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM}))
	bs := p.main.branches(testVM)
	must(t, p.dr.unprotect(control.UnprotectRequest{VM: testVM, Files: map[string]string{"vda": p.dr.path("disks", "free.raw")}}))
	await(t, "the group to be gone", func() bool { return p.main.group(testVM).Name == "" })
	kept, err := filepath.Glob(p.main.path("state", "forgotten", "*", "branches", filepath.Base(bs[0].Disks[0].File)))
	must(t, err)
	if len(kept) != 1 || !bytes.HasPrefix(readFile(t, kept[0])[8<<20:], []byte("never left the site")) {
		t.Errorf("the branch is gone: %q", kept)
	}
	if _, err := os.Stat(p.main.path("state", "images", testVM, "vda.raw")); err != nil {
		t.Errorf("the image is gone: %v", err)
	}
}

// TestReturnWithoutRoom: a site that cannot keep what it holds beyond the failover
// is not overwritten, and says so.
func TestReturnWithoutRoom(t *testing.T) {
	p, there := disaster(t)
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "fenced")
	p.main.fs.set(func() { p.main.fs.free[p.main.path("state")] = 64 << 10 })
	refusedAs(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM}), control.ExitFailed, "no space at site main to keep", "make room at site main")
	if g := p.main.group(testVM); g.State != "fenced" || len(p.main.branches(testVM)) > 0 {
		t.Errorf("%+v", g)
	}
	if left, err := os.ReadDir(p.main.path("state", "groups", testVM, "branches")); err != nil || len(left) > 0 {
		t.Errorf("half a branch is left: %v, %v", left, err)
	}
	must(t, there.disk("vda").write(sector("runs on"), 0))
	p.main.fs.set(func() { clear(p.main.fs.free) })
	must(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM}))
}

// TestRunsAreBounded: however scattered, what a returned site names fits a message and
// the group's file, and leaves nothing out.
func TestRunsAreBounded(t *testing.T) {
	all := map[uint32][]uint64{}
	for i := range uint64(20_000) {
		all[uint32(i%3)] = append(all[uint32(i%3)], i*i%999_983)
	}
	runs := runsOf(all)
	if len(runs) > wire.MaxRuns {
		t.Fatalf("%d runs", len(runs))
	}
	for slot, regions := range all {
		for _, i := range regions {
			if !slices.ContainsFunc(runs, func(r wire.Run) bool { return r.Disk == slot && r.First <= i && i < r.First+r.Count }) {
				t.Fatalf("region %d of disk %d is left out", i, slot)
			}
		}
	}
	f := &groupFile{Name: "g", Past: make([]epoch.Pos, 1000), Returned: &wire.Returned{Runs: runs}}
	if b, err := f.encode(); err != nil || len(b) > groupFileMax {
		t.Errorf("the group's file would have %d bytes (%v), at most %d are read", len(b), err, groupFileMax)
	}
	m := wire.Manifest{Disks: []wire.Disk{{Slot: 0, Size: 10 * regionBytes}}}
	for _, bad := range []wire.Returned{
		{RegionBytes: 0, Runs: []wire.Run{{Count: 1}}}, {RegionBytes: regionBytes, Runs: []wire.Run{{First: 10, Count: 1}}},
		{RegionBytes: regionBytes, Runs: []wire.Run{{First: 9, Count: 1<<64 - 1}}}, {RegionBytes: regionBytes, Runs: []wire.Run{{Disk: 1, Count: 1}}},
		{RegionBytes: regionBytes, Runs: []wire.Run{{Count: 0}}}, {RegionBytes: regionBytes, Runs: make([]wire.Run, wire.MaxRuns+1)},
	} {
		if bad.Valid(m) {
			t.Errorf("%+v counts as valid", bad)
		}
	}
}
