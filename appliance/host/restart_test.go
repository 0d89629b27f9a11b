package host

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync"
	"testing"

	"kagami/appliance/control"
)

// killAt kills the source's daemon when a protect has come to a step.
func killAt(t *testing.T, p *pair, step string) {
	t.Helper()
	reached, c := make(chan struct{}), p.main.conn
	var once sync.Once
	p.main.host.setFault(func(_ context.Context, at string) error {
		if at == step {
			once.Do(func() { close(reached) })
			<-c.died
		}
		return nil
	})
	done := make(chan error, 1)
	go func() { done <- p.main.protect(context.Background(), control.ProtectRequest{VM: testVM, To: "dr"}) }()
	select {
	case <-reached:
	case err := <-done:
		t.Fatalf("protect ended before %s: %v", step, err)
	}
	p.main.kill()
	if err := <-done; err == nil {
		t.Fatalf("protect ended well although the daemon was killed at %s", step)
	}
	p.main.host.setFault(nil)
}

// TestKilledDuringProtect: the daemon dies before the first pivot. The next
// one takes back what there is, at both sites, and ends the block jobs.
func TestKilledDuringProtect(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	want := guestContent(t, vm)
	here, there := p.main.traces(), p.dr.traces()
	for _, step := range untouchedPoints {
		t.Run(step, func(t *testing.T) {
			killAt(t, p, step)
			if p.dr.group(testVM).Name == "" {
				t.Fatal("there is no replica to take back")
			}
			p.start(p.main, p.dr)
			await(t, "everything to be taken back", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
			if kept := p.main.keptImages(); strings.HasSuffix(step, "pivot") { // it may have happened
				if len(kept) != 1 {
					t.Errorf("images kept: %v", kept)
				}
				must(t, os.RemoveAll(p.main.path("state", "images", testVM)))
			}
			p.main.untouched(here)
			p.dr.untouched(there)
			guestUnharmed(t, vm, want)
		})
	}
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}

// keptImages are those of the VM that were put aside.
func (s *site) keptImages() (kept []string) {
	for _, f := range s.traces() {
		if strings.Contains(f, "state/images/"+testVM+"/") && strings.Contains(f, ".raw.old-") {
			kept = append(kept, f)
		}
	}
	return kept
}

// TestKilledBetweenPivots: one disk runs from kagami, the other does not. The
// next daemon moves the one back.
func TestKilledBetweenPivots(t *testing.T) {
	for _, step := range []string{"attach vdb moved", "attach vda pivot"} {
		t.Run(step, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda", "vdb")
			want := guestContent(t, vm)
			there := p.dr.traces()
			killAt(t, p, step)
			p.start(p.main, p.dr)
			await(t, "everything to be taken back", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
			guestUnharmed(t, vm, want)
			must(t, os.Remove(aside(t, p.main, "vm1-vdb.raw")))
			if strings.HasSuffix(step, "pivot") && len(p.main.keptImages()) == 1 {
				must(t, os.RemoveAll(p.main.path("state", "images", testVM))) // that pivot may have happened
			}
			p.main.untouched(plain(testVM, "vda", "vdb"))
			p.dr.untouched(there)
			p.main.mustProtect(testVM)
			sameAtReplica(t, p, vm)
		})
	}
}

// TestKilledBeforeFirstSyncEnded: all disks have pivoted. The next daemon takes
// the first sync up by comparing; until then nothing is called protected.
func TestKilledBeforeFirstSyncEnded(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	want := guestContent(t, vm)
	killAt(t, p, "attach vda moved")
	p.dr.kill()
	p.start(p.main, p.dr)
	if g := p.main.group(testVM); g.Protected || g.Complete || g.State != "stalled" {
		t.Errorf("without the other site: %+v", g)
	}
	p.start(p.dr, p.main)
	if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
		t.Errorf("%+v", g)
	}
	for _, d := range vm.disks {
		got, err := d.content()
		must(t, err)
		if string(got) != string(want[d.definition().Target]) {
			t.Errorf("disk %s has other content", d.definition().Target)
		}
	}
	sameAtReplica(t, p, vm)
}

// TestKilledAndPeerAway: what the peer has is removed when it is back.
func TestKilledAndPeerAway(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	want := guestContent(t, vm)
	here, there := p.main.traces(), p.dr.traces()
	killAt(t, p, "attach vda copy 50")
	p.dr.kill()
	p.start(p.main, p.dr)
	if g := p.main.awaitState(testVM, "leaving"); g.Protected {
		t.Errorf("%+v", g)
	}
	guestUnharmed(t, vm, want)
	p.start(p.dr, p.main)
	await(t, "the peer to be told", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
	p.main.untouched(here)
	p.dr.untouched(there)
}

// TestKilledAndLibvirtAway: without libvirt nobody knows whether the VM was
// moved, so nothing is done until it answers.
func TestKilledAndLibvirtAway(t *testing.T) {
	for _, step := range []string{"attach vda copy 50", "attach vda moved"} {
		t.Run(step, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda")
			want := guestContent(t, vm)
			killAt(t, p, step)
			p.main.setDialErr(errors.New("no libvirtd"))
			p.start(p.main, p.dr)
			g := p.main.group(testVM)
			if g.Protected || len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "when libvirt answers") {
				t.Errorf("%+v", g)
			}
			p.main.setDialErr(nil)
			if step == "attach vda moved" {
				if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
					t.Errorf("%+v", g)
				}
				sameAtReplica(t, p, vm)
				return
			}
			await(t, "everything to be taken back", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
			guestUnharmed(t, vm, want)
		})
	}
}

// TestStoppedDuringProtect: SIGTERM is an interruption.
func TestStoppedDuringProtect(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	want := guestContent(t, vm)
	here, there := p.main.traces(), p.dr.traces()
	copying := make(chan struct{})
	p.main.host.setFault(func(ctx context.Context, step string) error {
		if step == "attach vdb copy 50" {
			close(copying)
			<-ctx.Done()
		}
		return nil
	})
	done := make(chan error, 1)
	go func() { done <- p.main.protect(context.Background(), control.ProtectRequest{VM: testVM, To: "dr"}) }()
	<-copying
	p.main.stop()
	if err := <-done; err == nil {
		t.Error("protect ended well")
	}
	p.main.untouched(here)
	p.dr.untouched(there)
	guestUnharmed(t, vm, want)
}

// TestRestartOfProtected: the daemon is killed, and stopped, under a protected
// VM. The guest stalls, sees no error, and goes on.
func TestRestartOfProtected(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	for i, end := range []func(){p.main.kill, p.main.stop} {
		end()
		done := make(chan error, 1)
		go func() { done <- vm.disk("vda").write([]byte("stalls"), int64(i)*512) }()
		p.start(p.main, p.dr)
		must(t, <-done)
		p.main.awaitState(testVM, "streaming")
		sameAtReplica(t, p, vm)
	}
}

// TestFencedOverRestarts: a source that was superseded serves nothing, and says
// why, as soon as it is seen to be fenced, and after every restart.
func TestFencedOverRestarts(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	vm.destroy()
	p.main.kill()
	p.dr.awaitState(testVM, "waiting")
	if _, err := p.dr.failover(control.FailoverRequest{VM: testVM, NoStart: true}); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		p.start(p.main, p.dr)
		g := p.main.awaitState(testVM, "fenced")
		if g.Protected || len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "superseded by a promotion") {
			t.Errorf("%+v", g)
		}
		if m, err := openExport(p.main.path("run", "vm1-vda.sock"), "vda"); err == nil {
			if _, err := m.c.ReadAt(make([]byte, 512), 0); err == nil {
				t.Error("a superseded source is read")
			}
			must(t, m.Close())
		}
		p.main.stop()
	}
}

// TestFloorOverCleanRestart: after a clean restart regions leave the active log
// for what the replica had acknowledged before it. The log says so.
func TestFloorOverCleanRestart(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	p.main.stop()
	there := p.dr.group(testVM)
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "streaming")
	if f := p.main.d.find(testVM).src.log.Floor(); uint64(f.LSN) < there.LSN.Durable || f.Session != there.Session {
		t.Errorf("floor %+v, the replica stood at record %d of session %d", f, there.LSN.Durable, there.Session)
	}
}
