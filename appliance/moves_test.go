package main

import (
	"context"
	"reflect"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
)

func TestMoves(t *testing.T) {
	var asked any
	socket := serve(t, &fake{
		move: func(_ context.Context, r control.SwitchoverRequest, emit func(control.Event)) (control.FailoverReport, error) {
			asked = r
			emit(control.Event{Step: "drain", Message: "shipping what site dr lacks"})
			if r.VM == "held" {
				return control.FailoverReport{}, &control.Error{Code: "timeout", Message: "VM held did not shut down within 1s", Hint: "shut it down from inside", Exit: control.ExitFailed}
			}
			return control.FailoverReport{Group: r.VM, DryRun: r.DryRun, Domain: "web-dr", RTOSeconds: 12}, nil
		},
		reprotect: func(_ context.Context, r control.ReprotectRequest, emit func(control.Event)) error {
			asked = r
			emit(control.Event{Step: "return", Message: "site main becomes the replica; 3 MiB may differ there"})
			return nil
		},
		survivor: func(_ context.Context, r control.SurvivorRequest, _ func(control.Event)) error {
			asked = r
			if !r.Yes && !r.DryRun {
				return &control.Error{Code: "refused", Message: "what was written at site dr would be served no more", Hint: "say --yes if that is meant", Exit: control.ExitRefused}
			}
			return nil
		},
	})
	for _, c := range []struct {
		args     string
		want     any
		out, err string
		code     int
	}{
		{"switchover web", control.SwitchoverRequest{VM: "web"}, "web-dr runs at the other site, nothing was lost; moved in 12s\n", "shipping what site dr lacks", 0},
		{"switchover web --dry-run", control.SwitchoverRequest{VM: "web", DryRun: true}, "web can be moved\n", "", 0},
		{"failback web --shutdown-timeout 1s --no-start", control.SwitchoverRequest{VM: "web", NoStart: true, ShutdownSeconds: 1}, "web-dr runs", "", 0},
		{"failback held", control.SwitchoverRequest{VM: "held"}, "", "did not shut down within 1s\n  next: shut it down from inside", 1},
		{"reprotect web --no-wait", control.ReprotectRequest{Group: "web", NoWait: true}, "", "3 MiB may differ there", 0},
		{"survivor web", control.SurvivorRequest{Group: "web"}, "", "say --yes", 3},
		{"survivor web --yes", control.SurvivorRequest{Group: "web", Yes: true}, "", "", 0},
		{"survivor web --dry-run", control.SurvivorRequest{Group: "web", DryRun: true}, "", "", 0},
		{"reprotect", nil, "", "wants the name of one VM", 2},
	} {
		asked = nil
		r := kagami(t, append([]string{"--socket", socket}, strings.Fields(c.args)...)...)
		if r.code != c.code || !strings.HasPrefix(r.out, c.out) || !strings.Contains(r.err, c.err) || !reflect.DeepEqual(asked, c.want) {
			t.Errorf("%s: exit %d, asked %+v\n%s%s", c.args, r.code, asked, r.out, r.err)
		}
	}
}

func TestBranches(t *testing.T) {
	var asked control.BranchesRequest
	kept := []control.Branch{{Group: "web", Name: "main-1", Site: "main", At: time.Date(2026, 11, 26, 10, 0, 0, 0, time.UTC), Lineage: "L0", ReplacedBy: "L1", Bytes: 3 << 20,
		Disks: []control.BranchDisk{{Name: "vda", File: "/state/a.raw", Bytes: 1 << 20}, {Name: "vdb", File: "/state/b.raw", Bytes: 2 << 20}}}}
	socket := serve(t, &fake{branches: func(_ context.Context, r control.BranchesRequest) ([]control.Branch, error) {
		asked = r
		if r.Delete != "" {
			return nil, nil
		}
		return kept, nil
	}})
	for _, c := range []struct {
		args string
		want control.BranchesRequest
		out  string
		code int
	}{
		{"branches", control.BranchesRequest{}, "GROUP  BRANCH  KEPT                  AT MOST  DISKS\nweb    main-1  2026-11-26T10:00:00Z  3 MiB    vda,vdb\n", 0},
		{"branches web -o wide", control.BranchesRequest{Group: "web"}, "/state/b.raw\n", 0},
		{"branches web --json", control.BranchesRequest{Group: "web"}, `"replaced_by": "L1"`, 0},
		{"branches web --delete main-1", control.BranchesRequest{Group: "web", Delete: "main-1"}, "nothing is kept\n", 0},
		{"branches --delete main-1", control.BranchesRequest{}, "", 2},
		{"branches -o pretty", control.BranchesRequest{}, "", 2},
	} {
		asked = control.BranchesRequest{}
		r := kagami(t, append([]string{"--socket", socket}, strings.Fields(c.args)...)...)
		if r.code != c.code || !strings.Contains(r.out, c.out) || asked != c.want {
			t.Errorf("%s: exit %d, asked %+v\n%s%s", c.args, r.code, asked, r.out, r.err)
		}
	}
}
