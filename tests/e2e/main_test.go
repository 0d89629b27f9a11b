// Package e2e tests the daemon and the command line with real processes: two
// sites on one machine (package stage), real NBD clients, the kernel's own
// ext4, real TCP over an emulated line.
//
// Environment: E2E_BIN is a binary to test instead of a new build;
// E2E_RACE=1 builds with the race detector; E2E_SEED repeats a run.
package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/tests/acked/raw"
	"kagami/tests/e2e/soak/rounds"
)

// kagamiBinary is the binary under test.
var kagamiBinary string

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if kagamiBinary = os.Getenv("E2E_BIN"); kagamiBinary != "" {
		return m.Run()
	}
	dir, err := os.MkdirTemp("", "kagami-bin-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	kagamiBinary = filepath.Join(dir, "kagami")
	args := []string{"build", "-o", kagamiBinary}
	if os.Getenv("E2E_RACE") == "1" {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "kagami/appliance")...)
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(os.Stderr, "build kagami:", err)
		return 1
	}
	return m.Run()
}

// seed is the test's seed: E2E_SEED, or a new one, which the log shows.
func seed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64() >> 16
	if v := os.Getenv("E2E_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("E2E_SEED: %v", err)
		}
	}
	t.Logf("seed %d", s)
	return s
}

// newRig builds a rig that is closed, and its logs looked through, at the end
// of the test. The test must end within limit.
func newRig(t *testing.T, limit time.Duration, o rounds.Options) (*rounds.Rig, context.Context) {
	t.Helper()
	needRoot(t)
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	o.Kagami = binary(t)
	r, err := rounds.New(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Trouble(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("--- daemon at %s:\n%s\n--- daemon at %s:\n%s", r.Main.Name, r.Main.Tail(), r.DR.Name, r.DR.Tail())
		}
		if err := r.Close(); err != nil {
			t.Error(err)
		}
	})
	return r, ctx
}

// needRoot skips a test that cannot run here; in CI that is a failure.
func needRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() == 0 {
		return
	}
	if os.Getenv("CI") == "true" {
		t.Fatal("the end-to-end tests need root: namespaces, mounts")
	}
	t.Skip("the end-to-end tests need root: namespaces, mounts")
}

// must ends the test on an error.
func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// said is all that a group's status says in words.
func said(g control.Group) []string {
	out := append([]string{g.Reason}, g.Alarms...)
	for _, e := range g.Events {
		out = append(out, e.Text)
	}
	return out
}

// has reports that a group's status says a text.
func has(g control.Group, text string) bool {
	return slices.ContainsFunc(said(g), func(s string) bool { return strings.Contains(s, text) })
}

// stoppedEqual drains a group that nobody writes to, stops both sites cleanly
// and compares their images.
func stoppedEqual(ctx context.Context, t *testing.T, r *rounds.Rig, group string) {
	t.Helper()
	must(t, r.AwaitDrained(ctx, group))
	must(t, r.Main.Stop())
	must(t, r.DR.Stop())
	must(t, r.SameImages(group))
}

// checkImage compares an image with the history of everything that was
// written to it.
func checkImage(t *testing.T, h *raw.History, path string) {
	t.Helper()
	f, err := os.Open(path)
	must(t, err)
	defer f.Close()
	rep, err := raw.Check(h, raw.Options{Completed: true, TrimIsZero: true}, f)
	must(t, err)
	must(t, rep.Err())
}
