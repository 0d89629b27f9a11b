package host

import (
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"

	"kagami/appliance/control"
)

// failing makes everything that a site writes below a part of a path end with EIO.
func failing(s *site, where string) {
	s.fs.set(func() {
		s.fs.fail = func(op, path string) error {
			if strings.Contains(path, where) && (op == "write" || op == "datasync") {
				return fmt.Errorf("%s %s: %w", op, path, syscall.EIO)
			}
			return nil
		}
	})
}

// TestFailedReplica: the spool of one replica fails. Both sites say so, and the
// other groups of the peer go on, although more is on its way to the failed one
// than the peer's window.
func TestFailedReplica(t *testing.T) {
	p := newPair(t)
	limits := strings.Replace(fmt.Sprintf(testLimits, "50ms"), "queue_bytes: 1MiB", "queue_bytes: 4MiB", 1)
	p.main.extra, p.dr.extra = limits, limits
	p.up()
	one := p.main.addVMWith("vm1", map[string][]byte{"vda": randomBytes(1, 4<<20)})
	two := p.main.addVMWith("vm2", map[string][]byte{"vda": randomBytes(2, 1<<20)})
	two.uuid = "6b1d2c9e-0000-4000-8000-000000000002"
	p.main.mustProtect("vm1")
	p.main.mustProtect("vm2")
	failing(p.dr, "groups/vm1/spool/")
	go func() { _ = one.disk("vda").write(randomBytes(3, 3<<20), 0) }() // its FLUSH waits until the daemon ends
	says := func(g control.Group, state string) bool {
		return g.State == state && !g.Protected && len(g.Alarms) == 1 && strings.Contains(g.Alarms[0], "input/output error")
	}
	await(t, "both sites to say that vm1 is not protected", func() bool {
		return says(p.main.group("vm1"), "stalled") && says(p.dr.group("vm1"), "failed")
	})
	done := make(chan error, 1)
	go func() { done <- two.disk("vda").write([]byte("y"), 4096) }()
	select {
	case err := <-done:
		must(t, err)
	case <-time.After(10 * time.Second):
		t.Error("a FLUSH of vm2 waits for the failed replica of vm1")
	}
	p.main.awaitState("vm2", "streaming")
	p.dr.kill()
	p.start(p.dr, p.main)
	p.main.awaitState("vm1", "streaming")
	sameAtReplica(t, p, one)
	for _, s := range []*site{p.main, p.dr} {
		if g := s.group("vm1"); len(g.Alarms) > 0 || !g.Protected {
			t.Errorf("after a restart of the replica's daemon: %+v", g)
		}
	}
}
