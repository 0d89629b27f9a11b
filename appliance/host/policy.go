package host

import (
	"cmp"
	"context"
	"fmt"
	"time"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/ext4j"
)

// policyFile is what `kagami set` has set for a group, in its file. It wins over the
// config file until it is taken back.
type policyFile struct {
	Mode       string `json:"mode"`
	AsyncBytes int64  `json:"async_bytes,omitempty"`
	AsyncAgeMs int64  `json:"async_age_ms,omitempty"`
	OnLinkLoss string `json:"on_link_loss,omitempty"` // "": the config file's
}

// valid tells whether this release can do what the policy says; nil is none.
func (p *policyFile) valid() bool {
	return p == nil || (p.Mode == config.ModeSync || p.Mode == config.ModeAsync) && p.AsyncBytes >= 0 && p.AsyncAgeMs > 0 &&
		(p.OnLinkLoss == "" || p.OnLinkLoss == config.LossStall || p.OnLinkLoss == config.LossContinue)
}

// policy is when a group's FLUSHes are answered.
type policy struct {
	mode       string
	asyncBytes int64 // 0: what the queue holds
	asyncAge   time.Duration
	onLoss     string // config.LossStall, config.LossContinue
	set        bool   // by kagami set
}

// policy is what counts for the group: what was set, else the config file's, else the default.
func (g *group) policy() policy { return g.d.policyOf(g.snapshot()) }

func (d *Daemon) policyOf(f *groupFile) policy {
	out := policy{mode: config.DefaultMode, asyncAge: config.DefaultAsyncAge, onLoss: config.DefaultOnLinkLoss}
	if c := d.groupConfig(f.Name); c != nil {
		out = policy{mode: c.Mode, asyncBytes: c.AsyncBytes, asyncAge: c.AsyncAge, onLoss: c.OnLinkLoss}
	}
	if p := f.Policy; p != nil {
		out = policy{p.Mode, p.AsyncBytes, time.Duration(p.AsyncAgeMs) * time.Millisecond, cmp.Or(p.OnLinkLoss, out.onLoss), true}
	}
	return out
}

// engine is the policy as ext4j knows it. queue is the limit of unacknowledged records, bytes.
func (p policy) engine(queue int64) ext4j.Mode {
	m := ext4j.Mode{Async: p.mode == config.ModeAsync, Bytes: queue, Age: p.asyncAge}
	if p.asyncBytes > 0 {
		m.Bytes = min(queue, p.asyncBytes)
	}
	return m
}

// control is the policy for people and programs.
func (p policy) control(name string, queue int64) control.Policy {
	c := control.Policy{Group: name, Mode: p.mode, OnLinkLoss: p.onLoss, Set: p.set}
	if m := p.engine(queue); m.Async {
		c.AsyncBytes, c.AsyncSeconds = m.Bytes, m.Age.Seconds()
	}
	return c
}

// Set changes the policy of a group whose source is here, while it serves. It is durable
// before anything is answered by it.
func (d *Daemon) Set(_ context.Context, req control.SetRequest) (control.Policy, error) {
	g := d.find(req.Group)
	if g == nil {
		return control.Policy{}, notFound(fmt.Sprintf("site %s has no group %s", d.cfg.Site, req.Group), "kagami status lists the groups of this site")
	}
	if f := g.snapshot(); f.Role == RoleReplica {
		return control.Policy{}, refused(fmt.Sprintf("the source of %s is at site %s", g.name, f.Peer), fmt.Sprintf("at site %s: kagami set %s", f.Peer, g.name))
	}
	queue := d.limits(g.name).QueueBytes
	next, err := g.policy().changed(req, queue)
	if err != nil {
		return control.Policy{}, err
	}
	if req.OnLinkLoss == config.LossContinue {
		if err := g.vouch(); err != nil { // an operator's word, before the policy can act on it
			return control.Policy{}, err
		}
	}
	if req.Default || next.set {
		if err := g.setPolicy(next, req.Default); err != nil {
			return control.Policy{}, err
		}
	}
	return g.policy().control(g.name, queue), nil
}

// changed is the policy with what a request changes; it counts as set when there is anything.
func (p policy) changed(req control.SetRequest, queue int64) (policy, error) {
	touched := req.Mode != "" || req.AsyncBytes != 0 || req.AsyncSeconds != 0 || req.OnLinkLoss != ""
	switch {
	case req.Default && touched:
		return p, refused("to go back to the configuration's policy and to set another one at once makes no sense", "use one of the two")
	case req.Mode != "" && req.Mode != config.ModeSync && req.Mode != config.ModeAsync:
		return p, refused(fmt.Sprintf("there is no mode %q", req.Mode), "allowed: sync, async")
	case req.OnLinkLoss != "" && req.OnLinkLoss != config.LossStall && req.OnLinkLoss != config.LossContinue:
		return p, refused(fmt.Sprintf("there is no policy %q on link loss", req.OnLinkLoss), "allowed: stall, continue")
	case req.AsyncBytes < 0 || req.AsyncSeconds < 0 || req.AsyncSeconds > config.MaxAsyncAge.Seconds():
		return p, refused("the bound of async is out of range", fmt.Sprintf("allowed: bytes up to the queue, seconds up to %.0f", config.MaxAsyncAge.Seconds()))
	case req.AsyncBytes > queue:
		return p, refused(fmt.Sprintf("a bound of %d bytes is more than this site keeps of what is not acknowledged, %d bytes", req.AsyncBytes, queue), "raise limits.queue_bytes in the config file, then restart the daemon")
	}
	p.set = touched
	if req.Mode != "" {
		p.mode = req.Mode
	}
	if req.AsyncBytes != 0 {
		p.asyncBytes = req.AsyncBytes
	}
	if req.OnLinkLoss != "" {
		p.onLoss = req.OnLinkLoss
	}
	if req.AsyncSeconds != 0 {
		p.asyncAge = time.Duration(req.AsyncSeconds * float64(time.Second))
	}
	return p, nil
}

// setPolicy makes a policy durable, then lets it count.
func (g *group) setPolicy(p policy, back bool) error {
	err := g.update(func(f *groupFile) {
		f.Policy = &policyFile{Mode: p.mode, AsyncBytes: p.asyncBytes, AsyncAgeMs: p.asyncAge.Milliseconds(), OnLinkLoss: p.onLoss}
		if back {
			f.Policy = nil
		}
	})
	if err != nil {
		return fmt.Errorf("set the policy of %s: %w", g.name, err)
	}
	g.mu.Lock()
	src := g.src
	g.mu.Unlock()
	now := g.policy()
	if src != nil {
		src.eng.SetMode(now.engine(src.limits.QueueBytes))
		src.lookAgain()
	}
	g.note("mode is " + now.words() + ", on link loss: " + now.onLoss)
	return nil
}

// lookAgain lets the goroutine that waits for the replica see a change of policy.
func (s *source) lookAgain() {
	if s.link == nil {
		return
	}
	s.alone()
	s.signal()
}

// signal makes the goroutine that waits for the replica look again.
func (s *source) signal() {
	select {
	case s.poke <- struct{}{}:
	default:
	}
}

func (p policy) words() string {
	if p.mode != config.ModeAsync {
		return p.mode
	}
	if p.asyncBytes == 0 {
		return fmt.Sprintf("async, at most %v behind", p.asyncAge)
	}
	return fmt.Sprintf("async, at most %d bytes and %v behind", p.asyncBytes, p.asyncAge)
}
