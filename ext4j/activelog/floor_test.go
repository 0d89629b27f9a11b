package activelog

import (
	"context"
	"testing"
	"time"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

// TestFloorIsWhatRemovalsRelyOn: a region that left because of an
// acknowledgement is known, after a crash, to have left for a position at
// least as high as its last record.
func TestFloorIsWhatRemovalsRelyOn(t *testing.T) {
	fsys := fault.NewFS(1)
	o := Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 2}
	open := func() *Log {
		t.Helper()
		l, _, err := Open(fsys, "/log", o)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	write := func(l *Log, region int64, lsn uint64) {
		t.Helper()
		if err := l.Acquire(context.Background(), 1, region*4096, 4096); err != nil {
			t.Fatal(err)
		}
		l.Release(1, region*4096, 4096, epoch.LSN(lsn))
	}
	l := open()
	if f := l.Floor(); f != (Floor{}) {
		t.Fatalf("a new log has floor %+v", f)
	}
	l.Begin(7, 100, 0)
	write(l, 1, 101)
	write(l, 2, 102)
	l.Acked(102)
	l.SyncEnd(1, l.SyncBegin(1))
	write(l, 3, 103) // one of the two has to leave for it
	fsys = fsys.Crash()
	l = open()
	if f := l.Floor(); f.Session != 7 || f.LSN < 102 {
		t.Fatalf("floor %+v, but a region left for record 101 or 102 of session 7", f)
	}
	l.Begin(8, 102, 0) // nothing acknowledged in this session yet: record 102 is of session 7
	if f := l.Floor(); f != (Floor{7, 102}) {
		t.Fatalf("floor %+v after session 8 began at 102", f)
	}
	l.Begin(9, 103, 13) // the replica had fallen back; everything is compared
	if f := l.Floor(); f != (Floor{}) {
		t.Fatalf("floor %+v after session 9 began at its record 90", f)
	}
	l.Acked(104)
	if f := l.Floor(); f != (Floor{9, 91}) {
		t.Fatalf("floor %+v after record 91 of session 9 was acknowledged", f)
	}
}

// TestFloorAfterCleanStart: a source was stopped with nothing to resync and
// started again. A region whose last record is of the earlier session leaves,
// and the log relies on the replica having that record.
func TestFloorAfterCleanStart(t *testing.T) {
	fsys := fault.NewFS(1)
	open := func() *Log {
		t.Helper()
		l, _, err := Open(fsys, "/log", Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 2})
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	write := func(l *Log, region int64, lsn epoch.LSN) {
		t.Helper()
		if err := l.Acquire(context.Background(), 1, region*4096, 4096); err != nil {
			t.Fatal(err)
		}
		l.Release(1, region*4096, 4096, lsn)
	}
	l := open()
	l.Begin(7, 100, 0)
	write(l, 1, 101)
	l.Acked(101)
	write(l, 2, 102) // the floor in the file is 101
	l.Acked(102)
	write(l, 1, 110) // region 1 is in the log already: nothing is written
	l.Acked(110)
	l.SyncEnd(1, l.SyncBegin(1))
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l = open()
	l.Begin(8, 110, 0)
	l.Reached(Floor{7, 110})
	l.Adopt(0)
	l.SyncEnd(1, l.SyncBegin(1))
	write(l, 3, 111) // region 1 or 2 leaves
	fsys = fsys.Crash()
	if f := open().Floor(); f != (Floor{7, 110}) {
		t.Fatalf("floor %+v: a replica that lost records 102 to 110 would not be noticed", f)
	}
}

// TestAdoptedRegionsLeave: recovered regions stay until they are adopted.
func TestAdoptedRegionsLeave(t *testing.T) {
	fsys := fault.NewFS(3)
	o := Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 1}
	l, _, err := Open(fsys, "/log", o)
	if err == nil {
		err = l.Acquire(context.Background(), 1, 0, 1)
	}
	if err != nil {
		t.Fatal(err)
	}
	l, kept, err := Open(fsys.Crash(), "/log", o)
	if err != nil || len(kept) != 1 {
		t.Fatalf("recovered %v, %v", kept, err)
	}
	l.Begin(2, 10, 0)
	if acquired(l) {
		t.Fatal("a recovered region left before it was adopted")
	}
	l.Adopt(20)
	l.SyncEnd(1, l.SyncBegin(1))
	if acquired(l) {
		t.Fatal("an adopted region left before its record was acknowledged")
	}
	l.Acked(20)
	if err := l.Acquire(context.Background(), 1, 4096, 1); err != nil {
		t.Fatal(err)
	}
}

// acquired tries for a moment to get a region that needs another's room.
func acquired(l *Log) bool {
	ctx, cancel := context.WithTimeout(context.Background(), 50*time.Millisecond)
	defer cancel()
	return l.Acquire(ctx, 1, 4096, 1) == nil
}
