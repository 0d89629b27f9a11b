package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"runtime"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
	"kagami/tests/fault"
)

var (
	groupID = epoch.UUID{1}
	lineage = epoch.UUID{2}
)

const groupName = "vm"

// Config of a run. Sizes are bytes.
type Config struct {
	Disks         int
	DiskBytes     int64
	Workers       int
	ThinkTime     time.Duration
	Connections   int
	Delay, Jitter time.Duration
	Room          int // of a connection
	QueueBytes    int64
	EpochBytes    int64
	EpochAge      time.Duration
	InflightBytes int64
	MaxRegions    int
	SpoolBytes    int64
	ApplyBytes    int64
	ApplyAge      time.Duration
	Compress      bool
	Events        int
	Eyes          bool // the source follows ext4, and answers FLUSHes that promise nothing locally
	Script        int  // recording of an ext4 that disk 0 plays; -1: none
	// Continue: the source goes on without a replica that is away.
	Continue bool
	// BacklogBytes is what it keeps then to be sent later; 0: nothing.
	BacklogBytes int64
	// Failover: the run ends with a promotion of the replica instead of an end of all faults.
	Failover bool
	// Jumps: now and then both machines, and what runs on them, stand still, and go on with clocks ahead.
	Jumps bool
	// FillsHere: the source's disk fills now and then.
	FillsHere bool
	// AsyncAge is how far the replica may be behind in mode async; 0: the mode is sync.
	AsyncAge time.Duration
}

// RandomConfig draws a configuration: small limits, so that all of them are met.
func RandomConfig(rng *rand.Rand) Config {
	pick := func(v ...int64) int64 { return v[rng.IntN(len(v))] }
	c := Config{Disks: 2, DiskBytes: 1 << 20, Workers: 1 + rng.IntN(6), ThinkTime: time.Duration(pick(4, 20, 60)) * time.Millisecond,
		Connections: 1 + rng.IntN(4), Delay: time.Duration(pick(0, 1, 10, 40)) * time.Millisecond, Jitter: time.Duration(pick(0, 1, 20)) * time.Millisecond,
		Room: int(pick(8<<10, 64<<10, 1<<20)), QueueBytes: pick(96<<10, 256<<10, 1<<20), EpochBytes: pick(16<<10, 64<<10, 90<<10),
		EpochAge: time.Duration(pick(20, 200, 1000)) * time.Millisecond, InflightBytes: 1 << 20, MaxRegions: int(pick(4, 8, 16, 64)),
		SpoolBytes: pick(6<<20, 16<<20), ApplyBytes: pick(16<<10, 256<<10, 3<<20), ApplyAge: time.Duration(pick(50, 500, 5000)) * time.Millisecond,
		Compress: rng.IntN(2) == 0, Events: 8 + rng.IntN(12), Script: -1}
	return c
}

// withExt4 lets disk 0 be an ext4's in half of the runs. The follower is on in some of the
// others too: then nothing that it sees is an ext4.
func (c Config) withExt4(rng *rand.Rand) Config {
	c.Eyes = rng.IntN(4) > 0
	if c.Eyes && rng.IntN(3) > 0 {
		c.Script, c.DiskBytes = rng.IntN(len(recordings())), 4<<20
	}
	if rng.IntN(5) == 0 {
		c.AsyncAge = []time.Duration{300 * time.Millisecond, 2 * time.Second}[rng.IntN(2)]
	}
	return c
}

// World is one run.
type World struct {
	seed    uint64
	mutant  Mutant
	c       Config
	rng     *rand.Rand // of the goroutine that runs the events
	codec   *wire.Codec
	net     *Net
	history *History
	stream  *Stream
	began   time.Time

	protected atomic.Bool  // the first sync has ended
	alone     atomic.Int64 // odd while FLUSHes may be answered by the source alone; see setAlone
	quiet     atomic.Bool  // the guest issues no new requests
	busy      atomic.Int64
	wg        sync.WaitGroup // guests

	mu       sync.Mutex
	cond     *sync.Cond
	err      error // the first failure
	log      []string
	pauses   *rand.Rand
	att      *attachment // the guest's way to its disks; nil while the source is down
	downed   map[*source]bool
	src      *source
	srcFS    *fault.FS
	rep      *replicaSite
	repFS    *fault.FS
	g        *guest
	player   *player // of an ext4 on disk 0; nil: that disk is like the others
	earlier  earlier
	vm       uint64 // number of the VM's present life
	local    uint64 // FLUSHes that did not wait for the replica, in former lives of the source
	compared int64  // chunks that a comparison looked at while the guest wrote
	checked  int    // disasters looked at
	rotten   bool   // acknowledged epochs may have rotted in the spool
	noticed  bool   // and the replica has said so
	killed   bool   // the source's last end left its page cache
	full     bool   // the replica's disk
	fullHere bool   // the source's
	wasFull  bool   // once, at least
	broken   bool   // an fsync of the source is to fail, or has
	hoard    bool   // a replica opened now applies nothing: its spool keeps everything
}

// NewWorld prepares both machines: empty images, nothing started. tweak, if not nil,
// changes the configuration that the seed draws.
func NewWorld(seed uint64, mutant Mutant, tweak func(*Config)) (*World, error) {
	rng := rand.New(rand.NewPCG(seed, 0x73696d))
	c := RandomConfig(rng).withExt4(rand.New(rand.NewPCG(seed, 0x65787434)))
	c.Continue = c.AsyncAge == 0 && rand.New(rand.NewPCG(seed, 0x636f6e74)).IntN(4) == 0
	if c.Continue {
		c.BacklogBytes = []int64{0, 1 << 20, 64 << 20}[rand.New(rand.NewPCG(seed, 0x6261636b)).IntN(3)]
	}
	c.Failover = rand.New(rand.NewPCG(seed, 0x6661696c)).IntN(6) == 0
	c.Jumps = rand.New(rand.NewPCG(seed, 0x6a756d70)).IntN(8) == 0
	c.FillsHere = rand.New(rand.NewPCG(seed, 0x66756c6c)).IntN(4) == 0
	if tweak != nil {
		tweak(&c)
	}
	if c.Continue { // what it writes alone, at most all, comes back as one epoch
		c.SpoolBytes = max(c.SpoolBytes, 2*int64(c.Disks)*c.DiskBytes)
	}
	codec, err := wire.NewCodec()
	if err != nil {
		return nil, err
	}
	w := &World{seed: seed, mutant: mutant, c: c, rng: rng, codec: codec, net: NewNet(seed, c.Delay, c.Jitter, c.Room),
		history: NewHistory(c.Disks, c.DiskBytes), stream: NewStream(c.Disks, c.DiskBytes), began: time.Now(),
		pauses: rand.New(rand.NewPCG(seed, 0x7061)), downed: map[*source]bool{}}
	w.cond = sync.NewCond(&w.mu)
	if c.Script >= 0 {
		w.player = newPlayer(w, recordings()[c.Script])
	}
	w.srcFS, w.repFS = w.machine(1), w.machine(2)
	for _, m := range []struct {
		fs   *fault.FS
		dir  string
		name func(int) string
	}{{w.srcFS, sourceDir, sourceImage}, {w.repFS, replicaDir, replicaImage}} {
		if err := m.fs.MkdirAll(m.dir, 0o700); err != nil {
			return nil, err
		}
		for slot := range c.Disks {
			img, err := images.CreateImage(m.fs, m.name(slot), c.DiskBytes, "")
			if err != nil {
				return nil, err
			}
			if err := img.Close(); err != nil {
				return nil, err
			}
		}
	}
	return w, nil
}

// machine makes a file system whose operations let other goroutines run in between.
func (w *World) machine(n uint64) *fault.FS {
	f := fault.NewFS(int64(w.seed*10 + n))
	w.hook(f)
	return f
}

func (w *World) hook(f *fault.FS) {
	f.SetHook(func(fault.Op, string) error {
		w.mu.Lock()
		n := w.pauses.IntN(8) - 4
		w.mu.Unlock()
		for ; n > 0; n-- {
			runtime.Gosched()
		}
		return nil
	})
}

// pause sleeps for a random time below most. The caller holds no lock.
func (w *World) pause(most time.Duration) {
	w.mu.Lock()
	d := time.Duration(w.pauses.Int64N(int64(most)))
	w.mu.Unlock()
	time.Sleep(d)
}

// note adds to the log of the run, which a failure prints.
func (w *World) note(format string, a ...any) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.noteLocked(format, a...)
}

func (w *World) noteLocked(format string, a ...any) {
	w.log = append(w.log, fmt.Sprintf("%9.3fs ", time.Since(w.began).Seconds())+fmt.Sprintf(format, a...))
}

// fail records the run's first failure.
func (w *World) fail(err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.err == nil {
		w.err = err
		w.noteLocked("FAILED: %v", err)
	}
}

func (w *World) failed() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.err
}

// Log is what happened, one line each.
func (w *World) Log() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return strings.Join(w.log, "\n")
}

// attachment returns the guest's present way to its disks, waiting for one.
func (w *World) attachment(ctx context.Context) (*attachment, error) {
	stop := context.AfterFunc(ctx, func() {
		w.mu.Lock()
		w.cond.Broadcast()
		w.mu.Unlock()
	})
	defer stop()
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.att == nil && ctx.Err() == nil {
		w.cond.Wait()
	}
	if ctx.Err() != nil {
		return nil, errGone
	}
	return w.att, nil
}

// connect is the guest's connection to a daemon that has just started.
func (w *World) connect(s *source) {
	a := &attachment{src: s, alone: w.alone.Load()}
	for _, d := range s.disks {
		a.entered = append(a.entered, w.history.Answered())
		if w.mutant != NoEntryFlush {
			d.Opened()
		}
	}
	w.mu.Lock()
	w.att = a
	w.cond.Broadcast()
	w.mu.Unlock()
}

// entered is called when a request on a disk was answered: the first one
// proves that whatever the guest can now read is at the replica.
func (w *World) entered(a *attachment, disk uint32) {
	w.mu.Lock()
	m := a.entered[disk]
	a.entered[disk] = nil
	w.mu.Unlock()
	if m == nil {
		return
	}
	w.promised(m, disk, a.alone)
	if w.protected.Load() && w.waited(a.alone) {
		w.history.shipped(m, int(disk)) // whatever the mode
	}
}

// promised notes a FLUSH that was answered, begun when m was answered and w.alone was so. Without
// eyes it covers every disk at the replica; with eyes its own, and of
// an ext4 what the player knows.
func (w *World) promised(m marks, disk uint32, alone int64) {
	w.history.flushed(m, disk)
	switch {
	case !w.protected.Load() || w.c.AsyncAge > 0 || !w.waited(alone) || w.player != nil && disk == 0:
	case w.c.Eyes:
		w.history.shipped(m, int(disk))
	default:
		w.history.shipped(m, -1)
	}
}

func (w *World) flush(a *attachment, disk uint32) error {
	if w.mutant == FlushHere {
		return a.src.eng.SyncImages()
	}
	return a.src.disks[disk].Flush()
}

func (w *World) write(a *attachment, disk uint32, p []byte, off int64, fua bool) error {
	if w.mutant == WritesOvertake && !fua {
		w.wg.Go(func() { _ = a.src.disks[disk].WriteAt(p, off, false) })
		return nil
	}
	return a.src.disks[disk].WriteAt(p, off, fua)
}

// isDown reports that a life of the daemon was ended by the run.
func (w *World) isDown(s *source) bool {
	fenced := s.snapshot().Fenced // before w.mu: whoever saves the state holds its lock, and its hook takes w.mu
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.downed[s] || fenced || s == w.src && (w.srcFS.Stopped() || w.broken && errors.Is(s.eng.Err(), errFsync))
}

// sourceUp starts the source's daemon; a new VM, if there is none.
func (w *World) sourceUp(killed bool) error {
	imgs, err := readImages(w.srcFS, sourceImage, w.c)
	if err != nil {
		return fmt.Errorf("read the source's images: %w", err)
	}
	if killed {
		m := w.history.Answered()
		for d := range imgs {
			if err := w.history.check(d, imgs[d], m[d], true); err != nil {
				return fmt.Errorf("after the source's process was killed: %w", err)
			}
		}
	}
	for d := range imgs {
		if err := w.history.Reboot(d, imgs[d]); err != nil {
			return err
		}
	}
	s, err := startSource(w, w.srcFS)
	if err != nil {
		if images.NoSpace(err) {
			w.makeRoomHere() // as somebody has to
			return errStopped
		}
		if w.srcFS.Stopped() || errors.Is(err, errFsync) {
			return errStopped
		}
		return fmt.Errorf("start the source: %w", err)
	}
	w.src = s
	w.note("source is up, session %d", s.snapshot().Session)
	w.connect(s)
	if w.g == nil {
		w.vm++
		w.g = startGuest(w, w.seed<<16+w.vm)
	}
	return nil
}

var errStopped = errors.New("the machine stopped while it started")

func readImages(fsys images.FS, name func(int) string, c Config) ([][]byte, error) {
	var out [][]byte
	for slot := range c.Disks {
		b, err := images.ReadFile(fsys, name(slot), c.DiskBytes)
		if err != nil {
			return nil, err
		}
		out = append(out, b)
	}
	return out, nil
}

// sourceDown ends the source: its process, or with power its machine and the VM. A
// process that dies after an fsync has failed leaves a page cache that lacks
// something: then the machine is started anew as well. It tells which of the two it was.
func (w *World) sourceDown(power bool) bool {
	power = power || w.srcFS.Fired() > 0
	s := w.src
	if s != nil {
		w.local += s.eng.Stats().LocalFlushes
	}
	w.mu.Lock()
	w.att = nil
	if s != nil {
		w.downed[s] = true
	}
	w.mu.Unlock()
	if power && w.g != nil {
		w.g.stop()
		w.g = nil
		w.player.crashed()
	}
	if power {
		w.srcFS = w.srcFS.Crash()
	} else {
		w.srcFS = w.srcFS.Kill()
	}
	w.hook(w.srcFS)
	w.net.DropAll(power)
	if s != nil {
		s.shut()
	}
	w.src = nil
	return power
}

// replicaUp starts the replica's daemon.
func (w *World) replicaUp() error {
	r, err := startReplica(w, w.repFS)
	if err != nil {
		if w.repFS.Stopped() || errors.Is(err, errFsync) {
			return errStopped
		}
		return fmt.Errorf("start the replica: %w", err)
	}
	w.rep = r
	w.note("replica is up: %+v", r.group.Status().Durable)
	return nil
}

func (w *World) replicaDown(power bool) {
	if power {
		w.repFS = w.repFS.Crash()
	} else {
		w.repFS = w.repFS.Kill()
	}
	w.hook(w.repFS)
	w.net.DropAll(power)
	if w.rep != nil {
		w.rep.shut()
	}
	w.rep = nil
}

// Disaster checks what the replica would come up with if the source were
// lost now and the replica had just lost its power.
func (w *World) Disaster() error {
	protected, promise, played := w.protected.Load(), w.history.Remote(), w.player.promised()
	w.checked++
	f := w.repFS.Fork(int64(w.rng.Uint64() >> 1)).Crash()
	f.SetCapacity(0) // whoever fails over makes room
	r, err := openReplica(w, f)
	if err != nil {
		return fmt.Errorf("open the replica after a power loss: %w", err)
	}
	defer r.shut()
	sealed, err := r.group.Seal()
	switch {
	case err != nil:
		return fmt.Errorf("seal: %w", err)
	case sealed.Torn && w.rotten: // and it says so
		return nil
	case w.rotten: // it may be older
		promise, protected, played = newMarks(w.c.Disks, w.c.DiskBytes), false, nothing
	case strings.Contains(sealed.Lost, "had been durable") || strings.Contains(sealed.Lost, "damaged after"):
		return fmt.Errorf("seal says %q", sealed.Lost)
	}
	if !sealed.Complete && protected {
		return errIncomplete
	}
	if !sealed.Complete {
		return nil
	}
	got, err := content(r.imgs)
	if err != nil {
		return err
	}
	want, err := w.stream.At(sealed.Pos)
	if err != nil {
		return fmt.Errorf("the replica is at %v: %w", sealed.Pos, err)
	}
	for d := range got {
		if !bytes.Equal(got[d], want[d]) {
			return fmt.Errorf("disk %d is not as at %v: %s", d, sealed.Pos, difference(got[d], want[d]))
		}
		if err := w.history.check(d, got[d], promise[d], false); err != nil {
			return fmt.Errorf("the replica at %v: %w", sealed.Pos, err)
		}
	}
	if err := w.player.check(got[0], played); err != nil {
		return fmt.Errorf("the replica at %v: %w", sealed.Pos, err)
	}
	return nil
}

func difference(got, want []byte) string {
	n, first := 0, -1
	for i := 0; i < len(want); i += Sector {
		if !bytes.Equal(got[i:i+Sector], want[i:i+Sector]) {
			if n++; first < 0 {
				first = i
			}
		}
	}
	a, b := readStamp(got[first:first+Sector]), readStamp(want[first:first+Sector])
	return fmt.Sprintf("%d sectors differ, the first is %d: write %d instead of %d", n, first/Sector, a, b)
}
