package spool

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/tests/fault"
)

func small(f images.FS, dir string) Options {
	return Options{FS: f, Dir: dir, Group: testGroup, SegmentBytes: 16 << 10, MaxBytes: 64 << 10, SmallSegments: true, Inline: true}
}

func open(t *testing.T, o Options, applied epoch.LSN) (*Spool, Recovery) {
	t.Helper()
	sp, rec, err := Open(o, applied)
	if err != nil {
		t.Fatal(err)
	}
	return sp, rec
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func put(t *testing.T, sp *Spool, recs ...epoch.Record) {
	t.Helper()
	for _, r := range recs {
		must(t, sp.Append(&r, epoch.CodecRaw, r.Payload))
	}
}

func commit(t *testing.T, sp *Spool, want epoch.LSN) {
	t.Helper()
	if pos, err := sp.Commit(); err != nil || pos.LSN != want {
		t.Fatalf("committed %v, want %d: %v", pos, want, err)
	}
}

// lsns reads until the end.
func lsns(t *testing.T, r *Reader) string {
	t.Helper()
	var got []epoch.LSN
	for {
		rec, err := r.Next()
		if err == io.EOF {
			return fmt.Sprint(got)
		}
		must(t, err)
		got = append(got, rec.LSN)
	}
}

func TestReaderSeesDurableEpochsOnly(t *testing.T) {
	sp, _ := open(t, small(fault.NewFS(1), "/"), 0)
	r := sp.NewReader(1)
	put(t, sp, writeRec(1, 1, 100), closeRec(2, 1))
	if s := lsns(t, r); s != "[]" {
		t.Errorf("before the commit: %s", s)
	}
	commit(t, sp, 2)
	put(t, sp, writeRec(3, 1, 100))
	commit(t, sp, 2)
	if s := lsns(t, r); s != "[1 2]" {
		t.Errorf("after the commit: %s", s)
	}
	put(t, sp, closeRec(4, 1))
	commit(t, sp, 4)
	if s := lsns(t, r); s != "[3 4]" {
		t.Errorf("going on: %s", s)
	}
	if s := lsns(t, sp.NewReader(2)); s != "[2 3 4]" {
		t.Errorf("from 2: %s", s)
	}
	if d, a := sp.Durable(), sp.Appended(); d != a || d != (epoch.Pos{Lineage: epoch.UUID{9}, Session: 1, LSN: 4}) {
		t.Errorf("durable %v, appended %v", d, a)
	}
}

func TestOrder(t *testing.T) {
	sp, _ := open(t, small(fault.NewFS(1), "/"), 10)
	refused := func(what string, r epoch.Record, want error) {
		t.Helper()
		before := sp.Appended()
		if err := sp.Append(&r, epoch.CodecRaw, r.Payload); !errors.Is(err, want) {
			t.Errorf("%s: %v", what, err)
		}
		if sp.Appended() != before {
			t.Errorf("%s: moved to %v", what, sp.Appended())
		}
	}
	refused("applied already", closeRec(10, 1), ErrOrder)
	put(t, sp, writeRec(20, 1, 10)) // an empty spool begins anywhere above
	refused("gap", closeRec(22, 1), ErrOrder)
	refused("again", closeRec(20, 1), ErrOrder)
	refused("session inside an epoch", closeRec(21, 2), ErrOrder)
	bad := closeRec(21, 1)
	bad.Sum++
	refused("sum", bad, epoch.ErrCorrupt)
	odd := closeRec(21, 1)
	odd.Payload, odd.Length = odd.Payload[:5], 5
	odd.Seal()
	refused("close payload", odd, epoch.ErrCorrupt)
	large := writeRec(21, 1, 14<<10)
	refused("larger than a segment", large, epoch.ErrCorrupt)
	c := closeRec(21, 1)
	if err := sp.Append(&c, epoch.CodecZstd, []byte{1}); !errors.Is(err, epoch.ErrCorrupt) {
		t.Errorf("compressed without a decoder: %v", err)
	}
	if err := sp.Append(&c, epoch.CodecRaw, []byte{1}); !errors.Is(err, epoch.ErrCorrupt) {
		t.Errorf("raw of another length: %v", err)
	}
	put(t, sp, c, closeRec(22, 2), closeRec(23, 2))
	commit(t, sp, 23)
	if s := lsns(t, sp.NewReader(11)); s != "[20 21 22 23]" {
		t.Error(s)
	}
}

func TestFullAndResume(t *testing.T) {
	sp, _ := open(t, small(fault.NewFS(1), "/"), 0)
	lsn := epoch.LSN(1)
	fill := func() {
		t.Helper()
		for {
			r := writeRec(lsn, 1, 3000)
			if lsn%3 == 0 {
				r = closeRec(lsn, 1)
			}
			err := sp.Append(&r, epoch.CodecRaw, r.Payload)
			if errors.Is(err, ErrFull) {
				if a := sp.Appended(); a.LSN != lsn-1 {
					t.Fatalf("full, and appended %v", a)
				}
				return
			}
			must(t, err)
			lsn++
		}
	}
	fill()
	if used, limit := sp.Usage(); used < limit-4096 || used > limit || limit != 64<<10 {
		t.Errorf("used %d of %d", used, limit)
	}
	full := lsn
	pos, err := sp.Commit()
	must(t, err)
	must(t, sp.Trim(pos.LSN))
	if used, _ := sp.Usage(); used > 32<<10 {
		t.Errorf("used %d after trim", used)
	}
	fill()
	if lsn < full+8 {
		t.Errorf("only %d records after trim", lsn-full)
	}
	if _, err := sp.Commit(); err != nil {
		t.Error(err)
	}
	if _, err := sp.NewReader(1).Next(); !errors.Is(err, ErrTrimmed) {
		t.Errorf("reading what was trimmed: %v", err)
	}
	if err := sp.Trim(lsn); err == nil {
		t.Error("trimmed above what is durable")
	}
}

// TestNoSpace: ENOSPC while a segment is made is "full", and goes away with the cause.
func TestNoSpace(t *testing.T) {
	f := fault.NewFS(1)
	f.SetCapacity(10 << 12)
	sp, _ := open(t, small(f, "/"), 0)
	lsn := epoch.LSN(1)
	for ; ; lsn++ {
		r := writeRec(lsn, 1, 3000)
		err := sp.Append(&r, epoch.CodecRaw, r.Payload)
		if errors.Is(err, ErrFull) && errors.Is(err, syscall.ENOSPC) {
			break
		}
		must(t, err)
	}
	if names, _ := f.ReadDir("/"); len(names) != 2 {
		t.Errorf("left behind: %v", names)
	}
	f.SetCapacity(0)
	put(t, sp, writeRec(lsn, 1, 3000), closeRec(lsn+1, 1))
	commit(t, sp, lsn+1)
	must(t, sp.Err())
}

// TestSyncErrorIsFinal: after one fsync error every call returns it.
func TestSyncErrorIsFinal(t *testing.T) {
	f := fault.NewFS(1)
	sp, _ := open(t, small(f, "/"), 0)
	put(t, sp, closeRec(1, 1))
	r := sp.NewReader(1)
	f.Inject(fault.Fault{Op: fault.OpSync, Err: syscall.EIO})
	c := closeRec(2, 1)
	for i, err := range []error{
		second(sp.Commit()), second(sp.Commit()), sp.Append(&c, 0, c.Payload), sp.DropPartial(), sp.Trim(0), sp.Reset(0),
		second(r.Next()), sp.Err()} {
		if !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "fsync spool segment") {
			t.Errorf("call %d: %v", i, err)
		}
	}
	if sp.Durable() != (epoch.Pos{}) {
		t.Errorf("durable %v", sp.Durable())
	}
	must(t, sp.Close())
	if err := sp.Close(); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
}

func second[T any](_ T, err error) error { return err }

func TestClosed(t *testing.T) {
	sp, _ := open(t, small(fault.NewFS(1), "/"), 0)
	must(t, sp.Close())
	c := closeRec(1, 1)
	for i, err := range []error{sp.Append(&c, 0, c.Payload), second(sp.Commit()), sp.DropPartial(), sp.Trim(0), sp.Reset(0),
		second(sp.NewReader(1).Next())} {
		if !errors.Is(err, ErrClosed) {
			t.Errorf("call %d: %v", i, err)
		}
	}
}

func TestOptions(t *testing.T) {
	f := fault.NewFS(1)
	for what, o := range map[string]Options{
		"segment small": {FS: f, Dir: "/", Group: testGroup, SegmentBytes: 512 << 10, MaxBytes: 1 << 30},
		"segment odd":   {FS: f, Dir: "/", Group: testGroup, SegmentBytes: 1<<20 + 1, MaxBytes: 1 << 30},
		"one segment":   {FS: f, Dir: "/", Group: testGroup, MaxBytes: 100 << 20},
		"no group":      {FS: f, Dir: "/", MaxBytes: 1 << 30},
		"no folder":     {FS: f, Dir: "/none", Group: testGroup, MaxBytes: 1 << 30},
	} {
		if _, _, err := Open(o, 0); err == nil {
			t.Errorf("%s: accepted", what)
		}
	}
}

// TestRefusedFolder: what is not ours, or in use, is left alone.
func TestRefusedFolder(t *testing.T) {
	f := fault.NewFS(1)
	o := small(f, "/")
	sp, _ := open(t, o, 0)
	put(t, sp, closeRec(1, 1))
	commit(t, sp, 1)
	if _, _, err := Open(o, 0); !errors.Is(err, images.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	must(t, sp.Close())
	before, _ := f.ReadFile("/00000000.seg")
	other := o
	other.Group = epoch.UUID{8}
	if _, _, err := Open(other, 0); err == nil || !strings.Contains(err.Error(), testGroup.String()) {
		t.Errorf("other group: %v", err)
	}
	other.Group, other.Replica = o.Group, epoch.UUID{8}
	if _, _, err := Open(other, 0); err == nil || !strings.Contains(err.Error(), "it belongs to replica") {
		t.Errorf("other replica: %v", err)
	}
	h, _, _ := readHeader(bytes.NewReader(before))
	late := h.encode()
	late[8] = 2
	sealBlock(late)
	f.WriteFile("/00000007.seg", late)
	f.WriteFile("/notes.txt", []byte("x"))
	if _, _, err := Open(o, 0); err == nil || !strings.Contains(err.Error(), "00000007.seg") || !strings.Contains(err.Error(), "version 2") {
		t.Errorf("later version: %v", err)
	}
	if after, _ := f.ReadFile("/00000000.seg"); !bytes.Equal(before, after) {
		t.Error("a refused open changed a segment")
	}
	must(t, f.Remove("/00000007.seg"))
	sp, rec := open(t, o, 0)
	if rec.Durable.LSN != 1 {
		t.Errorf("%+v", rec)
	}
	must(t, sp.Close())
}

// TestOtherSegmentSize: segments of another size are read, and removed once trimmed.
func TestOtherSegmentSize(t *testing.T) {
	f := fault.NewFS(1)
	o := small(f, "/")
	sp, _ := open(t, o, 0)
	put(t, sp, writeRec(1, 1, 9000), closeRec(2, 1), writeRec(3, 1, 9000), closeRec(4, 1))
	commit(t, sp, 4)
	must(t, sp.Close())
	o.SegmentBytes, o.MaxBytes = 24<<10, 80<<10
	sp, rec := open(t, o, 0)
	if rec.Durable.LSN != 4 || rec.Note != "" {
		t.Fatalf("%+v", rec)
	}
	put(t, sp, closeRec(5, 2))
	commit(t, sp, 5)
	if s := lsns(t, sp.NewReader(1)); s != "[1 2 3 4 5]" {
		t.Error(s)
	}
	must(t, sp.Trim(5))
	names, _ := f.ReadDir("/")
	for _, n := range names {
		if b, _ := f.ReadFile("/" + n); len(b) != 24<<10 {
			t.Errorf("%s has %d bytes", n, len(b))
		}
	}
	must(t, sp.Close())
}

func TestDropPartialAndSessions(t *testing.T) {
	f := fault.NewFS(1)
	sp, _ := open(t, small(f, "/"), 0)
	put(t, sp, closeRec(1, 1), writeRec(2, 1, 9000), writeRec(3, 1, 9000))
	must(t, sp.DropPartial())
	must(t, sp.DropPartial())
	if a := sp.Appended(); a.LSN != 1 {
		t.Fatal(a)
	}
	put(t, sp, writeRec(2, 2, 50), closeRec(3, 2))
	commit(t, sp, 3)
	r := sp.NewReader(1)
	for lsn, session := range []uint64{1: 1, 2: 2, 3: 2} {
		if lsn == 0 {
			continue
		}
		if rec, err := r.Next(); err != nil || rec.Session != session || rec.LSN != epoch.LSN(lsn) {
			t.Errorf("%+v %v, want %d of session %d", rec, err, lsn, session)
		}
	}
}

// TestReset: nothing of before is found again, whatever applied is afterwards.
func TestReset(t *testing.T) {
	f := fault.NewFS(1)
	o := small(f, "/")
	o.MaxBytes *= 2
	sp, _ := open(t, o, 0)
	for lsn := epoch.LSN(1); lsn <= 9; lsn += 3 {
		put(t, sp, writeRec(lsn, 1, 9000), writeRec(lsn+1, 1, 3000), closeRec(lsn+2, 1))
	}
	commit(t, sp, 9)
	must(t, sp.Trim(6)) // leaves stale headers in free segments
	r := sp.NewReader(7)
	_, err := r.Next()
	must(t, err)
	must(t, sp.Reset(0))
	if _, err := r.Next(); err != io.EOF && !errors.Is(err, ErrTrimmed) {
		t.Errorf("reader after reset: %v", err)
	}
	if sp.Durable() != (epoch.Pos{}) || sp.Appended() != (epoch.Pos{}) {
		t.Errorf("after reset: %v %v", sp.Durable(), sp.Appended())
	}
	for applied := range epoch.LSN(10) {
		g := f.Fork(int64(applied)).Crash()
		sp, rec := open(t, small(g, "/"), applied)
		if rec != (Recovery{}) {
			t.Errorf("applied %d: found %+v", applied, rec)
		}
		must(t, sp.Close())
	}
	put(t, sp, closeRec(1, 5))
	commit(t, sp, 1)
}

// TestAppendDuringSync: a running fdatasync blocks neither Append nor Durable, and
// does not cover what is appended meanwhile.
func TestAppendDuringSync(t *testing.T) {
	f := fault.NewFS(1)
	entered, leave := make(chan struct{}), make(chan struct{})
	var gate sync.Mutex
	armed := false
	f.SetHook(func(op fault.Op, _ string) error {
		gate.Lock()
		hold := armed && op == fault.OpSync
		armed = armed && !hold
		gate.Unlock()
		if hold {
			close(entered)
			<-leave
		}
		return nil
	})
	sp, _ := open(t, small(f, "/"), 0)
	put(t, sp, closeRec(1, 1))
	gate.Lock()
	armed = true
	gate.Unlock()
	done := make(chan epoch.Pos)
	go func() {
		pos, err := sp.Commit()
		if err != nil {
			t.Error(err)
		}
		done <- pos
	}()
	<-entered
	put(t, sp, writeRec(2, 1, 50), closeRec(3, 1))
	if d := sp.Durable(); d.LSN != 0 {
		t.Errorf("durable %v during the fdatasync", d)
	}
	close(leave)
	if pos := <-done; pos.LSN != 1 {
		t.Errorf("committed %v", pos)
	}
	commit(t, sp, 3)
}

// TestConcurrent runs appender, committer, reader and trimmer at once, with the background goroutine.
func TestConcurrent(t *testing.T) {
	o := small(fault.NewFS(1), "/")
	o.Inline = false
	sp, _ := open(t, o, 0)
	const last = 1500
	var wg sync.WaitGroup
	run := func(f func() error) {
		wg.Add(1)
		go func() {
			defer wg.Done()
			if err := f(); err != nil {
				t.Error(err)
			}
		}()
	}
	run(func() error { return appendAll(sp, last) })
	run(func() error {
		for {
			pos, err := sp.Commit()
			if err != nil || pos.LSN == last {
				return err
			}
			sp.Usage()
			time.Sleep(10 * time.Microsecond)
		}
	})
	run(func() error { return readAll(sp, last) })
	wg.Wait()
	must(t, sp.Close())
}

func appendAll(sp *Spool, last epoch.LSN) error {
	for lsn := epoch.LSN(1); lsn <= last; {
		r := writeRec(lsn, 1, 1+int(lsn*37%3000))
		if lsn%5 == 0 {
			r = closeRec(lsn, 1)
		}
		switch err := sp.Append(&r, epoch.CodecRaw, r.Payload); {
		case err == nil:
			lsn++
		case errors.Is(err, ErrFull):
			time.Sleep(100 * time.Microsecond)
		default:
			return err
		}
	}
	return nil
}

func readAll(sp *Spool, last epoch.LSN) error {
	r := sp.NewReader(1)
	for lsn := epoch.LSN(1); lsn <= last; {
		rec, err := r.Next()
		if err == io.EOF {
			time.Sleep(50 * time.Microsecond)
			continue
		}
		if err != nil {
			return err
		}
		if rec.LSN != lsn {
			return fmt.Errorf("read %d, want %d", rec.LSN, lsn)
		}
		if rec.Type == epoch.TypeClose {
			if err := sp.Trim(lsn); err != nil {
				return err
			}
		}
		lsn++
	}
	return nil
}

// TestOnDisk runs the same on the real file system, with segments of the real minimum.
func TestOnDisk(t *testing.T) {
	dir := t.TempDir()
	o := Options{FS: images.OS{}, Dir: dir, Group: testGroup, SegmentBytes: 1 << 20, MaxBytes: 4 << 20}
	sp, rec := open(t, o, 0)
	if rec != (Recovery{}) {
		t.Fatalf("%+v", rec)
	}
	m, err := OpenMark(o.FS, path.Join(dir, "applied"), testOwner)
	must(t, err)
	for lsn := epoch.LSN(1); lsn <= 60; lsn += 2 {
		put(t, sp, writeRec(lsn, 1, 200<<10), closeRec(lsn+1, 1))
		commit(t, sp, lsn+1)
		must(t, m.Store(Applied{Pos: epoch.Pos{LSN: lsn - 1}}))
		must(t, sp.Trim(lsn-1))
	}
	put(t, sp, writeRec(61, 1, 10))
	must(t, sp.Close())
	must(t, m.Close())
	m, err = OpenMark(o.FS, path.Join(dir, "applied"), testOwner)
	must(t, err)
	sp, rec = open(t, o, m.Load().Pos.LSN)
	if rec.Durable.LSN != 60 || rec.DroppedRecords != 1 || rec.Lost != 0 || m.Load().Pos.LSN != 58 {
		t.Errorf("%+v after %+v", rec, m.Load())
	}
	if s := lsns(t, sp.NewReader(59)); s != "[59 60]" {
		t.Error(s)
	}
	must(t, sp.Close())
	must(t, m.Close())
}
