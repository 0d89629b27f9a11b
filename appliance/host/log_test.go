package host

import (
	"errors"
	"strings"
	"testing"
)

// TestLogLevels: an alarm is a warning, a failure an error; what is over is neither.
func TestLogLevels(t *testing.T) {
	p := newPair(t)
	d := p.main.daemon(p.dr)
	g := newGroup(d, &groupFile{Name: "g", Role: RoleSource})
	g.alarm("k", "smoke")
	g.alarm("k", "")
	g.input(LinkLost, "cut")
	g.fail(errors.New("fire"))
	log := p.main.log.String()
	for text, level := range map[string]string{"alarm: smoke": "WARN", "alarm over: k": "INFO", "stalled → stalled: cut": "INFO", "alarm: fire": "WARN", "stalled → failed: fire": "ERROR"} {
		if !strings.Contains(log, "level="+level+` msg="`+text+`"`) {
			t.Errorf("%q is not at %s in\n%s", text, level, log)
		}
	}
}
