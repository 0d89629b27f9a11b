package activelog

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/tests/fault"
)

func open(t testing.TB, f images.FS, limit int) *Log {
	t.Helper()
	l, _, err := Open(f, "/log", Options{Group: testGroup, RegionBytes: 4096, MaxRegions: limit})
	must(t, err)
	return l
}

// async runs an Acquire of n regions from region first on; disk 0.
func async(ctx context.Context, l *Log, first, n int64) chan error {
	c := make(chan error, 1)
	go func() { c <- l.Acquire(ctx, 0, first*4096, n*4096) }()
	return c
}

func waits(t *testing.T, c chan error) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c:
		t.Fatalf("did not wait: %v", err)
	default:
	}
}

func returns(t *testing.T, c chan error, want error) {
	t.Helper()
	synctest.Wait()
	select {
	case err := <-c:
		if !errors.Is(err, want) {
			t.Fatalf("returned %v, want %v", err, want)
		}
	default:
		t.Fatal("waits")
	}
}

func asked(l *Log) bool {
	select {
	case <-l.NeedsRoom():
		return true
	default:
		return false
	}
}

// TestLimit: the bound of the set may be lowered while it is full, and raised
// again; it is never above MaxRegions.
func TestLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, fault.NewFS(1), 4)
		ctx := t.Context()
		use := func(first, n int64) {
			must(t, l.Acquire(ctx, 0, first*4096, n*4096))
			l.Release(0, first*4096, n*4096, 1)
		}
		settle := func() { l.SyncEnd(0, l.SyncBegin(0)) }
		l.Acked(1)
		use(0, 4)
		l.Limit(2)
		c := async(ctx, l, 4, 1)
		waits(t, c) // three have to go
		settle()
		returns(t, c, nil)
		if n := l.Count(); n > 2 {
			t.Errorf("%d regions, the limit is 2", n)
		}
		c = async(ctx, l, 5, 2) // one is pinned
		waits(t, c)
		l.Limit(1000)
		returns(t, c, nil)
		c = async(ctx, l, 7, 2) // three are pinned
		waits(t, c)
		l.Release(0, 4*4096, 3*4096, 1)
		settle()
		returns(t, c, nil)
		if n := l.Count(); n > 4 {
			t.Errorf("%d regions, MaxRegions is 4", n)
		}
		l.Release(0, 7*4096, 2*4096, 1)
		must(t, l.Close())
	})
}

// TestLeaving: a region leaves only when it is unpinned, acknowledged, and
// synced by an fdatasync that began after its release.
func TestLeaving(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, fault.NewFS(1), 2)
		ctx := t.Context()
		must(t, l.Acquire(ctx, 0, 0, 2*4096))
		early := l.SyncBegin(0)
		l.Release(0, 0, 2*4096, 7)
		c := async(ctx, l, 5, 1)
		waits(t, c)
		if !l.Pressure() || !asked(l) || asked(l) {
			t.Error("not asked once for room")
		}
		l.Acked(7)
		waits(t, c)
		l.SyncEnd(0, early) // began before the release
		waits(t, c)
		if !asked(l) {
			t.Error("not asked again")
		}
		other := l.SyncBegin(1)
		l.SyncEnd(1, other)
		waits(t, c)
		if !asked(l) {
			t.Error("not asked again, although disk 0 was not synced")
		}
		late := l.SyncBegin(0)
		if l.SyncEnd(0, early); asked(l) {
			t.Error("asked although an fdatasync runs that covers everything")
		}
		waits(t, c)
		l.SyncEnd(0, late)
		returns(t, c, nil)
		if l.Pressure() || !slices.Contains(l.Regions(), Region{0, 5}) {
			t.Errorf("regions %v", l.Regions())
		}
		must(t, l.Close())
	})
}

// TestAckMissing: synced but not acknowledged stays.
func TestAckMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, fault.NewFS(1), 1)
		must(t, l.Acquire(t.Context(), 0, 0, 1))
		l.Release(0, 0, 1, 7)
		l.SyncEnd(0, l.SyncBegin(0))
		l.Acked(6)
		c := async(t.Context(), l, 1, 1)
		waits(t, c)
		if !asked(l) {
			t.Error("not asked to close the epoch")
		}
		l.Acked(7)
		returns(t, c, nil)
		must(t, l.Close())
	})
}

// TestFIFO: waiting requests are served in order, all or nothing, and while one
// waits even requests whose regions are there wait.
func TestFIFO(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, fault.NewFS(1), 4)
		ctx := t.Context()
		must(t, l.Acquire(ctx, 0, 0, 4*4096))
		l.Release(0, 0, 4*4096, 1)
		must(t, l.Acquire(ctx, 0, 0, 4096))
		big := async(ctx, l, 10, 4)
		waits(t, big)
		hot := async(ctx, l, 0, 1)
		waits(t, hot)
		small := async(ctx, l, 20, 1)
		waits(t, small)
		l.Acked(1)
		l.SyncEnd(0, l.SyncBegin(0))
		waits(t, big) // region 0 is pinned
		waits(t, hot)
		waits(t, small)
		l.Release(0, 0, 4096, 1)
		l.SyncEnd(0, l.SyncBegin(0))
		returns(t, big, nil)
		waits(t, hot)
		l.Release(0, 10*4096, 4*4096, 1)
		l.SyncEnd(0, l.SyncBegin(0))
		returns(t, hot, nil)
		returns(t, small, nil)
		must(t, l.Close())
	})
}

// TestCancel: a request that gives up holds nothing and lets the next one go on.
func TestCancel(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, fault.NewFS(1), 2)
		must(t, l.Acquire(t.Context(), 0, 0, 4096))
		ctx, cancel := context.WithCancel(t.Context())
		big := async(ctx, l, 10, 2)
		waits(t, big)
		small := async(t.Context(), l, 20, 1)
		waits(t, small)
		cancel()
		returns(t, big, context.Canceled)
		returns(t, small, nil)
		// Cancelled at once, whether its regions get in or not.
		returns(t, async(ctx, l, 0, 1), nil) // needs no waiting
		returns(t, async(ctx, l, 30, 1), context.Canceled)
		l.Release(0, 0, 4096, 0)
		l.Release(0, 0, 4096, 0)
		l.Release(0, 20*4096, 4096, 0)
		l.SyncEnd(0, l.SyncBegin(0))
		must(t, l.Acquire(t.Context(), 0, 40*4096, 2*4096))
		must(t, l.Close())
	})
}

// TestGroupCommit: requests that arrive during an fdatasync share the next one.
func TestGroupCommit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := fault.NewFS(1)
		var syncs atomic.Int64
		var gate atomic.Pointer[chan struct{}]
		f.SetHook(func(op fault.Op, _ string) error {
			if op == fault.OpSync {
				syncs.Add(1)
				if g := gate.Load(); g != nil {
					<-*g
				}
			}
			return nil
		})
		l := open(t, f, 100)
		hold := make(chan struct{})
		gate.Store(&hold)
		before := syncs.Load()
		var all []chan error
		for i := range int64(20) {
			all = append(all, async(t.Context(), l, 3*i, 2))
			synctest.Wait()
		}
		all = append(all, async(t.Context(), l, 0, 2)) // there, but not durable
		for _, c := range all {
			waits(t, c)
		}
		close(hold)
		for _, c := range all {
			returns(t, c, nil)
		}
		if n := syncs.Load() - before; n != 2 {
			t.Errorf("%d fdatasyncs for 21 requests", n)
		}
		must(t, l.Close())
	})
}

// TestCancelDuringSync: a request that gives up while its batch is written leaves no pin behind.
func TestCancelDuringSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := fault.NewFS(1)
		var gate atomic.Pointer[chan struct{}]
		f.SetHook(func(op fault.Op, _ string) error {
			if g := gate.Load(); g != nil && op == fault.OpSync {
				<-*g
			}
			return nil
		})
		l := open(t, f, 1)
		hold := make(chan struct{})
		gate.Store(&hold)
		ctx, cancel := context.WithCancel(t.Context())
		c := async(ctx, l, 0, 1)
		waits(t, c)
		cancel()
		returns(t, c, context.Canceled)
		d := async(t.Context(), l, 1, 1)
		waits(t, d)
		close(hold)
		returns(t, d, nil)
		must(t, l.Close())
	})
}

func TestFastPath(t *testing.T) {
	f := fault.NewFS(1)
	l := open(t, f, 100)
	must(t, l.Acquire(t.Context(), 1, 0, 65*4096))
	l.Release(1, 0, 65*4096, 1)
	steps := f.Steps()
	ctx := t.Context()
	if n := testing.AllocsPerRun(100, func() {
		if err := l.Acquire(ctx, 1, 100, 64*4096); err != nil {
			t.Error(err)
		}
		l.Release(1, 100, 64*4096, 1)
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if f.Steps() != steps {
		t.Error("did I/O")
	}
	must(t, l.Close())
}

func TestErrors(t *testing.T) {
	f := fault.NewFS(1)
	l := open(t, f, 10)
	ctx := t.Context()
	if err := l.Acquire(ctx, 0, 1, 10*4096); !errors.Is(err, ErrTooLarge) {
		t.Errorf("eleven regions: %v", err)
	}
	for _, c := range [][3]int64{{1 << 16, 0, 1}, {0, -1, 1}, {0, 0, -1}, {0, 1<<63 - 1, 1}, {0, 1 << 60, 1}} {
		if err := l.Acquire(ctx, uint32(c[0]), c[1], c[2]); err == nil {
			t.Errorf("%v accepted", c)
		}
	}
	must(t, l.Acquire(ctx, 0, 5, 0))
	l.Release(0, 5, 0, 1)
	must(t, l.Acquire(ctx, 0, 0, 1))
	if err := l.Clear(); !errors.Is(err, ErrPinned) {
		t.Errorf("clear: %v", err)
	}
	f.Inject(fault.Fault{Op: fault.OpSync, Err: syscall.EIO})
	for range 2 {
		if err := l.Acquire(ctx, 0, 1<<20, 1); !errors.Is(err, syscall.EIO) || !strings.Contains(err.Error(), "fsync active log") {
			t.Errorf("after a failed fdatasync: %v", err)
		}
	}
	if !errors.Is(l.Err(), syscall.EIO) || !errors.Is(l.Clear(), syscall.EIO) {
		t.Error("not final")
	}
	must(t, l.Close())
	if err := l.Close(); !errors.Is(err, ErrClosed) {
		t.Errorf("closed twice: %v", err)
	}
	if err := l.Acquire(ctx, 0, 0, 1); !errors.Is(err, ErrClosed) {
		t.Errorf("acquire after close: %v", err)
	}
}

// TestWrongRelease: a release of what is not held ends the log rather than go unnoticed.
func TestWrongRelease(t *testing.T) {
	l := open(t, fault.NewFS(1), 10)
	must(t, l.Acquire(t.Context(), 0, 0, 4096))
	l.Release(0, 0, 2*4096, 1)
	if l.Err() == nil || l.Acquire(t.Context(), 0, 0, 1) == nil {
		t.Error("unnoticed")
	}
	must(t, l.Close())
}

func TestCloseWithWaiters(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := open(t, fault.NewFS(1), 1)
		must(t, l.Acquire(t.Context(), 0, 0, 1))
		a, b := async(t.Context(), l, 1, 1), async(t.Context(), l, 2, 1)
		waits(t, a)
		must(t, l.Close())
		returns(t, a, ErrClosed)
		returns(t, b, ErrClosed)
	})
}

// TestReopen: set, limits and refusals across runs.
func TestReopen(t *testing.T) {
	f := fault.NewFS(1)
	o := Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 2000}
	l, found, err := Open(f, "/log", o)
	must(t, err)
	if len(found) != 0 {
		t.Fatal(found)
	}
	must(t, l.Acquire(t.Context(), 2, 7*4096, 1500*4096))
	l.Release(2, 7*4096, 1500*4096, 1)
	l.Acked(1)
	l.SyncEnd(2, l.SyncBegin(2))
	if _, _, err := Open(f, "/log", o); !errors.Is(err, images.ErrLocked) {
		t.Errorf("opened twice: %v", err)
	}
	must(t, l.Close())
	for what, c := range map[string]Options{
		"group":       {Group: epoch.UUID{7}, RegionBytes: 4096, MaxRegions: 10},
		"region size": {Group: testGroup, RegionBytes: 8192, MaxRegions: 10},
		"odd regions": {Group: testGroup, RegionBytes: 5000, MaxRegions: 10},
		"no regions":  {Group: testGroup, RegionBytes: 4096},
	} {
		if _, _, err := Open(f, "/log", c); err == nil {
			t.Errorf("other %s accepted", what)
		}
	}
	for _, limit := range []int{2000, 10, 3000} {
		o.MaxRegions = limit
		l, found, err := Open(f.Fork(int64(limit)).Crash(), "/log", o)
		must(t, err)
		if len(found) != 1500 || found[0] != (Region{2, 7}) || found[1499] != (Region{2, 1506}) {
			t.Fatalf("limit %d: found %d regions", limit, len(found))
		}
		must(t, l.Clear())
		must(t, l.Acquire(t.Context(), 1, 0, 10*4096))
		must(t, l.Close())
	}
}

func TestDamagedFile(t *testing.T) {
	for what, b := range map[string][]byte{"empty": {}, "odd": make([]byte, 5000), "zeros": make([]byte, 1<<16)} {
		f := fault.NewFS(1)
		f.WriteFile("/log", b)
		if _, _, err := Open(f, "/log", Options{Group: testGroup, MaxRegions: 10}); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// TestCutFile: a file that lost its end is never a smaller set, whichever half is
// current and although its first half may be whole.
func TestCutFile(t *testing.T) {
	for opened := range 2 {
		f := fault.NewFS(1)
		for range opened {
			must(t, open(t, f, 100).Close()) // each begins the other half
		}
		l := open(t, f, 100)
		for i := range int64(5) {
			must(t, l.Acquire(t.Context(), 0, i*4096, 1))
		}
		must(t, l.Close())
		whole, err := images.ReadFile(f, "/log", maxFileBytes)
		must(t, err)
		for size := 0; size < len(whole); size += blockBytes {
			cut := fault.NewFS(1)
			cut.WriteFile("/log", whole[:size])
			if _, found, err := Open(cut, "/log", Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 100}); !errors.Is(err, ErrCorrupt) {
				t.Fatalf("%d of %d bytes: found %v, %v", size, len(whole), found, err)
			}
		}
	}
}

// TestRot: a flipped bit in what a later batch proves durable is never a smaller set.
func TestRot(t *testing.T) {
	for seed := range scale(int64(200)) {
		f := fault.NewFS(seed)
		l := open(t, f, 100)
		for i := range int64(5) {
			must(t, l.Acquire(t.Context(), 0, i*4096, 1))
		}
		at := int64(l.file.half*l.file.halfBlocks) * blockBytes
		must(t, l.Close())
		_, err := f.FlipBit("/log", at, 5*blockBytes) // snapshot and four of five batches
		must(t, err)
		if _, found, err := Open(f, "/log", Options{Group: testGroup, RegionBytes: 4096, MaxRegions: 100}); !errors.Is(err, ErrCorrupt) {
			t.Fatalf("seed %d: found %v, %v", seed, found, err)
		}
	}
}

// TestConcurrent runs many writers, an owner that answers NeedsRoom, and a background of acks.
func TestConcurrent(t *testing.T) {
	l := open(t, fault.NewFS(1), 16)
	var lsn atomic.Uint64
	var writers, owner sync.WaitGroup
	stop := make(chan struct{})
	owner.Add(1)
	go func() {
		defer owner.Done()
		for {
			select {
			case <-stop:
				return
			case <-l.NeedsRoom():
			}
			for d := range uint32(2) {
				l.SyncEnd(d, l.SyncBegin(d))
			}
			l.Acked(epoch.LSN(lsn.Load()))
		}
	}()
	for g := range uint64(6) {
		writers.Add(1)
		go func() {
			defer writers.Done()
			rng := rand.New(rand.NewPCG(g, 5))
			for range 300 {
				d, off, n := uint32(rng.IntN(2)), rng.Int64N(60*4096), 1+rng.Int64N(9*4096)
				if err := l.Acquire(context.Background(), d, off, n); err != nil {
					t.Error(err)
					return
				}
				l.Release(d, off, n, epoch.LSN(lsn.Add(1)))
			}
		}()
	}
	writers.Wait()
	close(stop)
	owner.Wait()
	if n := len(l.Regions()); n > 16 {
		t.Errorf("%d regions", n)
	}
	must(t, l.Err())
	must(t, l.Close())
}

func TestOnDisk(t *testing.T) {
	path := filepath.Join(t.TempDir(), "active.log")
	o := Options{Group: testGroup, MaxRegions: 1024}
	l, _, err := Open(images.OS{}, path, o)
	must(t, err)
	for i := range int64(40) {
		must(t, l.Acquire(t.Context(), 0, i<<21, 1))
	}
	must(t, l.Close())
	l, found, err := Open(images.OS{}, path, o)
	must(t, err)
	if s := fmt.Sprint(len(found), found[39]); s != "40 {0 78}" {
		t.Error(s)
	}
	must(t, l.Clear())
	must(t, l.Close())
	l, found, err = Open(images.OS{}, path, o)
	must(t, err)
	if len(found) != 0 {
		t.Error(found)
	}
	must(t, l.Close())
}
