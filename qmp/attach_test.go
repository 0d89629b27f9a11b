package qmp

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

func testWorker(d *fakeDomain) *worker {
	return &worker{d: d, calls: &calls{gate: &gate{}}, locks: &locks{}, poll: 250 * time.Millisecond}
}

func testSpec() AttachSpec {
	return AttachSpec{VM: "vm", Target: "vdb", Socket: testSocket, Export: "e", Size: fakeSize, ReconnectDelay: time.Hour}
}

func source(t *testing.T, doc string) Disk {
	t.Helper()
	ds, err := parseDisks(doc)
	if err != nil || len(ds) != 1 {
		t.Fatal(ds, err)
	}
	return ds[0]
}

func TestAttach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFakeDomain(StateRunning)
		d.late = 2
		var phases []string
		s := testSpec()
		s.BeforePivot = func(context.Context) error {
			if d.pivoted > 0 || d.job == nil || d.job.cur != d.job.end {
				t.Error("asked at the wrong time")
			}
			phases = append(phases, "asked")
			return nil
		}
		err := testWorker(d).attach(t.Context(), s, func(_, _ int64, p string) { phases = append(phases, p) })
		if err != nil {
			t.Fatal(err)
		}
		if want := []string{PhaseCopy, "asked", PhasePivot, PhaseTreat}; !slices.Equal(slices.Compact(phases), want) {
			t.Errorf("phases %v", phases)
		}
		live, stored := source(t, d.live), source(t, d.stored)
		if live.Socket != testSocket || stored.Socket != testSocket || stored.Cache != "none" {
			t.Errorf("live %+v, stored %+v", live, stored)
		}
		_, was, err := wasBefore(d.stored, "vdb")
		if err != nil || was == nil || diskOf(was).Source != "/srv/b.qcow2" || was.Driver.Type != "qcow2" || was.Driver.IO != "threads" {
			t.Errorf("the former disk is %+v, %v", was, err)
		}
		if err := d.q.treatedWell(); err != nil {
			t.Error(err)
		}
	})
}

// Every failure before the pivot leaves the VM as it was.
func TestAttachFailsBeforePivot(t *testing.T) {
	boom := errors.New("boom")
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for name, c := range map[string]struct {
		set  func(*fakeDomain, *AttachSpec)
		ctx  context.Context
		want error
	}{
		"not running":   {set: func(d *fakeDomain, _ *AttachSpec) { d.st = StateShutoff }, want: ErrNotRunning},
		"transient":     {set: func(d *fakeDomain, _ *AttachSpec) { d.temp = true }, want: ErrUnsuited},
		"no disk":       {set: func(_ *fakeDomain, s *AttachSpec) { s.Target = "vdz" }, want: ErrNoDisk},
		"size":          {set: func(d *fakeDomain, _ *AttachSpec) { d.size++ }, want: ErrSize},
		"job":           {set: func(d *fakeDomain, _ *AttachSpec) { d.job = &fakeCopy{end: 5000} }, want: ErrJobRunning},
		"copy refused":  {set: func(d *fakeDomain, _ *AttachSpec) { d.fails["blockCopy"] = boom }, want: boom},
		"copy dies":     {set: func(d *fakeDomain, _ *AttachSpec) { d.dies = 600 }, want: ErrCopyFailed},
		"not confirmed": {set: func(_ *fakeDomain, s *AttachSpec) { s.BeforePivot = func(context.Context) error { return boom } }, want: boom},
		"pivot refused": {set: func(d *fakeDomain, _ *AttachSpec) { d.fails["pivot"] = boom }, want: boom},
		"never ready":   {set: func(d *fakeDomain, _ *AttachSpec) { d.late = 1 << 30 }},
		"given up":      {ctx: cancelled, want: context.Canceled},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				d, s := newFakeDomain(StateRunning), testSpec()
				ctx := c.ctx
				if ctx == nil {
					ctx = t.Context()
				}
				if c.set != nil {
					c.set(d, &s)
				}
				live, stored, job := d.live, d.stored, d.job
				s.BeforeCancel = func(why error) {
					if d.pivoted > 0 || d.aborted || c.want != nil && !errors.Is(why, c.want) {
						t.Errorf("told too late, or of another reason: %v", why)
					}
				}
				err := testWorker(d).attach(ctx, s, nil)
				if err == nil || c.want != nil && !errors.Is(err, c.want) {
					t.Fatalf("error %v", err)
				}
				if d.live != live || d.stored != stored || d.job != job || d.pivoted > 0 || len(d.q.commands) > 0 {
					t.Fatalf("something is left: %+v", d)
				}
			})
		})
	}
}

func TestAttachCancelledMidway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFakeDomain(StateRunning)
		ctx, cancel := context.WithCancelCause(t.Context())
		gone := errors.New("the server is gone")
		live, s, told := d.live, testSpec(), false
		s.BeforeCancel = func(error) { told = d.job != nil && !d.aborted }
		err := testWorker(d).attach(ctx, s, func(done, _ int64, _ string) {
			if done > 300 {
				cancel(gone)
			}
		})
		if !told {
			t.Error("the copy was cancelled and whoever serves was not told before")
		}
		if !errors.Is(err, gone) && !errors.Is(err, context.Canceled) {
			t.Fatal(err)
		}
		if d.job != nil || d.live != live {
			t.Fatalf("the job is left: %+v", d)
		}
	})
}

// A pivot that is reported as failed but was made is a success: the
// definition decides.
func TestPivotWhoseAnswerIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFakeDomain(StateRunning)
		d.fails["pivot"], d.after = errors.New("connection lost"), func() {}
		if err := testWorker(d).attach(t.Context(), testSpec(), nil); err != nil {
			t.Fatal(err)
		}
		if err := d.q.treatedWell(); err != nil {
			t.Fatal(err)
		}
	})
}

// After the pivot, the caller's giving up stops nothing, and what fails is told.
func TestAttachAfterPivot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFakeDomain(StateRunning)
		ctx, cancel := context.WithCancel(t.Context())
		err := testWorker(d).attach(ctx, testSpec(), func(_, _ int64, p string) {
			if p == PhaseTreat {
				cancel()
			}
		})
		if err != nil || d.q.treatedWell() != nil {
			t.Fatal(err, d.q.treatedWell())
		}
		d = newFakeDomain(StateRunning)
		d.q.failAt = 6
		err = testWorker(d).attach(t.Context(), testSpec(), nil)
		if !errors.Is(err, ErrUntreated) || source(t, d.live).Socket != testSocket {
			t.Fatal(err)
		}
		if err := testWorker(d).treat(t.Context(), "vdb", testSocket, "e", time.Hour); err != nil || d.q.treatedWell() != nil {
			t.Fatal(err, d.q.treatedWell())
		}
		if err := testWorker(d).attach(t.Context(), testSpec(), nil); !errors.Is(err, ErrAlreadyAttached) {
			t.Fatal(err)
		}
	})
}

func TestLibvirtThatKnowsReconnect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		d := newFakeDomain(StateRunning)
		d.modern = true
		if err := testWorker(d).attach(t.Context(), testSpec(), nil); err != nil {
			t.Fatal(err)
		}
		if len(d.q.commands) > 0 {
			t.Fatalf("libvirt's work was done again: %v", d.q.commands)
		}
	})
}

func TestHotpluggedDisk(t *testing.T) {
	d := newFakeDomain(StateRunning)
	d.stored = strings.Replace(d.stored, "vdb", "vdc", 1)
	if err := testWorker(d).attach(t.Context(), testSpec(), nil); !errors.Is(err, ErrUnsuited) || d.job != nil {
		t.Fatal(err)
	}
}

func TestAttachOffline(t *testing.T) {
	d := newFakeDomain(StateShutoff)
	if err := testWorker(d).attachOffline(t.Context(), testSpec()); err != nil {
		t.Fatal(err)
	}
	if s := source(t, d.stored); s.Socket != testSocket {
		t.Fatalf("%+v", s)
	}
	if err := testWorker(d).attachOffline(t.Context(), testSpec()); !errors.Is(err, ErrAlreadyAttached) {
		t.Fatal(err)
	}
	back := DetachSpec{VM: "vm", Target: "vdb", Socket: testSocket, File: "/srv/b.raw", Format: "raw"}
	if err := testWorker(d).detachOffline(t.Context(), back); err != nil {
		t.Fatal(err)
	}
	if s := source(t, d.stored); s.Source != "/srv/b.raw" || s.Format != "raw" || s.Cache != "writeback" {
		t.Fatalf("%+v", s)
	}
	for want, set := range map[error]func(*fakeDomain){
		ErrRunning: func(d *fakeDomain) { d.st = StatePaused }, ErrUnsuited: func(d *fakeDomain) { d.saved = true },
		ErrSize: func(d *fakeDomain) { d.size = 7 },
	} {
		d := newFakeDomain(StateShutoff)
		set(d)
		stored := d.stored
		if err := testWorker(d).attachOffline(t.Context(), testSpec()); !errors.Is(err, want) || d.stored != stored {
			t.Errorf("%v, want %v", err, want)
		}
	}
}

func TestDetach(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		attached := func() *fakeDomain {
			d := newFakeDomain(StateRunning)
			if err := testWorker(d).attach(t.Context(), testSpec(), nil); err != nil {
				t.Fatal(err)
			}
			return d
		}
		s := DetachSpec{VM: "vm", Target: "vdb", Socket: testSocket, File: filepath.Join(t.TempDir(), "b.raw")}
		if err := s.check(); err != nil {
			t.Fatal(err)
		}
		d := attached()
		if err := testWorker(d).detach(t.Context(), s, nil); err != nil {
			t.Fatal(err)
		}
		if l, st := source(t, d.live), source(t, d.stored); l.Source != s.File || st.Source != s.File || st.Cache != "writeback" || strings.Contains(d.stored, metaNS) {
			t.Fatalf("live %+v stored %+v", l, st)
		}
		if err := testWorker(d).detach(t.Context(), s, nil); !errors.Is(err, ErrNotAttached) {
			t.Fatal(err)
		}
		d = attached()
		if err := testWorker(d).detach(t.Context(), s, nil); err == nil {
			t.Fatal("a file that exists was overwritten")
		}
		s.File += "2"
		d.dies = 600
		if err := testWorker(d).detach(t.Context(), s, nil); !errors.Is(err, ErrCopyFailed) {
			t.Fatal(err)
		}
		if _, err := os.Stat(s.File); !errors.Is(err, os.ErrNotExist) || source(t, d.live).Socket != testSocket {
			t.Fatalf("a failed copy is left: %v", err)
		}
	})
}

func TestSpecs(t *testing.T) {
	for _, change := range []func(*AttachSpec){
		func(s *AttachSpec) { s.VM = "" }, func(s *AttachSpec) { s.Target = "" }, func(s *AttachSpec) { s.Export = "" },
		func(s *AttachSpec) { s.Socket = "a/b" }, func(s *AttachSpec) { s.Socket = "/a/../b" }, func(s *AttachSpec) { s.Size = 0 },
		func(s *AttachSpec) { s.ReconnectDelay = time.Millisecond }, func(s *AttachSpec) { s.ReconnectDelay = 1 << 62 },
	} {
		s := testSpec()
		change(&s)
		if s.check() == nil {
			t.Errorf("%+v was taken", s)
		}
	}
	for _, s := range []DetachSpec{{}, {VM: "a", Target: "b", File: "rel"}, {VM: "a", Target: "b", File: "/f", Format: "vmdk"}} {
		if s.check() == nil {
			t.Errorf("%+v was taken", s)
		}
	}
}
