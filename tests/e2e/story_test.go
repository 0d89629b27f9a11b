package e2e

import (
	"context"
	"os"
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
	sum, err := stage.Story(ctx, stage.StoryOptions{Kagami: binary(t), Out: storyWriter{t}, FromDisk: fromDisk, Load: 5 * time.Second})
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
		t.Fatalf("e2fsck: %s", sum.FSOutput)
	case sum.Report.Replayed == 0:
		t.Fatalf("no journal transaction was replayed, although the guest was killed while it wrote: %+v", sum.Report)
	}
}

// TestStory is the demo: a data disk of a running VM.
func TestStory(t *testing.T) { playStory(t, false) }

// TestStoryFromDisk does the same with a VM that boots from the protected disk.
func TestStoryFromDisk(t *testing.T) { playStory(t, true) }

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
