package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/activelog"
	"kagami/images"
)

// mover plays disasters, failovers, returns, switchovers, kills and restarts in a
// random order over one VM, and knows what every byte of its disks must be.
type mover struct {
	t    *testing.T
	rng  *rand.Rand
	p    *pair
	here *site // where the VM runs
	away *site
	want map[string][]byte
	said []string
}

func (m *mover) say(format string, a ...any) { m.said = append(m.said, fmt.Sprintf(format, a...)) }

// TestMovesSeeds: whatever the order, the VM always finds all that was acknowledged
// to it, and when it is protected both sites are equal byte for byte.
// KAGAMI_MOVES=N plays N seeds, KAGAMI_MOVES_SEED is the first.
func TestMovesSeeds(t *testing.T) {
	seeds, first := 3, 1
	if raceEnabled { // the other seeds are played in the step of the crash tests
		seeds = 1
	}
	for name, v := range map[string]*int{"KAGAMI_MOVES": &seeds, "KAGAMI_MOVES_SEED": &first} {
		if text := os.Getenv(name); text != "" {
			n, err := strconv.Atoi(text)
			must(t, err)
			*v = n
		}
	}
	for seed := first; seed < first+seeds; seed++ {
		t.Run(fmt.Sprint(seed), func(t *testing.T) { playMoves(t, uint64(seed)) })
	}
}

func playMoves(t *testing.T, seed uint64) {
	p := newPair(t).up()
	m := &mover{t: t, rng: rand.New(rand.NewPCG(seed, 7)), p: p, here: p.main, away: p.dr,
		want: map[string][]byte{"vda": randomBytes(seed, 20<<20), "vdb": randomBytes(seed+1, diskSize)}}
	defer func() {
		if t.Failed() {
			t.Logf("seed %d: %q", seed, m.said)
		}
	}()
	p.main.addVMWith(testVM, m.want)
	p.main.mustProtect(testVM)
	for range 8 {
		m.write(1 + m.rng.IntN(4))
		switch m.rng.IntN(8) {
		case 0:
			m.bounce(m.here)
		case 1:
			m.bounce(m.away)
		case 2:
			m.move()
		case 3, 4:
			m.outage()
		default:
			m.disaster()
		}
		m.check()
	}
}

func (m *mover) vm() *fakeVM { return m.here.host.vm(testVM) }

func (m *mover) other(s *site) *site {
	if s == m.p.main {
		return m.p.dr
	}
	return m.p.main
}

// write writes n pieces and waits for their flushes.
func (m *mover) write(n int) {
	m.t.Helper()
	for range n {
		for target, content := range m.want {
			size := min(int64(len(content)), int64(1+m.rng.IntN(200))*512)
			off := m.rng.Int64N((int64(len(content))-size)/512+1) * 512
			b := randomBytes(m.rng.Uint64(), int(size))
			must(m.t, m.vm().disk(target).write(b, off))
			next := bytes.Clone(content)
			copy(next[off:], b)
			m.want[target] = next
		}
	}
}

// bounce stops or kills a site's daemon and starts it again; the VM runs on.
func (m *mover) bounce(s *site) {
	m.t.Helper()
	if m.rng.IntN(2) == 0 {
		m.say("restart of %s", s.name)
		s.stop()
	} else {
		m.say("kill of %s", s.name)
		s.kill()
	}
	m.p.start(s, m.other(s))
	m.here.awaitState(testVM, "streaming")
}

// move is a switchover, or a failback where that is one.
func (m *mover) move() {
	m.t.Helper()
	move := m.here.switchover
	if m.here == m.p.dr && m.rng.IntN(2) == 0 {
		move = m.here.failback
	}
	m.say("move from %s to %s", m.here.name, m.away.name)
	if _, err := move(control.SwitchoverRequest{VM: testVM}); err != nil {
		m.t.Fatal(err)
	}
	m.here, m.away = m.away, m.here
	m.here.awaitState(testVM, "streaming")
}

// outage takes the replica's site away for a while, in which the VM goes on. It may end
// with the loss of the VM's site: what was written since the outage began is lost then.
func (m *mover) outage() {
	m.t.Helper()
	m.here.continues()
	m.say("outage of %s", m.away.name)
	if m.rng.IntN(2) == 0 {
		m.away.stop()
	} else {
		m.away.kill()
	}
	before := maps.Clone(m.want)
	m.write(1 + m.rng.IntN(3))
	m.here.awaitState(testVM, string(Disconnected))
	if m.rng.IntN(2) == 0 {
		m.say("kill of %s while it is alone", m.here.name)
		m.here.kill()
		m.p.start(m.here, m.away)
		m.write(1)
	}
	if m.rng.IntN(3) == 0 {
		m.say("loss of %s while it is alone", m.here.name)
		m.want = before
		m.here.kill()
		m.vm().destroy()
		m.scribble(m.here)
		m.p.start(m.away, m.here)
		m.takeOver()
		return
	}
	m.p.start(m.away, m.here)
	for range m.rng.IntN(3) {
		time.Sleep(time.Duration(m.rng.IntN(40)) * time.Millisecond)
		victim := m.away
		if m.rng.IntN(2) == 0 {
			victim = m.here
		}
		m.say("kill of %s during the resync", victim.name)
		victim.kill()
		m.p.start(victim, m.other(victim))
		m.write(1)
	}
	m.here.awaitState(testVM, "streaming")
}

// disaster loses the site where the VM runs, fails over, and takes the lost site
// back; either daemon may be killed while that is under way.
func (m *mover) disaster() {
	m.t.Helper()
	m.say("disaster at %s", m.here.name)
	m.here.kill()
	m.vm().destroy()
	m.scribble(m.here)
	m.takeOver()
}

// takeOver fails over from a lost site and takes that back.
func (m *mover) takeOver() {
	m.t.Helper()
	m.away.awaitState(testVM, "waiting")
	_, err := m.away.failover(control.FailoverRequest{VM: testVM})
	must(m.t, err)
	m.here, m.away = m.away, m.here
	m.write(2)
	if m.rng.IntN(3) == 0 {
		m.say("kill of %s before the return", m.here.name)
		m.here.kill()
		m.p.start(m.here, m.away)
	}
	m.p.start(m.away, m.here)
	m.away.awaitState(testVM, "fenced")
	m.reprotect()
}

// scribble changes the image of a dead source where its active log allows that:
// writes that were lost, and such that nobody heard of.
func (m *mover) scribble(s *site) {
	m.t.Helper()
	f, err := loadGroupFile(images.OS{}, s.path("state", "groups", testVM))
	must(m.t, err)
	log, regions, err := activelog.Open(images.OS{}, s.path("state", "groups", testVM, "active.log"), activelog.Options{Group: f.ID, RegionBytes: regionBytes, MaxRegions: 1 << 10})
	must(m.t, err)
	must(m.t, log.Close())
	_, apart, err := (&group{dir: s.path("state", "groups", testVM), d: &Daemon{fs: images.OS{}}}).apartRegions(f)
	must(m.t, err)
	for slot, indices := range apart {
		for _, i := range indices {
			regions = append(regions, activelog.Region{Disk: slot, Index: i})
		}
	}
	for _, r := range regions {
		d := f.Disks[r.Disk]
		file, err := os.OpenFile(d.Image, os.O_RDWR, 0)
		must(m.t, err)
		b := randomBytes(m.rng.Uint64(), 4096)
		if m.rng.IntN(2) == 0 {
			b = make([]byte, 65536)
		}
		off := int64(r.Index)*regionBytes + m.rng.Int64N(8)*65536
		if off+int64(len(b)) <= d.Size {
			_, err = file.WriteAt(b, off)
			must(m.t, err)
		}
		must(m.t, file.Close())
	}
	m.say("%d regions scribbled over", len(regions))
}

// reprotect takes the lost site back, beside a guest that writes, with kills.
func (m *mover) reprotect() {
	m.t.Helper()
	var wg sync.WaitGroup
	for range m.rng.IntN(3) {
		victim := m.p.main
		if m.rng.IntN(2) == 0 {
			victim = m.p.dr
		}
		m.say("kill of %s during the return", victim.name)
		ctx, cancel := context.WithCancel(context.Background())
		wg.Go(func() {
			err := m.here.control.Reprotect(ctx, control.ReprotectRequest{Group: testVM}, func(control.Event) {})
			_ = err // it is asked again below
		})
		time.Sleep(time.Duration(m.rng.IntN(60)) * time.Millisecond)
		victim.kill()
		cancel()
		wg.Wait()
		m.p.start(victim, m.other(victim))
	}
	m.p.awaitLinks()
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := m.here.reprotect(control.ReprotectRequest{Group: testVM})
		if err == nil {
			break
		}
		var e *control.Error
		if !errors.As(err, &e) || time.Now().After(end) {
			m.t.Fatalf("reprotect: %v", err)
		}
	}
	m.say("reprotected")
}

// check compares what the VM reads, and what both images hold, with what must be there.
func (m *mover) check() {
	m.t.Helper()
	m.here.awaitState(testVM, "streaming")
	for target, want := range m.want {
		got, err := m.vm().disk(target).content()
		must(m.t, err)
		if i := firstDifference(got, want); i >= 0 {
			m.t.Fatalf("disk %s of the VM at %s differs at byte %d", target, m.here.name, i)
		}
	}
	if g := m.here.group(testVM); !g.Protected {
		m.t.Fatalf("not protected: %+v", g)
	}
	m.write(1) // its flush: everything before it is at the replica
	for target, want := range m.want {
		for _, s := range []*site{m.p.main, m.p.dr} {
			m.sameImage(s, target, want)
		}
	}
}

func (m *mover) sameImage(s *site, target string, want []byte) {
	m.t.Helper()
	for _, df := range s.d.find(testVM).snapshot().Disks {
		if df.Name != target {
			continue
		}
		at := -1
		for end := time.Now().Add(10 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
			if at = firstDifference(readFile(m.t, df.Image), want); at < 0 {
				return
			}
		}
		m.t.Fatalf("image of disk %s at %s differs at byte %d", target, s.name, at)
	}
}

func firstDifference(a, b []byte) int {
	if bytes.Equal(a, b) {
		return -1
	}
	for i := range min(len(a), len(b)) {
		if a[i] != b[i] {
			return i
		}
	}
	return min(len(a), len(b))
}
