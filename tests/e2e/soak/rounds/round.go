package rounds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"time"

	"kagami/appliance/control"
	"kagami/tests/acked/raw"
	"kagami/tests/e2e/stage"
	"kagami/tests/wan"
)

// RoundOptions of one round.
type RoundOptions struct {
	Kagami string
	Seed   uint64  // decides everything that is chosen; timing remains the machine's
	Faults int     // how many before the disaster; 0: 2 to 4
	Plan   []Fault // instead of random ones; each is recovered from before the next
	// Connections between the sites; 0: chosen too.
	Connections int
	Out         io.Writer // what happens, as it happens
}

// round is one disaster: loads run, faults happen, the main site is lost, the
// other takes over, and everything promised is looked for.
type round struct {
	o     RoundOptions
	rng   *rand.Rand
	r     *Rig
	raw   *Raw
	files *Files
	// cut: no loss of power at the source has torn the order of what was not
	// flushed, so the replica must be one cut through it.
	cut   bool
	began time.Time
}

// Names in a round: a group of two raw disks, and one of a disk with a file system.
const (
	rawGroup = "raw"
	fsGroup  = "fs"
	fsDisk   = "d0"
)

// Round plays one round. ctx bounds it; everything of it is gone when it returns.
func Round(ctx context.Context, o RoundOptions) (err error) {
	p := &round{o: o, rng: rand.New(rand.NewPCG(o.Seed, 1)), cut: true, began: time.Now()}
	defer func() {
		if err != nil {
			err = fmt.Errorf("round with seed %d: %w", o.Seed, err)
		}
	}()
	if err := p.build(ctx); err != nil {
		return err
	}
	err = errors.Join(p.play(ctx), p.r.Trouble())
	if err != nil {
		err = fmt.Errorf("%w\n--- daemon at %s:\n%s\n--- daemon at %s:\n%s", err, p.r.Main.Name, p.r.Main.Tail(), p.r.DR.Name, p.r.DR.Tail())
		if ctx.Err() != nil { // something hangs
			p.dump()
		}
	}
	return errors.Join(err, p.r.Close())
}

// dump shows what the goroutines of both daemons do.
func (p *round) dump() {
	for _, s := range []*stage.Site{p.r.Main, p.r.DR} {
		if err := s.Dump(); err != nil {
			p.say("%v", err)
		}
		if b, err := os.ReadFile(s.LogPath()); err == nil {
			p.say("log of site %s:\n%s", s.Name, b)
		}
	}
}

func (p *round) say(format string, a ...any) {
	if p.o.Out != nil {
		fmt.Fprintf(p.o.Out, "%7.2f s  %s\n", time.Since(p.began).Seconds(), fmt.Sprintf(format, a...))
	}
}

// pick is one of several values.
func pick[T any](rng *rand.Rand, values ...T) T { return values[rng.IntN(len(values))] }

func (p *round) build(ctx context.Context) error {
	limits := QuickLink()
	limits["queue_bytes"] = pick(p.rng, "1MiB", "2MiB", "16MiB")
	limits["apply_age"] = pick(p.rng, "50ms", "200ms", "2s")
	limits["epoch_age"] = pick(p.rng, "20ms", "200ms", "1s")
	limits["segment_bytes"] = pick(p.rng, "1MiB", "4MiB")
	limits["compression"] = pick(p.rng, "zstd", "none")
	limits["active_log_bytes"] = pick(p.rng, "8MiB", "32MiB")
	rtt, rate := pick(p.rng, 1, 5, 20), pick(p.rng, int64(100e6), 1e9)
	connections := pick(p.rng, 1, 4, 10)
	if p.o.Connections > 0 {
		connections = p.o.Connections
	}
	var err error
	p.r, err = New(ctx, Options{Connections: connections,
		Kagami: p.o.Kagami, RTT: time.Duration(rtt) * time.Millisecond, Rate: rate, Limits: limits,
		Disk: map[string]int64{stage.MainName: 512 << 20, stage.DRName: 768 << 20},
		Groups: []Group{
			{Name: rawGroup, Disks: []Disk{{"d0", 8 << 20}, {"d1", 24 << 20}}},
			{Name: fsGroup, Disks: []Disk{{fsDisk, 64 << 20}}},
		}})
	if err != nil {
		return err
	}
	p.say("seed %d: RTT %d ms, %d Mbit/s, %d connections, %v", p.o.Seed, rtt, rate/1e6, connections, limits)
	p.raw = p.r.NewRaw(rawGroup, p.o.Seed)
	p.raw.Shape.Workers = pick(p.rng, 1, 4, 8)
	p.files = p.r.NewFiles(fsGroup, fsDisk, p.o.Seed)
	return nil
}

func (p *round) play(ctx context.Context) error {
	if err := p.r.StartBoth(ctx); err != nil {
		return err
	}
	early := p.rng.IntN(2) == 0
	if early {
		p.say("the loads begin before the first sync has ended")
	} else if err := p.r.AwaitProtected(ctx); err != nil {
		return err
	}
	if err := p.startLoads(ctx, true); err != nil {
		return err
	}
	if err := p.r.AwaitProtected(ctx); err != nil {
		return err
	}
	if err := p.r.AwaitConnections(ctx); err != nil {
		return err
	}
	if err := p.faults(ctx); err != nil {
		return err
	}
	p.pause(1500 * time.Millisecond)
	if err := p.disaster(ctx); err != nil {
		return fmt.Errorf("disaster: %w", err)
	}
	return p.check(ctx)
}

func (p *round) pause(limit time.Duration) {
	time.Sleep(time.Duration(p.rng.Int64N(int64(limit))))
}

func (p *round) startLoads(ctx context.Context, mkfs bool) error {
	if err := p.raw.Start(ctx); err != nil {
		return err
	}
	return p.files.Start(ctx, mkfs)
}

// Fault is what may happen before the disaster. Each leaves both sites
// running and the line whole; the loads go on by themselves.
type Fault int

// The faults.
const (
	KillSource Fault = iota
	KillReplica
	KillBoth
	PowerSource
	PowerReplica
	StopSource
	StopReplica
	CutLine
	CutHalf
	Flap
	Lossy
	faults // their number
)

func (f Fault) String() string {
	return [faults]string{
		KillSource: "the source daemon is killed", KillReplica: "the replica daemon is killed", KillBoth: "both daemons are killed",
		PowerSource: "the source's host loses power", PowerReplica: "the replica's host loses power",
		StopSource: "the source daemon is stopped", StopReplica: "the replica daemon is stopped",
		CutLine: "the line is cut", CutHalf: "the line is cut in one direction", Flap: "the line is cut again and again",
		Lossy: "the line loses packets"}[f]
}

func (f Fault) do(p *round, ctx context.Context) error {
	return [faults]func(*round, context.Context) error{
		KillSource: (*round).killSource, KillReplica: (*round).killReplica, KillBoth: (*round).killBoth,
		PowerSource: (*round).powerSource, PowerReplica: (*round).powerReplica,
		StopSource: (*round).stopSource, StopReplica: (*round).stopReplica,
		CutLine: (*round).cutLine, CutHalf: (*round).cutHalf, Flap: (*round).flap, Lossy: (*round).lossy}[f](p, ctx)
}

// faults plays the planned faults, or random ones: some of these hit before
// the one before is recovered from.
func (p *round) faults(ctx context.Context) error {
	for _, f := range p.o.Plan {
		if err := p.fault(ctx, f, true); err != nil {
			return err
		}
	}
	if p.o.Plan != nil {
		return nil
	}
	n := p.o.Faults
	if n == 0 {
		n = 2 + p.rng.IntN(3)
	}
	for range n {
		f := Fault(p.rng.IntN(int(faults)))
		if err := p.fault(ctx, f, p.rng.IntN(4) > 0); err != nil {
			return err
		}
	}
	return nil
}

func (p *round) fault(ctx context.Context, f Fault, recover bool) error {
	p.pause(1500 * time.Millisecond)
	p.say("%s", f)
	err := f.do(p, ctx)
	if err == nil && recover {
		err = p.recovered(ctx)
	}
	if err != nil {
		return fmt.Errorf("%s: %w", f, err)
	}
	return nil
}

// recovered waits until both groups stream and the workload gets on.
func (p *round) recovered(ctx context.Context) error {
	began := time.Now()
	if err := p.r.AwaitProtected(ctx); err != nil {
		return err
	}
	if err := p.files.AwaitProgress(ctx); err != nil {
		return err
	}
	p.say("went on after %v; %d operations on files, %d requests", time.Since(began).Round(time.Millisecond), p.files.Acked(), p.raw.Answered())
	return nil
}

// killSource: the workload on files must not notice; raw clients connect anew.
func (p *round) killSource(ctx context.Context) error {
	if err := p.r.Main.Kill(); err != nil {
		return err
	}
	return p.restartSource(ctx)
}

func (p *round) restartSource(ctx context.Context) error {
	if err := p.raw.Crashed(); err != nil {
		return err
	}
	p.pause(500 * time.Millisecond)
	if err := p.r.Main.Start(ctx); err != nil {
		return err
	}
	return p.raw.Start(ctx)
}

func (p *round) stopSource(ctx context.Context) error {
	if err := p.r.Main.Stop(); err != nil {
		return err
	}
	return p.restartSource(ctx)
}

// powerSource: everything that ran at the main site is gone, and what was not
// flushed with it; what was, is there when the machine is up again.
func (p *round) powerSource(ctx context.Context) error {
	p.cut = false
	p.writeOut()
	if err := p.r.Main.PowerLoss(ctx); err != nil {
		return err
	}
	if err := errors.Join(p.raw.Lost(), p.files.Kill()); err != nil {
		return err
	}
	if err := p.r.Main.Start(ctx); err != nil {
		return err
	}
	if _, err := p.raw.Check(ctx, p.r.Main, raw.Options{}); err != nil {
		return err
	}
	if err := p.files.Check(ctx, p.r.Main); err != nil {
		return err
	}
	return p.startLoads(ctx, false)
}

// writeOut lets parts of the source's images reach its disk, in no order.
func (p *round) writeOut() {
	for _, d := range p.r.Disks(rawGroup) {
		for range p.rng.IntN(8) {
			off := p.rng.Int64N(d.Size)
			_ = stage.WriteOut(p.r.Image(rawGroup, d.Name), off, min(1<<20, d.Size-off)) // it may or may not
		}
	}
}

func (p *round) killReplica(ctx context.Context) error {
	if err := p.r.DR.Kill(); err != nil {
		return err
	}
	p.pause(time.Second)
	return p.r.DR.Start(ctx)
}

func (p *round) stopReplica(ctx context.Context) error {
	if err := p.r.DR.Stop(); err != nil {
		return err
	}
	p.pause(time.Second)
	return p.r.DR.Start(ctx)
}

func (p *round) powerReplica(ctx context.Context) error {
	if err := p.r.DR.PowerLoss(ctx); err != nil {
		return err
	}
	p.pause(time.Second)
	return p.r.DR.Start(ctx)
}

func (p *round) killBoth(ctx context.Context) error {
	if err := errors.Join(p.r.Main.Kill(), p.r.DR.Kill()); err != nil {
		return err
	}
	first, second := p.r.DR, p.r.Main
	if p.rng.IntN(2) == 0 {
		first, second = second, first
	}
	if err := p.raw.Crashed(); err != nil {
		return err
	}
	if err := first.Start(ctx); err != nil {
		return err
	}
	p.pause(500 * time.Millisecond)
	if err := second.Start(ctx); err != nil {
		return err
	}
	return p.raw.Start(ctx)
}

func (p *round) cutLine(context.Context) error {
	p.r.Link.Cut()
	p.pause(4 * time.Second)
	p.r.Link.Restore()
	return nil
}

func (p *round) cutHalf(context.Context) error {
	side := pick(p.rng, wan.A, wan.B)
	p.r.Link.CutFrom(side)
	p.pause(4 * time.Second)
	p.r.Link.RestoreFrom(side)
	return nil
}

func (p *round) flap(context.Context) error {
	for range 5 {
		p.r.Link.Cut()
		p.pause(400 * time.Millisecond)
		p.r.Link.Restore()
		p.pause(400 * time.Millisecond)
	}
	return nil
}

func (p *round) lossy(context.Context) error {
	before := p.r.Link.Params(wan.A).Loss
	if err := p.r.Link.Change(func(q *wan.Params) { q.Loss = 0.01 }); err != nil {
		return err
	}
	p.pause(3 * time.Second)
	return p.r.Link.Change(func(q *wan.Params) { q.Loss = before })
}

// disaster takes the main site away: daemon, clients and line, in any order.
func (p *round) disaster(ctx context.Context) error {
	var names []string
	parts := []struct {
		name string
		do   func() error
	}{
		{"daemon", p.r.Main.Kill},
		{"line", func() error { p.r.Link.Cut(); return nil }},
		{"clients", p.files.Kill},
	}
	p.rng.Shuffle(len(parts), func(i, j int) { parts[i], parts[j] = parts[j], parts[i] })
	for _, part := range parts {
		if err := part.do(); err != nil {
			return err
		}
		names = append(names, part.name)
		p.pause(50 * time.Millisecond)
	}
	if err := p.raw.Crashed(); err != nil {
		return err
	}
	p.say("disaster: %s; %d operations on files acknowledged, %d requests answered", strings.Join(names, ", "), p.files.Acked(), p.raw.Answered())
	if p.rng.IntN(2) == 0 {
		p.say("the replica's host loses power too")
		if err := p.r.DR.PowerLoss(ctx); err != nil {
			return err
		}
		return p.r.DR.Start(ctx)
	}
	return nil
}

// check fails over and looks for everything promised; then the old source
// comes back and must not serve.
func (p *round) check(ctx context.Context) error {
	for _, g := range []string{rawGroup, fsGroup} {
		out, err := p.r.Failover(ctx, g)
		if err != nil {
			return err
		}
		p.say("failed over %s: %s", g, strings.Join(strings.Fields(out), " "))
	}
	if err := Fsck(ctx, p.r.Replica(fsGroup, fsDisk)); err != nil {
		return err
	}
	if err := p.files.Check(ctx, p.r.DR); err != nil {
		return err
	}
	rep, err := p.raw.Check(ctx, p.r.DR, raw.Options{Cut: p.cut, TrimIsZero: true})
	if err != nil {
		return err
	}
	p.say("nothing lost: %d operations on files; %d writes, %d promised durable", p.files.Acked(), rep.Writes, rep.Durable)
	return p.returns(ctx)
}

// returns lets the old source come back: it is refused and serves nothing.
func (p *round) returns(ctx context.Context) error {
	p.r.Link.Restore()
	if err := p.r.Main.Start(ctx); err != nil {
		return err
	}
	for _, g := range []string{rawGroup, fsGroup} {
		st, err := p.r.Main.AwaitGroup(ctx, g, "the old source to be fenced", func(g control.Group) bool { return g.State == "fenced" })
		if err != nil {
			return err
		}
		if st.Protected || len(st.Alarms) == 0 {
			return fmt.Errorf("fenced group %s: protected %v, alarms %q", g, st.Protected, st.Alarms)
		}
		if err := p.servesNothing(ctx, g); err != nil {
			return err
		}
	}
	p.say("the old source came back and is fenced")
	return nil
}

// servesNothing tries to read from a fenced group's disks.
func (p *round) servesNothing(ctx context.Context, group string) error {
	for _, d := range p.r.Disks(group) {
		c, err := raw.Dial(ctx, "unix", p.r.Main.Socket(group, d.Name), d.Name)
		if err != nil {
			continue
		}
		_, err = c.ReadAt(make([]byte, 512), 0)
		c.Kill()
		if err == nil {
			return fmt.Errorf("fenced group %s still serves disk %s (%s)", group, d.Name, filepath.Base(p.r.Image(group, d.Name)))
		}
	}
	return nil
}
