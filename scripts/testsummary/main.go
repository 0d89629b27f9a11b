// Command testsummary reads the output of `go test -json` and prints what a
// person wants of it: one line per package as it ends, the output of what
// failed, and at the end every skip with its reason, the slowest packages, and
// the counts. It ends with 1 if anything failed, or if there was nothing to read.
package main

import (
	"bufio"
	"cmp"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
)

func main() {
	s := newSummary(os.Stdout)
	if err := s.read(os.Stdin); err != nil {
		fmt.Fprintln(os.Stderr, "testsummary:", err)
		os.Exit(1)
	}
	if !s.end() {
		os.Exit(1)
	}
}

// event is one line of test2json, see `go doc test2json` and `go help buildjson`.
type event struct {
	Action      string
	Package     string
	ImportPath  string // of build events
	FailedBuild string // of a package whose build failed
	Test        string
	Elapsed     float64 // seconds
	Output      string
}

type ended struct {
	name    string
	seconds float64
}

type skipped struct{ name, reason string }

type summary struct {
	w        io.Writer
	output   map[string][]string // package and test → lines, until it ends
	builds   map[string][]string // import path → compiler's words
	packages []ended
	skips    []skipped
	failures []string
	passed   int
}

func newSummary(w io.Writer) *summary {
	return &summary{w: w, output: map[string][]string{}, builds: map[string][]string{}}
}

func (s *summary) read(r io.Reader) error {
	lines := bufio.NewScanner(r)
	lines.Buffer(make([]byte, 1<<20), 64<<20)
	for lines.Scan() {
		var e event
		if err := json.Unmarshal(lines.Bytes(), &e); err != nil {
			s.printf("%s\n", lines.Text()) // not from a test: go's own words
			continue
		}
		s.event(e)
	}
	if err := lines.Err(); err != nil {
		return fmt.Errorf("read test output: %w", err)
	}
	return nil
}

func (s *summary) event(e event) {
	key := e.Package + " " + e.Test
	switch e.Action {
	case "output":
		s.output[key] = append(s.output[key], e.Output)
	case "build-output":
		s.builds[e.ImportPath] = append(s.builds[e.ImportPath], e.Output)
	case "pass", "fail", "skip":
		if e.Test == "" {
			s.packageEnds(e)
		} else {
			s.testEnds(e)
		}
		delete(s.output, key)
	}
}

func (s *summary) testEnds(e event) {
	name := e.Package + " " + e.Test
	switch e.Action {
	case "pass":
		s.passed++
	case "skip":
		s.skips = append(s.skips, skipped{name, reason(s.output[name])})
	case "fail":
		s.failures = append(s.failures, name)
		s.printf("--- FAIL %s (%.1fs)\n%s", name, e.Elapsed, strings.Join(s.output[name], ""))
	}
}

// reason is what a skipped test said, without go's own lines.
func reason(lines []string) string {
	var out []string
	for _, l := range lines {
		l = strings.TrimSpace(l)
		if l == "" || strings.HasPrefix(l, "=== ") || strings.HasPrefix(l, "--- ") {
			continue
		}
		out = append(out, l)
	}
	if len(out) == 0 {
		return "no reason given"
	}
	return strings.Join(out, " ")
}

func (s *summary) packageEnds(e event) {
	lines := s.output[e.Package+" "]
	switch {
	case e.Action == "fail":
		s.failures = append(s.failures, e.Package)
		s.printf("FAIL %s (%.1fs)\n%s%s", e.Package, e.Elapsed, strings.Join(s.builds[e.FailedBuild], ""), strings.Join(lines, ""))
		s.unfinished(e.Package)
	case noTests(lines):
		return
	default:
		s.packages = append(s.packages, ended{e.Package, e.Elapsed})
		s.printf("ok   %-40s %6.1fs%s\n", e.Package, e.Elapsed, cached(lines))
	}
}

// unfinished shows the output of tests that never ended: a panic's, or a time-out's.
func (s *summary) unfinished(pkg string) {
	for key, lines := range s.output {
		if p, test, _ := strings.Cut(key, " "); p == pkg && test != "" {
			s.printf("--- never ended: %s\n%s", key, strings.Join(lines, ""))
			delete(s.output, key)
		}
	}
}

func noTests(lines []string) bool {
	return slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "[no test files]") })
}

func cached(lines []string) string {
	if slices.ContainsFunc(lines, func(l string) bool { return strings.Contains(l, "(cached)") }) {
		return "  cached"
	}
	return ""
}

// end prints the closing lines and reports success.
func (s *summary) end() bool {
	for _, k := range s.skips {
		s.printf("SKIP %s: %s\n", k.name, k.reason)
	}
	slices.SortFunc(s.packages, func(a, b ended) int { return cmp.Compare(b.seconds, a.seconds) })
	var slow []string
	for _, p := range s.packages[:min(3, len(s.packages))] {
		slow = append(slow, fmt.Sprintf("%s %.0fs", p.name, p.seconds))
	}
	if len(slow) > 0 {
		s.printf("slowest: %s\n", strings.Join(slow, ", "))
	}
	s.printf("%d tests passed, %d skipped, %d failures in %d packages\n", s.passed, len(s.skips), len(s.failures), len(s.packages))
	for _, f := range s.failures {
		s.printf("failed: %s\n", f)
	}
	if len(s.packages)+len(s.failures) == 0 {
		s.printf("no tests ran\n")
		return false
	}
	return len(s.failures) == 0
}

func (s *summary) printf(format string, args ...any) { _, _ = fmt.Fprintf(s.w, format, args...) }
