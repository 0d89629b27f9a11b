package replica

import (
	"bytes"
	"context"
	"crypto/sha256"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

// largeBatches is a complete replica that applies many epochs at once, and its stream.
func largeBatches(t *testing.T) (*site, *stream) {
	s := newSite(t, 1)
	s.limits.ApplyBytes = 4 << 20
	s.mustOpen()
	s.mustAttach(1)
	m := newStream(1, 1)
	m.syncDone()
	m.close()
	s.receive(m.take())
	time.Sleep(5 * time.Second)
	return s, m
}

// TestTornImages: an apply that began and can neither go on nor be undone,
// because the spool rotted, is told; a compare repairs it.
func TestTornImages(t *testing.T) {
	for _, restart := range []bool{false, true} {
		synctest.Test(t, func(t *testing.T) {
			s := newSite(t, 1)
			s.limits.ApplyBytes = 4 << 20
			s.mustOpen()
			defer func() { s.shut() }()
			s.mustAttach(1)
			m := newStream(1, 1)
			m.syncDone()
			one := m.close()
			s.receive(m.take())
			time.Sleep(5 * time.Second)
			for i := range 9 { // two segments: what is read ahead in one does not rot
				m.write(0, i*80_000, pattern(200_000, 2))
				m.close()
			}
			n := 0
			s.fs.SetHook(func(op fault.Op, name string) error {
				if strings.HasSuffix(name, ".raw") && op == fault.OpWrite {
					if n++; n == 2 {
						s.damage(2)
						if restart {
							return fault.ErrStopped
						}
					}
				}
				return nil
			})
			s.receive(m.take())
			time.Sleep(5 * time.Second)
			synctest.Wait()
			if restart {
				s.reopen(false)
				s.reopen(true)
			}
			if st := s.g.Status(); st.Applied != one || !strings.Contains(st.Damaged, "not consistent") || st.Err != nil {
				t.Errorf("restart %v: %+v", restart, st)
			}
			if sealed, err := s.g.Seal(); err != nil || !sealed.Torn || sealed.Lost == "" {
				t.Errorf("restart %v: sealed %+v, %v", restart, sealed, err)
			}
			s.g.Unseal()
			if resp := s.mustAttach(2); resp.Damaged == "" || resp.Pos.LSN != one {
				t.Errorf("restart %v: the source is told %+v", restart, resp)
			}
			c := newStream(2, one+1)
			for i := range diskSize / epoch.MaxPayload {
				c.write(0, i*epoch.MaxPayload, pattern(epoch.MaxPayload, 3))
			}
			c.syncDone()
			last := c.close()
			s.receive(c.take())
			synctest.Wait()
			s.reopen(true)
			if sealed, err := s.g.Seal(); err != nil || sealed.Torn || sealed.Lost != "" || sealed.Pos.LSN != last {
				t.Errorf("restart %v: after the compare: %+v, %v", restart, sealed, err)
			}
			s.holds(c)
		})
	}
}

// TestTornIsDurable: what a batch had written when the spool rotted under it counts as
// equal in the compare that follows, so it has to survive a power loss: nothing redoes it.
func TestTornIsDurable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, m := largeBatches(t)
		defer func() { s.shut() }()
		for i := range 9 {
			m.write(0, i*100_000, pattern(200_000, 2))
			m.close()
		}
		var rots sync.Once
		s.fs.SetHook(func(op fault.Op, name string) error {
			if strings.HasSuffix(name, "0.raw") && op == fault.OpWrite {
				rots.Do(func() { s.damage(2) })
			}
			return nil
		})
		s.receive(m.take())
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if s.g.Status().Damaged == "" {
			t.Fatal("no damage is noticed")
		}
		s.fs.SetHook(nil)
		s.mustAttach(2)
		sums, err := s.g.Hash(context.Background(), 0, Chunk, []int64{0})
		if err != nil {
			t.Fatal(err)
		}
		for seed := range int64(20) {
			b, err := s.fs.Fork(seed).Crash().ReadFile(s.image(0))
			if err != nil {
				t.Fatal(err)
			}
			if got := sha256.Sum256(b[:Chunk]); !bytes.Equal(got[:], sums[0]) {
				t.Fatalf("after a power loss (%d) the image does not hold what its hash said", seed)
			}
		}
	})
}

// TestTornAfterSmallerBatches: a batch of nine epochs is broken off in its
// eighth; the next daemon applies one epoch at a time, and the spool rots behind
// the fifth. The images hold epochs six and seven all the same.
func TestTornAfterSmallerBatches(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, m := largeBatches(t)
		defer func() { s.shut() }()
		for i := range 9 {
			m.write(0, i*80_000, pattern(200_000, byte(2+i)))
			m.close()
		}
		atWrite := func(n int, do func() error) {
			s.fs.SetHook(func(op fault.Op, name string) error {
				if strings.HasSuffix(name, ".raw") && op == fault.OpWrite {
					if n--; n == 0 {
						return do()
					}
				}
				return nil
			})
		}
		atWrite(8, func() error { return fault.ErrStopped })
		s.receive(m.take())
		time.Sleep(5 * time.Second)
		synctest.Wait()
		s.limits.ApplyBytes = 64 << 10
		atWrite(5, func() error { s.damage(2); return nil })
		s.reopen(false)
		time.Sleep(5 * time.Second)
		synctest.Wait()
		s.fs.SetHook(nil)
		if sealed, err := s.g.Seal(); err != nil || !sealed.Torn || sealed.Pos.LSN == m.next-1 {
			t.Errorf("sealed %+v, %v", sealed, err)
		}
	})
}
