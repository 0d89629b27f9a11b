package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"kagami/appliance/control"
	"kagami/qmp"
)

// TestProtectRefused: whatever stands in the way is found before anything is
// made, said in one sentence with what to do next, and leaves no trace.
func TestProtectRefused(t *testing.T) {
	p := newPair(t)
	p.dr.extra = "groups:\n  - name: unbootable\n    domain:\n      disks: [{target: vdz, file: /nowhere/x.raw}]\n"
	p.up()
	with := func(name string, change func(*qmp.Disk)) {
		change(&p.main.addVM(name, "vda").disks[0].def)
	}
	p.main.addVM("off", "vda").destroy()
	p.main.addVM("plain", "vda")
	p.main.addVM("diskless")
	p.main.addVM("bad name", "vda")
	p.main.addVM("unbootable", "vda")
	with("read-only", func(d *qmp.Disk) { d.ReadOnly = true })
	with("shared", func(d *qmp.Disk) { d.Shareable = true })
	with("unsafe", func(d *qmp.Disk) { d.Cache = "unsafe" })
	with("copied", func(d *qmp.Disk) { d.Job = true })
	with("unknown-size", func(d *qmp.Disk) { d.Size = 0 })
	here, there := p.main.traces(), p.dr.traces()
	for _, c := range []struct {
		name  string
		req   control.ProtectRequest
		exit  int
		words []string
	}{
		{"not defined", control.ProtectRequest{VM: "ghost", To: "dr"}, control.ExitNotFound, []string{`no VM "ghost"`, "virsh list --all"}},
		{"not running", control.ProtectRequest{VM: "off", To: "dr"}, control.ExitRefused, []string{"VM off is not running", "virsh start off"}},
		{"disk missing", control.ProtectRequest{VM: "plain", To: "dr", Disks: []string{"vdq"}}, control.ExitNotFound, []string{"VM plain has no disk vdq", "virsh domblklist plain"}},
		{"no disk at all", control.ProtectRequest{VM: "diskless", To: "dr"}, control.ExitRefused, []string{"diskless has no writable disk"}},
		{"read-only disk", control.ProtectRequest{VM: "read-only", To: "dr", Disks: []string{"vda"}}, control.ExitRefused, []string{"vda cannot be protected", "read-only"}},
		{"only a read-only disk", control.ProtectRequest{VM: "read-only", To: "dr"}, control.ExitRefused, []string{"no writable disk"}},
		{"shareable disk", control.ProtectRequest{VM: "shared", To: "dr"}, control.ExitRefused, []string{"vda cannot be protected", "shareable", "one VM only"}},
		{"cache=unsafe", control.ProtectRequest{VM: "unsafe", To: "dr"}, control.ExitRefused, []string{"unsafe", "virsh edit"}},
		{"block job running", control.ProtectRequest{VM: "copied", To: "dr"}, control.ExitRefused, []string{"a block job is running on disk vda", "virsh blockjob"}},
		{"size not known", control.ProtectRequest{VM: "unknown-size", To: "dr"}, control.ExitRefused, []string{"disk vda of unknown-size has 0 bytes"}},
		{"name not usable", control.ProtectRequest{VM: "bad name", To: "dr"}, control.ExitRefused, []string{`"bad name"`, "virsh domrename"}},
		{"peer unknown", control.ProtectRequest{VM: "plain", To: "mars"}, control.ExitNotFound, []string{`site "mars"`, "known peers: dr"}},
		{"replica would not boot", control.ProtectRequest{VM: "unbootable", To: "dr"}, control.ExitRefused, []string{"site dr could not take unbootable", "vdz", "groups: … domain:"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			refusedAs(t, p.main.protect(t.Context(), c.req), c.exit, c.words...)
		})
	}
	p.main.untouched(here)
	p.dr.untouched(there)
	must(t, p.main.protect(t.Context(), control.ProtectRequest{VM: "plain", To: "dr", DryRun: true}))
	p.main.untouched(here)
	p.dr.untouched(there)
}

// TestProtectTwice: a second protect of the same VM is refused, while the
// first one runs and afterwards.
func TestProtectTwice(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	copying, goOn := make(chan struct{}), make(chan struct{})
	p.main.host.setFault(func(_ context.Context, step string) error {
		if step == "attach vda copy 50" {
			close(copying)
			<-goOn
		}
		return nil
	})
	first := make(chan error, 1)
	req := control.ProtectRequest{VM: testVM, To: "dr"}
	go func() { first <- p.main.protect(context.Background(), req) }()
	<-copying
	refusedAs(t, p.main.protect(t.Context(), req), control.ExitRefused, "vm1 is already a group at this site (source, syncing)", "kagami status vm1")
	refusedAs(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}), control.ExitRefused, "another operation is under way on vm1")
	close(goOn)
	must(t, <-first)
	refusedAs(t, p.main.protect(t.Context(), req), control.ExitRefused, "vm1 is already a group at this site (source, streaming)")
	if g := p.main.group(testVM); !g.Protected {
		t.Errorf("the refusal did harm: %+v", g)
	}
}

// TestNoSpace: here, at the peer for images, at the peer for the spool.
func TestNoSpace(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	here, there := p.main.traces(), p.dr.traces()
	req := control.ProtectRequest{VM: testVM, To: "dr"}
	try := func(s *site, free int64, exit int, words ...string) {
		t.Helper()
		s.fs.set(func() { s.fs.free[s.path("state")] = free })
		refusedAs(t, p.main.protect(t.Context(), req), exit, words...)
		s.fs.set(func() { delete(s.fs.free, s.path("state")) })
		p.main.untouched(here)
		p.dr.untouched(there)
	}
	try(p.main, diskSize-1, control.ExitFailed, "no space for the images of vm1", "1048575 free", "make room")
	try(p.dr, 100, control.ExitRefused, "no space for images and spool at site dr", "100 free")
	try(p.dr, diskSize+(32<<20)-1, control.ExitRefused, "no space for images and spool at site dr")
	p.main.mustProtect(testVM)
}

// full makes everything below a part of a path end with ENOSPC.
func full(s *site, where string) {
	s.fs.set(func() {
		s.fs.fail = func(op, path string) error {
			if strings.Contains(path, where) && (op == "create" || op == "write" || op == "truncate") {
				return fmt.Errorf("%s %s: %w", op, path, unix.ENOSPC)
			}
			return nil
		}
	})
}

func notFull(s *site) { s.fs.set(func() { s.fs.fail = nil }) }

// TestSpaceGoneMeanwhile: the peer's file system fills up between the check
// and the making of the replica.
func TestSpaceGoneMeanwhile(t *testing.T) {
	for _, where := range []string{"images/vm1", "groups/vm1/group.json", "groups/vm1/applied"} {
		t.Run(strings.ReplaceAll(where, "/", " "), func(t *testing.T) {
			p := newPair(t).up()
			p.main.addVM(testVM, "vda")
			here, there := p.main.traces(), p.dr.traces()
			full(p.dr, where)
			req := control.ProtectRequest{VM: testVM, To: "dr"}
			refusedAs(t, p.main.protect(t.Context(), req), control.ExitFailed, "site dr cannot make the replica", "no space left", "make room at site dr")
			p.main.untouched(here)
			p.dr.untouched(there)
			notFull(p.dr)
			p.main.mustProtect(testVM)
		})
	}
}

// TestSpoolWithoutSpace: no segment of the spool can be made. The copy waits
// and both sites say why; it goes on when there is space. The guest notices
// nothing.
func TestSpoolWithoutSpace(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	full(p.dr, "groups/vm1/spool")
	warned := make(chan string, 10)
	done := make(chan error, 1)
	go func() {
		done <- p.main.control.Protect(context.Background(), control.ProtectRequest{VM: testVM, To: "dr"}, func(ev control.Event) {
			if ev.Step == "warning" {
				warned <- ev.Message
			}
		})
	}()
	select {
	case w := <-warned:
		t.Log(w)
		if !strings.Contains(w, "spool is full") {
			t.Errorf("warned of %q", w)
		}
	case err := <-done:
		t.Fatalf("protect ended without the spool: %v", err)
	}
	must(t, vm.disk("vda").write([]byte("the guest goes on"), 0))
	if g := p.dr.group(testVM); len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "no space for the spool") || !strings.Contains(g.Alarms[0], "no space left on device") {
		t.Errorf("at the replica: %q", g.Alarms)
	}
	notFull(p.dr)
	must(t, <-done)
	if g := p.main.group(testVM); !g.Protected || len(g.Alarms) > 0 {
		t.Errorf("%+v", g)
	}
	if g := p.dr.group(testVM); len(g.Alarms) > 0 {
		t.Errorf("at the replica: %q", g.Alarms)
	}
	sameAtReplica(t, p, vm)
}

// TestSpaceGoneHere: the same at the source.
func TestSpaceGoneHere(t *testing.T) {
	for _, where := range []string{"images/vm1", "groups/vm1/group.json", "groups/vm1/active.log", "groups/vm1/domain.xml"} {
		t.Run(strings.ReplaceAll(where, "/", " "), func(t *testing.T) {
			p := newPair(t).up()
			p.main.addVM(testVM, "vda")
			here, there := p.main.traces(), p.dr.traces()
			full(p.main, where)
			req := control.ProtectRequest{VM: testVM, To: "dr"}
			refusedAs(t, p.main.protect(t.Context(), req), control.ExitFailed, "no space left", "kagami protect vm1")
			notFull(p.main)
			p.main.untouched(here)
			p.dr.untouched(there)
			p.main.mustProtect(testVM)
		})
	}
}

// TestSizeDiffers: the disk grew between the look at it and the copy.
func TestSizeDiffers(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	here, there := p.main.traces(), p.dr.traces()
	once := make(chan struct{}, 1)
	p.main.fs.set(func() {
		p.main.fs.fail = func(op, path string) error {
			if strings.HasSuffix(path, "domain.xml") { // after all checks, before the copy
				select {
				case once <- struct{}{}:
					vm.disks[0].mu.Lock()
					vm.disks[0].def.Size += 4096
					vm.disks[0].mu.Unlock()
				default:
				}
			}
			return nil
		}
	})
	refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitRefused,
		"disk vda of vm1 has 1052672 bytes, the export 1048576", "exactly as large")
	p.main.untouched(here)
	p.dr.untouched(there)
}

// TestSocketFolder: run_dir is not reachable by QEMU's user, read-only, or too
// deep for the path of a socket.
func TestSocketFolder(t *testing.T) {
	req := control.ProtectRequest{VM: testVM, To: "dr"}
	t.Run("not reachable", func(t *testing.T) {
		p := newPair(t).up()
		p.main.addVM(testVM, "vda")
		p.main.host.uid, p.main.host.gid = 65534, 65534
		here, there := p.main.traces(), p.dr.traces()
		must(t, os.Chmod(p.main.path("run"), 0o700))
		refusedAs(t, p.main.protect(t.Context(), req), control.ExitRefused, "QEMU", "may not enter "+p.main.path("run"), "chmod o+x")
		p.main.untouched(here)
		p.dr.untouched(there)
		must(t, os.Chmod(p.main.path("run"), 0o755))
		refusedAs(t, p.main.protect(t.Context(), req), control.ExitRefused, "may not read and write", "socket_group", "chgrp 65534")
		p.main.untouched(here)
		p.dr.untouched(there)
	})
	t.Run("not writable", func(t *testing.T) {
		if os.Geteuid() != 0 {
			missing(t, "root, to mount")
		}
		p := newPair(t)
		must(t, os.MkdirAll(p.main.path("run"), 0o755))
		must(t, unix.Mount("kagami-test", p.main.path("run"), "tmpfs", 0, "size=1m"))
		t.Cleanup(func() { // before the pair's own, which removes the folder
			p.main.stopIfUp()
			await(t, "the sockets' folder to be free", func() bool { return unix.Unmount(p.main.path("run"), 0) == nil })
		})
		p.up()
		p.main.addVM(testVM, "vda")
		here, there := p.main.traces(), p.dr.traces()
		must(t, unix.Mount("", p.main.path("run"), "", unix.MS_REMOUNT|unix.MS_RDONLY, ""))
		refusedAs(t, p.main.protect(t.Context(), req), control.ExitRefused, "the folder of the sockets, "+p.main.path("run"), "read-only file system")
		must(t, unix.Mount("", p.main.path("run"), "", unix.MS_REMOUNT, ""))
		p.main.untouched(here)
		p.dr.untouched(there)
		p.main.mustProtect(testVM)
	})
	t.Run("path too long", func(t *testing.T) {
		p := newPair(t)
		p.main.setRunDir(strings.Repeat("r", 40))
		p.up()
		name := strings.Repeat("n", 110-len(p.main.path(p.main.runDir)+"/-vda.sock"))
		p.main.addVM(name, "vda")
		here, there := p.main.traces(), p.dr.traces()
		refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: name, To: "dr"}), control.ExitRefused, "has 110 bytes", "run_dir")
		p.main.untouched(here)
		p.dr.untouched(there)
	})
	t.Run("socket taken", func(t *testing.T) {
		p := newPair(t).up()
		p.main.addVM(testVM, "vda")
		must(t, os.WriteFile(p.main.path("run", "vm1-vda.sock"), []byte("x"), 0o600))
		here, there := p.main.traces(), p.dr.traces()
		refusedAs(t, p.main.protect(t.Context(), req), control.ExitFailed, "vm1-vda.sock", "no socket")
		p.main.untouched(here)
		p.dr.untouched(there)
	})
}

// TestLibvirtAway: without libvirt the daemon runs and says so; it connects
// when libvirt comes, and says what is switched off.
func TestLibvirtAway(t *testing.T) {
	p := newPair(t)
	p.main.setDialErr(errors.New("connect to libvirt: no such socket"))
	p.up()
	req := control.ProtectRequest{VM: testVM, To: "dr"}
	refusedAs(t, p.main.protect(t.Context(), req), control.ExitFailed, "libvirt is not reachable", "no such socket", "libvirtd")
	p.main.stop()
	p.main.setDialErr(nil)
	p.main.libvirtOff = true
	p.start(p.main, p.dr)
	refusedAs(t, p.main.protect(t.Context(), req), control.ExitRefused, "libvirt is not enabled at site main", "libvirt.enabled")
}

// TestCertificateOfTheGroup: the peer's certificate for us does not allow it.
func TestCertificateOfTheGroup(t *testing.T) {
	p := newPair(t, "other").up()
	p.main.addVM(testVM, "vda")
	here, there := p.main.traces(), p.dr.traces()
	refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitFailed,
		"the certificate of site main does not allow group vm1", "kagami pki issue")
	p.main.untouched(here)
	p.dr.untouched(there)
}

// missing skips a test that cannot run here; in CI that is a failure.
func missing(t *testing.T, what string) {
	t.Helper()
	if os.Getenv("CI") == "true" {
		t.Fatalf("missing: %s", what)
	}
	t.Skipf("missing: %s", what)
}

// TestDamagedSiteFile: it keeps the daemon of all VMs from starting, so what is
// said must get it going again.
func TestDamagedSiteFile(t *testing.T) {
	p := newPair(t)
	p.main.extra = p.scratch()
	p.up()
	p.main.awaitState("scratch", "streaming")
	p.dr.stop()
	must(t, os.WriteFile(p.dr.path("state", "site.json"), []byte("{"), 0o600))
	_, err := p.dr.daemon(p.main).claim()
	refusedAs(t, err, control.ExitFailed, "site.json is damaged", "remove it")
	must(t, os.Remove(p.dr.path("state", "site.json")))
	p.start(p.dr, p.main)
	p.main.awaitState("scratch", "streaming")
}
