package main

import (
	"context"
	"encoding/json"
	"strings"
	"testing"

	"kagami/appliance/control"
)

func TestSet(t *testing.T) {
	var asked control.SetRequest
	socket := serve(t, &fake{set: func(_ context.Context, r control.SetRequest) (control.Policy, error) {
		asked = r
		switch {
		case r.Group == "none":
			return control.Policy{}, &control.Error{Code: "not-found", Message: "site primary has no group none", Hint: "kagami status", Exit: control.ExitNotFound}
		case r.Mode == "async":
			return control.Policy{Group: r.Group, Mode: r.Mode, OnLinkLoss: "stall", AsyncBytes: r.AsyncBytes, AsyncSeconds: r.AsyncSeconds, Set: true}, nil
		}
		return control.Policy{Group: r.Group, Mode: "sync", OnLinkLoss: "stall"}, nil
	}})
	for _, c := range []struct {
		args string
		want control.SetRequest
		out  string
		code int
	}{
		{"web", control.SetRequest{Group: "web"}, "web: sync, on link loss: stall (by the configuration)\n", 0},
		{"web --mode async --async-bytes 8MiB --async-age 2s", control.SetRequest{Group: "web", Mode: "async", AsyncBytes: 8 << 20, AsyncSeconds: 2},
			"web: async, at most 8 MiB and 2s behind, on link loss: stall (by kagami set)\n", 0},
		{"web --default", control.SetRequest{Group: "web", Default: true}, "web: sync, on link loss: stall (by the configuration)\n", 0},
		{"none", control.SetRequest{Group: "none"}, "", 5},
	} {
		r := kagami(t, append([]string{"--socket", socket, "set"}, strings.Fields(c.args)...)...)
		if r.code != c.code || r.out != c.out || asked != c.want {
			t.Errorf("%s: exit %d, %q, asked %+v\n%s", c.args, r.code, r.out, asked, r.err)
		}
	}
	if r := kagami(t, "--socket", socket, "set", "web", "--async-bytes", "8 MB"); r.code != control.ExitUsage || !strings.Contains(r.err, "--async-bytes") {
		t.Errorf("a wrong size: exit %d\n%s", r.code, r.err)
	}
	if r := kagami(t, "--socket", socket, "set"); r.code != control.ExitUsage {
		t.Errorf("no group: exit %d\n%s", r.code, r.err)
	}
	r := kagami(t, "--socket", socket, "set", "web", "--json")
	var p control.Policy
	if err := json.Unmarshal([]byte(r.out), &p); err != nil || p.Mode != "sync" {
		t.Errorf("--json: %v\n%s", err, r.out)
	}
}
