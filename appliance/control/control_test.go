package control

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"
)

// fake is a backend of functions.
type fake struct {
	status    func(context.Context) (Status, error)
	protect   func(context.Context, ProtectRequest, func(Event)) error
	unprotect func(context.Context, UnprotectRequest, func(Event)) error
	failover  func(context.Context, FailoverRequest, func(Event)) (FailoverReport, error)
	forget    func(context.Context, ForgetRequest, func(Event)) error
	verify    func(context.Context, VerifyRequest, func(Event)) (VerifyReport, error)
	set       func(context.Context, SetRequest) (Policy, error)
	reprotect func(context.Context, ReprotectRequest, func(Event)) error
	move      func(context.Context, SwitchoverRequest, func(Event)) (FailoverReport, error)
	survivor  func(context.Context, SurvivorRequest, func(Event)) error
	branches  func(context.Context, BranchesRequest) ([]Branch, error)
}

func (f *fake) Reprotect(ctx context.Context, r ReprotectRequest, emit func(Event)) error {
	return f.reprotect(ctx, r, emit)
}

func (f *fake) Switchover(ctx context.Context, r SwitchoverRequest, emit func(Event)) (FailoverReport, error) {
	return f.move(ctx, r, emit)
}

func (f *fake) Failback(ctx context.Context, r SwitchoverRequest, emit func(Event)) (FailoverReport, error) {
	return f.move(ctx, r, emit)
}

func (f *fake) Survivor(ctx context.Context, r SurvivorRequest, emit func(Event)) error {
	return f.survivor(ctx, r, emit)
}

func (f *fake) Branches(ctx context.Context, r BranchesRequest) ([]Branch, error) {
	return f.branches(ctx, r)
}

func (f *fake) Status(ctx context.Context) (Status, error) { return f.status(ctx) }

func (f *fake) Protect(ctx context.Context, r ProtectRequest, emit func(Event)) error {
	return f.protect(ctx, r, emit)
}

func (f *fake) Unprotect(ctx context.Context, r UnprotectRequest, emit func(Event)) error {
	return f.unprotect(ctx, r, emit)
}

func (f *fake) Failover(ctx context.Context, r FailoverRequest, emit func(Event)) (FailoverReport, error) {
	return f.failover(ctx, r, emit)
}

func (f *fake) Verify(ctx context.Context, r VerifyRequest, emit func(Event)) (VerifyReport, error) {
	return f.verify(ctx, r, emit)
}

func (f *fake) Set(ctx context.Context, r SetRequest) (Policy, error) { return f.set(ctx, r) }

func (f *fake) Forget(ctx context.Context, r ForgetRequest, emit func(Event)) error {
	return f.forget(ctx, r, emit)
}

// serve runs a server for the test and returns its socket and a client.
func serve(t *testing.T, b Backend, o ServerOptions) (string, *Client, *Server) {
	t.Helper()
	socket := filepath.Join(t.TempDir(), "c.sock")
	l, err := Listen(socket, "")
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(b, o)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
	})
	return socket, NewClient(socket), s
}

// raw sends one request as text and returns the answer's status and body.
func raw(t *testing.T, socket, method, path, body string) (int, string) {
	t.Helper()
	hc := &http.Client{Transport: &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, "unix", socket)
	}}}
	req, err := http.NewRequest(method, "http://x"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := hc.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(data)
}

func TestStatusAndVersion(t *testing.T) {
	want := Status{Site: "a", Version: "1", Since: time.Unix(5, 0).UTC(), Peers: []Peer{{Name: "b", RTTMs: 20.5}}, Groups: []Group{{Name: "web", LSN: LSN{Assigned: 7}}}}
	b := &fake{status: func(context.Context) (Status, error) { return want, nil }}
	_, c, _ := serve(t, b, ServerOptions{Version: "v9"})
	if got, err := c.Status(t.Context()); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v", got, err)
	}
	if v, err := c.Version(t.Context()); err != nil || v != (Version{"v9", 1}) {
		t.Errorf("%+v, %v", v, err)
	}
	b.status = func(context.Context) (Status, error) { return Status{}, errors.New("broken") }
	if _, err := c.Status(t.Context()); !isError(err, Error{Code: "failed", Message: "broken", Exit: ExitFailed}) {
		t.Errorf("%v", err)
	}
}

func isError(err error, want Error) bool {
	var e *Error
	return errors.As(err, &e) && *e == want
}

func TestMetrics(t *testing.T) {
	socket, _, _ := serve(t, &fake{}, ServerOptions{Metrics: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = io.WriteString(w, "m 1\n") })})
	if code, body := raw(t, socket, "GET", "/metrics", ""); code != 200 || body != "m 1\n" {
		t.Errorf("%d %q", code, body)
	}
	socket, _, _ = serve(t, &fake{}, ServerOptions{})
	if code, _ := raw(t, socket, "GET", "/metrics", ""); code != 404 {
		t.Errorf("%d", code)
	}
}

func TestStreams(t *testing.T) {
	var gotP ProtectRequest
	var gotU UnprotectRequest
	var gotF FailoverRequest
	var gotG ForgetRequest
	steps := func(emit func(Event)) {
		emit(Event{Step: "check", Message: "ok"})
		emit(Event{Step: "sync", Done: 10, Total: 10, Rate: 5, ETASeconds: 0})
	}
	b := &fake{
		protect:   func(_ context.Context, r ProtectRequest, emit func(Event)) error { gotP = r; steps(emit); return nil },
		unprotect: func(_ context.Context, r UnprotectRequest, emit func(Event)) error { gotU = r; steps(emit); return nil },
		failover: func(_ context.Context, r FailoverRequest, emit func(Event)) (FailoverReport, error) {
			gotF = r
			steps(emit)
			return FailoverReport{Group: "web", LSN: 9}, nil
		},
		forget: func(_ context.Context, r ForgetRequest, emit func(Event)) error { gotG = r; steps(emit); return nil },
	}
	_, c, _ := serve(t, b, ServerOptions{})
	var seen []Event
	emit := func(e Event) { seen = append(seen, e) }
	wantEvents := []Event{{Step: "check", Message: "ok"}, {Step: "sync", Done: 10, Total: 10, Rate: 5}}

	p := ProtectRequest{VM: "web", Disks: []string{"vdb"}, To: "dr", DryRun: true}
	if err := c.Protect(t.Context(), p, emit); err != nil || !reflect.DeepEqual(gotP, p) || !reflect.DeepEqual(seen, wantEvents) {
		t.Errorf("%+v, %v, %v", gotP, err, seen)
	}
	u := UnprotectRequest{VM: "web", Files: map[string]string{"vdb": "/x"}}
	seen = nil
	if err := c.Unprotect(t.Context(), u, emit); err != nil || !reflect.DeepEqual(gotU, u) || !reflect.DeepEqual(seen, wantEvents) {
		t.Errorf("%+v, %v, %v", gotU, err, seen)
	}
	f := FailoverRequest{VM: "web", Force: true, DryRun: true, NoStart: true}
	seen = nil
	rep, err := c.Failover(t.Context(), f, emit)
	if err != nil || gotF != f || rep.LSN != 9 || rep.Group != "web" || !reflect.DeepEqual(seen, wantEvents) {
		t.Errorf("%+v, %+v, %v, %v", gotF, rep, err, seen)
	}
	g := ForgetRequest{Group: "web", Force: true, DryRun: true}
	seen = nil
	if err := c.Forget(t.Context(), g, emit); err != nil || gotG != g || !reflect.DeepEqual(seen, wantEvents) {
		t.Errorf("%+v, %v, %v", gotG, err, seen)
	}
}

func TestStreamErrors(t *testing.T) {
	refusal := &Error{Code: "refused", Message: "the source is alive", Hint: "use --force", Exit: ExitRefused}
	for _, tc := range []struct {
		err  error
		want Error
	}{
		{refusal, *refusal},
		{fmt.Errorf("while checking: %w", refusal), *refusal},
		{errors.New("disk on fire"), Error{Code: "failed", Message: "disk on fire", Exit: ExitFailed}},
		{fmt.Errorf("copy: %w", context.Canceled), Error{Code: "cancelled", Message: "cancelled: copy: context canceled", Exit: ExitFailed}},
	} {
		b := &fake{protect: func(_ context.Context, _ ProtectRequest, emit func(Event)) error {
			emit(Event{Step: "check"})
			return tc.err
		}}
		_, c, _ := serve(t, b, ServerOptions{})
		n := 0
		err := c.Protect(t.Context(), ProtectRequest{VM: "a", To: "b"}, func(Event) { n++ })
		if !isError(err, tc.want) || n != 1 {
			t.Errorf("%v: got %#v, %d events", tc.err, err, n)
		}
	}
}

func TestBadRequests(t *testing.T) {
	never := func() { t.Error("the backend was asked") }
	b := &fake{
		protect:   func(context.Context, ProtectRequest, func(Event)) error { never(); return nil },
		unprotect: func(context.Context, UnprotectRequest, func(Event)) error { never(); return nil },
		failover: func(context.Context, FailoverRequest, func(Event)) (FailoverReport, error) {
			never()
			return FailoverReport{}, nil
		},
	}
	socket, _, _ := serve(t, b, ServerOptions{Version: "v1"})
	long := strings.Repeat("x", maxName+1)
	for _, c := range []struct {
		method, path, body string
		code               int
		want               string
	}{
		{"POST", "/v1/protect", ``, 400, "read request: EOF"},
		{"POST", "/v1/protect", `{`, 400, "read request: unexpected EOF"},
		{"POST", "/v1/protect", `[]`, 400, "cannot unmarshal array"},
		{"POST", "/v1/protect", `{"vm":5,"to":"b"}`, 400, "cannot unmarshal number"},
		{"POST", "/v1/protect", `{"vm":"a","to":"b","x":1}`, 400, `unknown field \"x\"`},
		{"POST", "/v1/protect", `{"vm":"a","to":"b"} {}`, 400, "more than one JSON value"},
		{"POST", "/v1/protect", `{"vm":"a","to":"b"}x`, 400, "more than one JSON value"},
		{"POST", "/v1/protect", `{"to":"b"}`, 400, "vm must have 1 to 255 characters"},
		{"POST", "/v1/protect", `{"vm":"a"}`, 400, "to must have 1 to 255 characters"},
		{"POST", "/v1/protect", `{"vm":"` + long + `","to":"b"}`, 400, "vm must have 1 to 255 characters"},
		{"POST", "/v1/protect", `{"vm":"a","to":"b","disks":[""]}`, 400, "disks must have 1 to 255 characters"},
		{"POST", "/v1/protect", `{"vm":"a","to":"b","disks":["x"` + strings.Repeat(`,"x"`, maxDisks) + `]}`, 400, "disks: at most 256"},
		{"POST", "/v1/protect", `{"vm":"` + strings.Repeat("x", maxBody) + `"}`, 400, "request body too large"},
		{"POST", "/v1/unprotect", `{"vm":""}`, 400, "vm must have"},
		{"POST", "/v1/unprotect", `{"vm":"a","files":{"` + long + `":"x"}}`, 400, "files must have"},
		{"POST", "/v1/failover", `{"vm":""}`, 400, "vm must have"},
		{"POST", "/v1/forget", `{"group":""}`, 400, "group must have"},
		{"POST", "/v1/failover", `{"vm":"a","froce":true}`, 400, "unknown field"},
		{"GET", "/v1/protect", ``, 404, "does not know GET /v1/protect"},
		{"POST", "/v1/status", ``, 404, "does not know POST /v1/status"},
		{"GET", "/v2/status", ``, 404, "does not know GET /v2/status"},
		{"GET", "/", ``, 404, "does not know GET /"},
	} {
		code, body := raw(t, socket, c.method, c.path, c.body)
		if code != c.code || !strings.Contains(body, c.want) || !strings.HasPrefix(body, `{"error":{"code":"`) {
			t.Errorf("%s %s %.60s: %d %.200s", c.method, c.path, c.body, code, body)
		}
	}
}

// begun is a backend whose operations run until their context ends.
func begun(started chan<- string, ended chan<- error) *fake {
	wait := func(ctx context.Context, op string, emit func(Event)) error {
		emit(Event{Step: op})
		started <- op
		select {
		case <-ctx.Done():
		case <-time.After(10 * time.Second):
		}
		ended <- ctx.Err()
		return ctx.Err()
	}
	return &fake{
		protect:   func(ctx context.Context, _ ProtectRequest, e func(Event)) error { return wait(ctx, "protect", e) },
		unprotect: func(ctx context.Context, _ UnprotectRequest, e func(Event)) error { return wait(ctx, "unprotect", e) },
		failover: func(ctx context.Context, _ FailoverRequest, e func(Event)) (FailoverReport, error) {
			return FailoverReport{}, wait(ctx, "failover", e)
		},
	}
}

func TestClientGoesAway(t *testing.T) {
	started, ended := make(chan string, 1), make(chan error, 1)
	_, c, s := serve(t, begun(started, ended), ServerOptions{})
	for op, run := range map[string]func(context.Context) error{
		"protect": func(ctx context.Context) error {
			return c.Protect(ctx, ProtectRequest{VM: "a", To: "b"}, func(Event) {})
		},
		"unprotect": func(ctx context.Context) error { return c.Unprotect(ctx, UnprotectRequest{VM: "a"}, func(Event) {}) },
	} {
		ctx, cancel := context.WithCancel(t.Context())
		result := make(chan error, 1)
		go func() { result <- run(ctx) }()
		<-started
		cancel()
		if err := <-ended; !errors.Is(err, context.Canceled) {
			t.Errorf("%s was not cancelled: %v", op, err)
		}
		var e *Error
		if err := <-result; !errors.As(err, &e) || e.Code != "interrupted" || e.Exit != ExitFailed {
			t.Errorf("%s: %v", op, err)
		}
	}
	// A failover goes on, until the server is closed.
	ctx, cancel := context.WithCancel(t.Context())
	result := make(chan error, 1)
	go func() { _, err := c.Failover(ctx, FailoverRequest{VM: "a"}, func(Event) {}); result <- err }()
	<-started
	cancel()
	if err := <-result; err == nil {
		t.Error("the client does not say that it was interrupted")
	}
	select {
	case err := <-ended:
		t.Fatalf("failover ended with its client: %v", err)
	case <-time.After(300 * time.Millisecond):
	}
	s.Close()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}

func TestCloseEndsOperationsAndTellsTheClient(t *testing.T) {
	started, ended := make(chan string, 1), make(chan error, 1)
	_, c, s := serve(t, begun(started, ended), ServerOptions{})
	result := make(chan error, 1)
	go func() { result <- c.Protect(t.Context(), ProtectRequest{VM: "a", To: "b"}, func(Event) {}) }()
	<-started
	s.Close()
	if err := <-ended; err == nil {
		t.Error("not cancelled")
	}
	var e *Error
	if err := <-result; !errors.As(err, &e) || e.Code != "cancelled" {
		t.Errorf("%v", err)
	}
	if _, err := c.Status(t.Context()); !errors.As(err, &e) || e.Code != "unreachable" || e.Exit != ExitUnreachable {
		t.Errorf("after Close: %v", err)
	}
	s.Close() // twice does no harm
}

func TestSlowClientDoesNotSlowTheOperation(t *testing.T) {
	const events = 200_000
	done := make(chan struct{})
	b := &fake{protect: func(_ context.Context, _ ProtectRequest, emit func(Event)) error {
		defer close(done)
		for i := range events {
			emit(Event{Step: "sync", Message: strings.Repeat("x", 100), Done: int64(i), Total: events})
		}
		return nil
	}}
	socket, _, _ := serve(t, b, ServerOptions{})
	c, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "POST /v1/protect HTTP/1.1\r\nHost: x\r\nContent-Length: 19\r\n\r\n{\"vm\":\"a\",\"to\":\"b\"}"); err != nil {
		t.Fatal(err)
	}
	select {
	case <-done: // though nothing was read
	case <-time.After(20 * time.Second):
		t.Fatal("the operation waits for its client")
	}
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	last, n := "", 0
	for sc := bufio.NewScanner(resp.Body); sc.Scan(); n++ {
		last = sc.Text()
	}
	if last != `{"result":{}}` || n >= events {
		t.Errorf("last of %d lines: %s", n, last)
	}
}

func TestOutbox(t *testing.T) {
	o := newOutbox()
	for i := range 3 * maxPending {
		o.event(Event{Step: fmt.Sprint(i)})
	}
	o.event(Event{Step: "sync", Done: 1, Total: 9})
	o.event(Event{Step: "sync", Done: 2, Total: 9})
	o.event(Event{Step: "sync", Done: 9, Total: 9}) // the end of a step is kept apart
	o.last(line{Result: 1})
	o.event(Event{Step: "late"})
	lines, more := o.take()
	if more || len(lines) != maxPending+1 {
		t.Fatalf("%d lines, more %v", len(lines), more)
	}
	tail, err := json.Marshal(lines[len(lines)-3:])
	if err != nil || string(tail) != `[{"step":"sync","done":2,"total":9},{"step":"sync","done":9,"total":9},{"result":1}]` {
		t.Errorf("%s, %v", tail, err)
	}
}

func TestConcurrentEmit(t *testing.T) {
	b := &fake{protect: func(_ context.Context, _ ProtectRequest, emit func(Event)) error {
		var wg sync.WaitGroup
		for i := range 8 {
			wg.Go(func() {
				for range 1000 {
					emit(Event{Step: fmt.Sprint(i)})
				}
			})
		}
		wg.Wait()
		return nil
	}}
	_, c, _ := serve(t, b, ServerOptions{})
	if err := c.Protect(t.Context(), ProtectRequest{VM: "a", To: "b"}, func(Event) {}); err != nil {
		t.Error(err)
	}
}

func TestOperationsAreLoggedWithTheCaller(t *testing.T) {
	var out strings.Builder
	var mu sync.Mutex
	log := slog.New(slog.NewTextHandler(lockedWriter{&mu, &out}, nil))
	b := &fake{failover: func(context.Context, FailoverRequest, func(Event)) (FailoverReport, error) {
		return FailoverReport{}, errors.New("no")
	}}
	_, c, s := serve(t, b, ServerOptions{Log: log})
	_, _ = c.Failover(t.Context(), FailoverRequest{VM: "web"}, func(Event) {})
	s.Close()
	mu.Lock()
	defer mu.Unlock()
	want := fmt.Sprintf("msg=begin operation=failover vm=web caller=\"{PID:%d UID:%d}\"", os.Getpid(), os.Getuid())
	if !strings.Contains(out.String(), want) || !strings.Contains(out.String(), "code=failed error=no") {
		t.Errorf("%s\nwant %s", out.String(), want)
	}
}

type lockedWriter struct {
	mu *sync.Mutex
	w  io.Writer
}

func (l lockedWriter) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.w.Write(p)
}
