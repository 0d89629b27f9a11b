package control

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"testing"
)

// FuzzRequest: whatever a client of the control socket sends is answered with JSON, and
// reaches the backend only with names of a bounded length.
func FuzzRequest(f *testing.F) {
	for _, path := range []string{"protect", "unprotect", "failover", "forget", "set", "verify", "reprotect", "switchover", "failback", "survivor", "branches"} {
		f.Add(path, []byte(`{"vm":"web","group":"web","to":"dr"}`))
	}
	f.Add("set", []byte(`{"group":"web","mode":"async","async_seconds":1e308}`))
	f.Add("protect", []byte(`{"vm":"web","to":"dr","disks":["vda"]}{}`))
	f.Add("switchover", []byte(`{"vm":"web","shutdown_s":1e308}`))
	f.Add("branches", []byte(`{"delete":"x"}`))
	f.Add("status/../protect", []byte(`[]`))
	f.Fuzz(func(t *testing.T, path string, body []byte) {
		check := func(names ...string) {
			for _, n := range names {
				if n == "" || len(n) > maxName {
					t.Errorf("the backend was given the name %q", n)
				}
			}
		}
		b := &fake{
			protect: func(_ context.Context, r ProtectRequest, _ func(Event)) error {
				check(append(r.Disks, r.VM, r.To)...)
				return nil
			},
			unprotect: func(_ context.Context, r UnprotectRequest, _ func(Event)) error { check(r.VM); return nil },
			failover: func(_ context.Context, r FailoverRequest, _ func(Event)) (FailoverReport, error) {
				check(r.VM)
				return FailoverReport{}, nil
			},
			forget: func(_ context.Context, r ForgetRequest, _ func(Event)) error { check(r.Group); return nil },
			set:    func(_ context.Context, r SetRequest) (Policy, error) { check(r.Group); return Policy{}, nil },
			verify: func(_ context.Context, r VerifyRequest, _ func(Event)) (VerifyReport, error) {
				check(r.Group)
				return VerifyReport{}, nil
			},
			reprotect: func(_ context.Context, r ReprotectRequest, _ func(Event)) error { check(r.Group); return nil },
			move: func(_ context.Context, r SwitchoverRequest, _ func(Event)) (FailoverReport, error) {
				check(r.VM)
				return FailoverReport{}, nil
			},
			survivor: func(_ context.Context, r SurvivorRequest, _ func(Event)) error { check(r.Group); return nil },
			branches: func(_ context.Context, r BranchesRequest) ([]Branch, error) {
				if r != (BranchesRequest{}) {
					check(r.Group)
				}
				return nil, nil
			},
			status: func(context.Context) (Status, error) { return Status{}, nil },
		}
		s := NewServer(b, ServerOptions{Version: "v1"})
		defer s.Close()
		req := httptest.NewRequest(http.MethodPost, "/v1/x", bytes.NewReader(body))
		req.URL.Path = "/v1/" + path
		w := httptest.NewRecorder()
		s.http.Handler.ServeHTTP(w, req)
		for line := range bytes.Lines(w.Body.Bytes()) {
			if line = bytes.TrimSpace(line); len(line) > 0 && w.Header().Get("Content-Type") != "text/html; charset=utf-8" && !json.Valid(line) && !json.Valid(w.Body.Bytes()) {
				t.Errorf("%s: answered %d with %q", path, w.Code, w.Body.String())
			}
		}
	})
}
