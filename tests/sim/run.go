package sim

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"time"

	"kagami/ext4j"
	"kagami/images"
	"kagami/tests/fault"
)

// Play starts both sites, runs a script, ends all faults, checks that both
// sites come to hold the same, and returns what was broken.
func (w *World) Play(script func(*World) error) error {
	w.note("seed %d: %+v", w.seed, w.c)
	err := w.start()
	if err == nil {
		err = script(w)
	}
	if err == nil && w.c.Failover {
		err = w.failover()
	} else if err == nil {
		err = w.heal()
	}
	if first := w.failed(); first != nil {
		err = first
	}
	if err != nil {
		w.fail(err)
	}
	w.stop()
	return err
}

// misfortunes is the script of a seed: events at random.
func (w *World) misfortunes() error {
	for range w.c.Events {
		if err := w.step(); err != nil {
			return err
		}
		if err := w.failed(); err != nil {
			return err
		}
	}
	return nil
}

func (w *World) start() error {
	if err := w.replicaUp(); err != nil {
		return err
	}
	if err := w.sourceUp(false); err != nil {
		return err
	}
	w.rest(2 * time.Second)
	return nil
}

// stop ends everything that runs.
func (w *World) stop() {
	w.net.Cut(false)
	if w.g != nil {
		w.g.stop()
	}
	w.sourceDown(true)
	w.replicaDown(true)
	w.wg.Wait()
}

// rest lets the run go on for a random time.
func (w *World) rest(most time.Duration) { time.Sleep(time.Duration(w.rng.Int64N(int64(most)))) }

// step is one event and the time after it.
func (w *World) step() error {
	if err := w.event(); err != nil {
		return err
	}
	w.rest([]time.Duration{20 * time.Millisecond, 300 * time.Millisecond, 2 * time.Second, 6 * time.Second}[w.rng.IntN(4)])
	if err := w.inBounds(); err != nil {
		return err
	}
	w.bury()
	w.noticeRot()
	if w.rng.IntN(2) == 0 || w.player != nil {
		if err := w.Disaster(); err != nil {
			return fmt.Errorf("disaster: %w", err)
		}
	}
	return w.bringUp()
}

// bury ends the sites whose machine has stopped meanwhile.
func (w *World) bury() {
	if w.src != nil && w.srcFS.Stopped() {
		power := w.rng.IntN(2) == 0
		w.note("source has stopped, power loss: %v", power)
		w.killed = !w.sourceDown(power)
	}
	if w.rep != nil && w.repFS.Stopped() {
		power := w.rng.IntN(2) == 0
		w.note("replica has stopped, power loss: %v", power)
		w.replicaDown(power)
	}
	w.buryBroken()
}

// event is one misfortune.
func (w *World) event() error {
	switch k := w.rng.IntN(21); {
	case k < 3:
		w.dieSource(w.rng.IntN(2) == 0)
	case k < 6:
		w.dieReplica(w.rng.IntN(2) == 0)
	case k < 7:
		w.note("both sites lose their power")
		w.dieSource(true)
		w.dieReplica(true)
	case k < 8:
		return w.cleanRestart()
	case k < 10:
		w.note("the link is cut")
		w.net.Cut(true)
	case k < 12:
		for range 1 + w.rng.IntN(4) {
			if w.net.Kill() {
				w.note("a connection dies")
			}
			w.rest(50 * time.Millisecond)
		}
	case k < 14:
		w.reconnect()
	case k < 15:
		return w.rot()
	case k < 16 && w.c.FillsHere:
		w.fillHere()
	case k < 17:
		w.fill()
	case k < 19:
		w.breakSync()
	case w.c.Jumps:
		w.jump()
	default:
		w.note("nothing happens")
	}
	return nil
}

// jump: the clocks are ahead by minutes in a moment in which the guest did nothing. (Clocks that
// go back cannot be had in a bubble; what depends on wall clocks is tried where it is.)
func (w *World) jump() {
	w.quiet.Store(true)
	defer w.quiet.Store(false)
	by := time.Minute + time.Duration(w.rng.Int64N(int64(10*time.Minute)))
	w.note("the clocks jump by %v", by)
	time.Sleep(by)
}

// inBounds checks that nothing has grown beyond what was configured, but for what requests that
// run at the same time may add.
func (w *World) inBounds() error {
	if w.src != nil {
		s, slack := w.src.eng.Stats(), int64(w.c.Workers+2)*(120*Sector+1024)
		if s.QueueBytes > w.c.QueueBytes+slack {
			return fmt.Errorf("the queue has %d bytes, its limit is %d", s.QueueBytes, w.c.QueueBytes)
		}
		if most := w.c.BacklogBytes + 1<<20 + slack; s.BacklogBytes > most {
			return fmt.Errorf("the backlog has %d bytes, its limit is %d", s.BacklogBytes, w.c.BacklogBytes)
		}
		if n := len(w.src.log.Regions()); n > w.c.MaxRegions {
			return fmt.Errorf("the active log names %d regions, its limit is %d", n, w.c.MaxRegions)
		}
	}
	if w.rep != nil {
		if r := w.rep.group.Status(); r.SpoolUsed > r.SpoolMax {
			return fmt.Errorf("the spool has %d bytes, its limit is %d", r.SpoolUsed, r.SpoolMax)
		}
	}
	return nil
}

// reconnect replaces the guest by another one beside the same daemon, as when
// the VM is stopped and started.
func (w *World) reconnect() {
	if w.src == nil || w.g == nil || w.srcFS.Stopped() {
		return
	}
	w.quiet.Store(true)
	defer w.quiet.Store(false)
	for range 40 {
		if w.busy.Load() == 0 {
			break
		}
		time.Sleep(50 * time.Millisecond)
	}
	if w.busy.Load() != 0 {
		return // its requests wait for the replica
	}
	if w.rng.IntN(2) == 0 {
		w.note("the link is cut")
		w.net.Cut(true)
	}
	w.note("another guest connects")
	w.g.stop()
	for _, d := range w.src.disks {
		d.Closed()
	}
	w.connect(w.src)
	w.vm++
	w.g = startGuest(w, w.seed<<16+w.vm)
}

// rot flips bits: in the replica's spool, or in the source's active log while
// it is down. Acknowledged epochs may be lost then, until the replica was compared.
func (w *World) rot() error {
	if w.src == nil && !w.srcFS.Stopped() {
		return w.rotLog()
	}
	return w.rotSpool()
}

func (w *World) rotSpool() error {
	names, err := w.repFS.ReadDir(replicaDir + "/spool")
	if errors.Is(err, fault.ErrStopped) {
		return nil // just now
	}
	if err != nil {
		return err
	}
	w.note("the spool rots")
	w.rotten, w.noticed = true, false
	for _, name := range names {
		if w.mutant == NoSums {
			w.rotUnnoticed(replicaDir + "/spool/" + name)
			continue
		}
		if _, err := w.repFS.FlipBit(replicaDir+"/spool/"+name, 4096, 64<<10); err != nil {
			return err
		}
	}
	return nil
}

func (w *World) rotLog() error {
	b, err := w.srcFS.ReadFile(activeLog)
	if errors.Is(err, fs.ErrNotExist) {
		return nil // there is none yet
	}
	if err != nil {
		return err
	}
	w.note("the active log rots")
	for off := 0; off < len(b); off += 4096 { // each block: rot in a snapshot alone looks like a torn one
		if _, err := w.srcFS.FlipBit(activeLog, int64(off), 4096); err != nil {
			return err
		}
	}
	return nil
}

// noticeRot ends the time in which promises are not checked: the replica has
// said what it lost, and has been compared since.
func (w *World) noticeRot() {
	if w.rotten && w.rep != nil {
		w.noticed = w.noticed || w.rep.group.Status().Damaged != ""
	}
	if w.rotten && w.noticed && w.recovered() {
		w.rotten = false
	}
}

// recovered reports that the replica has everything and knows of no damage.
func (w *World) recovered() bool {
	if w.rep == nil || w.src == nil {
		return false
	}
	r, s := w.rep.group.Status(), w.src.eng.Stats()
	return r.Damaged == "" && r.Err == nil && r.Applied == r.Durable && !s.Resyncing && s.Session == r.Session && s.Ack+1 == s.Next && r.Durable == s.Ack
}

// atSomeStep lets a machine run to a random step of its file system, where it stops.
func (w *World) atSomeStep(stopAfter func(int64), stopped func() bool) {
	if w.rng.IntN(4) == 0 {
		return
	}
	stopAfter(1 + w.rng.Int64N([]int64{3, 30, 300}[w.rng.IntN(3)]))
	for range 50 {
		if time.Sleep(20 * time.Millisecond); stopped() {
			return
		}
	}
}

func (w *World) dieSource(power bool) {
	if w.src == nil {
		return
	}
	// What fails from the moment the machine stops is no failure of the run.
	w.mu.Lock()
	w.downed[w.src] = true
	w.mu.Unlock()
	w.atSomeStep(w.srcFS.StopAfter, w.srcFS.Stopped)
	w.note("source dies, power loss: %v", power)
	w.killed = !w.sourceDown(power)
}

func (w *World) dieReplica(power bool) {
	if w.rep == nil {
		return
	}
	w.atSomeStep(w.repFS.StopAfter, w.repFS.Stopped)
	w.note("replica dies, power loss: %v", power)
	w.replicaDown(power)
}

// cleanRestart stops the source in good order and starts it again.
func (w *World) cleanRestart() error {
	if w.src == nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	err := w.src.drain(ctx)
	w.note("source is stopped cleanly: %v", err)
	if errors.Is(err, errFsync) || w.srcFS.Stopped() {
		if w.bury(); w.src != nil { // its state could not be written: it ends all the same
			w.killed = !w.sourceDown(false)
		}
		return nil
	}
	if err != nil && !errors.Is(err, context.DeadlineExceeded) && !images.NoSpace(err) && !errors.Is(err, ext4j.ErrApart) && !w.linkTrouble() {
		return fmt.Errorf("clean stop: %w", err)
	}
	w.killed = !w.sourceDown(false)
	return nil
}

// linkTrouble reports that a clean stop could not be expected to succeed.
func (w *World) linkTrouble() bool {
	return w.rep == nil || w.net.isCut() || w.src.eng.Stats().Session == 0
}

// bringUp repairs some of what is broken.
func (w *World) bringUp() error {
	if w.net.isCut() && w.rng.IntN(3) > 0 {
		w.note("the link is back")
		w.net.Cut(false)
	}
	if w.full && (w.rep == nil || w.rng.IntN(2) == 0) {
		w.makeRoom()
	}
	if w.fullHere && (w.src == nil || w.rng.IntN(2) == 0) {
		w.makeRoomHere()
	}
	if w.rep == nil && w.rng.IntN(4) > 0 {
		if err := w.startUp(w.replicaUp, w.dyingReplica); err != nil {
			return err
		}
	}
	if w.src == nil && w.rng.IntN(4) > 0 {
		if err := w.startUp(func() error { return w.sourceUp(w.killed) }, w.dyingSource); err != nil {
			return err
		}
	}
	return nil
}

// startUp starts a site; sometimes it stops while it starts, and is started again.
func (w *World) startUp(up func() error, die func(power bool)) error {
	if w.rng.IntN(4) == 0 {
		die(w.rng.IntN(2) == 0)
	}
	for {
		err := up()
		if !errors.Is(err, errStopped) {
			return err
		}
		w.note("stopped while starting")
		die(w.rng.IntN(2) == 0)
	}
}

func (w *World) dyingSource(power bool) {
	if w.srcFS.Stopped() {
		w.killed = !w.sourceDown(power) && w.killed
		return
	}
	w.srcFS.StopAfter(1 + w.rng.Int64N(40))
}

func (w *World) dyingReplica(power bool) {
	if w.repFS.Stopped() {
		w.replicaDown(power)
		return
	}
	w.repFS.StopAfter(1 + w.rng.Int64N(60))
}

// never is a number of steps that no run takes.
const never = 1 << 40

// patience is how long, at most, everything takes once nothing goes wrong any more.
const patience = 10 * time.Minute

// heal ends all faults and checks that both sites come to hold the same.
func (w *World) heal() error {
	w.note("healing")
	w.net.Cut(false)
	w.makeRoom()
	w.makeRoomHere()
	w.srcFS.StopAfter(never)
	w.repFS.StopAfter(never)
	w.bury()
	w.srcFS.Forgive()
	w.repFS.Forgive()
	if w.rep == nil {
		if err := w.replicaUp(); err != nil {
			return err
		}
	}
	if w.src == nil {
		if err := w.sourceUp(w.killed); err != nil {
			return err
		}
	}
	w.rest(5 * time.Second)
	if w.rng.IntN(2) == 0 && w.net.Kill() {
		w.note("a connection dies")
		w.rest(time.Second)
	}
	if err := w.verify(); err != nil {
		return err
	}
	w.quiet.Store(true)
	for _, what := range []struct {
		name string
		done func() bool
	}{
		{"the guest's requests are answered", func() bool { return w.busy.Load() == 0 }},
		{"the first sync ends", w.protected.Load},
		{"everything is acknowledged", func() bool { s := w.src.eng.Stats(); return !s.Resyncing && s.Ack+1 == s.Next }},
	} {
		if err := w.await(what.name, what.done); err != nil {
			return err
		}
	}
	if err := w.await("the replica is whole", w.recovered); err != nil {
		return err
	}
	w.noticeRot()
	if err := w.Disaster(); err != nil {
		return fmt.Errorf("after healing: %w", err)
	}
	return w.equal()
}

// verify compares both sites while the guest writes on: where nothing speaks against
// the replica, nothing may differ.
func (w *World) verify() error {
	f := w.src.snapshot()
	if !f.Complete || f.Compare != "" || f.Apart != 0 || w.rotten || w.rep.group.Status().Damaged != "" {
		return nil
	}
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	sess, err := w.src.link.Session(ctx)
	if err != nil {
		return nil
	}
	v, err := w.src.eng.Verify(ctx, w.src.eng.WholeRanges(), w.src.hasher(sess), ext4j.VerifyOptions{})
	if err != nil {
		w.note("the comparison was broken off: %v", err) // by a resync, or a link that is lost
	}
	if f := w.src.snapshot(); v.Differ > 0 && f.Compare == "" && f.Apart == 0 && !w.src.eng.Stats().Resyncing {
		return fmt.Errorf("a comparison found %d of %d chunks different", v.Differ, v.Compared)
	}
	w.compared += v.Compared
	return nil
}

func (w *World) await(what string, done func() bool) error {
	for began := time.Now(); time.Since(began) < patience; time.Sleep(20 * time.Millisecond) {
		if done() {
			return nil
		}
		if err := w.failed(); err != nil {
			return err
		}
		if err := w.revive(); err != nil {
			return err
		}
		if err := w.src.eng.Err(); err != nil {
			return fmt.Errorf("the source ended: %w", err)
		}
		if err := w.rep.group.Status().Err; err != nil {
			return fmt.Errorf("the replica ended: %w", err)
		}
	}
	return fmt.Errorf("%v later it is still not so that %s: %d requests wait; source %+v; replica %+v; link %+v",
		patience, what, w.busy.Load(), w.src.eng.Stats(), w.rep.group.Status(), w.src.link.Status())
}

// revive restarts a replica that an fsync has ended which had failed before: what prepares segments of
// a spool ahead is heard of only when one of them is needed.
func (w *World) revive() error {
	err := w.rep.group.Status().Err
	if !errors.Is(err, errFsync) {
		return nil
	}
	w.note("replica has failed: %v", err)
	w.repFS.Forgive()
	w.replicaDown(w.rng.IntN(2) == 0)
	return w.replicaUp()
}

// equal compares the images of both sites when everything is acknowledged.
func (w *World) equal() error {
	if err := w.await("everything is applied", func() bool { s := w.rep.group.Status(); return s.Applied == s.Durable }); err != nil {
		return err
	}
	here, err := readImages(w.srcFS, sourceImage, w.c)
	if err != nil {
		return err
	}
	there, err := readImages(w.repFS, replicaImage, w.c)
	if err != nil {
		return err
	}
	for d := range here {
		if !bytes.Equal(here[d], there[d]) {
			return fmt.Errorf("both sites are drained, and disk %d is not equal: %s", d, difference(there[d], here[d]))
		}
	}
	return nil
}
