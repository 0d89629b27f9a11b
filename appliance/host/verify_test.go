package host

import (
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j"
)

func (s *site) verify(req control.VerifyRequest) control.VerifyReport {
	s.t.Helper()
	rep, err := s.d.Verify(s.t.Context(), req, func(control.Event) {})
	must(s.t, err)
	return rep
}

// TestVerify: a comparison finds what was changed behind kagami's back at the replica,
// while a client writes; it is written down, told by an alarm, and repaired.
func TestVerify(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	stop, ended := make(chan struct{}), make(chan error, 1)
	go func() {
		for i := byte(0); ; i++ {
			select {
			case <-stop:
				ended <- nil
				return
			case <-time.After(time.Millisecond):
			}
			if err := vm.disk("vda").write([]byte{i}, 1000); err != nil {
				ended <- err
				return
			}
		}
	}()
	rep := p.main.verify(control.VerifyRequest{Group: testVM})
	if size := p.main.group(testVM).Disks[0].Size; rep.Differ != 0 || rep.Compared != (size+ext4j.Chunk-1)/ext4j.Chunk || rep.Evidence != "" {
		t.Errorf("equal sites: %+v", rep)
	}

	image := p.dr.d.find(testVM).snapshot().Disks[0].Image
	overwrite(t, image, []byte("rot"), 300_000)
	rep = p.main.verify(control.VerifyRequest{Group: testVM, BytesPerSecond: 1 << 30})
	if rep.Differ != 1 || rep.Repaired != 0 {
		t.Fatalf("one place rotted: %+v", rep)
	}
	var ev evidence
	must(t, json.Unmarshal(readFile(t, rep.Evidence), &ev))
	if len(ev.Differences) != 1 || ev.Differences[0].Disk != "vda" || ev.Differences[0].Offset != 300_000/ext4j.Chunk*ext4j.Chunk || ev.Differences[0].Here == ev.Differences[0].There {
		t.Errorf("written down: %+v", ev)
	}
	if a := strings.Join(p.main.group(testVM).Alarms, "\n"); !strings.Contains(a, "the sites differ in 1 chunks") {
		t.Errorf("alarms: %q", a)
	}
	if rep = p.main.verify(control.VerifyRequest{Group: testVM, Repair: true}); rep.Differ != 1 || rep.Repaired != 1 {
		t.Errorf("repair: %+v", rep)
	}
	if rep = p.main.verify(control.VerifyRequest{Group: testVM}); rep.Differ != 0 {
		t.Errorf("after the repair: %+v", rep)
	}
	if a := p.main.group(testVM).Alarms; len(a) != 0 {
		t.Errorf("alarms: %q", a)
	}
	close(stop)
	must(t, <-ended)
	sameAtReplica(t, p, vm)
}

func TestVerifyRefuses(t *testing.T) {
	p := newPair(t).up()
	p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 17<<20)}) // more than is asked for at once
	p.main.mustProtect(testVM)
	verify := func(s *site, group string) error {
		_, err := s.d.Verify(t.Context(), control.VerifyRequest{Group: group}, func(control.Event) {})
		return err
	}
	refusedAs(t, verify(p.main, "none"), control.ExitNotFound, "no group none")
	refusedAs(t, verify(p.dr, testVM), control.ExitRefused, "is at site")

	// The loss of the link ends it; it does not wait for the link's return.
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	slow := make(chan error, 1)
	go func() {
		_, err := p.main.d.Verify(ctx, control.VerifyRequest{Group: testVM, BytesPerSecond: 1}, func(control.Event) {})
		slow <- err
	}()
	await(t, "the comparison to begin", func() bool { return p.main.d.find(testVM).busy() })
	time.Sleep(200 * time.Millisecond) // into the pause between two batches
	p.dr.stop()
	if err := <-slow; err == nil || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the link is lost: %v", err)
	}
	p.main.awaitState(testVM, string(Stalled))
	refusedAs(t, verify(p.main, testVM), control.ExitRefused, "nothing to compare with")
}

// busy tells whether an operation is under way.
func (g *group) busy() bool {
	if !g.op.TryLock() {
		return true
	}
	g.op.Unlock()
	return false
}
