package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"kagami/appliance/control"
)

// plain is what is at the source after unprotect to the original files, whose
// old copies have been removed.
func plain(vm string, targets ...string) []string {
	out := []string{"state/groups", "state/images", "run", "disks"}
	for _, target := range targets {
		out = append(out, "disks/"+vm+"-"+target+".raw")
	}
	return out
}

// TestUnprotect moves the disks back to where they came from, and the VM can
// be protected again.
func TestUnprotect(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	p.main.mustProtect(testVM)
	must(t, vm.disk("vda").write([]byte("written while protected"), 4096))
	want := guestContent(t, vm)
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM, DryRun: true}))
	if g := p.main.group(testVM); !g.Protected {
		t.Fatalf("the dry run did it: %+v", g)
	}
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	guestUnharmed(t, vm, want)
	must(t, os.Remove(aside(t, p.main, "vm1-vda.raw")))
	must(t, os.Remove(aside(t, p.main, "vm1-vdb.raw")))
	p.main.untouched(plain(testVM, "vda", "vdb"))
	if g := p.dr.group(testVM); g.Name != "" {
		t.Errorf("the replica is still there: %+v", g)
	}
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	other := p.main.path("disks", "elsewhere.raw")
	want = guestContent(t, vm)
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM, Files: map[string]string{"vdb": other}}))
	guestUnharmed(t, vm, want)
	if got := vm.disk("vdb").definition().Source; got != other {
		t.Errorf("vdb went to %s", got)
	}
}

// TestUnprotectRefused: what cannot be is said before anything is done.
func TestUnprotectRefused(t *testing.T) {
	p := newPair(t)
	p.main.extra = "groups:\n  - name: declared\n    peer: dr\n    disks: [{name: d1, image: " + p.main.path("disks", "d1.raw") + ", size: 1MiB}]\n"
	p.up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	p.main.mustProtect(testVM)
	there := p.main.path("disks", "there.raw")
	must(t, os.WriteFile(there, []byte("precious"), 0o600))
	before := p.main.traces()
	files := func(f map[string]string) control.UnprotectRequest {
		return control.UnprotectRequest{VM: testVM, Files: f}
	}
	for _, c := range []struct {
		name  string
		site  *site
		req   control.UnprotectRequest
		exit  int
		words []string
	}{
		{"unknown", p.main, control.UnprotectRequest{VM: "ghost"}, control.ExitNotFound, []string{"site main has no group ghost", "kagami status"}},
		{"at the replica's site", p.dr, control.UnprotectRequest{VM: testVM}, control.ExitRefused, []string{"site dr holds the replica of vm1", "kagami unprotect at site main"}},
		{"no VM's", p.main, control.UnprotectRequest{VM: "declared"}, control.ExitRefused, []string{"declared belongs to no VM", "config file"}},
		{"the file exists", p.main, files(map[string]string{"vda": there}), control.ExitRefused, []string{there + " for disk vda exists", "name a file that does not"}},
		{"not absolute", p.main, files(map[string]string{"vda": "x.raw"}), control.ExitUsage, []string{`"x.raw"`, "whole path"}},
		{"no such folder", p.main, files(map[string]string{"vda": "/nowhere/x.raw"}), control.ExitRefused, []string{"/nowhere/x.raw", "no such folder"}},
		{"one file for two", p.main, files(map[string]string{"vda": there + "2", "vdb": there + "2"}), control.ExitUsage, []string{"disks vda and vdb would go to the same file"}},
		{"no such disk", p.main, files(map[string]string{"vdq": there + "2"}), control.ExitUsage, []string{"vm1 has no disk vdq"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			refusedAs(t, c.site.unprotect(c.req), c.exit, c.words...)
		})
	}
	p.main.fs.set(func() { p.main.fs.free[p.main.path("disks")] = diskSize })
	refusedAs(t, p.main.unprotect(files(nil)), control.ExitFailed, "no space for the disks of vm1", "make room")
	vm.destroy()
	refusedAs(t, p.main.unprotect(files(nil)), control.ExitRefused, "VM vm1 is not running", "virsh start vm1")
	must(t, vm.start())
	if now := p.main.traces(); strings.Join(now, " ") != strings.Join(before, " ") {
		t.Errorf("a refusal left something:\nwas %v\nis  %v", before, now)
	}
	if g := p.main.group(testVM); !g.Protected {
		t.Errorf("%+v", g)
	}
	sameAtReplica(t, p, vm)
}

// TestUnprotectFails: the copy back fails. A VM that still has all disks from
// kagami stays protected; one that has not is not, and the next attempt goes on.
func TestUnprotectFails(t *testing.T) {
	for _, step := range []string{"detach vda copy 50", "detach vda ready", "detach vda pivot"} {
		t.Run(step, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda", "vdb")
			p.main.mustProtect(testVM)
			before := p.main.traces()
			p.main.host.setFault(failAt(step))
			refusedAs(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}), control.ExitFailed, "the copy failed", "vm1 stays as it was, protected")
			if g := p.main.group(testVM); !g.Protected || len(g.Alarms) > 0 {
				t.Errorf("%+v", g)
			}
			if now := p.main.traces(); strings.Join(now, " ") != strings.Join(before, " ") {
				t.Errorf("it left something:\nwas %v\nis  %v", before, now)
			}
			sameAtReplica(t, p, vm)
		})
	}
	t.Run("second disk", func(t *testing.T) {
		p := newPair(t).up()
		vm := p.main.addVM(testVM, "vda", "vdb")
		p.main.mustProtect(testVM)
		want := guestContent(t, vm)
		p.main.host.setFault(failAt("detach vdb copy 50"))
		refusedAs(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}), control.ExitFailed, "disks vdb of vm1 go on from kagami, unprotected", "kagami unprotect vm1 again")
		if g := p.main.group(testVM); g.Protected || len(g.Alarms) != 1 {
			t.Errorf("half of it is plain, but status says %+v", g)
		}
		p.main.host.setFault(nil)
		p.main.kill() // and a restart does not call it protected
		p.start(p.main, p.dr)
		if g := p.main.group(testVM); g.Protected || len(g.Alarms) == 0 {
			t.Errorf("after a restart: %+v", g)
		}
		must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
		guestUnharmed(t, vm, want)
		await(t, "the group to be gone", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
		p.main.mustProtect(testVM)
	})
}

// TestUnprotectWithoutPeer: the replica's site is away, so the guest's FLUSHes
// wait. Unprotect gets them going, moves the disks, and the replica goes as
// soon as its site is back, over a restart of this one.
func TestUnprotectWithoutPeer(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	p.main.mustProtect(testVM)
	p.dr.kill()
	p.main.awaitState(testVM, "stalled")
	var guest sync.WaitGroup
	guest.Go(func() {
		if err := vm.disk("vdb").write([]byte("waits for its flush"), 8192); err != nil {
			t.Errorf("the guest saw an error: %v", err)
		}
	})
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	guest.Wait()
	got, err := vm.disk("vdb").read(8192, 19)
	must(t, err)
	if string(got) != "waits for its flush" {
		t.Errorf("the guest's write is lost: %q", got)
	}
	guestUnharmed(t, vm, guestContent(t, vm))
	if g := p.main.group(testVM); g.State != "leaving" || g.Protected {
		t.Errorf("the peer was not told, but: %+v", g)
	}
	req := control.ProtectRequest{VM: testVM, To: "dr"}
	refusedAs(t, p.main.protect(t.Context(), req), control.ExitRefused, "vm1 was unprotected, but site dr could not be told yet", "told as soon as it is connected")
	refusedAs(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}), control.ExitRefused, "vm1 was unprotected, but site dr could not be told yet")
	p.main.kill()
	p.start(p.main, p.dr)
	if g := p.main.group(testVM); g.State != "leaving" {
		t.Errorf("after a restart: %+v", g)
	}
	p.start(p.dr, p.main)
	await(t, "the peer to be told", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
	must(t, os.Remove(aside(t, p.main, "vm1-vda.raw")))
	must(t, os.Remove(aside(t, p.main, "vm1-vdb.raw")))
	p.main.untouched(plain(testVM, "vda", "vdb"))
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}

// TestPeerLostDuringUnprotect: the replica's site goes away in mid-copy.
func TestPeerLostDuringUnprotect(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	want := guestContent(t, vm)
	var once sync.Once
	p.main.host.setFault(func(ctx context.Context, step string) error {
		if step == "detach vda copy 50" {
			once.Do(func() {
				p.dr.kill()
				<-ctx.Done() // the copy is given up: its pivot might hang
			})
		}
		return nil
	})
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	guestUnharmed(t, vm, want)
	p.start(p.dr, p.main)
	await(t, "the peer to be told", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
}

// TestUnprotectInterrupted before the pivot: as it was.
func TestUnprotectInterrupted(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	before := p.main.traces()
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	p.main.host.setFault(func(ctx context.Context, step string) error {
		if step == "detach vda copy 50" {
			interrupt()
			<-ctx.Done()
		}
		return nil
	})
	refusedAsInterrupted(t, p.main.control.Unprotect(ctx, control.UnprotectRequest{VM: testVM}, func(control.Event) {}))
	await(t, "the VM to be protected again", func() bool { return p.main.group(testVM).Protected })
	if now := p.main.traces(); strings.Join(now, " ") != strings.Join(before, " ") {
		t.Errorf("it left something:\nwas %v\nis  %v", before, now)
	}
	sameAtReplica(t, p, vm)
}

// TestUnprotectedReplicaStays: the replica's images are kept after unprotect.
func TestUnprotectedReplicaStays(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	want := guestContent(t, vm)
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	got, err := os.ReadFile(p.dr.path("state", "images", testVM, "vda.raw"))
	must(t, err)
	if !bytes.Equal(got, want["vda"]) {
		t.Error("it is not what it was")
	}
	p.main.mustProtect(testVM) // and does not stand in the way
	sameAtReplica(t, p, vm)
}

// TestUnprotectNamesEveryDisk that needs a file, at once.
func TestUnprotectNamesEveryDisk(t *testing.T) {
	p := newPair(t)
	g := newGroup(p.main.daemon(p.dr), &groupFile{Name: "web", Role: RolePromoted, VM: "web",
		Disks: []diskFile{{Name: "vda"}, {Name: "vdb"}, {Name: "vdc", Kept: "/srv/c.raw"}}})
	_, err := g.filesFor(nil)
	refusedAs(t, err, control.ExitUsage, "disks of web did not come from a file: vda, vdb", "kagami unprotect web --file vda=PATH --file vdb=PATH")
	_, err = g.filesFor(map[string]string{"vda": "/nowhere/a"})
	refusedAs(t, err, control.ExitUsage, "did not come from a file: vdb", "--file vdb=PATH")
}

// TestLeavingInWords: an unprotect and a first protect that was taken back are
// told apart.
func TestLeavingInWords(t *testing.T) {
	f := &groupFile{Name: "web", Peer: "dr"}
	refusedAs(t, f.leaving(), control.ExitRefused, "web was unprotected, but site dr could not be told yet", "kagami forget web")
	f.Purge = true
	refusedAs(t, f.leaving(), control.ExitRefused, "web is not protected, its protect was taken back, but site dr")
}

// TestUnprotectOfFailed: a group that has failed comes to no end by itself. Its
// disks are not moved, neither by unprotect nor by what undoes a protect.
func TestUnprotectOfFailed(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	g := p.main.d.find(testVM)
	g.src.eng.Fail(errors.New("the disk broke"))
	p.main.awaitState(testVM, "failed")
	began := time.Now()
	refusedAs(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}), control.ExitFailed, "the disks of vm1 are not served: the disk broke", "restart the daemon")
	ctx, cancel := context.WithTimeout(t.Context(), commandLimit)
	defer cancel()
	err := p.main.d.detachDisks(ctx, g, map[string]string{"vda": p.main.path("disks", "back.raw")}, func(control.Event) {})
	refusedAs(t, err, control.ExitFailed, "the disks of vm1 are not served: the disk broke", "restart the daemon")
	if took := time.Since(began); took > commandLimit/2 {
		t.Errorf("it took %v", took)
	}
}
