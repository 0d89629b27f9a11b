package activelog

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

// claim is one Acquire of the model.
type claim struct {
	disk   uint32
	off, n int64
	cancel context.CancelFunc
	done   chan error
}

func (c *claim) regions() []Region {
	var out []Region
	for i := c.off / 4096; i <= (c.off+c.n-1)/4096; i++ {
		out = append(out, Region{c.disk, uint64(i)})
	}
	return out
}

// fact is what the model knows about a region.
type fact struct {
	pins    int
	kept    bool
	last    epoch.LSN
	written int // the model's clock
}

// world is a log on a file system that crashes, and what must be found after it.
type world struct {
	t       *testing.T
	seed    int64
	rng     *rand.Rand
	fs      *fault.FS
	o       Options
	log     *Log
	facts   map[Region]*fact
	ever    map[Region]bool
	held    []*claim
	waiting []*claim
	clock   int
	synced  [3]int
	running map[uint32][2]uint64 // an fdatasync: token, the model's clock
	lsn     epoch.LSN
	acked   epoch.LSN
	kept    int
	trace   []string

	follower Follower // Follow returned for it
	tried    Follower // the newest that Follow was called for

	starved, switches, found int
}

func (w *world) note(format string, a ...any) { w.trace = append(w.trace, fmt.Sprintf(format, a...)) }

func (w *world) fatal(format string, a ...any) {
	w.t.Helper()
	w.t.Fatalf("seed %d: %s\n%s", w.seed, fmt.Sprintf(format, a...), strings.Join(w.trace[max(0, len(w.trace)-100):], "\n"))
}

func (w *world) required(r Region, f *fact) bool {
	return f.pins > 0 || f.kept || f.last > w.acked || f.written > w.synced[r.Disk]
}

func (w *world) fact(r Region) *fact {
	if w.facts[r] == nil {
		w.facts[r] = &fact{}
	}
	return w.facts[r]
}

func (w *world) acquire() {
	ctx, cancel := context.WithCancel(context.Background())
	c := &claim{disk: uint32(w.rng.IntN(3)), off: w.rng.Int64N(40 * 4096), n: 1 + w.rng.Int64N(5*4096), cancel: cancel, done: make(chan error, 1)}
	w.note("acquire %v", c.regions())
	for _, r := range c.regions() {
		w.ever[r] = true
	}
	go func() { c.done <- w.log.Acquire(ctx, c.disk, c.off, c.n) }()
	w.waiting = append(w.waiting, c)
}

// collect notes which requests have returned.
func (w *world) collect() {
	synctest.Wait()
	var rest []*claim
	for _, c := range w.waiting {
		select {
		case err := <-c.done:
			c.cancel()
			if err != nil {
				if !errors.Is(err, context.Canceled) && !errors.Is(err, fault.ErrStopped) && !errors.Is(err, syscall.EIO) {
					w.fatal("acquire: %v", err)
				}
				continue
			}
			w.note("  got %v", c.regions())
			w.held = append(w.held, c)
			for _, r := range c.regions() {
				w.fact(r).pins++
			}
		default:
			rest = append(rest, c)
		}
	}
	w.waiting = rest
	if n := w.log.Count(); n > max(w.o.MaxRegions, w.kept) {
		w.fatal("%d regions", n)
	}
}

func (w *world) release() {
	if len(w.held) == 0 {
		return
	}
	i := w.rng.IntN(len(w.held))
	c := w.held[i]
	w.held = append(w.held[:i:i], w.held[i+1:]...)
	w.lsn++
	w.clock++
	w.note("release %v at %d", c.regions(), w.lsn)
	for _, r := range c.regions() {
		f := w.fact(r)
		f.pins--
		f.last, f.written = w.lsn, w.clock
	}
	w.log.Release(c.disk, c.off, c.n, w.lsn)
}

func (w *world) sync(d uint32) {
	if run, ok := w.running[d]; ok {
		delete(w.running, d)
		if w.rng.IntN(8) == 0 {
			return // it failed
		}
		w.note("synced %d", d)
		w.log.SyncEnd(d, run[0])
		w.synced[d] = max(w.synced[d], int(run[1]))
		return
	}
	w.running[d] = [2]uint64{w.log.SyncBegin(d), uint64(w.clock)}
}

func (w *world) ack(lsn epoch.LSN) {
	w.note("acked %d", lsn)
	w.acked = max(w.acked, lsn)
	w.log.Acked(lsn)
}

func (w *world) follow() {
	w.tried = Follower{Lineage: epoch.UUID{1}, Replica: epoch.UUID{byte(1 + w.rng.IntN(3))}}
	w.note("follow %v", w.tried)
	if err := w.log.Follow(w.tried); err == nil {
		w.follower = w.tried
	} else if !errors.Is(err, fault.ErrStopped) && !errors.Is(err, syscall.EIO) {
		w.fatal("follow: %v", err)
	}
}

func (w *world) step() {
	if w.rng.IntN(40) == 0 {
		w.follow()
	}
	switch k := w.rng.IntN(20); {
	case k < 8 && len(w.waiting) < 6:
		w.acquire()
	case k < 13:
		w.release()
	case k < 17:
		w.sync(uint32(w.rng.IntN(3)))
	case k < 19:
		w.ack(w.acked + epoch.LSN(w.rng.Uint64N(uint64(w.lsn-w.acked+1))))
	case len(w.waiting) > 0:
		w.note("cancel")
		w.waiting[w.rng.IntN(len(w.waiting))].cancel()
	}
	if w.log.Pressure() {
		w.starved++
	}
	w.collect()
}

// drain does what an owner does under pressure; then nobody may be left waiting.
func (w *world) drain() {
	for range 50 {
		for len(w.held) > 0 {
			w.release()
			w.collect()
		}
		for d := range uint32(3) {
			delete(w.running, d)
			w.sync(d)
			token := w.running[d]
			delete(w.running, d)
			w.log.SyncEnd(d, token[0])
			w.synced[d] = w.clock
		}
		w.ack(w.lsn)
		w.collect()
		if w.log.Err() != nil || len(w.waiting) == 0 && len(w.held) == 0 {
			return
		}
	}
	if w.kept == 0 {
		w.fatal("%d requests wait for ever", len(w.waiting))
	}
}

// restart crashes or kills the machine, perhaps again while the log is opened, and checks what is found.
func (w *world) restart() {
	for _, c := range w.waiting {
		c.cancel()
	}
	w.collect()
	_ = w.log.Close()
	for {
		if w.rng.IntN(3) == 0 {
			w.note("kill")
			w.fs = w.fs.Kill()
		} else {
			w.note("crash")
			w.fs = w.fs.Crash()
		}
		if w.rng.IntN(3) == 0 {
			w.fs.StopAfter(int64(1 + w.rng.IntN(9)))
		} else if w.rng.IntN(6) == 0 {
			w.fs.Inject(fault.Fault{Op: fault.OpSync, Nth: w.rng.IntN(3), Err: syscall.EIO})
		}
		w.o.MaxRegions = 8 + w.rng.IntN(2)*600*w.rng.IntN(2)
		log, found, err := Open(w.fs, "/log", w.o)
		if err == nil {
			w.log = log
			w.check(found)
			return
		}
		if !w.fs.Stopped() && !errors.Is(err, syscall.EIO) {
			w.fatal("open: %v", err)
		}
	}
}

func (w *world) check(found []Region) {
	w.note("found %v", found)
	have := map[Region]bool{}
	for _, r := range found {
		have[r] = true
		if !w.ever[r] {
			w.fatal("found %v, which nobody acquired", r)
		}
	}
	for r, f := range w.facts {
		if w.required(r, f) && !have[r] {
			w.fatal("%v is lost: %+v", r, *f)
		}
	}
	if len(found) > max(608, w.kept) {
		w.fatal("found %d regions", len(found))
	}
	if f := w.log.Follower(); f != w.follower && f != w.tried {
		w.fatal("follows %v, want %v or %v", f, w.follower, w.tried)
	}
	w.follower = w.log.Follower() // Open made it durable
	w.tried = w.follower
	w.found += len(found)
	w.facts, w.held, w.waiting, w.running = map[Region]*fact{}, nil, nil, map[uint32][2]uint64{}
	w.synced, w.clock, w.kept = [3]int{}, 0, len(found)
	for _, r := range found {
		w.fact(r).kept = true
	}
	w.again(found)
	if w.rng.IntN(4) > 0 {
		w.clearAll()
	}
	w.acked = w.lsn
	w.log.Acked(w.lsn)
}

// again checks that what Open reported survives a power loss right after it.
func (w *world) again(found []Region) {
	l, again, err := Open(w.fs.Fork(w.rng.Int64()).Crash(), "/log", w.o)
	if err != nil {
		w.fatal("open after a power loss: %v", err)
	}
	if fmt.Sprint(found) != fmt.Sprint(again) {
		w.fatal("found %v, and %v after a power loss", found, again)
	}
	if err := l.Close(); err != nil {
		w.fatal("close: %v", err)
	}
}

func (w *world) clearAll() {
	w.facts = map[Region]*fact{} // whether it returns or not
	if err := w.log.Clear(); err == nil {
		w.note("cleared")
		w.kept = 0
	} else if !w.fs.Stopped() && !errors.Is(err, syscall.EIO) {
		w.fatal("clear: %v", err)
	}
}

func run(t *testing.T, seed int64) *world {
	w := &world{t: t, seed: seed, rng: rand.New(rand.NewPCG(uint64(seed), 11)), fs: fault.NewFS(seed),
		o: Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 8}, facts: map[Region]*fact{}, ever: map[Region]bool{},
		running: map[uint32][2]uint64{}}
	defer func() { // also when the test fails: nothing may be left running
		for _, c := range w.waiting {
			c.cancel()
		}
		_ = w.log.Close()
	}()
	var err error
	if w.log, _, err = Open(w.fs, "/log", w.o); err != nil {
		w.fatal("open: %v", err)
	}
	for range 4 {
		switch w.rng.IntN(5) {
		case 0:
			w.fs.Inject(fault.Fault{Op: fault.OpSync, Nth: w.rng.IntN(40), Err: syscall.EIO})
		case 1:
		default:
			w.fs.StopAfter(int64(1 + w.rng.IntN(80)))
		}
		for range 60 + w.rng.IntN(200) {
			if w.step(); w.log.Err() != nil {
				break
			}
		}
		if w.rng.IntN(2) == 0 {
			w.drain()
		}
		if w.log.file.proto.generation > 4 {
			w.switches++
		}
		w.restart()
	}
	return w
}

// TestCrash runs random histories with crashes at random steps. A failure prints its seed.
func TestCrash(t *testing.T) {
	seeds := int64(1200)
	if testing.Short() {
		seeds = 150
	} else if raceEnabled {
		seeds = 60
	}
	if s := os.Getenv("ACTIVELOG_SEEDS"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		must(t, err)
		seeds = n
	}
	var starved, switches, found int
	for seed := range seeds {
		synctest.Test(t, func(t *testing.T) {
			w := run(t, seed)
			starved, switches, found = starved+w.starved, switches+w.switches, found+w.found
		})
		if t.Failed() {
			t.FailNow()
		}
	}
	t.Logf("%d seeds: %d steps under pressure, %d runs with switched halves, %d regions found", seeds, starved, switches, found)
	if starved == 0 || switches == 0 || found == 0 {
		t.Error("not everything happened")
	}
}
