package main

import (
	"context"
	"strings"
	"testing"

	"kagami/appliance/control"
)

func TestVerify(t *testing.T) {
	var asked control.VerifyRequest
	var report control.VerifyReport
	socket := serve(t, &fake{verify: func(_ context.Context, r control.VerifyRequest, emit func(control.Event)) (control.VerifyReport, error) {
		asked = r
		emit(control.Event{Step: "compare", Done: 1 << 20, Total: 2 << 20})
		return report, nil
	}})
	report = control.VerifyReport{Group: "web", LSN: 77, ChunkBytes: 65536, Compared: 32, Seconds: 3.5}
	r := kagami(t, "--socket", socket, "verify", "web", "--rate", "20MiB")
	if want := "web: 2 MiB compared in 3.5s, up to record 77\n  both sites are equal\n"; r.code != 0 || r.out != want || asked != (control.VerifyRequest{Group: "web", BytesPerSecond: 20 << 20}) {
		t.Errorf("equal: exit %d, asked %+v\n%s%s", r.code, asked, r.out, r.err)
	}
	if !strings.Contains(r.err, "compare     50%") {
		t.Errorf("no progress: %q", r.err)
	}
	report.Differ, report.Evidence = 2, "/state/verify-1.json"
	r = kagami(t, "--socket", socket, "verify", "web")
	if r.code != control.ExitFailed || !strings.Contains(r.out, "2 pieces of 64 KiB differ, 0 shipped\n  /state/verify-1.json names them") || !strings.Contains(r.err, "--repair ships them") {
		t.Errorf("different: exit %d\n%s%s", r.code, r.out, r.err)
	}
	report.Repaired = 2
	r = kagami(t, "--socket", socket, "verify", "web", "--repair", "--json")
	if r.code != control.ExitFailed || !asked.Repair || !strings.Contains(r.out, `"repaired":2`) {
		t.Errorf("repaired: exit %d, asked %+v\n%s", r.code, asked, r.out)
	}
	if r := kagami(t, "--socket", socket, "verify", "web", "--rate", "fast"); r.code != control.ExitUsage {
		t.Errorf("a wrong rate: exit %d\n%s", r.code, r.err)
	}
}
