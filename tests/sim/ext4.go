package sim

import (
	"bytes"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"sync"
	"time"

	"kagami/ext4j"
	"kagami/ext4j/follow"
	"kagami/tests/ext4cap/script"
)

// recordings are what the kernel's ext4 wrote to small disks.
var recordings = sync.OnceValue(func() []script.Script {
	all, err := script.All()
	if err == nil && len(all) == 0 {
		err = errors.New("no recordings of ext4")
	}
	if err != nil {
		panic(err)
	}
	return all
})

// eyes are what a source of this run makes of ext4.
func (w *World) eyes() ext4j.Eyes {
	e := ext4j.Eyes{Follow: w.c.Eyes, LocalFlushes: w.c.Eyes}
	switch w.mutant {
	case StaleView:
		e.Mutant = follow.StaleView
	case ClearPending:
		e.Mutant = follow.SinceFlush
	}
	return e
}

// nothing is a promise that holds at any time.
const nothing = -1

// A player is the ext4 of a VM on disk 0: it formats the disk, plays a recording, one
// request after the other, and begins again. A VM that lost its power does not go on, since a
// real one would replay its journal; it formats the disk anew. One whose connection or daemon
// was replaced goes on where it was.
//
// Its oracle: what recovery shows of the replica is of the class of the newest FLUSH that
// was answered, or the replica is further on than that.
type player struct {
	w      *World
	s      script.Script
	prefix map[uint64]int // what the disk is after so many steps, by identity

	mu      sync.Mutex
	next    int  // step
	fresh   bool // the disk is to be formatted
	promise int  // steps done when the newest FLUSH that was answered arrived
	tally   tally
}

// tally counts what the oracle of players saw, so that a test can tell that it saw something.
type tally struct {
	flushes, local int   // answered; without waiting for the replica
	checked        int   // disasters with an ext4 that was promised something
	behind         int   // of these, the replica was behind the step of that promise
	compared       int64 // chunks compared while the guest wrote
}

func (t *tally) add(o tally) {
	t.flushes, t.local, t.checked, t.behind = t.flushes+o.flushes, t.local+o.local, t.checked+o.checked, t.behind+o.behind
	t.compared += o.compared
}

func newPlayer(w *World, s script.Script) *player {
	p := &player{w: w, s: s, prefix: map[uint64]int{}, fresh: true, promise: nothing}
	img := bytes.Clone(s.Base)
	id := identity(img)
	p.prefix[id] = 0
	for i, step := range s.Steps {
		for o := 0; o < len(step.Data); o += Sector {
			at := step.Off + int64(o)
			id ^= share(at, img[at:at+Sector]) ^ share(at, step.Data[o:o+Sector])
		}
		copy(img[step.Off:], step.Data)
		p.prefix[id] = i + 1
	}
	return p
}

var hashSeed = maphash.MakeSeed()

// share is one sector's share of a disk's identity.
func share(off int64, sector []byte) uint64 {
	h := maphash.Bytes(hashSeed, sector) ^ uint64(off)*0x9e3779b97f4a7c15
	h ^= h >> 29
	h *= 0xbf58476d1ce4e5b9
	return h ^ h>>32
}

func identity(img []byte) (id uint64) {
	for o := 0; o < len(img); o += Sector {
		id ^= share(int64(o), img[o:o+Sector])
	}
	return id
}

// tally is what the oracles saw in this run.
func (w *World) tally() tally {
	t := tally{compared: w.compared}
	if w.player != nil {
		t = w.player.tally
		t.local, t.compared = int(w.local), w.compared
	}
	return t
}

// promised is the promise made so far.
func (p *player) promised() int {
	if p == nil {
		return nothing
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.promise
}

// crashed: the VM has lost its power.
func (p *player) crashed() {
	if p == nil {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.fresh, p.promise, p.next = true, nothing, 0
}

// check looks at a disk of the replica, which must show what was promised.
func (p *player) check(disk []byte, promise int) error {
	if p == nil || promise == nothing {
		return nil
	}
	at, ok := p.prefix[identity(disk)]
	if !ok {
		return nil // between two recordings, or after a crash
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	p.tally.checked++
	if at >= promise {
		return nil
	}
	p.tally.behind++
	if got, want := p.s.Class[at], p.s.Class[promise]; got != want {
		return fmt.Errorf("the ext4 %q is as after step %d and shows class %d; a FLUSH after step %d was answered, which shows class %d", p.s.Name, at, got, promise, want)
	}
	return nil
}

// play goes on with the recording until the VM ends.
func (p *player) play(g *guest, rng *rand.Rand) {
	for g.ctx.Err() == nil {
		if sleep(g.ctx, time.Duration(rng.Int64N(int64(g.w.c.ThinkTime)))) != nil || g.w.quiet.Load() {
			continue
		}
		g.w.busy.Add(1)
		if p.formatted(g) {
			p.step(g)
		}
		g.w.busy.Add(-1)
	}
}

// formatted makes the disk what the recording begins with, if it is not.
func (p *player) formatted(g *guest) bool {
	p.mu.Lock()
	fresh := p.fresh
	if fresh {
		p.promise = nothing
	}
	p.mu.Unlock()
	if !fresh {
		return true
	}
	const chunk = 16 << 10
	size := int64(len(p.s.Base))
	if !p.change(g, 0, make([]byte, size), func(a *attachment) error { return a.src.disks[0].WriteZeroes(0, size, false, false) }) {
		return false
	}
	for o := int64(0); o < size; o += chunk {
		if b := p.s.Base[o : o+chunk]; !bytes.Equal(b, make([]byte, chunk)) && !p.write(g, o, b) {
			return false
		}
	}
	ok, waited := p.flush(g)
	if !ok {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if g.ctx.Err() != nil {
		return false
	}
	if p.fresh, p.next = false, 0; p.w.c.AsyncAge == 0 && waited {
		p.promise = 0
	}
	return true
}

// step does the next one.
func (p *player) step(g *guest) {
	p.mu.Lock()
	n := p.next
	p.mu.Unlock()
	var ok, waited bool
	if step := p.s.Steps[n]; step.Data != nil {
		ok = p.write(g, step.Off, step.Data)
	} else {
		ok, waited = p.flush(g)
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if !ok || g.ctx.Err() != nil {
		return
	}
	if p.s.Steps[n].Data == nil && p.w.c.AsyncAge == 0 && waited {
		p.promise = n
		p.tally.flushes++
	}
	if p.next = n + 1; p.next == len(p.s.Steps) {
		p.fresh = true
	}
}

func (p *player) flush(g *guest) (ok, waited bool) {
	var m marks
	var alone int64
	_, ok = g.try(0, func(a *attachment) error {
		m, alone = g.w.history.Answered(), g.w.alone.Load()
		return g.w.flush(a, 0)
	})
	if ok {
		g.w.promised(m, 0, alone)
	}
	return ok, g.w.waited(alone)
}

func (p *player) write(g *guest, off int64, b []byte) bool {
	return p.change(g, off, b, func(a *attachment) error { return g.w.write(a, 0, b, off, false) })
}

// change makes a request that leaves b at off.
func (p *player) change(g *guest, off int64, b []byte, do func(a *attachment) error) bool {
	h := g.w.history
	before := h.newest(0, off, int64(len(b)))
	var due marks
	if _, ok := g.try(0, func(a *attachment) error { due = g.w.aged(); return do(a) }); !ok {
		return false
	}
	g.w.within(due)
	h.answerEach(0, off, func(s int) version { return readStamp(b[s*Sector : s*Sector+Sector]) }, before)
	return true
}
