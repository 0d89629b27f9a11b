// Package wan emulates a long line between two sites on one machine: two
// network namespaces, each with one TUN device, and a forwarder in this
// process that delays, limits, loses and cuts. Everything above IP is the
// kernel's own: real TCP at both ends.
//
// Invariants:
//
//   - Packets of one direction never overtake each other.
//   - A queue never holds more than its limit; what does not fit is dropped at
//     its tail, as a router does. Queue and line together never hold more than
//     Config.Memory.
//   - Loss and queue act on packets of MTU size: a TSO train is cut up first.
//   - After Close no goroutine of this package runs and both namespaces are
//     gone, whatever their devices were doing.
//
// Each direction has a reader and a writer goroutine, owned by the Link, and
// one lock that covers its pipe; no two of these locks are ever held together.
package wan

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"sync"
	"time"
)

// Config describes a link. The two names must be set.
type Config struct {
	Names   [2]string       // names of the network namespaces
	Addrs   [2]netip.Prefix // addresses of the two ends; default 10.98.0.1/30 and 10.98.0.2/30
	Params  [2]Params       // of the direction that leaves side A, and of the one that leaves side B
	Seed    uint64          // of every random choice
	Memory  int64           // bytes that one direction may hold at most; default 64 MiB
	Replace bool            // remove namespaces of these names first when no process lives in them
}

const defaultMemory = 64 << 20

// Symmetric gives both directions the same parameters.
func Symmetric(p Params) [2]Params { return [2]Params{p, p} }

func (c *Config) complete() error {
	if c.Addrs[A] == (netip.Prefix{}) && c.Addrs[B] == (netip.Prefix{}) {
		c.Addrs = [2]netip.Prefix{netip.MustParsePrefix("10.98.0.1/30"), netip.MustParsePrefix("10.98.0.2/30")}
	}
	if c.Memory == 0 {
		c.Memory = defaultMemory
	}
	if c.Memory < minQueue || c.Memory > maxBuffer {
		return fmt.Errorf("memory limit of %d bytes is not between %d and %d", c.Memory, minQueue, maxBuffer)
	}
	if c.Names[A] == c.Names[B] {
		return fmt.Errorf("both ends are called %q", c.Names[A])
	}
	for s := range 2 {
		if !c.Addrs[s].IsValid() || c.Addrs[s].Addr().Is4() != c.Addrs[1-s].Addr().Is4() {
			return fmt.Errorf("%v and %v are not addresses of one link", c.Addrs[A], c.Addrs[B])
		}
		if err := c.Params[s].check(c.Memory); err != nil {
			return err
		}
	}
	return nil
}

func (p Params) check(memory int64) error {
	if err := p.Check(); err != nil {
		return err
	}
	if n := p.need(); n > memory {
		return fmt.Errorf("%d bit/s for %v and a queue of %d bytes need %d bytes, the memory limit is %d",
			p.Rate, p.Delay+p.Jitter, p.queueLimit(), n, memory)
	}
	return nil
}

// Link is a running link. Its methods are safe for concurrent use.
type Link struct {
	config Config
	start  time.Time
	space  [2]*space
	tun    [2]*os.File
	dir    [2]*direction // by the side where it starts
	once   sync.Once
	closed error
}

// New makes the namespaces and devices and starts forwarding. It needs
// CAP_NET_ADMIN and CAP_SYS_ADMIN.
func New(c Config) (*Link, error) {
	if err := c.complete(); err != nil {
		return nil, fmt.Errorf("link: %w", err)
	}
	l := &Link{config: c, start: time.Now()}
	for s := range 2 {
		if err := l.makeSide(Side(s)); err != nil {
			return nil, errors.Join(fmt.Errorf("link: %w", err), l.Close())
		}
	}
	for s := range 2 {
		l.dir[s] = newDirection(l, Side(s))
	}
	for s := range 2 {
		l.dir[s].run()
	}
	return l, nil
}

func (l *Link) makeSide(s Side) (err error) {
	name := l.config.Names[s]
	if l.config.Replace {
		if err := removeStale(name); err != nil {
			return err
		}
	}
	if l.space[s], err = newSpace(name); err != nil {
		return err
	}
	err = l.Do(s, func() error {
		if l.tun[s], err = openTUN(); err != nil {
			return err
		}
		return configure(l.config.Addrs[s])
	})
	if err != nil {
		return fmt.Errorf("side %v (%s): %w", s, name, err)
	}
	return nil
}

// Close stops forwarding and removes the namespaces. It reports processes
// that are still inside; it does not end them.
func (l *Link) Close() error {
	l.once.Do(func() { l.closed = l.close() })
	return l.closed
}

func (l *Link) close() error {
	var errs []error
	for _, d := range l.dir {
		if d != nil {
			d.stop()
		}
	}
	for _, t := range l.tun {
		if t != nil {
			errs = append(errs, t.Close())
		}
	}
	for _, d := range l.dir {
		if d != nil {
			errs = append(errs, d.wait())
		}
	}
	for _, s := range l.space {
		if s != nil {
			errs = append(errs, s.remove())
		}
	}
	return errors.Join(errs...)
}

// Addr is the address of a side.
func (l *Link) Addr(s Side) netip.Addr { return l.config.Addrs[s].Addr() }

// Cut makes both directions drop everything, what is on the line included.
func (l *Link) Cut() { l.CutFrom(A); l.CutFrom(B) }

// Restore mends both directions.
func (l *Link) Restore() { l.RestoreFrom(A); l.RestoreFrom(B) }

// CutFrom cuts only what leaves side s: a line that fails in one direction.
func (l *Link) CutFrom(s Side) { l.dir[s].setCut(true) }

// RestoreFrom mends what leaves side s.
func (l *Link) RestoreFrom(s Side) { l.dir[s].setCut(false) }

// Params returns the parameters of what leaves side s.
func (l *Link) Params(s Side) Params { return l.dir[s].params() }

// SetParams changes what leaves side s, for packets that have not reached the
// line yet.
func (l *Link) SetParams(s Side, p Params) error { return l.dir[s].change(func(q *Params) { *q = p }) }

// Change edits the parameters of both directions.
func (l *Link) Change(f func(*Params)) error {
	for _, d := range l.dir {
		if err := d.change(f); err != nil {
			return err
		}
	}
	return nil
}

// Stats returns the counters of what leaves side s.
func (l *Link) Stats(s Side) Stats { return l.dir[s].stats() }
