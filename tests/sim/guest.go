package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
)

// A guest is a VM with several threads that write to its disks. It outlives
// the source's daemon (its requests are then made again, as QEMU does after a
// reconnect), not the source's power.
type guest struct {
	w    *World
	ctx  context.Context // ends with the VM
	stop context.CancelFunc
}

// attachment is one connection of the guest to one life of the daemon.
type attachment struct {
	src     *source
	alone   int64   // what World.alone was then
	entered []marks // per disk: what was answered when the guest connected; nil once checked
}

func startGuest(w *World, seed uint64) *guest {
	g := &guest{w: w}
	g.ctx, g.stop = context.WithCancel(context.Background())
	for i := range w.c.Workers {
		rng := rand.New(rand.NewPCG(seed, uint64(i)))
		w.wg.Go(func() { g.work(rng) })
	}
	if w.player != nil {
		rng := rand.New(rand.NewPCG(seed, 1<<32))
		w.wg.Go(func() { w.player.play(g, rng) })
	}
	return g
}

func (g *guest) work(rng *rand.Rand) {
	for g.ctx.Err() == nil {
		if sleep(g.ctx, time.Duration(rng.Int64N(int64(g.w.c.ThinkTime)))) != nil || g.w.quiet.Load() {
			continue
		}
		g.w.busy.Add(1)
		g.request(rng)
		g.w.busy.Add(-1)
	}
}

// request makes one request and waits for its answer.
func (g *guest) request(rng *rand.Rand) {
	disk := uint32(rng.IntN(g.w.c.Disks))
	if g.w.player != nil {
		disk = max(disk, 1) // disk 0 has its own writer
	}
	off, n := g.place(rng)
	switch k := rng.IntN(20); {
	case k < 3:
		g.flush(disk)
	case k < 4:
		g.zero(rng, disk, off, n)
	case k < 6:
		g.read(disk, off, n)
	default:
		g.write(disk, off, n, rng.IntN(10) == 0)
	}
}

// place picks a range: often a hot one, sometimes a long one.
func (g *guest) place(rng *rand.Rand) (off, n int64) {
	sectors := g.w.c.DiskBytes / Sector
	n = 1 + rng.Int64N(16)
	if rng.IntN(20) == 0 {
		n = 1 + rng.Int64N(120)
	}
	span := sectors - n
	if rng.IntN(2) == 0 {
		span = min(span, 200)
	}
	return rng.Int64N(span+1) * Sector, n * Sector
}

// try runs a request against the present daemon, and again against the next
// one, until it is answered or the VM is gone. ok says that it was answered.
func (g *guest) try(disk uint32, f func(a *attachment) error) (a *attachment, ok bool) {
	for {
		a, err := g.w.attachment(g.ctx)
		if err != nil {
			return nil, false
		}
		err = f(a)
		if g.ctx.Err() != nil {
			return nil, false
		}
		if err == nil {
			g.w.entered(a, disk)
			return a, true
		}
		if images.NoSpace(err) && g.w.hasBeenFull() { // QEMU pauses the VM; when there is room, it goes on with the request
			if sleep(g.ctx, 100*time.Millisecond) != nil {
				return nil, false
			}
			continue
		}
		if !g.w.isDown(a.src) {
			g.w.fail(fmt.Errorf("a request failed although the source is up: %w", err))
			return nil, false
		}
		if sleep(g.ctx, 5*time.Millisecond) != nil {
			return nil, false
		}
	}
}

func (g *guest) write(disk uint32, off, n int64, fua bool) {
	op := g.w.history.Op()
	p := make([]byte, n)
	stamp(p, op)
	g.change(disk, off, n, op, fua, func(a *attachment) error { return g.w.write(a, disk, p, off, fua) })
}

func (g *guest) zero(rng *rand.Rand, disk uint32, off, n int64) {
	trim, noHole := rng.IntN(2) == 0, rng.IntN(2) == 0
	g.change(disk, off, n, zeros, false, func(a *attachment) error {
		if trim {
			return a.src.disks[disk].Trim(off, n, false)
		}
		return a.src.disks[disk].WriteZeroes(off, n, noHole, false)
	})
}

func (g *guest) change(disk uint32, off, n int64, v version, fua bool, do func(a *attachment) error) {
	h := g.w.history
	before := h.newest(disk, off, n)
	var m marks
	var from epochMark
	var due marks
	var alone int64
	a, ok := g.try(disk, func(a *attachment) error {
		now := markOf(a.src)
		if m == nil || now.session != from.session { // a try that found no space may have left records
			from = now
		}
		m, due, alone = h.Answered(), g.w.aged(), g.w.alone.Load()
		return do(a)
	})
	if !ok {
		return
	}
	g.w.within(due)
	h.answer(disk, off, v, before)
	if to := markOf(a.src); v != zeros && to.session == from.session {
		if err := g.w.stream.Answered(v, bounds{to.session, from.last, to.last}); err != nil {
			g.w.fail(err)
		}
	}
	if fua {
		h.answerInto(m, disk, off, v, before)
		g.w.promised(m, disk, alone)
	}
}

// epochMark is the newest record that has been given a number.
type epochMark struct {
	session uint64
	last    epoch.LSN
}

func markOf(s *source) epochMark {
	st := s.eng.Stats()
	return epochMark{st.Session, st.Next - 1}
}

func (g *guest) flush(disk uint32) {
	var m marks
	var alone int64
	if _, ok := g.try(disk, func(a *attachment) error {
		m, alone = g.w.history.Answered(), g.w.alone.Load()
		return g.w.flush(a, disk)
	}); ok {
		g.w.promised(m, disk, alone)
	}
}

func (g *guest) read(disk uint32, off, n int64) {
	p := make([]byte, n)
	var m marks
	if _, ok := g.try(disk, func(a *attachment) error {
		m = g.w.history.Answered()
		return a.src.disks[disk].ReadAt(p, off)
	}); !ok {
		return
	}
	for i := int64(0); i < n; i += Sector {
		if err := g.w.history.checkSector(disk, (off+i)/Sector, p[i:i+Sector], m[disk][(off+i)/Sector]); err != nil {
			g.w.fail(fmt.Errorf("the guest read: %w", err))
		}
	}
}

var errGone = errors.New("the guest is gone")
