package host

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/epoch"
)

// continues lets the VM go on when the replica is away.
func (s *site) continues() { s.set(control.SetRequest{Group: testVM, OnLinkLoss: "continue"}) }

// flushWaits tells whether a FLUSH of a client waits, and lets it go on.
func flushWaits(t *testing.T, c *exportMedium) (bool, <-chan error) {
	t.Helper()
	done := make(chan error, 1)
	go func() { done <- c.Flush() }()
	select {
	case err := <-done:
		must(t, err)
		return false, nil
	case <-time.After(500 * time.Millisecond):
		return true, done
	}
}

func (s *site) mapsLeft() []string {
	s.t.Helper()
	left, err := filepath.Glob(s.path("state", "groups", testVM, "apart-*"))
	must(s.t, err)
	return left
}

// TestContinue: the replica is away, the VM goes on, unprotected and with an alarm;
// back again, what was written meanwhile is sent in order, or without a backlog compared,
// and all is as before.
func TestContinue(t *testing.T) {
	for _, backlog := range []string{"64MiB", "0"} {
		t.Run("backlog of "+backlog, func(t *testing.T) { testContinue(t, backlog) })
		if raceEnabled {
			break
		}
	}
}

func testContinue(t *testing.T, backlog string) {
	p := newPair(t)
	p.main.backlog = backlog
	p.up()
	const size = 12 << 20
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, size), "vdb": randomBytes(2, 8<<20)})
	p.main.mustProtect(testVM)
	p.main.continues()
	c := p.main.client(testVM)
	p.dr.stop()
	_, err := c.WriteAt(randomBytes(3, 4096), 8<<20)
	must(t, err)
	must(t, c.Flush()) // as soon as the group goes on
	p.main.awaitState(testVM, string(Disconnected))
	time.Sleep(1100 * time.Millisecond)
	g := p.main.group(testVM)
	if g.Protected || g.RPOSeconds < 1 || len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "site dr is away, and the group goes on without it") {
		t.Errorf("apart: protected %v, RPO %v s, alarms %q", g.Protected, g.RPOSeconds, g.Alarms)
	}
	for i, d := range vm.disks {
		must(t, d.write(randomBytes(uint64(10+i), 8192), int64(3+i)<<20))
	}
	if p.main.verifyErr() == nil {
		t.Error("a group without its replica is verified")
	}
	before := p.main.group(testVM).Resynced
	p.start(p.dr, p.main)
	if g = p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
		t.Errorf("together: %+v", g)
	}
	if n := g.Resynced - before; (n == 0) != (backlog != "0") || n > 4<<20 {
		t.Errorf("%d bytes were compared and shipped for 3 writes", n)
	}
	sameAtReplica(t, p, vm)
	if left := p.main.mapsLeft(); len(left) > 0 || p.main.d.find(testVM).snapshot().Required != 0 {
		t.Errorf("left: %q", left)
	}
	p.dr.stop() // and once more
	must(t, vm.disk("vda").write(randomBytes(4, 4096), 0))
	p.main.awaitState(testVM, string(Disconnected))
	p.start(p.dr, p.main)
	p.main.awaitState(testVM, "streaming")
	sameAtReplica(t, p, vm)
}

func (s *site) verifyErr() error {
	_, err := s.control.Verify(s.t.Context(), control.VerifyRequest{Group: testVM}, func(control.Event) {})
	return err
}

// TestContinueIsDurable: a daemon that is killed while it goes on alone goes on alone,
// and all that was written is brought to the replica, whatever was lost with the page cache.
func TestContinueIsDurable(t *testing.T) {
	for _, how := range []string{"map there", "map lost"} {
		t.Run(how, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 16<<20)})
			p.main.mustProtect(testVM)
			p.main.continues()
			p.dr.stop()
			must(t, vm.disk("vda").write(randomBytes(3, 4096), 5<<20))
			p.main.awaitState(testVM, string(Disconnected))
			must(t, vm.disk("vda").write(randomBytes(3, 4096), 7<<20))
			p.main.kill()
			image := p.main.path("state", "images", testVM, "vda.raw")
			overwrite(t, image, randomBytes(9, 4096), 7<<20+8192) // reached the disk, was never answered
			if how == "map lost" {
				must(t, os.Remove(p.main.path("state", "groups", testVM, "apart-0.map")))
				overwrite(t, image, randomBytes(10, 4096), 12<<20)
			}
			p.start(p.main, p.dr)
			p.main.awaitState(testVM, string(Disconnected))
			must(t, vm.disk("vda").write(randomBytes(4, 4096), 9<<20))
			if g := p.main.group(testVM); g.RPOSeconds == 0 || (how == "map lost") != strings.Contains(strings.Join(g.Alarms, "\n"), "was lost") {
				t.Errorf("RPO %v, alarms %q", g.RPOSeconds, g.Alarms)
			}
			p.start(p.dr, p.main)
			if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
				t.Errorf("together: %+v", g)
			}
			sameAtReplica(t, p, vm)
		})
	}
}

// TestContinueAfterRebootOfHost: a host that was started anew cannot know whether the other
// site was promoted meanwhile. It waits for that site, or for an operator's word.
func TestContinueAfterRebootOfHost(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.continues()
	p.main.kill()
	p.dr.stop()
	p.main.boot = "another start"
	p.start(p.main, p.dr)
	time.Sleep(time.Second)
	if g := p.main.group(testVM); g.State != string(Stalled) {
		t.Fatalf("%+v", g)
	}
	p.main.continues()
	p.main.awaitState(testVM, string(Disconnected))
	p.main.kill()
	p.start(p.main, p.dr) // the daemon alone
	p.main.awaitState(testVM, string(Disconnected))
	p.main.kill()
	p.main.boot = "a third start"
	p.start(p.main, p.dr)
	time.Sleep(time.Second)
	if g := p.main.group(testVM); g.State != string(Stalled) {
		t.Fatalf("%+v", g)
	}
	p.start(p.dr, p.main)
	p.main.awaitState(testVM, "streaming")
}

// TestContinueChangedLive: whoever decides otherwise while the replica is away is heeded at once.
func TestContinueChangedLive(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.dr.stop()
	p.main.awaitState(testVM, string(Stalled))
	c := p.main.client(testVM)
	_, err := c.WriteAt(randomBytes(3, 4096), 0)
	must(t, err)
	waits, done := flushWaits(t, c)
	if !waits {
		t.Fatal("a FLUSH is answered without the replica")
	}
	p.main.continues()
	must(t, <-done)
	p.main.awaitState(testVM, string(Disconnected))
	if got := p.main.set(control.SetRequest{Group: testVM, OnLinkLoss: "stall"}); got.OnLinkLoss != "stall" {
		t.Errorf("%+v", got)
	}
	p.main.awaitState(testVM, string(Stalled))
	_, err = c.WriteAt(randomBytes(4, 4096), 4096)
	must(t, err)
	if waits, done = flushWaits(t, c); !waits {
		t.Fatal("a FLUSH is answered without the replica, after the policy is to stall")
	}
	p.start(p.dr, p.main)
	must(t, <-done)
	p.main.awaitState(testVM, "streaming")
	sameAtReplica(t, p, vm)
}

// TestContinueWhenReplicaIsBroken: the link is up, and the replica's disk answers nothing, or
// has failed. The VM goes on; when that is put right, all is as before.
func TestContinueWhenReplicaIsBroken(t *testing.T) {
	for _, how := range []string{"hangs", "fails"} {
		t.Run(how, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 32<<20)})
			p.main.mustProtect(testVM)
			p.main.continues()
			hang := make(chan struct{})
			p.dr.fs.set(func() {
				p.dr.fs.fail = func(op, path string) error {
					if op != "datasync" || !strings.Contains(path, "/spool/") {
						return nil
					}
					if how == "fails" {
						return syscall.EIO
					}
					<-hang
					return nil
				}
			})
			must(t, vm.disk("vda").write(randomBytes(3, 4096), 5<<20)) // returns when the group goes on
			p.main.awaitState(testVM, string(Disconnected))
			must(t, vm.disk("vda").write(randomBytes(4, 4096), 6<<20))
			time.Sleep(2500 * time.Millisecond) // it is refused again and again
			if n := strings.Count(p.main.log.String(), "disconnected → "); n > 1 {
				t.Errorf("the state changed %d times", n)
			}
			close(hang)
			if how == "fails" {
				p.dr.stop()
				p.start(p.dr, p.main)
			}
			p.main.awaitState(testVM, "streaming")
			sameAtReplica(t, p, vm)
		})
	}
}

// TestContinueWithoutSpaceHere: the record of changes cannot be made, so the VM waits, and goes
// on as soon as it can.
func TestContinueWithoutSpaceHere(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.continues()
	full(p.main, "groups/vm1/apart-")
	p.dr.stop()
	done := make(chan error, 1)
	go func() { done <- vm.disk("vda").write(randomBytes(3, 4096), 0) }()
	await(t, "the alarm", func() bool {
		return strings.Contains(strings.Join(p.main.group(testVM).Alarms, "\n"), "cannot go on without site dr")
	})
	select {
	case err := <-done:
		t.Fatalf("the VM went on, unrecorded: %v", err)
	case <-time.After(time.Second):
	}
	notFull(p.main)
	must(t, <-done)
	p.main.awaitState(testVM, string(Disconnected))
	p.start(p.dr, p.main)
	p.main.awaitState(testVM, "streaming")
	sameAtReplica(t, p, vm)
}

// TestContinueTooMuch: more was written without the replica than its spool takes at once. The
// VM goes on and the alarm says what to do; with a larger spool the sites come together.
func TestContinueTooMuch(t *testing.T) {
	p := newPair(t)
	p.main.backlog = "0"
	p.dr.extra = fmt.Sprintf(smallSpool, "9MiB")
	p.up()
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 14<<20)})
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	p.main.continues()
	p.dr.stop()
	must(t, vm.disk("vda").write(randomBytes(2, 4096), 0))
	for i := range int64(13) {
		must(t, vm.disk("vda").write(randomBytes(uint64(i), 1<<20), i<<20))
	}
	p.start(p.dr, p.main)
	await(t, "the alarm", func() bool {
		return strings.Contains(strings.Join(p.main.group(testVM).Alarms, "\n"), "raise spool_bytes at site dr")
	})
	p.main.awaitState(testVM, string(Disconnected))
	must(t, vm.disk("vda").write(randomBytes(3, 4096), 13<<20))
	if g := p.dr.group(testVM); !g.Protected {
		t.Errorf("the replica has no point to boot any more: %+v", g)
	}
	p.dr.stop()
	p.dr.extra = fmt.Sprintf(smallSpool, "24MiB")
	p.start(p.dr, p.main)
	if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
		t.Errorf("%+v", g)
	}
	sameAtReplica(t, p, vm)
}

// TestContinueAndFailover: both sites serve, as `continue` allows for. In touch again the
// superseded one is fenced, what it alone has is kept, and it becomes the replica by delta.
func TestContinueAndFailover(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 32<<20)})
	p.main.mustProtect(testVM)
	p.main.continues()
	must(t, vm.disk("vda").write(randomBytes(2, 4096), 1<<20))
	p.dr.stop()
	p.main.awaitState(testVM, string(Stalled))
	p.main.awaitState(testVM, string(Disconnected))
	mine := randomBytes(3, 4096)
	must(t, vm.disk("vda").write(mine, 20<<20))
	p.main.stop()
	vm.destroy()
	p.start(p.dr, p.main)
	_, err := p.dr.failover(control.FailoverRequest{VM: testVM})
	must(t, err)
	there := p.dr.host.vm(testVM)
	must(t, there.disk("vda").write(randomBytes(4, 4096), 30<<20))
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, string(Fenced))
	p.awaitLinks()
	must(t, p.dr.reprotect(control.ReprotectRequest{Group: testVM}))
	b := p.main.branches(testVM)
	if len(b) != 1 || b[0].Whole != "" || b[0].Bytes > 20<<20 {
		t.Fatalf("branches: %+v", b)
	}
	kept := readFile(t, b[0].Disks[0].File)
	if string(kept[20<<20:20<<20+4096]) != string(mine) {
		t.Error("what was written without the replica is not in the branch")
	}
	want, err := there.disk("vda").content()
	must(t, err)
	awaitFor(t, 10*time.Second, "both images to be equal", func() bool {
		return firstDifference(readFile(t, p.main.path("state", "images", testVM, "vda.raw")), want) < 0
	})
	if left := p.main.mapsLeft(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestApartFile: a release that does not know of maps must not take the file for one
// that names all that may differ.
func TestApartFile(t *testing.T) {
	f := &groupFile{Version: groupFileVersion, Name: "g", ID: epoch.NewUUID(), Role: RoleSource, Peer: "dr"}
	f.Apart, f.Required = &apartFile{SinceNs: 5, Session: 3}, featureApart
	b, err := f.encode()
	must(t, err)
	got, err := decodeGroupFile(b)
	must(t, err)
	if *got.Apart != *f.Apart {
		t.Errorf("%+v", got.Apart)
	}
	f.Required = 0
	b, err = f.encode()
	must(t, err)
	if _, err := decodeGroupFile(b); err == nil {
		t.Error("apart, but not required to know of it: taken")
	}
}
