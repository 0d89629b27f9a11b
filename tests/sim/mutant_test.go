package sim

import (
	"testing"
	"time"
)

// TestMutants proves that the simulator sees what it is there for: each
// mistake must be caught within the given number of seeds. Under the race
// detector only the first few are played.
func TestMutants(t *testing.T) {
	for i, c := range []struct {
		mutant Mutant
		within uint64
		script func(*World) error // nil: misfortunes at random
		tweak  func(*Config)
	}{
		{HalfApply, 10, nil, nil},
		{FlushHere, 10, nil, nil},
		{NoActiveLog, 20, nil, nil},
		{AckBeforeCommit, 20, nil, nil},
		{MarkBeforeImage, 20, nil, nil},
		{FlushThere, 20, nil, nil},
		{UnsyncedLog, 40, nil, nil},
		{ReuseSession, 10, nil, nil},
		{DropRequeue, 20, connectionsDie, nil},
		{EarlyResync, 20, nil, nil},
		{NoHold, 40, nil, nil},
		{NoEntryFlush, 20, strangersRead, nil},
		{ForgetCompare, 20, crashInCompare, nil},
		{NoFloor, 20, rotAndRestart, nil},
		{WritesOvertake, 10, nil, nil},
		{NoBound, 10, cutWhilePlaying, roomy},
		{NoSums, 40, nil, nil},
		{NoFolderSync, 40, nil, nil},
		{Reordered, 10, nil, nil},
		{StaleView, 40, cutWhilePlaying, stalls},
		{ClearPending, 20, cutWhilePlaying, stalls},
		{NoMaps, 20, awayAndBack, continues},
		{ForgetApart, 20, awayAndBack, continues},
		{KeepAlone, 20, awayAndBack, continues},
		{ForgetLineage, 20, nil, fails},
		{EqualByCRC, 5, forges, alone},
		{EarlyRejoin, 20, backAndLost, keeps},
		{LateLog, 20, backAndLost, keeps},
	} {
		if raceEnabled && i >= 1 {
			break
		}
		t.Run(string(c.mutant), func(t *testing.T) {
			for seed := uint64(1); seed <= c.within; seed++ {
				if err, _ := play(t, run{seed: seed, mutant: c.mutant, script: c.script, tweak: c.tweak}); err != nil {
					t.Logf("caught by seed %d of %d: %v", seed, c.within, err)
					return
				}
			}
			t.Errorf("not caught within %d seeds", c.within)
		})
	}
}

// TestScripts plays the mutants' scripts without a mutant.
func TestScripts(t *testing.T) {
	for name, script := range map[string]func(*World) error{"strangersRead": strangersRead, "crashInCompare": crashInCompare,
		"rotAndRestart": rotAndRestart, "endUnheard": endUnheard, "cutWhilePlaying": cutWhilePlaying, "connectionsDie": connectionsDie, "awayAndBack": awayAndBack, "backAndLost": backAndLost, "forges": forges} {
		if raceEnabled && name != "crashInCompare" {
			continue
		}
		for seed := uint64(1); seed <= 2; seed++ {
			tweak := stalls
			if name == "awayAndBack" {
				tweak = continues
			} else if name == "backAndLost" {
				tweak = keeps
			} else if name == "forges" {
				tweak = alone
			}
			if err, log := play(t, run{seed: seed, script: script, tweak: tweak}); err != nil {
				t.Errorf("%s, seed %d: %v\n%s", name, seed, err, log)
			}
		}
	}
}

// strangersRead: a new guest connects while the link is cut and the replica
// lacks what the one before wrote.
func strangersRead(w *World) error {
	for range 5 {
		w.rest(time.Second)
		w.reconnect()
		w.rest(time.Second)
		if err := w.Disaster(); err != nil {
			return err
		}
		w.net.Cut(false)
		time.Sleep(10 * time.Second)
	}
	return nil
}

// roomy lets nothing but the bound of mode async hold clients up.
func roomy(c *Config) {
	c.AsyncAge, c.ThinkTime, c.QueueBytes, c.MaxRegions, c.Failover = 300*time.Millisecond, 60*time.Millisecond, 1<<20, 256, false
}

// continues lets the source go on when the replica is away.
func continues(c *Config) { c.Continue, c.AsyncAge, c.Failover = true, 0, false }

// fails ends a run with a failover.
func fails(c *Config) { c.Failover = true }

// keeps lets it keep what it writes then.
func keeps(c *Config) { c.Continue, c.AsyncAge, c.BacklogBytes, c.Failover = true, 0, 64<<20, false }

// stalls lets its FLUSHes wait.
func stalls(c *Config) { c.Continue, c.Failover = false, false }

// awayAndBack: the link is cut for so long that the source goes on alone, and it dies
// in that time or while it comes back; in between, the source is lost.
func awayAndBack(w *World) error {
	if err := w.await("the first sync ends", w.protected.Load); err != nil {
		return err
	}
	for range 3 {
		w.net.Cut(true)
		time.Sleep(7100 * time.Millisecond) // noticed after 5 s, alone after 2 more
		w.rest(time.Second)
		if w.rng.IntN(2) == 0 {
			w.dieSource(w.rng.IntN(2) == 0)
			if err := w.startUp(func() error { return w.sourceUp(w.killed) }, w.dyingSource); err != nil {
				return err
			}
			w.rest(4 * time.Second)
		}
		w.net.Cut(false)
		w.rest(2 * time.Second)
		if w.rng.IntN(3) == 0 {
			w.dieSource(w.rng.IntN(2) == 0)
			if err := w.startUp(func() error { return w.sourceUp(w.killed) }, w.dyingSource); err != nil {
				return err
			}
		}
		w.rest(8 * time.Second)
		if err := w.Disaster(); err != nil {
			return err
		}
		w.bury()
		if err := w.bringUp(); err != nil {
			return err
		}
	}
	return nil
}

// backAndLost: the source has gone on alone, with a backlog, and is lost, or loses its power, in the
// moment when it and the replica are together again.
func backAndLost(w *World) error {
	if err := w.await("the first sync ends", w.protected.Load); err != nil {
		return err
	}
	for range 5 {
		w.net.Cut(true)
		time.Sleep(7100 * time.Millisecond)
		w.rest(3 * time.Second)
		w.net.Cut(false)
		if err := w.await("they are together", func() bool { return w.src.snapshot().Apart == 0 }); err != nil {
			return err
		}
		if err := w.Disaster(); err != nil {
			return err
		}
		w.rest(100 * time.Millisecond)
		w.killed = !w.sourceDown(true)
		if err := w.sourceUp(w.killed); err != nil {
			return err
		}
		w.rest(time.Second)
		if err := w.await("the source is back", func() bool { s := w.src.eng.Stats(); return s.Ready && !s.Resyncing && s.Session != 0 }); err != nil {
			return err
		}
	}
	return nil
}

// cutWhilePlaying: the link is cut again and again, and the source lost, while an
// ext4 goes on until a FLUSH has to wait, or clients as long as mode async allows.
func cutWhilePlaying(w *World) error {
	for range 30 {
		if w.player == nil && w.c.AsyncAge == 0 {
			return nil // another seed has either
		}
		w.rest(time.Second)
		w.net.Cut(true)
		w.rest(3 * time.Second)
		if err := w.Disaster(); err != nil {
			return err
		}
		w.net.Cut(false)
		time.Sleep(3 * time.Second)
	}
	return nil
}

// endUnheard: the source dies after the replica has acknowledged the end of the first
// sync and before it has noted that itself, with writes on the way.
func endUnheard(w *World) error {
	if err := w.await("the first sync ends", w.protected.Load); err != nil {
		return err
	}
	w.net.Cut(true)
	time.Sleep(2 * time.Second)
	w.sourceDown(false)
	var state sourceState
	if err := loadJSON(w.srcFS, sourceDir+"/group.json", &state); err != nil {
		return err
	}
	state.Complete = false
	if err := saveJSON(w.srcFS, sourceDir+"/group.json", state); err != nil {
		return err
	}
	w.net.Cut(false)
	if err := w.sourceUp(true); err != nil {
		return err
	}
	if err := w.await("the session begins", func() bool { return w.src.eng.Stats().Session != 0 }); err != nil {
		return err
	}
	for range 60 {
		time.Sleep(3 * time.Millisecond)
		if err := w.Disaster(); err != nil {
			return err
		}
	}
	return nil
}

// connectionsDie: data connections die one after another while the guest writes.
func connectionsDie(w *World) error {
	for range 40 {
		w.net.killData()
		w.rest(50 * time.Millisecond)
	}
	return nil
}

// crashInCompare: the source loses its active log while the replica is behind,
// and dies again before the compare that follows has begun.
func crashInCompare(w *World) error {
	w.net.Cut(true)
	w.rest(2 * time.Second)
	w.sourceDown(true)
	if err := w.rotLog(); err != nil {
		return err
	}
	w.killed = false
	if err := w.sourceUp(w.killed); err != nil {
		return err
	}
	w.rest(2 * time.Second)
	w.sourceDown(false)
	w.killed = true
	return nil
}

// rotAndRestart: the replica loses acknowledged epochs without a trace while
// both sites are down.
func rotAndRestart(w *World) error {
	w.hoard = true
	w.replicaDown(false)
	if err := w.replicaUp(); err != nil {
		return err
	}
	time.Sleep(3 * time.Second) // short: a second segment's header would tell what had been durable
	w.sourceDown(true)
	w.replicaDown(true)
	w.killed, w.hoard = false, false
	return w.rotSpool()
}
