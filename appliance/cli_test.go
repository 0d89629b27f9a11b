package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden compares got with testdata/NAME.
func golden(t *testing.T, name, got string) {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s differs (run with -update after checking)\n--- got\n%s\n--- want\n%s", path, got, want)
	}
}

// clock is the time of every test.
var clock = time.Date(2026, 11, 22, 12, 0, 0, 0, time.UTC)

// verified is when the replica of web was compared last.
var verified = clock.Add(-28 * time.Hour)

// fake is a daemon with a fixed status; its operations are functions.
type fake struct {
	st        control.Status
	protect   func(context.Context, control.ProtectRequest, func(control.Event)) error
	unprotect func(context.Context, control.UnprotectRequest, func(control.Event)) error
	failover  func(context.Context, control.FailoverRequest, func(control.Event)) (control.FailoverReport, error)
	forget    func(context.Context, control.ForgetRequest, func(control.Event)) error
	verify    func(context.Context, control.VerifyRequest, func(control.Event)) (control.VerifyReport, error)
	set       func(context.Context, control.SetRequest) (control.Policy, error)
	reprotect func(context.Context, control.ReprotectRequest, func(control.Event)) error
	move      func(context.Context, control.SwitchoverRequest, func(control.Event)) (control.FailoverReport, error)
	survivor  func(context.Context, control.SurvivorRequest, func(control.Event)) error
	branches  func(context.Context, control.BranchesRequest) ([]control.Branch, error)
}

func (f *fake) Reprotect(ctx context.Context, r control.ReprotectRequest, emit func(control.Event)) error {
	return f.reprotect(ctx, r, emit)
}

func (f *fake) Switchover(ctx context.Context, r control.SwitchoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	return f.move(ctx, r, emit)
}

func (f *fake) Failback(ctx context.Context, r control.SwitchoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	return f.move(ctx, r, emit)
}

func (f *fake) Survivor(ctx context.Context, r control.SurvivorRequest, emit func(control.Event)) error {
	return f.survivor(ctx, r, emit)
}

func (f *fake) Branches(ctx context.Context, r control.BranchesRequest) ([]control.Branch, error) {
	return f.branches(ctx, r)
}

func (f *fake) Status(context.Context) (control.Status, error) { return f.st, nil }

func (f *fake) Protect(ctx context.Context, r control.ProtectRequest, emit func(control.Event)) error {
	return f.protect(ctx, r, emit)
}

func (f *fake) Unprotect(ctx context.Context, r control.UnprotectRequest, emit func(control.Event)) error {
	return f.unprotect(ctx, r, emit)
}

func (f *fake) Failover(ctx context.Context, r control.FailoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
	return f.failover(ctx, r, emit)
}

func (f *fake) Verify(ctx context.Context, r control.VerifyRequest, emit func(control.Event)) (control.VerifyReport, error) {
	return f.verify(ctx, r, emit)
}

func (f *fake) Set(ctx context.Context, r control.SetRequest) (control.Policy, error) {
	return f.set(ctx, r)
}

func (f *fake) Forget(ctx context.Context, r control.ForgetRequest, emit func(control.Event)) error {
	return f.forget(ctx, r, emit)
}

// serve runs the fake's control API and returns its socket.
func serve(t *testing.T, f *fake) string {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "c.sock")
	l, err := control.Listen(socket, "")
	if err != nil {
		t.Fatal(err)
	}
	s := control.NewServer(f, control.ServerOptions{Version: "v1.2.3"})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return socket
}

// result of a command line.
type result struct {
	out, err string
	code     int
}

// kagami runs a command line as a user without a configuration file would.
func kagami(t *testing.T, args ...string) result {
	t.Helper()
	return kagamiWith(t.Context(), t, &app{environ: []string{"KAGAMI_CONFIG=" + filepath.Join(t.TempDir(), "none")}}, args...)
}

func kagamiWith(ctx context.Context, t *testing.T, a *app, args ...string) result {
	t.Helper()
	var out, errOut bytes.Buffer
	a.out, a.err, a.now = &out, &errOut, func() time.Time { return clock }
	code := a.run(ctx, args)
	return result{out.String(), errOut.String(), code}
}

// site is a status with something of everything.
func site() control.Status {
	return control.Status{
		Site: "primary", Version: "v1.2.3", Since: clock.Add(-50 * time.Hour),
		Peers: []control.Peer{
			{Name: "dr", Address: "192.0.2.1:7400", Connected: true, Since: clock.Add(-3*time.Hour - 12*time.Minute), Connections: 4, RTTMs: 20.34, Inflight: 4096, SentBytes: 1 << 30, Version: "v1.2.2"},
			{Name: "far", Address: "far.example:7400", Since: clock.Add(-90 * time.Second), Error: "dial tcp: connection refused"},
			{Name: "new", Address: "new.example:7400"},
		},
		Alarms: []string{"libvirt is not reachable: no such socket"},
		Groups: []control.Group{
			{
				Name: "db", ID: "6a5c0e0e-0000-4000-8000-000000000001", VM: "db", Role: "source", State: "syncing", Since: clock.Add(-75 * time.Second),
				Mode: "sync", OnLinkLoss: "stall", Peer: "dr", PeerUp: true, Lineage: "11111111-2222-4333-8444-555555555555", Session: 1,
				LSN: control.LSN{Assigned: 900, Received: 850, Durable: 800, Applied: 700}, QueueLimit: 16 << 20, QueueBytes: 3 << 20,
				SpoolLimit: 0, Regions: 40, Flushes: 1,
				Sync:  &control.Sync{What: "first sync", Done: 4509715660, Total: 10 << 30, Rate: 117440512, ETASeconds: 53},
				Disks: []control.Disk{{Name: "vda", Size: 10 << 30, Image: "/var/lib/kagami/images/db/vda.raw", Socket: "/run/kagami/db-vda.sock", Clients: 1}},
			},
			{
				Name: "old", ID: "6a5c0e0e-0000-4000-8000-000000000002", VM: "oldvm", Role: "promoted", State: "unmirrored", Since: clock.Add(-26 * time.Hour),
				Complete: true, Mode: "sync", OnLinkLoss: "stall", Lineage: "99999999-2222-4333-8444-555555555555", Session: 3,
				LSN:      control.LSN{Assigned: 5000},
				Alarms:   []string{"serves without a replica since the failover"},
				Failover: &control.FailoverReport{Group: "old", At: clock.Add(-26 * time.Hour), LSN: 4990, Lineage: "99999999-2222-4333-8444-555555555555", RPOSeconds: 0.25, RTOSeconds: 14.5, Domain: "old-dr", Replayed: 1, Notes: []string{"network production is recovery here"}},
				Disks:    []control.Disk{{Name: "vda", Size: 1 << 30, Image: "/var/lib/kagami/images/old/vda.raw", Socket: "/run/kagami/old-vda.sock"}},
			},
			{
				Name: "web", ID: "6a5c0e0e-0000-4000-8000-000000000003", VM: "web", Role: "source", State: "stalled", Since: clock.Add(-5 * time.Second), Reason: "link to far lost",
				Protected: true, Complete: true, Mode: "async", AsyncBytes: 16 << 20, AsyncSeconds: 5, OnLinkLoss: "stall", Peer: "far", Lineage: "aaaaaaaa-2222-4333-8444-555555555555", Session: 2,
				LSN: control.LSN{Assigned: 123456, Received: 123400, Durable: 123390, Applied: 120000}, RPOSeconds: 5.5,
				QueueBytes: 16 << 20, QueueLimit: 16 << 20, SpoolBytes: 300 << 20, SpoolLimit: 2 << 30, Regions: 12, Flushes: 3, Written: 5 << 30, Resynced: 12345678,
				Verified: &control.Verified{Began: clock.Add(-30 * time.Hour), Ended: &verified, Done: 20 << 30, Total: 20 << 30, Differ: 1, Repaired: 1},
				Disks: []control.Disk{
					{Name: "vda", Slot: 0, ID: "x", Size: 20 << 30, Image: "/var/lib/kagami/images/web/vda.raw", Socket: "/run/kagami/web-vda.sock", Clients: 1, OldFile: "/srv/web.qcow2"},
					{Name: "vdb", Slot: 1, ID: "y", Size: 1536 << 20, Image: "/var/lib/kagami/images/web/vdb.raw", Socket: "/run/kagami/web-vdb.sock", Clients: 1},
				},
				Alarms: []string{"the link to far is lost: writes wait", "the spool is 90 % full"},
				Events: []control.LoggedEvent{{At: clock.Add(-time.Hour), Text: "first sync ended"}, {At: clock.Add(-5 * time.Second), Text: "link lost"}},
			},
		},
	}
}

func TestStatusGolden(t *testing.T) {
	socket := serve(t, &fake{st: site()})
	for name, args := range map[string][]string{
		"status.golden":          {"status"},
		"status-wide.golden":     {"status", "-o", "wide"},
		"status-web.golden":      {"status", "web"},
		"status-db.golden":       {"status", "db"},
		"status-old.golden":      {"status", "oldvm"},
		"status-json.golden":     {"status", "--json"},
		"status-web-json.golden": {"status", "web", "--json"},
	} {
		r := kagami(t, append(args, "--socket", socket)...)
		if r.code != 0 || r.err != "" {
			t.Errorf("%v: %+v", args, r)
		}
		golden(t, name, r.out)
	}
	var st control.Status
	if err := json.Unmarshal([]byte(kagami(t, "status", "--json", "--socket", socket).out), &st); err != nil || len(st.Groups) != 3 {
		t.Errorf("%+v, %v", st, err)
	}
	r := kagami(t, "status", "--socket", serve(t, &fake{st: control.Status{Site: "dr", Version: "v1", Since: clock}}))
	golden(t, "status-empty.golden", r.out)
}

func TestStatusErrors(t *testing.T) {
	socket := serve(t, &fake{st: site()})
	for _, c := range []struct {
		args []string
		code int
		want string
	}{
		{[]string{"status", "nope", "--socket", socket}, control.ExitNotFound, "kagami: site primary has no group nope\n  next: kagami status lists the groups of this site\n"},
		{[]string{"status", "--socket", "/nonexistent/s"}, control.ExitUnreachable, "kagami: no daemon answers on /nonexistent/s\n  next: start it (systemctl start kagami, or kagami daemon), or name its socket with --socket\n"},
		{[]string{"status", "-o", "long", "--socket", socket}, control.ExitUsage, "kagami: output \"long\" is not known\n  next: use -o wide, or --json\n"},
		{[]string{"status", "--interval", "1ms", "--socket", socket}, control.ExitUsage, "kagami: --interval is too short\n  next: use 100ms or more\n"},
		{[]string{"status", "a", "b"}, control.ExitUsage, "kagami: accepts at most 1 arg(s), received 2\n  next: see kagami status --help\n"},
		{[]string{"statsu"}, control.ExitUsage, "kagami: unknown command \"statsu\" for \"kagami\"\n\nDid you mean this?\n\tstatus\n\n  next: see kagami --help\n"},
		{[]string{"config", "nope"}, control.ExitUsage, "kagami: unknown command \"nope\" for \"kagami config\"\n  next: see kagami config --help\n"},
		{[]string{"pki", "nope"}, control.ExitUsage, "kagami: unknown command \"nope\" for \"kagami pki\"\n  next: see kagami pki --help\n"},
		{[]string{"completion", "nope"}, control.ExitUsage, "kagami: unknown command \"nope\" for \"kagami completion\"\n  next: see kagami completion --help\n"},
		{[]string{"help", "nope"}, control.ExitUsage, "kagami: there is no command or topic \"nope\"\n  next: see kagami help --help\n"},
		{[]string{"help", "pki", "nope"}, control.ExitUsage, "kagami: there is no command or topic \"pki nope\"\n  next: see kagami help --help\n"},
		{[]string{"protect", "web", "--to", "", "--socket", socket}, control.ExitUsage, "kagami: --to names no site\n  next: name a peer of the configuration; kagami status lists them\n"},
		{[]string{"status", "--nope"}, control.ExitUsage, "kagami: unknown flag: --nope\n  next: see kagami status --help\n"},
		{[]string{"failover", "--socket", socket}, control.ExitUsage, "kagami: kagami failover wants the name of one VM, not 0 arguments\n  next: see kagami failover --help\n"},
		{[]string{"protect", "web", "--socket", socket}, control.ExitUsage, "kagami: required flag(s) \"to\" not set\n  next: see kagami protect --help\n"},
		{[]string{"unprotect", "web", "--file", "vdb", "--socket", socket}, control.ExitUsage, "kagami: --file vdb is not DISK=PATH with an absolute path\n  next: write it like --file vdb=/srv/images/web.raw\n"},
		{[]string{"unprotect", "web", "--file", "vdb=x", "--socket", socket}, control.ExitUsage, "kagami: --file vdb=x is not DISK=PATH with an absolute path\n  next: write it like --file vdb=/srv/images/web.raw\n"},
		{[]string{"unprotect", "web", "--file", "a=/x", "--file", "a=/y", "--socket", socket}, control.ExitUsage, "kagami: --file names disk a twice\n  next: name each disk once\n"},
	} {
		if r := kagami(t, c.args...); r.code != c.code || r.err != c.want || r.out != "" {
			t.Errorf("%v: %d\n%s%s\nwant\n%s", c.args, r.code, r.err, r.out, c.want)
		}
	}
}

func TestWatch(t *testing.T) {
	socket := serve(t, &fake{st: site()})
	for name, tty := range map[string]bool{"lines": false, "terminal": true} {
		ctx, cancel := context.WithTimeout(t.Context(), 450*time.Millisecond)
		a := &app{tty: true, outTTY: tty, width: 80} // messages go to a terminal in any case
		r := kagamiWith(ctx, t, a, "status", "--watch", "--interval", "100ms", "--socket", socket)
		cancel()
		if n := strings.Count(r.out, "site primary"); r.code != 0 || n < 2 {
			t.Errorf("%s: %d, shown %d times\n%s", name, r.code, n, r.err)
		}
		if tty != strings.Contains(r.out, "\x1b[H\x1b[2J") {
			t.Errorf("%s: %q", name, r.out[:40])
		}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer cancel()
	r := kagamiWith(ctx, t, &app{}, "status", "--watch", "--json", "--interval", "100ms", "--socket", socket)
	for l := range strings.Lines(r.out) {
		if !json.Valid([]byte(l)) {
			t.Errorf("not JSON: %s", l)
		}
	}
	// A daemon that is away is waited for.
	ctx2, cancel2 := context.WithTimeout(t.Context(), 250*time.Millisecond)
	defer cancel2()
	if r := kagamiWith(ctx2, t, &app{}, "status", "--watch", "--interval", "100ms", "--socket", "/nonexistent/s"); r.code != 0 || strings.Count(r.err, "no daemon answers") < 2 {
		t.Errorf("%+v", r)
	}
}

// steps plays an operation of fixed events.
func TestErrorsOfOperations(t *testing.T) {
	refusal := &control.Error{Code: "refused", Message: "the source is alive", Hint: "use --force", Exit: control.ExitRefused}
	socket := serve(t, &fake{
		protect: func(context.Context, control.ProtectRequest, func(control.Event)) error {
			return errors.New("disk on fire")
		},
		unprotect: func(context.Context, control.UnprotectRequest, func(control.Event)) error { return refusal },
		failover: func(context.Context, control.FailoverRequest, func(control.Event)) (control.FailoverReport, error) {
			return control.FailoverReport{}, refusal
		},
	})
	if r := kagami(t, "protect", "web", "--to", "dr", "--socket", socket); r.code != 1 || r.err != "kagami: disk on fire\n" {
		t.Errorf("%+v", r)
	}
	if r := kagami(t, "unprotect", "web", "--socket", socket); r.code != 3 || r.err != "kagami: the source is alive\n  next: use --force\n" {
		t.Errorf("%+v", r)
	}
	r := kagami(t, "failover", "web", "--json", "--socket", socket)
	if r.code != 3 || r.out != `{"error":{"code":"refused","message":"the source is alive","hint":"use --force","exit":3}}`+"\n" {
		t.Errorf("%+v", r)
	}
}

func TestFailoverReportGolden(t *testing.T) {
	rep := control.FailoverReport{
		Group: "web", LSN: 123390, Lineage: "bbbbbbbb-2222-4333-8444-555555555555", RPOSeconds: 0.02, RTOSeconds: 12.34, Domain: "web-dr",
		Replayed: 12, Notes: []string{"network production is recovery here"},
	}
	var got control.FailoverRequest
	socket := serve(t, &fake{failover: func(_ context.Context, r control.FailoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
		got = r
		emit(control.Event{Step: "seal", Message: "sealed at LSN 123390"})
		out := rep
		out.DryRun = r.DryRun
		return out, nil
	}})
	for name, args := range map[string][]string{
		"failover.golden":          {},
		"failover-dry-run.golden":  {"--dry-run"},
		"failover-no-start.golden": {"--no-start", "--force"},
		"failover-json.golden":     {"--json"},
	} {
		r := kagami(t, append([]string{"failover", "web", "--socket", socket}, args...)...)
		if r.code != 0 {
			t.Errorf("%v: %+v", args, r)
		}
		golden(t, name, r.err+"---\n"+r.out)
		want := control.FailoverRequest{VM: "web"}
		for _, a := range args {
			want.DryRun = want.DryRun || a == "--dry-run"
			want.NoStart = want.NoStart || a == "--no-start"
			want.Force = want.Force || a == "--force"
		}
		if got != want {
			t.Errorf("%v: %+v", args, got)
		}
	}
}

func TestUnprotect(t *testing.T) {
	var got control.UnprotectRequest
	socket := serve(t, &fake{unprotect: func(_ context.Context, r control.UnprotectRequest, _ func(control.Event)) error { got = r; return nil }})
	r := kagami(t, "unprotect", "web", "--file", "vdb=/srv/a=b.raw", "--dry-run", "--socket", socket)
	if r.code != 0 || got.VM != "web" || !got.DryRun || len(got.Files) != 1 || got.Files["vdb"] != "/srv/a=b.raw" {
		t.Errorf("%+v, %+v", r, got)
	}
}

func TestForget(t *testing.T) {
	var got control.ForgetRequest
	socket := serve(t, &fake{forget: func(_ context.Context, r control.ForgetRequest, emit func(control.Event)) error {
		got = r
		emit(control.Event{Step: "forget", Message: "state: /x"})
		return nil
	}})
	if r := kagami(t, "forget", "web", "--force", "--dry-run", "--socket", socket); r.code != 0 || !strings.Contains(r.err, "state: /x") {
		t.Errorf("%+v", r)
	}
	if want := (control.ForgetRequest{Group: "web", Force: true, DryRun: true}); got != want {
		t.Errorf("%+v", got)
	}
	if r := kagami(t, "forget", "--socket", socket); r.code != control.ExitUsage || r.err != "kagami: kagami forget wants the name of one group, not 0 arguments\n  next: see kagami forget --help\n" {
		t.Errorf("%+v", r)
	}
}

func TestCompletion(t *testing.T) {
	socket := serve(t, &fake{st: site()})
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"failover", ""}, "db\tsource, syncing\nold\tpromoted, unmirrored\nweb\tsource, stalled\n"},
		{[]string{"status", ""}, "db\tsource, syncing\n"},
		{[]string{"unprotect", ""}, "web\tsource, stalled\n"},
		{[]string{"protect", "web", "--to", ""}, "dr\t192.0.2.1:7400\n"},
		{[]string{"status", "-o", ""}, "wide\n"},
	} {
		a := &app{environ: []string{"KAGAMI_CONTROL_SOCKET=" + socket}}
		if r := kagamiWith(t.Context(), t, a, append([]string{"__complete"}, c.args...)...); r.code != 0 || !strings.Contains(r.out, c.want) {
			t.Errorf("%v: %+v", c.args, r)
		}
	}
	if r := kagami(t, "__complete", "--socket", "/nonexistent/s", "failover", ""); r.code != 0 || strings.Contains(r.out, "web") {
		t.Errorf("without a daemon: %+v", r)
	}
	for _, shell := range []string{"bash", "zsh", "fish"} {
		if r := kagami(t, "completion", shell); r.code != 0 || len(r.out) < 500 {
			t.Errorf("%s: %+v", shell, r)
		}
	}
}

func TestVersion(t *testing.T) {
	socket := serve(t, &fake{})
	if r := kagami(t, "version", "--socket", socket); r.code != 0 || !strings.HasPrefix(r.out, "kagami ") || !strings.HasSuffix(r.out, "daemon v1.2.3\n") {
		t.Errorf("%+v", r)
	}
	r := kagami(t, "version", "--json", "--socket", "/nonexistent/s")
	var v versions
	if err := json.Unmarshal([]byte(r.out), &v); err != nil || v.Version == "" || v.Go == "" || v.Daemon != "" || r.err != "" {
		t.Errorf("%+v, %v", r, err)
	}
}

func TestSocketIsFound(t *testing.T) {
	socket := serve(t, &fake{st: site()})
	dir := t.TempDir()
	good, broken := filepath.Join(dir, "good.yaml"), filepath.Join(dir, "broken.yaml")
	write(t, good, "site: primary\ncontrol: {socket: "+socket+"}\n")
	write(t, broken, "nonsense\n")
	for name, c := range map[string]struct {
		environ []string
		args    []string
		code    int
		err     string
	}{
		"flag":               {nil, []string{"--socket", socket}, 0, ""},
		"environment":        {[]string{"KAGAMI_CONTROL_SOCKET=" + socket, "KAGAMI_CONFIG=" + broken}, nil, 0, ""},
		"--config":           {nil, []string{"--config", good}, 0, ""},
		"KAGAMI_CONFIG":      {[]string{"KAGAMI_CONFIG=" + good}, nil, 0, ""},
		"flag before config": {nil, []string{"--config", broken, "--socket", socket}, 0, ""},
		"broken --config":    {nil, []string{"--config", broken}, 2, "broken.yaml:1: "},
		"broken environment": {[]string{"KAGAMI_CONFIG=" + broken}, nil, 4, "is not usable (kagami config check says why); trying /run/kagami/control.sock"},
		"missing --config":   {nil, []string{"--config", dir + "/none"}, 2, "kagami config init"},
	} {
		if c.code == 4 && exists("/run/kagami/control.sock") {
			continue // a daemon runs on this machine
		}
		r := kagamiWith(t.Context(), t, &app{environ: c.environ}, append([]string{"status"}, c.args...)...)
		if r.code != c.code || !strings.Contains(r.err, c.err) {
			t.Errorf("%s: %+v", name, r)
		}
	}
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
