package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kagami/tests/e2e/stage"
)

// storyWriter passes a story's lines on to the test's log.
type storyWriter struct{ t *testing.T }

func (w storyWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", p)
	return len(p), nil
}

func playStory(t *testing.T, fromDisk bool) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 6*time.Minute)
	defer cancel()
	sum, err := stage.Story(ctx, stage.StoryOptions{Kagami: binary(t), Out: storyWriter{t}, FromDisk: fromDisk, Home: !fromDisk, Load: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("\n%s", sum.Table())
	switch {
	case sum.Lost != 0 || !sum.Found.OK():
		t.Fatalf("%d acknowledged records lost: %s", sum.Lost, sum.Found)
	case sum.Acked.Append == 0 || sum.Acked.Blocks == 0:
		t.Fatalf("the guest acknowledged nothing: %+v", sum.Acked)
	case !sum.FSClean:
		t.Fatal("e2fsck was not run")
	}
}

// TestStory is the demo: a data disk of a running VM.
func TestStory(t *testing.T) { playStory(t, false) }

// TestStoryFromDisk does the same with a VM that boots from the protected disk.
func TestStoryFromDisk(t *testing.T) { playStory(t, true) }

// TestDemoKeepsError: a demo that failed and leaves everything running says so
// by its exit code when it is ended.
func TestDemoKeepsError(t *testing.T) {
	t.Parallel()
	needRoot(t)
	demo := filepath.Join(t.TempDir(), "demo")
	if out, err := exec.Command("go", "build", "-o", demo, "kagami/tests/e2e/demo").CombinedOutput(); err != nil {
		t.Fatalf("build the demo: %v: %s", err, out)
	}
	cmd := exec.Command(demo, "-kagami", binary(t), "-keep", "-timeout", "4s") // too short for it
	out, err := cmd.StdoutPipe()
	must(t, err)
	must(t, cmd.Start())
	var said strings.Builder
	for sc := bufio.NewScanner(out); sc.Scan(); {
		fmt.Fprintln(&said, sc.Text())
		if strings.HasPrefix(sc.Text(), "Everything is left running") {
			must(t, cmd.Process.Signal(os.Interrupt))
		}
	}
	var exit *exec.ExitError
	if err := cmd.Wait(); !errors.As(err, &exit) || exit.ExitCode() != 1 {
		t.Errorf("a demo that failed ended with %v, want exit code 1; it said:\n%s", err, said.String())
	}
}

// binary is the kagami binary under test, made by TestMain.
func binary(t *testing.T) string {
	t.Helper()
	if kagamiBinary == "" {
		t.Fatal("TestMain made no binary")
	}
	if _, err := os.Stat(kagamiBinary); err != nil {
		t.Fatal(err)
	}
	return kagamiBinary
}
