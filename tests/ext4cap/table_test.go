package ext4cap

import (
	"os"
	"testing"

	"kagami/ext4j/follow"
)

func tempShm(t *testing.T) string {
	dir, err := os.MkdirTemp("/dev/shm", "ext4cap")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestTable(t *testing.T) {
	for _, w := range Table() {
		t.Run(w.Name, func(t *testing.T) {
			s, err := Capture(tempShm(t), w, 1)
			if err != nil {
				t.Fatal(err)
			}
			p := s.Play(follow.Options{}, 0)
			t.Logf("records %d flushes %d local %d waited %d empty %d commits %d counts %v status %+v", len(s.Log), p.Flushes, p.Local, p.Waited, p.Empty, p.Commits, p.Counts, p.Status.Parts)
			j, err := NewJudge(tempShm(t), int64(len(s.Base)))
			if err != nil {
				t.Fatal(err)
			}
			defer j.Close()
			if err := s.Check(j, p.Answers); err != nil {
				t.Fatal(err)
			}
			if w.Waits != 0 && p.Waited > w.Waits {
				t.Errorf("%d FLUSHes waited, at most %d should", p.Waited, w.Waits)
			}
		})
	}
}
