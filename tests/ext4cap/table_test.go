package ext4cap

import (
	"testing"

	"kagami/ext4j/follow"
)

// TestTable counts the FLUSHes that wait, for the table in docs/ext4.md.
func TestTable(t *testing.T) {
	need(t)
	for _, w := range Table() {
		t.Run(w.Name, func(t *testing.T) {
			s, err := Capture(tempShm(t), w, 1)
			if err != nil {
				t.Fatal(err)
			}
			p := s.Play(follow.Options{}, 0)
			t.Logf("%d commits, %d FLUSHes, %d wait, %d local, %d with nothing to cover; classes %v", p.Commits, p.Flushes, p.Waited, p.Local, p.Empty, p.Counts)
			if w.Waits != 0 && p.Waited > w.Waits {
				t.Errorf("%d FLUSHes waited, at most %d should", p.Waited, w.Waits)
			}
		})
	}
}
