package host

import (
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// writesOn writes to a VM's disk until it is told to end, and returns what ends it and
// how much was written.
func writesOn(t *testing.T, vm *fakeVM, size int64) (stop func(), written *atomic.Int64) {
	t.Helper()
	end, ended := make(chan struct{}), make(chan error, 1)
	written = new(atomic.Int64)
	go func() {
		for i := int64(0); ; i++ {
			select {
			case <-end:
				ended <- nil
				return
			case <-time.After(4 * time.Millisecond):
			}
			if err := vm.disk("vda").write(randomBytes(uint64(i), 64<<10), i*(64<<10)%size); err != nil {
				ended <- err
				return
			}
			written.Add(64 << 10)
		}
	}()
	return func() { close(end); must(t, <-ended) }, written
}

// TestBacklogInOrder: a VM writes far more than the queue holds while the replica is away;
// back again, and away again in the middle of it, the replica gets it in order: nothing is compared, and
// what a failover would find there is never older than before.
func TestBacklogInOrder(t *testing.T) {
	p := newPair(t).up()
	const size = 8 << 20
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, size)})
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	p.main.continues()
	p.dr.fail = func(op, path string) error { // a slow disk
		if op == "datasync" && strings.Contains(path, "/spool/") {
			time.Sleep(25 * time.Millisecond)
		}
		return nil
	}
	before, at := p.main.group(testVM).Resynced, p.dr.group(testVM).LSN.Durable
	p.dr.stop()
	p.main.awaitState(testVM, string(Disconnected))
	stop, written := writesOn(t, vm, size)
	for round := range 2 {
		more := written.Load() + 5<<20
		awaitFor(t, 20*time.Second, "the VM to write", func() bool { return written.Load() > more })
		if g := p.main.group(testVM); g.State != string(Disconnected) || g.BacklogBytes < 4<<20 || g.Protected {
			t.Errorf("round %d: %s, %d bytes of backlog, protected %v", round, g.State, g.BacklogBytes, g.Protected)
		}
		p.start(p.dr, p.main)
		if p.main.awaitState(testVM, string(CatchingUp)); round == 1 {
			break
		}
		awaitFor(t, 20*time.Second, "something to arrive", func() bool { return p.dr.group(testVM).LSN.Durable > at })
		at = p.dr.group(testVM).LSN.Durable
		p.dr.stop()
		p.main.awaitState(testVM, string(Disconnected))
	}
	stop()
	if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 || g.BacklogBytes > 0 || g.Resynced != before {
		t.Errorf("%+v", g)
	}
	sameAtReplica(t, p, vm)
	if left := p.main.mapsLeft(); len(left) > 0 {
		t.Errorf("left: %q", left)
	}
}

// TestBacklogGivenUp: a backlog that is full, or whose disk is, costs a comparison; the VM
// hardly notices.
func TestBacklogGivenUp(t *testing.T) {
	for _, how := range []string{"full", "no space", "from the start"} {
		if raceEnabled && how != "full" {
			break
		}
		t.Run(how, func(t *testing.T) {
			p := newPair(t)
			p.main.backlog = "2MiB"
			p.up()
			vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 8<<20)})
			p.main.mustProtect(testVM)
			p.main.continues()
			before := p.main.group(testVM).Resynced
			if how == "from the start" {
				full(p.main, "groups/vm1/backlog")
			}
			p.dr.stop()
			p.main.awaitState(testVM, string(Disconnected))
			if how == "no space" {
				full(p.main, "groups/vm1/backlog")
			}
			for i := range int64(7) {
				must(t, vm.disk("vda").write(randomBytes(uint64(i), 1<<20), i<<20))
			}
			if g := p.main.group(testVM); g.State != string(Disconnected) || g.BacklogBytes > 0 {
				t.Errorf("%s with %d bytes of backlog", g.State, g.BacklogBytes)
			}
			if why := map[string]string{"full": "the backlog is full", "no space": "no space left", "from the start": "there is no backlog"}[how]; !strings.Contains(p.main.log.String(), why) {
				t.Errorf("nobody says that %s", why)
			}
			notFull(p.main)
			p.start(p.dr, p.main)
			if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 || g.Resynced-before < 7<<20 {
				t.Errorf("%+v", g)
			}
			sameAtReplica(t, p, vm)
		})
	}
}

// TestNoSpaceForState: this site's disk is full when the replica is back. Nothing is begun that could not
// be noted, the VM goes on, and all goes well as soon as there is room.
func TestNoSpaceForState(t *testing.T) {
	for _, backlog := range []string{"0", "64MiB"} {
		if raceEnabled && backlog != "0" {
			break
		}
		t.Run("backlog of "+backlog, func(t *testing.T) {
			p := newPair(t)
			p.main.backlog = backlog
			p.up()
			vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 8<<20)})
			p.main.mustProtect(testVM)
			p.main.continues()
			p.dr.stop()
			must(t, vm.disk("vda").write(randomBytes(2, 1<<20), 0))
			p.main.awaitState(testVM, string(Disconnected))
			full(p.main, "groups/vm1/group.json")
			p.start(p.dr, p.main)
			await(t, "the alarm", func() bool {
				return strings.Contains(strings.Join(p.main.group(testVM).Alarms, "\n"), "no space for the state of this group")
			})
			must(t, vm.disk("vda").write(randomBytes(3, 1<<20), 4<<20))
			if g := p.main.group(testVM); g.Protected {
				t.Errorf("protected while %s", g.State)
			}
			notFull(p.main)
			if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
				t.Errorf("%+v", g)
			}
			sameAtReplica(t, p, vm)
		})
	}
}

// TestBacklogLostWhileCatchingUp: what cannot be read back is compared.
func TestBacklogLostWhileCatchingUp(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 8<<20)})
	p.main.mustProtect(testVM)
	p.main.continues()
	p.dr.stop()
	p.main.awaitState(testVM, string(Disconnected))
	for i := range int64(7) {
		must(t, vm.disk("vda").write(randomBytes(uint64(i), 1<<20), i<<20))
	}
	p.main.fs.set(func() {
		p.main.fs.fail = func(op, path string) error {
			if op == "read" && strings.Contains(path, "groups/vm1/backlog") {
				return syscall.EIO
			}
			return nil
		}
	})
	p.start(p.dr, p.main)
	p.main.awaitState(testVM, string(Resyncing))
	if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 || !strings.Contains(p.main.log.String(), "read backlog") {
		t.Errorf("%+v", g)
	}
	sameAtReplica(t, p, vm)
}
