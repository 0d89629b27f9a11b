package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/qmp"
)

var errCopy = fmt.Errorf("%w: the copy of the disk failed, the VM goes on as before: try again", qmp.ErrCopyFailed)

// failAt makes a step of the fake libvirt fail.
func failAt(steps ...string) func(context.Context, string) error {
	return func(_ context.Context, step string) error {
		if slices.Contains(steps, step) {
			return errCopy
		}
		return nil
	}
}

// guest is what a VM's disks hold, to be compared later.
func guestContent(t *testing.T, vm *fakeVM) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for _, d := range vm.disks {
		b, err := d.content()
		must(t, err)
		out[d.definition().Target] = b
	}
	return out
}

// guestUnharmed checks that a VM runs, from its own files, with its content,
// and can write.
func guestUnharmed(t *testing.T, vm *fakeVM, want map[string][]byte) {
	t.Helper()
	for _, d := range vm.disks {
		def := d.definition()
		if def.Socket != "" || def.Job {
			t.Errorf("disk %s is not as before: %+v", def.Target, def)
		}
		got, err := d.content()
		must(t, err)
		if !bytes.Equal(got, want[def.Target]) {
			t.Errorf("disk %s has other content", def.Target)
		}
		must(t, d.write(got[:512], 0))
		onDisk, err := os.ReadFile(def.Source)
		must(t, err)
		if !bytes.Equal(onDisk, got) {
			t.Errorf("disk %s is not what %s holds", def.Target, def.Source)
		}
	}
}

// untouchedPoints are the steps at which an interrupted or failed protect
// leaves the VM untouched: no disk has pivoted.
var untouchedPoints = []string{"attach vda copy 0", "attach vda copy 50", "attach vda ready",
	"attach vdb copy 0", "attach vdb copy 50", "attach vdb ready", "attach vdb pivot"}

// TestCopyFails: the block copy fails on the way, at the first disk and at the
// second, up to the first pivot. The VM is untouched, nothing is left at
// either site, and protect works afterwards.
func TestCopyFails(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	want := guestContent(t, vm)
	here, there := p.main.traces(), p.dr.traces()
	for _, step := range untouchedPoints {
		t.Run(step, func(t *testing.T) {
			p.main.host.setFault(failAt(step))
			refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitFailed, "the copy failed", "VM goes on as before")
			p.main.untouched(here)
			p.dr.untouched(there)
			guestUnharmed(t, vm, want)
		})
	}
	p.main.host.setFault(nil)
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}

// TestProtectInterrupted: the command is interrupted at the same points, while
// the copy hangs there.
func TestProtectInterrupted(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	want := guestContent(t, vm)
	here, there := p.main.traces(), p.dr.traces()
	for _, step := range untouchedPoints {
		if step == "attach vdb pivot" {
			continue // the point of no return has passed: see TestInterruptedTooLate
		}
		t.Run(step, func(t *testing.T) {
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			p.main.host.setFault(func(ctx context.Context, at string) error {
				if at == step {
					interrupt()
					<-ctx.Done()
				}
				return nil
			})
			refusedAsInterrupted(t, p.main.protect(ctx, control.ProtectRequest{VM: testVM, To: "dr"}))
			await(t, "everything to be taken back", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
			p.main.untouched(here)
			p.dr.untouched(there)
			guestUnharmed(t, vm, want)
		})
	}
	p.main.host.setFault(nil)
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}

// refusedAsInterrupted: what is done next is for the command line to say.
func refusedAsInterrupted(t *testing.T, err error) {
	t.Helper()
	var e *control.Error
	if !errors.As(err, &e) || e.Code != "interrupted" || e.Exit == control.ExitOK {
		t.Fatalf("the interrupted command ended with %v", err)
	}
}

// TestInterruptedTooLate: once the first disk pivots, an interruption undoes nothing.
func TestInterruptedTooLate(t *testing.T) {
	for _, step := range []string{"attach vdb pivot", "attach vdb moved", "attach vda pivot", "attach vda moved"} {
		t.Run(step, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda", "vdb")
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			told := make(chan error, 1)
			p.main.host.setFault(func(_ context.Context, at string) error {
				if at == step {
					interrupt()
					told <- <-told // the client is gone before it goes on
				}
				return nil
			})
			go func() { told <- p.main.protect(ctx, control.ProtectRequest{VM: testVM, To: "dr"}) }()
			p.main.awaitState(testVM, "streaming")
			refusedAsInterrupted(t, <-told)
			if g := p.main.group(testVM); !g.Protected {
				t.Errorf("%+v", g)
			}
			sameAtReplica(t, p, vm)
		})
	}
}

// TestSecondPivotFails: the second disk fails after the first one has pivoted.
// That one is copied back to a plain file where it came from, and everything
// else is as after any failure.
func TestSecondPivotFails(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	want := guestContent(t, vm)
	there := p.dr.traces()
	p.main.host.setFault(failAt("attach vda pivot"))
	refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitFailed, "the copy failed")
	p.dr.untouched(there)
	guestUnharmed(t, vm, want)
	old := aside(t, p.main, "vm1-vdb.raw")
	b, err := os.ReadFile(old)
	must(t, err)
	if !bytes.Equal(b, want["vdb"]) {
		t.Error("the old file of vdb is not what it was")
	}
	must(t, os.Remove(old))
	p.main.untouched([]string{"state/groups", "state/images", "run", "disks", "disks/vm1-vda.raw", "disks/vm1-vdb.raw"})
	p.main.host.setFault(nil)
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}

// aside is the file that was put aside from a name.
func aside(t *testing.T, s *site, name string) string {
	t.Helper()
	var found []string
	for _, f := range s.traces() {
		if strings.HasPrefix(f, "disks/"+name+".old-") {
			found = append(found, s.path(f))
		}
	}
	if len(found) != 1 {
		t.Fatalf("put aside: %v in %v", found, s.traces())
	}
	return found[0]
}

// TestMovedButUntreated: after the pivot something fails. The VM runs from the
// export, so it is protected, with an alarm until the disk is treated.
func TestMovedButUntreated(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.host.setFault(failAt("attach vda moved", "treat vda"))
	p.main.mustProtect(testVM)
	g := p.main.group(testVM)
	if len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "disk vda of VM vm1") {
		t.Errorf("alarms: %q", g.Alarms)
	}
	p.main.host.setFault(nil)
	p.main.host.send(qmp.Event{Kind: qmp.EventResumed, VM: testVM})
	await(t, "the disk to be treated", func() bool { return len(p.main.group(testVM).Alarms) == 0 })
	if !vm.disks[0].isTreated() {
		t.Error("it was not")
	}
	sameAtReplica(t, p, vm)
}

// TestTakeBackFails: a disk that has pivoted cannot be moved back. The VM goes
// on, the operator is told that it is half done, and unprotect ends it.
func TestTakeBackFails(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda", "vdb")
	want := guestContent(t, vm)
	p.main.host.setFault(failAt("attach vda pivot", "detach vdb copy 50"))
	refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitFailed,
		"the copy failed", "not all of it could be taken back", "kagami unprotect vm1")
	g := p.main.group(testVM)
	if g.Protected || len(g.Alarms) == 0 {
		t.Errorf("half done, but status says %+v", g)
	}
	must(t, vm.disk("vda").write([]byte("goes on"), 0))
	must(t, vm.disk("vdb").write([]byte("goes on"), 0))
	copy(want["vda"], "goes on")
	copy(want["vdb"], "goes on")
	p.main.host.setFault(nil)
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	guestUnharmed(t, vm, want)
	must(t, os.Remove(aside(t, p.main, "vm1-vdb.raw")))
	p.main.untouched([]string{"state/groups", "state/images", "run", "disks", "disks/vm1-vda.raw", "disks/vm1-vdb.raw"})
	await(t, "the replica to be gone", func() bool { return p.dr.group(testVM).Name == "" })
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
}

// TestImageFails: the local image fails under the copy.
func TestImageFails(t *testing.T) {
	for _, op := range []string{"write", "datasync"} {
		t.Run(op, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda")
			want := guestContent(t, vm)
			here, there := p.main.traces(), p.dr.traces()
			p.main.host.setFault(func(_ context.Context, step string) error {
				if step == "attach vda copy 50" {
					p.main.fs.set(func() {
						p.main.fs.fail = func(o, path string) error {
							if o == op && strings.HasSuffix(path, "vda.raw") {
								return fmt.Errorf("%s %s: %w", o, path, syscall.EIO)
							}
							return nil
						}
					})
				}
				return nil
			})
			refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitFailed, "input/output error", "again")
			notFull(p.main)
			p.main.untouched(here)
			p.dr.untouched(there)
			guestUnharmed(t, vm, want)
			p.main.host.setFault(nil)
			p.main.mustProtect(testVM)
		})
	}
}

// TestLinkDownInCopy: the line goes down while a disk is copied, so the copy's
// writes wait in the full queue. An interruption and the daemon's end take
// everything back all the same, and soon.
func TestLinkDownInCopy(t *testing.T) {
	for _, how := range []string{"interrupt", "stop"} {
		t.Run(how, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 8*diskSize), "vdb": randomBytes(2, 8*diskSize)})
			want := guestContent(t, vm)
			here, there := p.main.traces(), p.dr.traces()
			hung := cutInCopy(p, vm.disk("vdb"), "attach vdb copy 10")
			ctx, interrupt := context.WithCancel(t.Context())
			defer interrupt()
			ended := make(chan error, 1)
			go func() { ended <- p.main.protect(ctx, control.ProtectRequest{VM: testVM, To: "dr"}) }()
			<-hung
			began := time.Now()
			if how == "interrupt" {
				interrupt()
				refusedAsInterrupted(t, <-ended)
				await(t, "everything to be taken back here", func() bool { return p.main.group(testVM).State == "leaving" })
			} else {
				p.main.stop()
				if err := <-ended; err == nil {
					t.Error("the command was told of a success")
				}
			}
			if took := time.Since(began); took > jobEnd {
				t.Errorf("it took %v", took)
			}
			guestUnharmed(t, vm, want)
			p.main.host.setFault(nil)
			if how == "stop" {
				p.start(p.main, p.dr)
			}
			p.start(p.dr, p.main)
			await(t, "the replica to be gone", func() bool { return p.main.group(testVM).Name == "" && p.dr.group(testVM).Name == "" })
			p.main.untouched(here)
			p.dr.untouched(there)
		})
	}
}

// cutInCopy stops the daemon of site dr at a step of the copy of a disk. The
// channel is closed when the copy hangs.
func cutInCopy(p *pair, d *fakeDisk, step string) (hung chan struct{}) {
	hung = make(chan struct{})
	var last atomic.Int64
	var cut atomic.Bool
	p.main.host.setFault(func(_ context.Context, at string) error {
		last.Store(time.Now().UnixNano())
		if at != step || cut.Swap(true) {
			return nil
		}
		p.dr.stop()
		go func() {
			for time.Since(time.Unix(0, last.Load())) < time.Second || d.landed(0) {
				time.Sleep(50 * time.Millisecond)
			}
			close(hung)
		}()
		return nil
	})
	return hung
}
