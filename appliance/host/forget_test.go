package host

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/images"
)

// scratch is the section of a declared group of one disk at site main.
func (p *pair) scratch() string {
	return "groups:\n  - name: scratch\n    peer: dr\n    disks: [{name: data, image: " + p.main.path("disks", "data.raw") + ", size: 1MiB}]\n"
}

func (s *site) forget(req control.ForgetRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return s.control.Forget(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

// glob finds the one file of a pattern below the site's folder.
func (s *site) glob(pattern string) string {
	s.t.Helper()
	found, err := filepath.Glob(s.path(pattern))
	must(s.t, err)
	if len(found) != 1 {
		s.t.Fatalf("%s: %v", pattern, found)
	}
	return found[0]
}

// gone checks that a site has no group of the name, in its state neither.
func (s *site) gone(group string) {
	s.t.Helper()
	if g := s.group(group); g.Name != "" {
		s.t.Errorf("site %s has the group: %+v", s.name, g)
	}
	if _, err := os.Stat(s.path("state", "groups", group)); !errors.Is(err, os.ErrNotExist) {
		s.t.Errorf("its state is there: %v", err)
	}
}

// TestUndeclaredGroup: a group whose section is gone from the config file is
// kept, not served, and says so. It comes back with its section; forget ends it.
func TestUndeclaredGroup(t *testing.T) {
	p := newPair(t)
	p.main.extra = p.scratch()
	p.up()
	p.main.awaitState("scratch", "streaming")
	refusedAs(t, p.main.forget(control.ForgetRequest{Group: "scratch", Force: true}), control.ExitRefused, "the config file declares scratch", "restart the daemon")
	m, err := openExport(p.main.path("run", "scratch-data.sock"), "data")
	must(t, err)
	_, err = m.WriteAt([]byte("precious"), 4096)
	must(t, errors.Join(err, m.Flush(), m.Close()))

	section := p.main.extra
	p.main.extra = ""
	p.main.stop()
	p.start(p.main, p.dr)
	p.awaitLinks()
	g := p.main.group("scratch")
	if g.State != "undeclared" || g.Protected || len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "kagami forget scratch") {
		t.Errorf("%+v", g)
	}
	if _, err := openExport(p.main.path("run", "scratch-data.sock"), "data"); err == nil {
		t.Error("it is served")
	}
	p.main.extra = section
	p.main.stop()
	p.start(p.main, p.dr)
	if g := p.main.awaitState("scratch", "streaming"); len(g.Alarms) > 0 {
		t.Errorf("declared again: %+v", g)
	}
	p.main.extra = ""
	p.main.stop()
	p.start(p.main, p.dr)
	p.awaitLinks()

	req := control.ForgetRequest{Group: "scratch"}
	refusedAs(t, p.main.forget(req), control.ExitRefused, "scratch is not forgotten: site dr has a replica of it", "--force")
	req.Force, req.DryRun = true, true
	must(t, p.main.forget(req))
	if g := p.main.group("scratch"); g.State != "undeclared" {
		t.Fatalf("the dry run did it: %+v", g)
	}
	req.DryRun = false
	must(t, p.main.forget(req))
	p.main.gone("scratch")
	p.dr.gone("scratch")
	for _, image := range []string{p.main.path("disks", "data.raw"), p.dr.path("state", "images", "scratch", "data.raw")} {
		if b := readFile(t, image); string(b[4096:4104]) != "precious" {
			t.Errorf("%s is not what it was", image)
		}
	}
	refusedAs(t, p.main.forget(req), control.ExitNotFound, "site main has no group scratch")
	p.main.extra = section // and it stands in nobody's way
	p.main.stop()
	p.start(p.main, p.dr)
	p.main.awaitState("scratch", "streaming")
}

// TestSameGroupDeclaredTwice: both sites declare it; each refuses the other's.
// The alarm names the way out, and it is one: no data was at stake.
func TestSameGroupDeclaredTwice(t *testing.T) {
	p := newPair(t)
	p.main.extra = p.scratch()
	p.dr.extra = "groups:\n  - name: scratch\n    peer: main\n    disks: [{name: data, image: " + p.dr.path("disks", "data.raw") + ", size: 1MiB}]\n"
	p.up()
	await(t, "the alarm", func() bool {
		g := p.main.group("scratch")
		return len(g.Alarms) == 1 && strings.Contains(g.Alarms[0], "kagami forget scratch")
	})
	p.dr.extra = ""
	p.dr.stop()
	p.start(p.dr, p.main)
	must(t, p.dr.forget(control.ForgetRequest{Group: "scratch"}))
	p.dr.gone("scratch")
	if g := p.main.awaitState("scratch", "streaming"); len(g.Alarms) > 0 {
		t.Errorf("%+v", g)
	}
	if g := p.dr.group("scratch"); g.Role != "replica" {
		t.Errorf("%+v", g)
	}
}

// TestForgetRefused: what is in use is not given up, with --force neither, and
// what may be the only copy only with it.
func TestForgetRefused(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	sure := control.ForgetRequest{Group: testVM, Force: true}
	refusedAs(t, p.main.forget(sure), control.ExitRefused, "a VM runs from the disks of vm1", "kagami unprotect vm1")
	refusedAs(t, p.dr.forget(sure), control.ExitRefused, "site main replicates vm1 to this site just now", "kagami unprotect vm1")
	vm.destroy()
	await(t, "the VM to let go", func() bool { return p.main.group(testVM).Disks[0].Clients == 0 })
	refusedAs(t, p.main.forget(control.ForgetRequest{Group: testVM}), control.ExitRefused, "it protects VM vm1", "--force")
	if g := p.main.group(testVM); !g.Protected {
		t.Errorf("a refusal did harm: %+v", g)
	}
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	refusedAs(t, p.dr.forget(control.ForgetRequest{Group: testVM}), control.ExitRefused, "may be the only one", "--force")
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM, NoStart: true})
	must(t, err)
	refusedAs(t, p.dr.forget(control.ForgetRequest{Group: testVM}), control.ExitRefused, "promoted here and is the only copy", "--force")
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "fenced")
	p.dr.kill()
	await(t, "the link to end", func() bool { return !p.main.status().Peers[0].Connected })
	refusedAs(t, p.main.forget(control.ForgetRequest{Group: testVM}), control.ExitRefused, "is not connected, and this may be the only copy", "--force")
}

// TestForgetReplica: its images are brought up to the last epoch, and kept.
func TestForgetReplica(t *testing.T) {
	p := newPair(t)
	p.dr.extra = strings.Replace(testLimits, "%s", "1h", 1) // what arrives stays in the spool
	p.up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	must(t, vm.disk("vda").write([]byte("in the spool"), 8192))
	want := guestContent(t, vm)["vda"]
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	must(t, p.dr.forget(control.ForgetRequest{Group: testVM, Force: true}))
	p.dr.gone(testVM)
	if got := readFile(t, p.dr.glob("state/images/vm1/vda.raw.old-*")); !bytes.Equal(got, want) {
		t.Error("the image is not the last epoch's")
	}
	p.dr.glob("state/forgotten/vm1.old-*/group.json")
	// The source, back, does not make it again by itself.
	p.start(p.main, p.dr)
	await(t, "the source to say so", func() bool {
		return slices.ContainsFunc(p.main.group(testVM).Alarms, func(a string) bool { return strings.Contains(a, "site dr has no group vm1") })
	})
}

// TestForgetFenced is the way back after a failover: the VM goes to a plain
// file at the new site, the old source is forgotten, and the VM is protected
// towards it.
func TestForgetFenced(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	must(t, vm.disk("vda").write([]byte("only here"), 8192))
	vm.destroy()
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	p.start(p.main, p.dr)
	p.awaitLinks()
	p.main.awaitState(testVM, "fenced")
	refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitRefused, "what a failover to site dr left behind", "kagami forget vm1")
	req := control.ForgetRequest{Group: testVM}
	old, err := openExport(p.main.path("run", "vm1-vda.sock"), "vda") // somebody started the old VM
	must(t, err)
	refusedAs(t, p.main.forget(req), control.ExitRefused, "the superseded VM vm1 runs here", "virsh destroy vm1")
	must(t, old.Close())
	await(t, "the old VM to be gone", func() bool { return p.main.group(testVM).Disks[0].Clients == 0 })
	must(t, p.main.forget(req))
	p.main.gone(testVM)
	if log := p.main.log.String(); !strings.Contains(log, "old file of disk vda: "+p.main.path("disks", "vm1-vda.raw")) || !strings.Contains(log, "virsh undefine") {
		t.Errorf("what remains is not said")
	}
	if b := readFile(t, p.main.glob("state/images/vm1/vda.raw.old-*")); string(b[8192:8201]) != "only here" {
		t.Error("the image is not what it was")
	}
	if g := p.dr.group(testVM); g.Role != "promoted" || g.State != "unmirrored" {
		t.Errorf("the promoted group suffered: %+v", g)
	}
	must(t, p.dr.unprotect(control.UnprotectRequest{VM: testVM, Files: map[string]string{"vda": p.dr.path("disks", "back.raw")}}))
	must(t, p.dr.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "main"}))
	if g := p.dr.group(testVM); !g.Protected {
		t.Errorf("%+v", g)
	}
}

// TestForgetBrokenOff: between the image and the state; the second try ends it.
func TestForgetBrokenOff(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	vm.destroy()
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	p.dr.fs.set(func() {
		p.dr.fs.fail = func(op, path string) error {
			if op == "rename" && strings.Contains(path, "/forgotten/") {
				return errors.New("broken off")
			}
			return nil
		}
	})
	req := control.ForgetRequest{Group: testVM, Force: true}
	refusedAs(t, p.dr.forget(req), control.ExitFailed, "put state of group aside", "broken off", "kagami forget vm1 again")
	p.dr.awaitState(testVM, "failed")
	p.dr.kill()
	p.start(p.dr, p.main)
	if g := p.dr.group(testVM); g.State != "failed" || !strings.Contains(strings.Join(g.Alarms, " "), "no such file") {
		t.Errorf("%+v", g)
	}
	must(t, p.dr.forget(req))
	p.dr.gone(testVM)
	p.dr.glob("state/images/vm1/vda.raw.old-*")
}

// TestForgetLeaving: a site that never comes back need not be told.
func TestForgetLeaving(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.dr.kill()
	p.main.awaitState(testVM, "stalled")
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	p.main.awaitState(testVM, "leaving")
	must(t, p.main.forget(control.ForgetRequest{Group: testVM}))
	p.main.gone(testVM)
	p.start(p.dr, p.main)
	p.awaitLinks()
	if g := p.dr.group(testVM); g.Role != "replica" {
		t.Errorf("%+v", g)
	}
	must(t, p.dr.forget(control.ForgetRequest{Group: testVM, Force: true}))
	p.main.mustProtect(testVM)
}

// TestUnreadableReplica: the group file of a replica is damaged. Its source says
// that it has failed there, not that it is somebody else's, and nothing else happens.
func TestUnreadableReplica(t *testing.T) {
	p := newPair(t)
	p.main.extra = p.scratch()
	p.up()
	p.main.awaitState("scratch", "streaming")
	p.dr.stop()
	file := p.dr.path("state", "groups", "scratch", "group.json")
	was := readFile(t, file)
	must(t, os.WriteFile(file, bytes.Replace(was, []byte(`"role"`), []byte(`"rold"`), 1), 0o600))
	p.start(p.dr, p.main)
	await(t, "the source to say why it stalls", func() bool {
		g := p.main.group("scratch")
		return g.State == "stalled" && len(g.Alarms) == 1 && strings.Contains(g.Alarms[0], "group scratch is failed at site dr")
	})
	if g := p.dr.group("scratch"); g.State != "failed" || len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "checksum") {
		t.Errorf("%+v", g)
	}
	p.dr.stop()
	must(t, os.WriteFile(file, was, 0o600))
	p.start(p.dr, p.main)
	p.main.awaitState("scratch", "streaming")
}

// TestForgetUnreadable: a group whose file is damaged can be given up, too.
func TestForgetUnreadable(t *testing.T) {
	p := newPair(t)
	p.main.extra = p.scratch()
	p.up()
	p.main.awaitState("scratch", "streaming")
	p.main.stop()
	must(t, os.WriteFile(p.main.path("state", "groups", "scratch", "group.json"), []byte("{"), 0o600))
	p.start(p.main, p.dr)
	p.main.awaitState("scratch", "failed")
	for _, err := range []error{
		p.main.protect(t.Context(), control.ProtectRequest{VM: "scratch", To: "dr"}),
		p.main.unprotect(control.UnprotectRequest{VM: "scratch"}),
	} {
		refusedAs(t, err, control.ExitFailed, "the state of scratch cannot be read", "kagami forget scratch")
	}
	refusedAs(t, p.main.forget(control.ForgetRequest{Group: "scratch"}), control.ExitRefused, "cannot be told", "--force")
	must(t, p.main.forget(control.ForgetRequest{Group: "scratch", Force: true}))
	p.main.gone("scratch")
	p.main.glob("state/forgotten/scratch.old-*/group.json")
	if size := len(readFile(t, p.main.path("disks", "data.raw"))); size != 1<<20 {
		t.Errorf("the image has %d bytes", size)
	}
}

// TestForgottenIsNotSaved: who still holds a group that is gone does not write to
// the file of the one that has its name now.
func TestForgottenIsNotSaved(t *testing.T) {
	d := newDaemon(&config.Config{StateDir: t.TempDir()}, "test", images.OS{}, nil)
	old, other := newGroup(d, &groupFile{Name: testVM, ID: epoch.NewUUID()}), newGroup(d, &groupFile{Name: testVM, ID: epoch.NewUUID()})
	must(t, os.MkdirAll(old.dir, 0o700))
	d.add(old)
	must(t, old.update(func(*groupFile) {}))
	d.forget(old)
	must(t, other.update(func(*groupFile) {}))
	if err := old.update(func(*groupFile) {}); err == nil {
		t.Error("it is saved")
	}
	if b := readFile(t, old.dir+"/group.json"); !strings.Contains(string(b), other.file.ID.String()) {
		t.Errorf("the file is now %s", b)
	}
}

// TestForgottenIsNotSettled: a look at the groups that began before one was
// forgotten touches nothing of what has its name now.
func TestForgottenIsNotSettled(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	f := &groupFile{Name: testVM, VM: testVM, Role: RoleSource, Peer: "dr", Phase: Protecting, Disks: []diskFile{{Name: "vda", Image: p.main.path("state", "vda.raw"), Socket: p.main.path("run", "vm1-vda.sock")}}}
	g := newGroup(p.main.d, f)
	must(t, os.MkdirAll(g.dir, 0o700))
	must(t, f.save(p.main.fs, g.dir))
	p.main.d.settle(g)
	if !g.op.TryLock() {
		t.Error("it is being taken back")
	}
	if _, err := os.Stat(g.dir + "/group.json"); err != nil {
		t.Error(err)
	}
}
