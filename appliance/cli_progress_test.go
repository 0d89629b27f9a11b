package main

import (
	"bytes"
	"context"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
)

func steps(emit func(control.Event)) {
	emit(control.Event{Step: "check", Message: "looking at VM web"})
	for i := range int64(21) {
		emit(control.Event{Step: "sync", Done: i << 29, Total: 10 << 30, Rate: 112 << 20, ETASeconds: float64(20-i) * 4.5})
		time.Sleep(2 * time.Millisecond) // progress that is not read in time is replaced
	}
	emit(control.Event{Step: "done", Message: "web is protected"})
}

func TestProtectShowsProgress(t *testing.T) {
	var got control.ProtectRequest
	socket := serve(t, &fake{protect: func(_ context.Context, r control.ProtectRequest, emit func(control.Event)) error {
		got = r
		steps(emit)
		return nil
	}})
	r := kagami(t, "protect", "web", "--disk", "vdb", "--disk", "vdc", "--to", "dr", "--dry-run", "--socket", socket)
	if r.code != 0 || r.out != "" || !strings.HasPrefix(r.err, "check      looking at VM web\nsync       ") || !strings.HasSuffix(r.err, "done       web is protected\n") {
		t.Errorf("%+v", r)
	}
	if got.VM != "web" || got.To != "dr" || strings.Join(got.Disks, " ") != "vdb vdc" || !got.DryRun {
		t.Errorf("%+v", got)
	}
	r = kagami(t, "protect", "web", "--to", "dr", "--json", "--socket", socket)
	lines := strings.Split(strings.TrimSpace(r.out), "\n")
	if r.code != 0 || r.err != "" || lines[0] != `{"step":"check","message":"looking at VM web"}` || lines[len(lines)-1] != `{"result":{}}` {
		t.Errorf("%+v", r)
	}
}

func TestReporterGolden(t *testing.T) {
	events := []control.Event{
		{Step: "check", Message: "looking at VM web and at site dr"},
		{Step: "sync", Done: 0, Total: 10 << 30},
		{Step: "sync", Done: 1 << 20, Total: 10 << 30, Rate: 1 << 20, ETASeconds: 10239},
		{Step: "sync", Done: 4509715660, Total: 10 << 30, Rate: 117440512, ETASeconds: 53.2},
		{Step: "sync", Done: 4509715661, Total: 10 << 30, Rate: 117440512, ETASeconds: 53.1},
		{Step: "sync", Done: 10 << 30, Total: 10 << 30, Rate: 117440512},
		{Step: "done", Message: "web is protected"},
	}
	for name, a := range map[string]*app{"progress-lines.golden": {}, "progress-bar.golden": {tty: true, width: 80}, "progress-narrow.golden": {tty: true, width: 40}} {
		var out, errOut bytes.Buffer
		a.out, a.err, a.now = &out, &errOut, func() time.Time { return clock }
		r := &reporter{a: a}
		for _, e := range events {
			r.event(e)
		}
		if err := r.end(nil, nil); err != nil || out.Len() > 0 {
			t.Errorf("%v, %q", err, out.String())
		}
		golden(t, name, strings.NewReplacer("\r", "<CR>", "\x1b[K", "<EL>").Replace(errOut.String()))
	}
}

func TestLinesComeAtLeastEveryTenSeconds(t *testing.T) {
	var errOut bytes.Buffer
	now := clock
	r := &reporter{a: &app{err: &errOut, now: func() time.Time { return now }}}
	for range 31 {
		r.event(control.Event{Step: "sync", Done: 1, Total: 1000})
		now = now.Add(time.Second)
	}
	if n := strings.Count(errOut.String(), "\n"); n != 4 {
		t.Errorf("%d lines in 31 seconds", n)
	}
}

func TestBarNeverWraps(t *testing.T) {
	for width := range 200 {
		for _, e := range []control.Event{
			{Step: "sync", Done: 4509715660, Total: 10 << 30, Rate: 117440512, ETASeconds: 53},
			{Step: "a-very-long-step-name", Done: 5, Total: 3},
			{Step: "neg", Done: -5, Total: 3},
		} {
			if s := []rune(bar(e, width)); len(s) >= max(width, 1) {
				t.Fatalf("%d columns on a terminal of %d: %s", len(s), width, string(s))
			}
		}
	}
}

func TestInterrupted(t *testing.T) {
	ended := make(chan error, 3)
	started := make(chan struct{}, 3)
	wait := func(ctx context.Context) error {
		started <- struct{}{}
		<-ctx.Done()
		ended <- ctx.Err()
		return ctx.Err()
	}
	goOn := make(chan struct{})
	socket := serve(t, &fake{
		protect: func(ctx context.Context, _ control.ProtectRequest, emit func(control.Event)) error {
			emit(control.Event{Step: "check"})
			return wait(ctx)
		},
		failover: func(_ context.Context, _ control.FailoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
			emit(control.Event{Step: "seal"})
			started <- struct{}{}
			<-goOn
			return control.FailoverReport{}, nil
		},
	})
	interrupt := func(args ...string) result {
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		go func() {
			<-started
			time.Sleep(100 * time.Millisecond) // let the first line of the answer arrive
			cancel()
		}()
		return kagamiWith(ctx, t, &app{}, append(args, "--socket", socket)...)
	}
	r := interrupt("protect", "web", "--to", "dr")
	if r.code != 1 || !strings.Contains(r.err, "interrupted while protect was running\n  next: what was begun is taken back") {
		t.Errorf("%+v", r)
	}
	if err := <-ended; err == nil {
		t.Error("protect was not cancelled")
	}
	r = interrupt("failover", "web")
	close(goOn)
	if r.code != 1 || !strings.Contains(r.err, "interrupted while failover was running\n  next: the failover goes on; kagami status web shows its outcome") {
		t.Errorf("%+v", r)
	}
}
