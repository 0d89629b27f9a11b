package spool

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

var testOwner = Owner{Group: testGroup, Replica: epoch.UUID{0xab}}

func appliedAt(n uint64) Applied {
	return Applied{Pos: epoch.Pos{Lineage: epoch.UUID{byte(n)}, Session: n, LSN: epoch.LSN(n * 10)}, CloseTimeNs: int64(n), SyncDone: n > 5}
}

// TestMarkCrash: after any crash the mark holds the last stored position, or the one whose Store was running.
func TestMarkCrash(t *testing.T) {
	seeds := int64(3000)
	if raceEnabled {
		seeds = 500
	}
	for seed := range seeds {
		rng := rand.New(rand.NewPCG(uint64(seed), 3))
		f := fault.NewFS(seed)
		stored, tried := uint64(0), uint64(0)
		for range 6 {
			f.StopAfter(int64(1 + rng.IntN(16)))
			if rng.IntN(4) == 0 {
				f.Inject(fault.Fault{Op: fault.OpSync, Nth: rng.IntN(5), Err: syscall.EIO})
			}
			if m, err := OpenMark(f, "/applied", testOwner); err == nil {
				if a := m.Load(); a == appliedAt(tried) && tried > 0 {
					stored = tried
				} else if a != (Applied{}) && a != appliedAt(stored) || stored > 0 && a == (Applied{}) {
					t.Fatalf("seed %d: holds %+v, want %d or %d", seed, a, stored, tried)
				}
				for range 4 {
					tried = max(stored, tried) + 1
					if err := m.Store(appliedAt(tried)); err != nil {
						if m.Store(Applied{}) == nil {
							t.Fatalf("seed %d: stored after an error", seed)
						}
						break
					}
					stored = tried
				}
			} else if errors.Is(err, ErrCorrupt) {
				t.Fatalf("seed %d: %v", seed, err)
			}
			if rng.IntN(3) == 0 {
				f = f.Kill()
			} else {
				f = f.Crash()
			}
		}
	}
}

func TestMarkDamage(t *testing.T) {
	f := fault.NewFS(1)
	m, err := OpenMark(f, "/applied", testOwner)
	must(t, err)
	must(t, m.Store(appliedAt(1)))
	must(t, m.Store(appliedAt(2)))
	must(t, m.Close())
	if err := m.Store(appliedAt(3)); !errors.Is(err, ErrClosed) {
		t.Error(err)
	}
	_, err = f.FlipBit("/applied", 0, markSlot) // the newer one
	must(t, err)
	m, err = OpenMark(f, "/applied", testOwner)
	must(t, err)
	if m.Load() != appliedAt(1) {
		t.Errorf("%+v", m.Load())
	}
	must(t, m.Close())
	_, err = f.FlipBit("/applied", markSlot, markSlot)
	must(t, err)
	if _, err := OpenMark(f, "/applied", testOwner); !errors.Is(err, ErrCorrupt) {
		t.Errorf("both slots damaged: %v", err)
	}
	for at, words := range map[int]string{8: "version 9", 12: "features 0x9", 20: "flags 0x9"} {
		b := encodeMark(testOwner, appliedAt(1), 5)
		b[at] = 9
		sealBlock(b)
		f.WriteFile("/applied", append(b, b...))
		if _, err := OpenMark(f, "/applied", testOwner); err == nil || errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), words) {
			t.Errorf("later release, byte %d: %v", at, err)
		}
	}
	b := encodeMark(testOwner, appliedAt(1), 5)
	b[16] = 9 // an optional feature
	sealBlock(b)
	f.WriteFile("/applied", append(b, b...))
	if m, err = OpenMark(f, "/applied", testOwner); err != nil || m.Load() != appliedAt(1) {
		t.Errorf("optional feature: %v", err)
	}
	must(t, m.Close())
	for _, o := range []Owner{{}, {Group: testOwner.Group}, {Group: epoch.UUID{9}, Replica: testOwner.Replica}} {
		if _, err := OpenMark(f, "/applied", o); err == nil || errors.Is(err, ErrCorrupt) || !strings.Contains(err.Error(), "it belongs to replica") {
			t.Errorf("mark of another owner: %v", err)
		}
	}
}

// FuzzMark decodes arbitrary slots with a right sum.
func FuzzMark(f *testing.F) {
	f.Add(encodeMark(testOwner, appliedAt(7), 9)[:128])
	f.Fuzz(func(t *testing.T, b []byte) {
		slot := append(bytes.Clone(b), make([]byte, markSlot)...)[:markSlot]
		sealBlock(slot)
		if o, a, n, err := decodeMark(slot); err == nil {
			if o2, got, m, err := decodeMark(encodeMark(o, a, n)); err != nil || o2 != o || got != a || m != n {
				t.Fatalf("%+v became %+v: %v", a, got, err)
			}
		}
	})
}
