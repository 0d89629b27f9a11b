package wan

import (
	"math"
	"testing"
	"time"
)

func TestParseRate(t *testing.T) {
	good := map[string]int64{"1gbit": 1e9, "2.5Gbit": 25e8, "20mbit": 20e6, "64kbit": 64e3, "9600": 9600, "unlimited": 0, "0": 0}
	for s, want := range good {
		if got, err := ParseRate(s); err != nil || got != want {
			t.Errorf("%q is %d (%v), want %d", s, got, err, want)
		}
	}
	for _, s := range []string{"", "fast", "-1mbit", "nan", "inf", "1e300gbit", "1gbps", "gbit"} {
		if got, err := ParseRate(s); err == nil {
			t.Errorf("%q was taken as %d", s, got)
		}
	}
}

func TestParamsRefuseTheImpossible(t *testing.T) {
	bad := []Params{
		{Delay: -1}, {Delay: time.Hour}, {Jitter: -1}, {Rate: 1}, {Rate: -5}, {Queue: -1}, {Queue: 1 << 40},
		{Loss: -0.1}, {Loss: 1.1}, {Loss: math.NaN()},
		{Rate: 10e9, Delay: time.Second}, // needs more than the memory limit
	}
	for _, p := range bad {
		if err := p.check(defaultMemory); err == nil {
			t.Errorf("%+v was accepted", p)
		}
	}
	if err := (Params{Rate: 1e9, Delay: 10 * time.Millisecond}).check(defaultMemory); err != nil {
		t.Error(err)
	}
}

// idleLink is a Link without devices: enough for what only changes pipes.
func idleLink() *Link {
	l := &Link{start: time.Now(), config: Config{Memory: defaultMemory}}
	for s := range 2 {
		l.dir[s] = newDirection(l, Side(s))
	}
	return l
}

func TestControl(t *testing.T) {
	l := idleLink()
	for _, line := range []string{"delay 10ms", "jitter 1ms", "rate 1gbit", "queue 300000", "loss 0.25", "cut", "restore a"} {
		if answer, err := l.Control(line); err != nil || answer != "ok" {
			t.Errorf("%q: %q, %v", line, answer, err)
		}
	}
	want := Params{Delay: 10 * time.Millisecond, Jitter: time.Millisecond, Rate: 1e9, Queue: 300000, Loss: 0.25}
	if l.Params(A) != want || l.Params(B) != want {
		t.Errorf("parameters are %+v and %+v", l.Params(A), l.Params(B))
	}
	if l.dir[A].pipe.cut || !l.dir[B].pipe.cut {
		t.Error("cut, then restore a: b alone should be cut")
	}
	bad := []string{"", "cut c", "delay", "delay soon", "delay -1s", "rate fast", "queue many", "loss 2", "loss x", "fly 3", "cut a b"}
	for _, line := range bad {
		if answer, err := l.Control(line); err == nil {
			t.Errorf("%q was answered with %q", line, answer)
		}
	}
	if l.Params(A) != want {
		t.Errorf("a refused line changed the parameters to %+v", l.Params(A))
	}
}
