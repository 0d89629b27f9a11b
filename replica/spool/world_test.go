package spool

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

var testGroup = epoch.UUID{1, 2, 3}

// world is a spool and a mark on a file system that crashes, and what must be found after it.
type world struct {
	t       *testing.T
	seed    int64
	rng     *rand.Rand
	fs      *fault.FS
	o       Options
	sp      *Spool
	mark    *Mark
	lineage epoch.UUID
	session uint64

	log       map[epoch.LSN]epoch.Record // appended and not dropped; the last one perhaps not whole
	next      epoch.LSN
	closed    epoch.LSN // last Close appended
	committed epoch.LSN // last Close known durable
	applied   epoch.LSN // stored in the mark
	maybe     epoch.LSN // position of a Store that failed

	trace []string // what happened, for the report of a failure

	crashes, kills, full, drops, trims, resets, found, poisoned int
}

func newWorld(t *testing.T, seed int64) *world {
	w := &world{t: t, seed: seed, rng: rand.New(rand.NewPCG(uint64(seed), 7)), fs: fault.NewFS(seed),
		lineage: epoch.UUID{9}, session: 1, log: map[epoch.LSN]epoch.Record{}, next: 1}
	w.o = Options{Dir: "/spool", Group: testGroup, SegmentBytes: 16 << 10, SmallSegments: true, Inline: true,
		MaxBytes: int64(3+w.rng.IntN(6)) * (16 << 10), incarnation: w.rng.Uint64}
	w.fs.SetHook(w.hook)
	if err := w.fs.MkdirAll("/spool", 0o700); err != nil {
		t.Fatal(err)
	}
	return w
}

func (w *world) fatal(format string, a ...any) {
	w.t.Helper()
	w.t.Fatalf("seed %d: %s\n%s", w.seed, fmt.Sprintf(format, a...), strings.Join(w.trace[max(0, len(w.trace)-200):], "\n"))
}

// hook notes the steps.
func (w *world) hook(op fault.Op, name string) error {
	if op != fault.OpRead {
		w.note("    %s %s", op, name)
	}
	return nil
}

func (w *world) note(format string, a ...any) { w.trace = append(w.trace, fmt.Sprintf(format, a...)) }

// record makes the record of an LSN; its content depends on session and LSN alone.
func (w *world) record(lsn epoch.LSN) epoch.Record {
	r := rand.New(rand.NewPCG(w.session, uint64(lsn)))
	rec := epoch.Record{Lineage: w.lineage, Session: w.session, LSN: lsn, Disk: 1, Offset: r.Uint64N(1 << 40)}
	switch k := r.IntN(12); {
	case k < 3 || w.next-w.closed > 30:
		rec.Type, rec.Disk, rec.Offset = epoch.TypeClose, epoch.GroupWide, 0
		rec.Payload = epoch.CloseInfo{TimeNs: int64(lsn), Reason: epoch.ByFlush, First: w.closed + 1}.Encode()
		rec.Length = uint64(len(rec.Payload))
	case k < 4:
		rec.Type, rec.Length = epoch.TypeTrim, 1<<20
	default:
		rec.Type, rec.Payload = epoch.TypeWrite, make([]byte, 1+r.IntN(2500))
		for i := 0; i+8 <= len(rec.Payload); i += 8 {
			binary.LittleEndian.PutUint64(rec.Payload[i:], r.Uint64())
		}
		rec.Length = uint64(len(rec.Payload))
	}
	rec.Seal()
	return rec
}

// step does one random thing. It returns false when the machine has stopped or the spool has failed.
func (w *world) step() bool {
	var err error
	switch k := w.rng.IntN(40); {
	case k < 26:
		err = w.append()
	case k < 34:
		err = w.commit()
	case k < 35:
		err = w.drop()
	case k < 36 && w.closed+1 == w.next:
		w.session++ // a clean change of session
	case k < 37:
		err = w.apply()
	case k < 38 && w.rng.IntN(2) == 0:
		w.poison()
	case w.rng.IntN(60) == 0:
		err = w.reset()
	}
	if err == nil {
		return true
	}
	if !w.fs.Stopped() && !errors.Is(err, syscall.EIO) {
		w.fatal("step failed: %v", err)
	}
	return false
}

func (w *world) append() error {
	if w.sp.fresh && w.rng.IntN(3) == 0 {
		w.next += epoch.LSN(w.rng.IntN(5))
	}
	rec := w.record(w.next)
	w.note("append %s %d session %d", rec.Type, rec.LSN, rec.Session)
	err := w.sp.Append(&rec, epoch.CodecRaw, rec.Payload)
	if errors.Is(err, ErrFull) {
		w.full++
		return w.makeRoom()
	}
	w.log[rec.LSN] = rec // if it failed it may be there or not
	if err != nil {
		return err
	}
	if rec.Type == epoch.TypeClose {
		w.closed = rec.LSN
	}
	w.next++
	return nil
}

// makeRoom is what a replica does with a full spool: apply, and give up an epoch that cannot fit.
func (w *world) makeRoom() error {
	if err := w.commit(); err != nil {
		return err
	}
	if w.applied == w.committed {
		return w.drop()
	}
	return w.applyTo(w.committed)
}

func (w *world) commit() error {
	want := w.closed
	w.note("commit %d", want)
	pos, err := w.sp.Commit()
	if err != nil {
		return err
	}
	if want > w.applied && (pos.LSN != want || pos != w.sp.Durable()) {
		w.fatal("commit returned %v, want %d", pos, want)
	}
	w.committed = max(w.committed, want)
	if w.rng.IntN(8) == 0 && !w.fs.Stopped() {
		w.compare(w.committed)
	}
	return nil
}

// drop gives up the partial epoch; what follows has the same LSNs and, in another session, other content.
func (w *world) drop() error {
	w.note("drop above %d", w.closed)
	if err := w.sp.DropPartial(); err != nil {
		return err
	}
	w.drops++
	w.forget(w.closed)
	w.session += w.rng.Uint64N(2)
	return nil
}

// forget removes everything above an LSN from the model.
func (w *world) forget(lsn epoch.LSN) {
	maps.DeleteFunc(w.log, func(l epoch.LSN, _ epoch.Record) bool { return l > lsn })
	w.next = lsn + 1
}

func (w *world) apply() error {
	var ends []epoch.LSN
	for l, r := range w.log {
		if r.Type == epoch.TypeClose && l <= w.committed && l > w.applied {
			ends = append(ends, l)
		}
	}
	if len(ends) == 0 {
		return nil
	}
	slices.Sort(ends)
	return w.applyTo(ends[w.rng.IntN(len(ends))])
}

func (w *world) applyTo(lsn epoch.LSN) error {
	w.maybe = lsn
	w.note("apply and trim %d", lsn)
	rec := w.log[lsn]
	if err := w.mark.Store(Applied{Pos: epoch.Pos{Lineage: rec.Lineage, Session: rec.Session, LSN: lsn}}); err != nil {
		return err
	}
	w.applied = lsn
	w.trims++
	return w.sp.Trim(lsn)
}

// poison writes into free segments, after their headers, the records that will come
// next, sealed with other content and another incarnation.
func (w *world) poison() {
	for _, s := range w.sp.free {
		w.poisoned++
		b := []byte{}
		for lsn := w.next; len(b) < 12<<10; lsn++ {
			rec := w.record(lsn)
			if rec.Type == epoch.TypeWrite {
				rec.Offset++
				rec.Payload = bytes.Clone(rec.Payload)
				rec.Payload[0] ^= 1
				rec.Seal()
			}
			b = rec.AppendStored(b, epoch.CodecRaw, rec.Payload, w.rng.Uint32())
		}
		f, err := w.fs.Open(s.path)
		if err != nil {
			return // stopped: the next step sees it
		}
		_, _ = f.WriteAt(b[:min(int64(len(b)), s.size-headerBytes)], headerBytes)
		_ = f.Close()
	}
}

func (w *world) reset() error {
	w.resets++
	w.note("reset to %d", w.applied)
	// From here on any older part of the log may be found until Reset returns.
	w.committed = w.applied
	if err := w.sp.Reset(w.applied); err != nil {
		return err
	}
	w.forget(0)
	w.next, w.closed, w.committed = w.applied+1, w.applied, w.applied
	w.session++
	return nil
}

// restart brings the machine up again after a crash or kill, maybe crashing again on the way, and checks what is found.
func (w *world) restart() {
	for {
		w.boot()
		if w.rng.IntN(3) == 0 {
			w.fs.StopAfter(int64(1 + w.rng.IntN(12)))
		} else if w.rng.IntN(8) == 0 {
			w.fs.Inject(fault.Fault{Op: fault.OpSync, Nth: w.rng.IntN(6), Err: syscall.EIO})
		}
		rec, err := w.open()
		if err == nil {
			w.check(rec)
			return
		}
		if !w.fs.Stopped() && !errors.Is(err, syscall.EIO) {
			w.fatal("open: %v", err)
		}
	}
}

func (w *world) boot() {
	switch w.rng.IntN(3) {
	case 0:
		w.note("kill")
		w.kills++
		w.fs = w.fs.Kill()
	default:
		w.note("crash")
		w.crashes++
		w.fs = w.fs.Crash()
	}
	w.fs.SetHook(w.hook)
}

func (w *world) open() (Recovery, error) {
	m, err := OpenMark(w.fs, "/applied", testOwner)
	if err != nil {
		return Recovery{}, err
	}
	a := m.Load().Pos.LSN
	if a != w.applied && a != w.maybe {
		w.fatal("applied is %d after restart, want %d or %d", a, w.applied, w.maybe)
	}
	o := w.o
	o.FS = w.fs
	sp, rec, err := Open(o, a)
	if err != nil {
		return rec, err
	}
	w.sp, w.mark, w.applied, w.maybe = sp, m, a, a
	return rec, nil
}

func (w *world) check(rec Recovery) {
	end := max(rec.Durable.LSN, w.applied)
	w.note("open: applied %d, %+v", w.applied, rec)
	if end < w.committed {
		w.fatal("durable up to %d is lost: found %+v, applied %d", w.committed, rec, w.applied)
	}
	if rec.Lost != 0 {
		w.fatal("claims a loss: %+v", rec)
	}
	if rec.Closed && rec.Durable.LSN > w.applied {
		last, ok := w.log[rec.Durable.LSN]
		if !ok || last.Type != epoch.TypeClose || last.Session != rec.Durable.Session || last.Lineage != rec.Durable.Lineage {
			w.fatal("log ends at %v, not at a Close", rec.Durable)
		}
		if rec.LastClose.TimeNs != int64(rec.Durable.LSN) {
			w.fatal("close info %+v of %v", rec.LastClose, rec.Durable)
		}
		w.found++
	}
	w.compare(end)
	w.forget(end)
	w.closed, w.committed = end, end
	w.session++
	if w.rng.IntN(3) == 0 {
		w.again(rec)
	}
}

// compare reads the spool and wants exactly the model's records up to end.
func (w *world) compare(end epoch.LSN) {
	var want []epoch.LSN
	for l := range w.log {
		if l > w.applied && l <= end {
			want = append(want, l)
		}
	}
	slices.Sort(want)
	r := w.sp.NewReader(w.applied + 1)
	for _, l := range want {
		got, err := r.Next()
		if err != nil {
			w.fatal("read %d: %v", l, err)
		}
		if m := w.log[l]; !same(got, m) {
			w.fatal("record %d of session %d differs from what was appended in session %d", got.LSN, got.Session, m.Session)
		}
	}
	if got, err := r.Next(); err != io.EOF {
		w.fatal("after %d: record %d, %v", end, got.LSN, err)
	}
}

func same(a, b epoch.Record) bool {
	p, q := a.Payload, b.Payload
	a.Payload, b.Payload = nil, nil
	return fmt.Sprint(a) == fmt.Sprint(b) && bytes.Equal(p, q)
}

// again checks that what Open reported survives a power loss right after it.
func (w *world) again(rec Recovery) {
	o := w.o
	o.FS = w.fs.Fork(w.rng.Int64()).Crash()
	sp, rec2, err := Open(o, w.applied)
	if err != nil {
		w.fatal("open after a power loss: %v", err)
	}
	if rec.Durable.LSN > w.applied && rec2.Durable != rec.Durable || rec2.DroppedRecords != 0 {
		w.fatal("found %+v, and %+v after a power loss", rec, rec2)
	}
	if err := sp.Close(); err != nil {
		w.fatal("close: %v", err)
	}
}
