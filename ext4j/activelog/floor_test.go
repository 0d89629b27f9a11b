package activelog

import (
	"context"
	"errors"
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

// TestFollow: whose floor it is survives a crash as soon as Follow has
// returned, and the floor of another replica or lineage does not count.
func TestFollow(t *testing.T) {
	fsys := fault.NewFS(2)
	o := Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 4}
	crashed := func() (*Log, []Region) {
		t.Helper()
		fsys = fsys.Crash()
		l, kept, err := Open(fsys, "/log", o)
		must(t, err)
		return l, kept
	}
	l, _ := crashed()
	if l.Follower() != (Follower{}) {
		t.Fatalf("a new log follows %+v", l.Follower())
	}
	one := Follower{Lineage: epoch.UUID{1}, Replica: epoch.UUID{2}}
	for i, f := range []Follower{one, {Lineage: epoch.UUID{1}, Replica: epoch.UUID{3}}, {Lineage: epoch.UUID{4}, Replica: epoch.UUID{3}}} {
		must(t, l.Follow(f))
		l.Begin(uint64(i+1), epoch.LSN(100*i), 0)
		if l.Floor() != (Floor{}) {
			t.Errorf("the floor of another counts: %+v", l.Floor())
		}
		l.Acked(epoch.LSN(100*i + 5))
		must(t, l.Follow(f))                                 // no news
		must(t, l.Acquire(t.Context(), 1, int64(i)*4096, 1)) // writes the floor
		l.Release(1, int64(i)*4096, 1, 1)
		var kept []Region
		l, kept = crashed()
		if l.Follower() != f || l.Floor() != (Floor{uint64(i + 1), epoch.LSN(100*i + 5)}) || len(kept) != i+1 {
			t.Errorf("after the crash: %+v, floor %+v, regions %v", l.Follower(), l.Floor(), kept)
		}
		l.Adopt(0)
	}
	must(t, l.Follow(one))
	l, kept := crashed()
	if l.Follower() != one || l.Floor() != (Floor{}) || len(kept) != 3 {
		t.Errorf("after the last: %+v, floor %+v, regions %v", l.Follower(), l.Floor(), kept)
	}
	must(t, l.Close())
	if err := l.Follow(Follower{}); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	o.MaxRegions = 3000 // another size of file
	if l, _ = crashed(); l.Follower() != one {
		t.Errorf("a resized log follows %+v", l.Follower())
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
