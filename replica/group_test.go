package replica

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
	"kagami/tests/fault"
)

// TestAnyOrder: runs of records that come in any order, twice, overlapping,
// give the stream; acks only rise, durable is always a Close record.
func TestAnyOrder(t *testing.T) {
	for seed := range uint64(12) {
		synctest.Test(t, func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 0))
			s := newSite(t, int64(seed))
			s.mustOpen()
			defer s.shut()
			if resp := s.mustAttach(1); !resp.Fresh || resp.Pos.LSN != 0 || resp.Complete {
				t.Errorf("attached at %+v", resp)
			}
			m, closes := newStream(1, 1), map[epoch.LSN]bool{0: true}
			for range 60 {
				randomRecord(rng, m)
				if rng.IntN(5) == 0 {
					closes[m.close()] = true
				}
			}
			last := m.close()
			closes[last] = true
			all := m.take()
			var runs [][]epoch.Record
			for range 2 {
				for i := 0; i < len(all); {
					n := min(1+rng.IntN(9), len(all)-i)
					runs = append(runs, all[i:i+n])
					i += n
				}
			}
			rng.Shuffle(len(runs), func(i, j int) { runs[i], runs[j] = runs[j], runs[i] })
			for _, run := range runs {
				s.receive(slices.Clone(run))
				if rng.IntN(4) == 0 {
					synctest.Wait()
				}
			}
			synctest.Wait()
			if a := s.acked(); a.Received != last || a.Durable != last {
				t.Errorf("seed %d: acked %+v, want %d", seed, a, last)
			}
			var prev wire.Ack
			for _, a := range s.allAcks() {
				if a.Received < prev.Received || a.Durable < prev.Durable || a.Applied < prev.Applied || a.Applied > a.Durable || a.Durable > a.Received || !closes[a.Durable] || !closes[a.Applied] {
					t.Errorf("seed %d: ack %+v after %+v", seed, a, prev)
				}
				prev = a
			}
			time.Sleep(3 * time.Second)
			synctest.Wait()
			if st := s.g.Status(); st.Applied != last || st.CloseTime.UnixNano() != int64(last)*1000 {
				t.Errorf("seed %d: %+v", seed, st)
			}
			s.holds(m)
		})
	}
}

func randomRecord(rng *rand.Rand, m *stream) {
	disk, off := rng.Uint32N(2), rng.IntN(diskSize-40000)
	switch rng.IntN(6) {
	case 0:
		m.trim(epoch.TypeTrim, disk, off, 1+rng.IntN(30000))
	case 1:
		m.trim(epoch.TypeZero, disk, off, 1+rng.IntN(30000))
	default:
		m.write(disk, off, pattern(1+rng.IntN(30000), byte(rng.Uint32())))
	}
}

// TestAckAfterSync: no ack of an epoch leaves before the spool's fdatasync,
// and none at all when that fails.
func TestAckAfterSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(4096, 1))
		one := m.close()
		s.receive(m.take())
		if synctest.Wait(); s.acked().Durable != one {
			t.Fatalf("acked %+v", s.acked())
		}
		s.fs.Inject(fault.Fault{Op: fault.OpSync, Name: "*.seg", Err: syscall.EIO})
		m.write(0, 0, pattern(4096, 2))
		m.close()
		s.receive(m.take())
		synctest.Wait()
		if s.acked().Durable != one || !errors.Is(s.g.Status().Err, syscall.EIO) {
			t.Errorf("acked %+v, group %v", s.acked(), s.g.Status().Err)
		}
		if _, err := s.attach(1); !errors.Is(err, syscall.EIO) {
			t.Errorf("attach to a failed group: %v", err)
		}
		// After a power loss what was acknowledged is there.
		s.reopen(true)
		if resp := s.mustAttach(1); resp.Pos.LSN < one {
			t.Errorf("after the restart: %+v", resp)
		}
	})
}

// TestSmallWindow: a source that may have little unacknowledged hears of what
// was received before it must stop, though its epoch does not end.
func TestSmallWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		man := manifest(1)
		man.Window = 96 << 10
		if _, err := s.g.Attach(man, false, s.ch); err != nil {
			t.Fatal(err)
		}
		m := newStream(1, 1)
		for i := range 20 {
			m.write(0, i*40_000, pattern(30_000, 1))
			s.receive(m.take())
			if synctest.Wait(); s.acked().Received < epoch.LSN(i) {
				t.Fatalf("%d records of 30000 bytes were sent, the window is %d, acknowledged is %+v", i+1, man.Window, s.acked())
			}
		}
	})
}

// TestDuplicatesAreAcked: records that come again are answered, although
// nothing has moved: the source waits for their arrival.
func TestDuplicatesAreAcked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(512, 1))
		run := m.take()
		s.receive(run)
		synctest.Wait()
		before := len(s.allAcks())
		s.receive(run)
		if after := s.allAcks(); len(after) != before+1 || after[before].Received != 1 {
			t.Errorf("acks after a duplicate: %+v", after)
		}
	})
}

func TestAttachRules(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.mustOpen()
		defer s.shut()
		s.mustAttach(5)
		code := func(change func(*wire.Manifest)) wire.Code {
			m := manifest(5)
			change(&m)
			_, err := s.g.Attach(m, false, &Channel{Ack: func(uint32, uint64, epoch.LSN, epoch.LSN, epoch.LSN) {}, Drop: func(error) {}})
			var we *wire.Error
			if errors.As(err, &we) {
				return we.Code
			}
			return wire.Code("")
		}
		for name, c := range map[string]struct {
			change func(*wire.Manifest)
			want   wire.Code
		}{
			"older session":  {func(m *wire.Manifest) { m.Session = 4 }, wire.CodeStale},
			"other lineage":  {func(m *wire.Manifest) { m.Lineage = epoch.UUID{77} }, wire.CodeConflict},
			"other group":    {func(m *wire.Manifest) { m.ID = epoch.UUID{78} }, wire.CodeConflict},
			"no window":      {func(m *wire.Manifest) { m.Window = 0 }, wire.CodeConflict},
			"negative":       {func(m *wire.Manifest) { m.Window = -1 }, wire.CodeConflict},
			"too much":       {func(m *wire.Manifest) { m.Window = s.limits.WindowBytes + 1 }, wire.CodeConflict},
			"as it was":      {func(*wire.Manifest) {}, ""},
			"higher session": {func(m *wire.Manifest) { m.Session = 6 }, ""},
		} {
			if got := code(c.change); got != c.want && name != "as it was" {
				t.Errorf("%s: refused with %q, want %q", name, got, c.want)
			}
		}
		if s.session != 6 {
			t.Errorf("session %d is durable", s.session)
		}
		if _, err := s.attach(5); err == nil {
			t.Error("an older session is let in")
		}
	})
}

// TestSessionWithoutSpace: a full disk keeps a new session out for as long as it
// is full, and the group lives: what it holds can be failed over meanwhile.
func TestSessionWithoutSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(4096, 1))
		last := m.close()
		s.receive(m.take())
		synctest.Wait()
		s.persist = fmt.Errorf("write group file: %w", syscall.ENOSPC)
		_, err := s.attach(2)
		if we := (*wire.Error)(nil); !errors.As(err, &we) || we.Code != wire.CodeNoSpace {
			t.Errorf("a session that cannot be made durable: %v", err)
		}
		if sealed, err := s.g.Seal(); err != nil || sealed.Pos.LSN != last || sealed.Pos.Session != 1 {
			t.Errorf("failover meanwhile: %+v, %v", sealed, err)
		}
		s.g.Unseal()
		s.persist = nil
		if resp := s.mustAttach(2); resp.Pos.LSN != last || s.session != 2 {
			t.Errorf("with space again: %+v, session %d is durable", resp, s.session)
		}
	})
}

// TestNewSessionDropsPartialEpoch: what was not closed is void, whole epochs stay.
func TestNewSessionDropsPartialEpoch(t *testing.T) {
	for _, restart := range []string{"", "kill", "crash"} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t, 1)
			s.mustOpen()
			defer func() { s.shut() }()
			s.mustAttach(1)
			m := newStream(1, 1)
			m.write(0, 0, pattern(4096, 1))
			whole := m.close()
			s.receive(m.take())
			synctest.Wait()
			want := [2][]byte{slices.Clone(m.disks[0]), slices.Clone(m.disks[1])}
			m.write(0, 0, pattern(4096, 2))
			m.write(1, 0, pattern(4096, 2))
			s.receive(m.take())
			old := s.ch
			if restart != "" {
				s.reopen(restart == "crash")
				old = nil
			}
			if st := s.g.Status(); st.Recovery != "" {
				t.Errorf("%s: an epoch that nobody was told is durable is an alarm: %s", restart, st.Recovery)
			}
			resp := s.mustAttach(2)
			if resp.Pos.LSN != whole || resp.Pos.Session != 1 || resp.Fresh {
				t.Fatalf("%s: %+v", restart, resp)
			}
			// The same LSNs, another session, another content; the old channel is deaf.
			n := newStream(2, whole+1)
			n.disks = want
			n.write(0, 4096, pattern(4096, 3))
			last := n.close()
			if old != nil {
				m.write(0, 0, pattern(4096, 9))
				if err := s.g.Receive(old, 1, m.take()); err != nil {
					t.Error(err)
				}
			}
			s.receive(n.take())
			synctest.Wait()
			if s.acked().Durable != last {
				t.Errorf("%s: acked %+v, want %d", restart, s.acked(), last)
			}
			s.reopen(true)
			if sealed, err := s.g.Seal(); err != nil || sealed.Pos.LSN != last || sealed.Pos.Session != 2 || sealed.CloseNs != int64(last)*1000 {
				t.Errorf("%s: sealed %+v, %v", restart, sealed, err)
			}
			s.holds(n)
		})
	}
}

// TestViolations: a peer's nonsense ends its link, not the group.
func TestViolations(t *testing.T) {
	for name, make := range map[string]func(*stream){
		"unknown disk": func(m *stream) {
			r := epoch.Record{Type: epoch.TypeTrim, Disk: 0, Offset: 0, Length: 1}
			m.add(r)
			m.recs[0].Disk = 7
			m.recs[0].Seal()
		},
		"past the end":  func(m *stream) { m.trimRaw(diskSize-1, 2) },
		"far past":      func(m *stream) { m.trimRaw(1<<59, 1) },
		"other lineage": func(m *stream) { m.trimRaw(0, 1); m.recs[0].Lineage = epoch.UUID{9}; m.recs[0].Seal() },
		"bad close":     func(m *stream) { m.add(epoch.Record{Type: epoch.TypeClose, Disk: epoch.GroupWide}) },
		"above window": func(m *stream) {
			m.next = 10
			for range 50 {
				m.write(0, 0, pattern(epoch.MaxPayload, 1))
			}
		},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t, 1)
			s.mustOpen()
			defer s.shut()
			s.mustAttach(1)
			m := newStream(1, 1)
			make(m)
			if err := s.g.Receive(s.ch, 1, m.take()); !errors.Is(err, wire.ErrProtocol) {
				t.Errorf("%s: %v", name, err)
			}
			s.mustAttach(1)
			good := newStream(1, 1)
			good.write(0, 0, pattern(512, 1))
			last := good.close()
			s.receive(good.take())
			if synctest.Wait(); s.acked().Durable != last {
				t.Errorf("%s: the group is stuck at %+v", name, s.acked())
			}
		})
	}
}

func (m *stream) trimRaw(off, n uint64) {
	r := epoch.Record{Type: epoch.TypeTrim, Lineage: lineage, Session: m.session, LSN: m.next, Offset: off, Length: n}
	r.Seal()
	m.next++
	m.recs = append(m.recs, r)
}

// TestSpoolFull: a full spool holds records back and says so; once some of it
// is applied it goes on, and nothing is lost.
func TestSpoolFull(t *testing.T) {
	for _, full := range []error{syscall.ENOSPC, syscall.EDQUOT} {
		synctest.Test(t, func(t *testing.T) { spoolFull(t, full) })
	}
}

func spoolFull(t *testing.T, full error) {
	s := newSite(t, 1)
	s.limits.SpoolBytes = 2 << 20
	release := make(chan struct{})
	s.wrap = func(_ uint32, img Image) Image { return &stuck{img, release, full} }
	s.mustOpen()
	defer s.shut()
	s.mustAttach(1)
	m := newStream(1, 1)
	for i := range 40 {
		m.write(0, i*1000, pattern(100_000, byte(i+1)))
		m.close()
		s.receive(m.take())
		synctest.Wait()
	}
	time.Sleep(time.Minute)
	synctest.Wait()
	if a := s.acked(); a.Flags != wire.AckSpoolFull || a.Applied != 0 || a.Received == m.next-1 || !s.g.Status().SpoolFull {
		t.Errorf("acked %+v of %d", a, m.next-1)
	}
	close(release)
	time.Sleep(time.Minute)
	synctest.Wait()
	if a := s.acked(); a.Durable != m.next-1 || a.Flags != 0 {
		t.Errorf("acked %+v, want %d", a, m.next-1)
	}
	if _, err := s.g.Seal(); err != nil {
		t.Fatal(err)
	}
	s.holds(m)
}

// TestSpoolDiskFull: no segment of the spool can be made. With space again it
// goes on by itself, although there was nothing to apply that would have made room.
func TestSpoolDiskFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.fs.SetHook(func(op fault.Op, name string) error {
			if strings.HasSuffix(name, ".seg") && op == fault.OpWrite {
				return syscall.EDQUOT
			}
			return nil
		})
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(100_000, 1))
		last := m.close()
		s.receive(m.take())
		time.Sleep(time.Minute)
		synctest.Wait()
		if st := s.g.Status(); !st.SpoolFull || st.SpoolShort == "" || st.Received != 0 || st.Err != nil {
			t.Errorf("%+v", st)
		}
		s.fs.SetHook(nil)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if st := s.g.Status(); st.Applied != last || st.SpoolFull || st.SpoolShort != "" {
			t.Errorf("with space again: %+v", st)
		}
		s.holds(m)
	})
}

// stuck is an image on a host without space, until it is released.
type stuck struct {
	Image
	release chan struct{}
	full    error
}

func (i *stuck) Allocate(off, n int64) error {
	select {
	case <-i.release:
		return i.Image.Allocate(off, n)
	default:
		return i.full
	}
}

// TestImageFull: without space an epoch is not begun; with space it goes on.
func TestImageFull(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(4096, 1))
		m.close()
		s.receive(m.take())
		time.Sleep(5 * time.Second)
		before := newStream(1, 1)
		before.write(0, 0, pattern(4096, 1))
		fillUp(s.fs)
		m.write(0, 0, pattern(4096, 2))
		m.trim(epoch.TypeZero, 0, 8192, 4096)
		m.write(1, 0, pattern(100_000, 3))
		last := m.close()
		s.receive(m.take())
		time.Sleep(5 * time.Second)
		synctest.Wait()
		st := s.g.Status()
		if st.Durable != last || st.Applied == last || !strings.Contains(st.Stalled, "no space") || st.Err != nil {
			t.Fatalf("%+v", st)
		}
		s.holds(before)
		s.fs.SetCapacity(0)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if st := s.g.Status(); st.Applied != last || st.Stalled != "" {
			t.Errorf("%+v", st)
		}
		s.holds(m)
	})
}

// TestTrimNeedsNoSpace: discarding a whole disk takes no room on a full host.
func TestTrimNeedsNoSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 8192, pattern(8192, 1))
		m.close()
		s.receive(m.take())
		time.Sleep(5 * time.Second)
		fillUp(s.fs)
		m.trim(epoch.TypeTrim, 0, 0, diskSize)
		m.trim(epoch.TypeTrim, 1, 0, diskSize)
		last := m.close()
		s.receive(m.take())
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if st := s.g.Status(); st.Applied != last || st.Stalled != "" {
			t.Errorf("%+v", st)
		}
		s.holds(m)
		if _, _, err := s.imgs[0].NextData(0); err == nil {
			t.Error("the trimmed space was not given back")
		}
	})
}

// TestTrimKeepsReservedSpace: a trim does not give away what a later write of
// the same batch was promised.
func TestTrimKeepsReservedSpace(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		used := 0
		s.wrap = func(slot uint32, img Image) Image {
			return &greedy{Image: img, fs: s.fs, used: &used}
		}
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(65536, 1))
		m.trim(epoch.TypeTrim, 0, 0, diskSize)
		m.write(0, 4096, pattern(30000, 2))
		last := m.close()
		s.receive(m.take())
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if st := s.g.Status(); st.Applied != last || used == 0 {
			t.Errorf("%+v; %d allocations", st, used)
		}
		s.holds(m)
	})
}

// fillUp leaves no space at all.
func fillUp(fs *fault.FS) {
	const huge = 1 << 50
	fs.SetCapacity(huge)
	free, err := fs.Free("/")
	if err != nil {
		panic(err)
	}
	fs.SetCapacity(huge - free)
}

// greedy takes away all space that is left once space was reserved.
type greedy struct {
	Image
	fs   *fault.FS
	used *int
}

func (i *greedy) WriteAt(p []byte, off int64) (int, error) {
	*i.used++
	fillUp(i.fs)
	defer i.fs.SetCapacity(0)
	return i.Image.WriteAt(p, off)
}

func (i *greedy) WriteZeroes(off, n int64, noHole bool) error {
	fillUp(i.fs)
	defer i.fs.SetCapacity(0)
	return i.Image.WriteZeroes(off, n, noHole)
}

// TestImageFailure: an image that cannot be written ends the group, which says
// so once and drops its link, and the spool still has everything after a restart.
func TestImageFailure(t *testing.T) {
	for _, op := range []fault.Op{fault.OpWrite, fault.OpSync} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t, 1)
			s.mustOpen()
			defer s.shut()
			s.mustAttach(1)
			s.fs.Inject(fault.Fault{Op: op, Name: "0.raw", Err: syscall.EIO, Short: true})
			m := newStream(1, 1)
			m.write(0, 0, pattern(65536, 1))
			m.write(1, 0, pattern(65536, 1))
			last := m.close()
			s.receive(m.take())
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if st := s.g.Status(); !errors.Is(st.Err, syscall.EIO) || st.Applied != 0 || st.Durable != last {
				t.Errorf("%s: %+v", op, st)
			}
			if len(s.failed) != 1 || !errors.Is(s.failed[0], syscall.EIO) || len(s.drops) != 1 {
				t.Errorf("%s: failed %v, dropped %v", op, s.failed, s.drops)
			}
			s.reopen(true)
			if _, err := s.g.Seal(); err != nil {
				t.Fatal(err)
			}
			s.holds(m)
		})
	}
}

// damage flips bits in the spool's records.
func (s *site) damage(n int) {
	s.t.Helper()
	names, err := s.fs.ReadDir(siteDir + "/spool")
	if err != nil {
		s.t.Fatal(err)
	}
	for _, name := range names {
		for range n {
			if _, err := s.fs.FlipBit(siteDir+"/spool/"+name, 4096+200, 4000); err != nil {
				s.t.Fatal(err)
			}
		}
	}
}

// TestDamagedSpool: acknowledged epochs that rot in the spool before they are
// applied are reported until a compare of everything has ended, across
// restarts; the images stay at the last whole epoch.
func TestDamagedSpool(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t, 1)
			s.limits.ApplyAge = 10 * time.Second
			s.mustOpen()
			defer func() { s.shut() }()
			s.mustAttach(1)
			m := newStream(1, 1)
			m.write(0, 0, pattern(4096, 1))
			m.syncDone()
			one := m.close()
			s.receive(m.take())
			time.Sleep(20 * time.Second)
			old := newStream(1, 1)
			old.write(0, 0, pattern(4096, 1))
			for i := range 3 {
				m.write(0, i*8192, pattern(8192, 2))
				m.close()
				s.receive(m.take())
				synctest.Wait()
			}
			s.damage(1)
			time.Sleep(20 * time.Second)
			synctest.Wait()
			if len(s.drops) != 1 {
				t.Errorf("the link was dropped %d times", len(s.drops))
			}
			if restart {
				s.reopen(false)
				s.reopen(true)
			}
			st := s.g.Status()
			if st.Err != nil || st.Durable != one || st.Applied != one || st.Damaged == "" || st.CloseTime.UnixNano() != int64(one)*1000 {
				t.Errorf("restart %v: %+v", restart, st)
			}
			s.holds(old)
			resp := s.mustAttach(2)
			if resp.Pos.LSN != one || resp.Damaged == "" || !resp.Complete {
				t.Errorf("restart %v: the source is told %+v", restart, resp)
			}
			n := newStream(2, one+1)
			n.disks = old.disks
			n.write(0, 0, pattern(30000, 3))
			n.syncDone()
			n.close()
			s.receive(n.take())
			synctest.Wait()
			s.reopen(true)
			if resp := s.mustAttach(2); resp.Damaged != "" {
				t.Errorf("restart %v: still damaged after the compare: %q", restart, resp.Damaged)
			}
			if sealed, err := s.g.Seal(); err != nil || sealed.Lost != "" || !sealed.Complete {
				t.Errorf("restart %v: sealed %+v, %v", restart, sealed, err)
			}
			s.holds(n)
		})
	}
}

// TestLostWhileDown: the same when the damage is found at start.
func TestLostWhileDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.limits.ApplyAge = time.Hour
		s.limits.ApplyBytes = 1 << 30
		s.mustOpen()
		defer func() { s.shut() }()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.syncDone()
		m.close()
		s.receive(m.take())
		if _, err := s.g.Hash(context.Background(), 0, Chunk, []int64{0}); err != nil {
			t.Fatal(err)
		}
		for i := range 25 { // more than one segment, so that a later header knows what was durable
			m.write(0, 0, pattern(100_000, byte(i)))
			m.close()
			s.receive(m.take())
			synctest.Wait()
		}
		s.shut()
		s.damage(1)
		s.mustOpen()
		if st := s.g.Status(); st.Recovery == "" {
			t.Error("nothing is said of the damage")
		}
		s.mustAttach(1)
		if st := s.g.Status(); st.Recovery != "" || st.Damaged == "" {
			t.Errorf("the source is back: what was not acknowledged is sent again: %+v", st)
		}
		s.reopen(false)
		s.reopen(true)
		if resp := s.mustAttach(1); resp.Pos.LSN >= m.next-1 || resp.Damaged == "" {
			t.Errorf("%d records were acknowledged, the source is told %+v", m.next-1, resp)
		}
		if sealed, err := s.g.Seal(); err != nil || sealed.Lost == "" {
			t.Errorf("sealed %+v, %v", sealed, err)
		}
	})
}

const Chunk = 64 << 10

func TestHash(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.limits.ApplyAge = time.Hour
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(1, 70_000, pattern(4096, 1))
		m.close()
		m.write(1, 0, pattern(4096, 2)) // not closed: not in the hash
		s.receive(m.take())
		synctest.Wait()
		sums, err := s.g.Hash(context.Background(), 1, Chunk, []int64{Chunk, 0, diskSize - 5})
		want := make([]byte, 2*Chunk)
		copy(want[70_000:], pattern(4096, 1))
		a, b, c := sha256.Sum256(want[Chunk:]), sha256.Sum256(want[:Chunk]), sha256.Sum256(make([]byte, 5))
		if err != nil || len(sums) != 3 || string(sums[0]) != string(a[:]) || string(sums[1]) != string(b[:]) || string(sums[2]) != string(c[:]) {
			t.Errorf("hashes differ: %v", err)
		}
		for name, f := range map[string]func() error{
			"disk":   func() error { _, err := s.g.Hash(context.Background(), 9, Chunk, nil); return err },
			"small":  func() error { _, err := s.g.Hash(context.Background(), 0, 512, nil); return err },
			"large":  func() error { _, err := s.g.Hash(context.Background(), 0, 1<<30, nil); return err },
			"many":   func() error { _, err := s.g.Hash(context.Background(), 0, Chunk, make([]int64, 2000)); return err },
			"before": func() error { _, err := s.g.Hash(context.Background(), 0, Chunk, []int64{-1}); return err },
			"after":  func() error { _, err := s.g.Hash(context.Background(), 0, Chunk, []int64{diskSize}); return err },
		} {
			if f() == nil {
				t.Errorf("%s: no error", name)
			}
		}
	})
}

func TestSeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.limits.ApplyAge = time.Hour
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		m.write(0, 0, pattern(4096, 1))
		m.close()
		s.receive(m.take())
		if sealed, err := s.g.Seal(); err != nil || sealed.Complete || sealed.Pos.LSN != 2 {
			t.Errorf("before the first sync ended: %+v, %v", sealed, err)
		}
		s.g.Unseal()
		s.mustAttach(1)
		m.syncDone()
		last := m.close()
		want := newStream(1, 1)
		want.write(0, 0, pattern(4096, 1))
		m.write(0, 0, pattern(4096, 9))
		s.receive(m.take())
		synctest.Wait()
		sealed, err := s.g.Seal()
		if err != nil || !sealed.Complete || sealed.Pos != (epoch.Pos{Lineage: lineage, Session: 1, LSN: last}) || sealed.Lost != "" {
			t.Errorf("%+v, %v", sealed, err)
		}
		s.holds(want)
		var we *wire.Error
		if _, err := s.attach(2); !errors.As(err, &we) || we.Code != wire.CodeFenced {
			t.Errorf("attach to a sealed group: %v", err)
		}
		m.close()
		if err := s.g.Receive(s.ch, 1, m.take()); err != nil || s.g.Status().Received != last {
			t.Errorf("a sealed group takes records: %v, %+v", err, s.g.Status())
		}
	})
}

// TestCrashAtEveryStep loses the power at each step of a short life, again and
// again, and checks that nothing acknowledged is lost and only whole epochs are there.
func TestCrashAtEveryStep(t *testing.T) {
	const every = 4
	for n := int64(1); n < 150; n += every {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t, n)
			s.limits.ApplyAge, s.limits.SpoolBytes = time.Millisecond, 3<<20
			states := map[epoch.LSN]*stream{}
			m := newStream(1, 1)
			snap := func(l epoch.LSN) {
				states[l] = &stream{disks: [2][]byte{slices.Clone(m.disks[0]), slices.Clone(m.disks[1])}}
			}
			snap(0)
			s.fs.StopAfter(n)
			if s.open() == nil {
				if _, err := s.attach(1); err == nil {
					for i := range 12 {
						m.write(uint32(i%2), i*3000, pattern(90_000, byte(i+1)))
						m.trim(epoch.TypeTrim, 0, i*1000, 5000)
						snap(m.close())
						if s.g.Receive(s.ch, 1, m.take()) != nil {
							break
						}
						time.Sleep(300 * time.Millisecond)
					}
				}
				synctest.Wait()
			}
			if s.g != nil {
				s.shut()
			}
			acked := s.acked().Durable
			s.fs = s.fs.Crash()
			s.mustOpen()
			defer s.shut()
			sealed, err := s.g.Seal()
			if err != nil || sealed.Pos.LSN < acked || states[sealed.Pos.LSN] == nil || strings.Contains(sealed.Lost, "had been durable") {
				t.Fatalf("step %d: %d was acknowledged, sealed %+v, %v", n, acked, sealed, err)
			}
			s.holds(states[sealed.Pos.LSN])
		})
	}
}

// slowImage takes its time for a write.
type slowImage struct {
	Image
	each time.Duration
}

func (i slowImage) WriteAt(p []byte, off int64) (int, error) {
	time.Sleep(i.each)
	return i.Image.WriteAt(p, off)
}

// TestToApply: how long applying will take is known from how long it took.
func TestToApply(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSite(t, 1)
		s.wrap = func(_ uint32, img Image) Image { return slowImage{img, 10 * time.Millisecond} }
		s.mustOpen()
		defer s.shut()
		s.mustAttach(1)
		m := newStream(1, 1)
		fill := func() {
			for i := range 99 {
				m.write(0, i*4096, pattern(4096, byte(i)))
			}
			m.close()
			s.receive(m.take())
			synctest.Wait()
		}
		fill()
		if got := s.g.Status().ToApply; got != 0 {
			t.Errorf("before anything was applied: %v", got)
		}
		time.Sleep(10 * time.Second)
		fill()
		if got := s.g.Status().ToApply; got < 900*time.Millisecond || got > 1100*time.Millisecond {
			t.Errorf("100 records of 10 ms each: %v", got)
		}
		time.Sleep(10 * time.Second)
		if st := s.g.Status(); st.ToApply != 0 || st.Applied != st.Durable {
			t.Errorf("applied: %+v", st)
		}
	})
}
