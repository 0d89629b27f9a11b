package main

import (
	"strings"
	"testing"
)

const good = `{"Action":"start","Package":"p/a"}
{"Action":"run","Package":"p/a","Test":"TestOne"}
{"Action":"output","Package":"p/a","Test":"TestOne","Output":"=== RUN   TestOne\n"}
{"Action":"pass","Package":"p/a","Test":"TestOne","Elapsed":0.5}
{"Action":"run","Package":"p/a","Test":"TestTwo"}
{"Action":"output","Package":"p/a","Test":"TestTwo","Output":"=== RUN   TestTwo\n"}
{"Action":"output","Package":"p/a","Test":"TestTwo","Output":"    a_test.go:5: qemu is missing\n"}
{"Action":"output","Package":"p/a","Test":"TestTwo","Output":"--- SKIP: TestTwo (0.00s)\n"}
{"Action":"skip","Package":"p/a","Test":"TestTwo","Elapsed":0}
{"Action":"output","Package":"p/a","Output":"PASS\n"}
{"Action":"output","Package":"p/a","Output":"ok  \tp/a\t(cached)\n"}
{"Action":"pass","Package":"p/a","Elapsed":0.6}
{"Action":"output","Package":"p/none","Output":"?   \tp/none\t[no test files]\n"}
{"Action":"skip","Package":"p/none","Elapsed":0}
`

func summarize(t *testing.T, in string) (string, bool) {
	t.Helper()
	var out strings.Builder
	s := newSummary(&out)
	if err := s.read(strings.NewReader(in)); err != nil {
		t.Fatal(err)
	}
	ok := s.end()
	return out.String(), ok
}

func TestGood(t *testing.T) {
	out, ok := summarize(t, good)
	want := `ok   p/a                                         0.6s  cached
SKIP p/a TestTwo: a_test.go:5: qemu is missing
slowest: p/a 1s
1 tests passed, 1 skipped, 0 failures in 1 packages
`
	if !ok || out != want {
		t.Errorf("%v\n%s", ok, out)
	}
}

func TestBad(t *testing.T) {
	for name, c := range map[string]struct{ in, want string }{
		"test": {`{"Action":"output","Package":"p","Test":"T","Output":"wrong\n"}
{"Action":"fail","Package":"p","Test":"T","Elapsed":1}
{"Action":"fail","Package":"p","Elapsed":1}`, "--- FAIL p T (1.0s)\nwrong\n"},
		"build": {`{"ImportPath":"p [p.test]","Action":"build-output","Output":"x.go:1: undefined: y\n"}
{"ImportPath":"p [p.test]","Action":"build-fail"}
{"Action":"fail","Package":"p","Elapsed":0,"FailedBuild":"p [p.test]"}`, "FAIL p (0.0s)\nx.go:1: undefined: y\n"},
		"panic": {`{"Action":"output","Package":"p","Test":"T","Output":"panic: boom\n"}
{"Action":"fail","Package":"p","Elapsed":0}`, "--- never ended: p T\npanic: boom\n"},
		"nothing":  {``, "no tests ran\n"},
		"no JSON":  {`go: cannot find module`, "go: cannot find module\n"},
		"no tests": {`{"Action":"output","Package":"p","Output":"?   \tp\t[no test files]\n"}` + "\n" + `{"Action":"skip","Package":"p"}`, "no tests ran\n"},
	} {
		if out, ok := summarize(t, c.in); ok || !strings.Contains(out, c.want) {
			t.Errorf("%s: %v\n%s", name, ok, out)
		}
	}
}
