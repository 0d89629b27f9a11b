package host

import (
	"testing"
	"time"

	"kagami/appliance/control"
)

// client is a client of a group's first disk.
func (s *site) client(group string) *exportMedium {
	s.t.Helper()
	d := s.group(group).Disks[0]
	m, err := openExport(d.Socket, d.Name)
	must(s.t, err)
	s.t.Cleanup(func() { _ = m.Close() })
	return m
}

func (s *site) set(req control.SetRequest) control.Policy {
	s.t.Helper()
	p, err := s.d.Set(s.t.Context(), req)
	must(s.t, err)
	return p
}

// TestSetAsync: in mode async FLUSHes return while the link is lost, until the
// replica may be behind no longer; a change to sync, and back, counts at once; what was
// set outlives the daemon.
func TestSetAsync(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	if got := p.main.set(control.SetRequest{Group: testVM}); got.Mode != "sync" || got.Set || got.AsyncBytes != 0 {
		t.Errorf("before: %+v", got)
	}
	got := p.main.set(control.SetRequest{Group: testVM, Mode: "async", AsyncSeconds: 2})
	if got.Mode != "async" || !got.Set || got.AsyncSeconds != 2 || got.AsyncBytes <= 0 {
		t.Errorf("set: %+v", got)
	}
	c := p.main.client(testVM)
	p.dr.stop()
	p.main.awaitState(testVM, string(Stalled))
	_, err := c.WriteAt(make([]byte, 4096), 0)
	must(t, err)
	began := time.Now()
	must(t, c.Flush()) // would wait for the replica in mode sync
	if took := time.Since(began); took > time.Second {
		t.Errorf("a FLUSH took %v in mode async", took)
	}
	time.Sleep(2100 * time.Millisecond)
	late := make(chan error, 1)
	go func() { late <- c.Flush() }()
	select {
	case err := <-late:
		t.Fatalf("past the bound a FLUSH returned: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	if st := p.main.group(testVM); len(st.Alarms) == 0 || st.Mode != "async" || st.RPOSeconds < 2 {
		t.Errorf("past the bound: mode %s, RPO %v, alarms %q", st.Mode, st.RPOSeconds, st.Alarms)
	}
	p.start(p.dr, p.main)
	must(t, <-late)
	p.main.awaitState(testVM, string(Streaming))
	sameAtReplica(t, p, vm)

	p.main.stop()
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, string(Streaming))
	if st := p.main.group(testVM); st.Mode != "async" || st.AsyncSeconds != 2 {
		t.Errorf("after a restart: mode %s, %v s", st.Mode, st.AsyncSeconds)
	}
	if got := p.main.set(control.SetRequest{Group: testVM, Default: true}); got.Mode != "sync" || got.Set {
		t.Errorf("taken back: %+v", got)
	}
	c = p.main.client(testVM)
	p.dr.stop()
	p.main.awaitState(testVM, string(Stalled))
	_, err = c.WriteAt(make([]byte, 4096), 0)
	must(t, err)
	go func() { late <- c.Flush() }()
	select {
	case err := <-late:
		t.Errorf("in mode sync a FLUSH returned without the replica: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	p.start(p.dr, p.main)
	must(t, <-late)
}

func TestSetRefuses(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	for _, c := range []struct {
		at    *site
		req   control.SetRequest
		exit  int
		words string
	}{
		{p.main, control.SetRequest{Group: "none", Mode: "async"}, control.ExitNotFound, "no group none"},
		{p.dr, control.SetRequest{Group: testVM, Mode: "async"}, control.ExitRefused, "is at site"},
		{p.main, control.SetRequest{Group: testVM, Mode: "fast"}, control.ExitRefused, "no mode"},
		{p.main, control.SetRequest{Group: testVM, Mode: "async", AsyncBytes: 1 << 40}, control.ExitRefused, "not acknowledged"},
		{p.main, control.SetRequest{Group: testVM, AsyncSeconds: -1}, control.ExitRefused, "out of range"},
		{p.main, control.SetRequest{Group: testVM, AsyncSeconds: 1e9}, control.ExitRefused, "out of range"},
		{p.main, control.SetRequest{Group: testVM, Mode: "async", Default: true}, control.ExitRefused, "makes no sense"},
	} {
		_, err := c.at.d.Set(t.Context(), c.req)
		refusedAs(t, err, c.exit, c.words)
	}
	if st := p.main.group(testVM); st.Mode != "sync" {
		t.Errorf("mode is %s after refusals alone", st.Mode)
	}
}
