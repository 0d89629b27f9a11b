package sim

import (
	"errors"

	"kagami/tests/fault"
)

// errFsync is what a broken fsync returns.
var errFsync = errors.New("the fsync fails")

// fill leaves the replica's disk little room, until makeRoom.
func (w *World) fill() {
	const plenty = 1 << 40
	w.repFS.SetCapacity(plenty)
	free, err := w.repFS.Free(replicaDir)
	if err != nil {
		return // it has stopped just now
	}
	left := w.rng.Int64N(1 << 20)
	w.note("the replica's disk is full but for %d bytes", left)
	w.full = true
	w.repFS.SetCapacity(plenty - free + left)
}

func (w *World) makeRoom() {
	if w.full {
		w.note("there is room again")
	}
	w.full = false
	w.repFS.SetCapacity(0)
}

// fillHere leaves the source's disk little room, until makeRoomHere.
func (w *World) fillHere() {
	const plenty = 1 << 40
	w.srcFS.SetCapacity(plenty)
	free, err := w.srcFS.Free(sourceDir)
	if err != nil {
		return // it has stopped just now
	}
	left := w.rng.Int64N(200 << 10)
	w.note("the source's disk is full but for %d bytes", left)
	w.mu.Lock()
	defer w.mu.Unlock()
	w.fullHere, w.wasFull = true, true
	w.srcFS.SetCapacity(plenty - free + left)
}

func (w *World) makeRoomHere() {
	if w.fullHere {
		w.note("there is room again at the source")
	}
	w.fullHere = false
	w.srcFS.SetCapacity(0)
}

// hasBeenFull tells whether a request may have met a full disk at the source.
func (w *World) hasBeenFull() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.wasFull
}

// breakSync lets one of the next fsyncs of a site fail.
func (w *World) breakSync() {
	x := fault.Fault{Op: fault.OpSync, Nth: 1 + w.rng.IntN(20), Err: errFsync}
	if w.rng.IntN(2) == 0 {
		w.note("fsync %d of the replica is to fail", x.Nth)
		w.repFS.Inject(x)
		return
	}
	w.note("fsync %d of the source is to fail", x.Nth)
	w.mu.Lock()
	w.broken = true
	w.mu.Unlock()
	w.srcFS.Inject(x)
}

// buryBroken restarts a site that a failed fsync has ended. What the source's page cache
// held is suspect then, and its VM has seen errors: both are started anew.
func (w *World) buryBroken() {
	if w.rep != nil && w.rep.group.Status().Err != nil && !w.repFS.Stopped() {
		power := w.rng.IntN(2) == 0
		w.note("replica has failed: %v; power loss: %v", w.rep.group.Status().Err, power)
		w.replicaDown(power)
	}
	if w.src != nil && errors.Is(w.src.eng.Err(), errFsync) {
		w.note("source has failed: %v", w.src.eng.Err())
		w.sourceDown(true)
		w.killed = false
	}
}
