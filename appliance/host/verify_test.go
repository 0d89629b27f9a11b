package host

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j"
	"kagami/ext4j/epoch"
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

// TestVerifyResumes: a comparison that was broken off goes on where it was, also in
// another life of the daemon; without --resume it begins anew.
func TestVerifyResumes(t *testing.T) {
	p := newPair(t).up()
	const batch = 16 << 20
	p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 3*batch)})
	p.main.mustProtect(testVM)
	ctx, cancel := context.WithCancel(t.Context())
	_, err := p.main.d.Verify(ctx, control.VerifyRequest{Group: testVM, BytesPerSecond: batch}, func(ev control.Event) {
		if ev.Done == batch {
			cancel()
		}
	})
	if err == nil {
		t.Fatal("it was not broken off")
	}
	if v := p.main.group(testVM).Verified; v == nil || v.Ended != nil || v.Done != batch || v.Total != 3*batch {
		t.Fatalf("broken off: %+v", v)
	}
	p.main.stop()
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "streaming")
	image := p.dr.d.find(testVM).snapshot().Disks[0].Image
	overwrite(t, image, []byte("rot"), 1<<20)
	overwrite(t, image, []byte("rot"), 2*batch+1<<20)
	if rep := p.main.verify(control.VerifyRequest{Group: testVM, Resume: true}); rep.Differ != 1 || rep.Compared != 3*batch/ext4j.Chunk {
		t.Errorf("resumed: %+v", rep)
	}
	if v := p.main.group(testVM).Verified; v.Ended == nil || v.Done != 3*batch || v.Differ != 1 {
		t.Errorf("ended: %+v", v)
	}
	if rep := p.main.verify(control.VerifyRequest{Group: testVM, Resume: true}); rep.Differ != 2 || rep.Compared != 3*batch/ext4j.Chunk {
		t.Errorf("there was nothing to go on with: %+v", rep)
	}
}

// TestVerifyKilled: what a comparison has found is not lost with the daemon: it is told after a
// restart, and what goes on from there still counts it.
func TestVerifyKilled(t *testing.T) {
	p := newPair(t).up()
	const batch = 16 << 20
	p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 3*batch)})
	p.main.mustProtect(testVM)
	overwrite(t, p.dr.d.find(testVM).snapshot().Disks[0].Image, []byte("rot"), 1<<20)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_, _ = p.main.d.Verify(t.Context(), control.VerifyRequest{Group: testVM, BytesPerSecond: 1 << 20}, func(control.Event) {})
	}()
	differ := func() bool {
		return strings.Contains(strings.Join(p.main.group(testVM).Alarms, "\n"), "the sites differ in 1 chunks")
	}
	await(t, "the alarm of a comparison that runs", differ)
	p.main.kill()
	<-ended
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "streaming")
	if v := p.main.group(testVM).Verified; !differ() || v == nil || v.Done != batch || v.Differ != 1 || v.Ended != nil {
		t.Fatalf("after the kill: %+v, alarms %q", v, p.main.group(testVM).Alarms)
	}
	if rep := p.main.verify(control.VerifyRequest{Group: testVM, Resume: true}); rep.Differ != 1 || rep.Compared != 3*batch/ext4j.Chunk || rep.Evidence == "" {
		t.Errorf("resumed: %+v", rep)
	}
	if !differ() {
		t.Error("the end of the second part has taken the alarm of the first away")
	}
	if rep := p.main.verify(control.VerifyRequest{Group: testVM, Repair: true}); rep.Repaired != 1 || differ() {
		t.Errorf("repaired: %+v", rep)
	}
}

// TestVerifiedDecode: a file that is damaged, short, or of something else leaves nothing out of a
// comparison.
func TestVerifiedDecode(t *testing.T) {
	f := &groupFile{Lineage: epoch.NewUUID(), Disks: []diskFile{{Size: 10*ext4j.Chunk - 512}}}
	good := verifyFile{Version: verifyVersion, Lineage: f.Lineage, BeganNs: 1, DoneBytes: 2 * ext4j.Chunk, TotalBytes: 10 * ext4j.Chunk, Differ: 3, Repaired: 1}
	encode := func(v verifyFile) []byte {
		var err error
		v.Sum, err = v.sumOf()
		must(t, err)
		b, err := json.Marshal(v)
		must(t, err)
		return b
	}
	b := encode(good)
	if decodeVerified(b, f) == nil {
		t.Fatal("a good one is refused")
	}
	for name, change := range map[string]func(*verifyFile){
		"more done than there is": func(v *verifyFile) { v.DoneBytes = 11 * ext4j.Chunk },
		"less than nothing done":  func(v *verifyFile) { v.DoneBytes = -1 },
		"other disks":             func(v *verifyFile) { v.TotalBytes = 20 * ext4j.Chunk },
		"another lineage":         func(v *verifyFile) { v.Lineage = epoch.NewUUID() },
		"another version":         func(v *verifyFile) { v.Version++ },
		"more repaired":           func(v *verifyFile) { v.Repaired = 4 },
	} {
		v := good
		if change(&v); decodeVerified(encode(v), f) != nil {
			t.Errorf("%s: taken", name)
		}
	}
	for i := range b {
		if decodeVerified(b[:i], f) != nil {
			t.Errorf("the first %d bytes are taken", i)
		}
		c := bytes.Clone(b)
		c[i] ^= 1
		if v := decodeVerified(c, f); v != nil && *v != *decodeVerified(b, f) {
			t.Errorf("rot in byte %d is taken: %s", i, c)
		}
	}
}

// TestVerifyRegularly: groups are compared again and again without being asked for, and
// no operator has to wait for that.
func TestVerifyRegularly(t *testing.T) {
	p := newPair(t)
	p.main.extra = "verify: {every: 1s, rate: 1GiB}\n"
	p.up()
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, 48<<20)})
	p.main.mustProtect(testVM)
	ended := func() time.Time {
		if v := p.main.group(testVM).Verified; v != nil && v.Ended != nil {
			return *v.Ended
		}
		return time.Time{}
	}
	var first time.Time
	await(t, "the first comparison", func() bool { first = ended(); return !first.IsZero() })
	await(t, "the second one", func() bool { return ended().Sub(first) >= time.Second })
	overwrite(t, p.dr.d.find(testVM).snapshot().Disks[0].Image, []byte("rot"), 300_000)
	await(t, "the alarm", func() bool {
		return strings.Contains(strings.Join(p.main.group(testVM).Alarms, "\n"), "the sites differ in 1 chunks")
	})
	p.main.stop()
	p.main.extra = "verify: {every: 1s, rate: 1MiB}\n" // takes a minute
	p.start(p.main, p.dr)
	await(t, "a slow comparison", func() bool { s := p.main.group(testVM).Sync; return s != nil && s.What == "verify" })
	must(t, p.main.unprotect(control.UnprotectRequest{VM: testVM}))
	if _, err := vm.disk("vda").read(0, 512); err != nil {
		t.Error(err)
	}
	p.main.gone(testVM)
}
