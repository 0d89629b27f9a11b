package wan

import (
	"fmt"
	"math"
	"strconv"
	"strings"
	"time"
)

// Params says how one direction of a link behaves. The zero value is a
// perfect wire: no delay, no limit, no loss.
type Params struct {
	Delay  time.Duration // one way, at least 0
	Jitter time.Duration // uniform in [0, Jitter] on top of Delay; packets keep their order
	Rate   int64         // bit/s of IP packets (link-layer framing not counted); 0: unlimited
	Queue  int64         // bytes that may wait for the line; 0: one round trip at Rate, at least 256 KiB
	Loss   float64       // probability of losing one MTU-sized packet, in [0, 1]
}

const (
	minQueue  = 256 << 10
	maxDelay  = time.Minute
	minRate   = 8000    // bit/s
	maxRate   = 1e12    // bit/s
	maxBuffer = 2 << 30 // bytes a direction may ever be configured to hold
)

// queueLimit is Queue or its default.
func (p Params) queueLimit() int64 {
	if p.Queue > 0 {
		return p.Queue
	}
	bdp := float64(p.Rate) / 8 * 2 * p.Delay.Seconds()
	return max(minQueue, int64(bdp))
}

// Check refuses impossible values.
func (p Params) Check() error {
	switch {
	case p.Delay < 0 || p.Delay > maxDelay:
		return fmt.Errorf("delay %v is not between 0 and %v", p.Delay, maxDelay)
	case p.Jitter < 0 || p.Jitter > maxDelay:
		return fmt.Errorf("jitter %v is not between 0 and %v", p.Jitter, maxDelay)
	case p.Rate != 0 && (p.Rate < minRate || p.Rate > maxRate):
		return fmt.Errorf("rate %d bit/s is neither 0 (unlimited) nor between %d and %d", p.Rate, minRate, int64(maxRate))
	case p.Queue < 0 || p.Queue > maxBuffer:
		return fmt.Errorf("queue of %d bytes is not between 0 and %d", p.Queue, maxBuffer)
	case math.IsNaN(p.Loss) || p.Loss < 0 || p.Loss > 1:
		return fmt.Errorf("loss %v is not a probability", p.Loss)
	}
	return nil
}

// need is the number of bytes a direction holds when its line and queue are
// full; 0 when the rate is unlimited.
func (p Params) need() int64 {
	if p.Rate == 0 {
		return 0
	}
	line := float64(p.Rate) / 8 * (p.Delay + p.Jitter).Seconds()
	return int64(line) + p.queueLimit() + 2*maxPacket
}

// ParseRate reads "1gbit", "20mbit", "64kbit", "9600" (bit/s) or "unlimited".
func ParseRate(s string) (int64, error) {
	t := strings.ToLower(strings.TrimSpace(s))
	if t == "unlimited" {
		return 0, nil
	}
	unit := 1.0
	for suffix, u := range map[string]float64{"gbit": 1e9, "mbit": 1e6, "kbit": 1e3} {
		if rest, ok := strings.CutSuffix(t, suffix); ok {
			t, unit = rest, u
		}
	}
	v, err := strconv.ParseFloat(t, 64)
	if err != nil || math.IsNaN(v) || v < 0 || v*unit > maxRate {
		return 0, fmt.Errorf("%q is not a rate such as 1gbit, 20mbit, 64kbit or unlimited", s)
	}
	return int64(v * unit), nil
}
