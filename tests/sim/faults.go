package sim

import (
	"errors"

	"kagami/tests/fault"
)

// errFsync is what a broken fsync returns.
var errFsync = errors.New("the fsync fails")

// leave leaves a machine's disk at most so much room, or less, at random; false: it has stopped just now.
func (w *World) leave(f *fault.FS, dir string, most int64) (left int64, ok bool) {
	const plenty = 1 << 40
	f.SetCapacity(plenty)
	free, err := f.Free(dir)
	if err != nil {
		return 0, false
	}
	left = w.rng.Int64N(most)
	f.SetCapacity(plenty - free + left)
	return left, true
}

// fill leaves the replica's disk little room, until makeRoom.
func (w *World) fill() {
	if left, ok := w.leave(w.repFS, replicaDir, 1<<20); ok {
		w.note("the replica's disk is full but for %d bytes", left)
		w.full = true
	}
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
	w.mu.Lock()
	w.wasFull = true // before a request can meet it
	w.mu.Unlock()
	if left, ok := w.leave(w.srcFS, sourceDir, 200<<10); ok {
		w.note("the source's disk is full but for %d bytes", left)
		w.fullHere = true
	}
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
