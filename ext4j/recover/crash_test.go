package recover

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"kagami/ext4j/jbd2"
)

var errCrash = errors.New("power lost")

// crashDevice is a disk that loses power: what was written since the last
// Datasync survives or not, sector by sector.
type crashDevice struct {
	base    []byte
	durable map[int64][]byte   // sectors
	pending map[int64][][]byte // versions since the last Datasync, oldest first
	left    int                // operations until power is lost; below 0: never
	ops     int
}

func newCrashDevice(base []byte) *crashDevice {
	return &crashDevice{base: base, durable: map[int64][]byte{}, pending: map[int64][][]byte{}, left: -1}
}

func (d *crashDevice) sector(n int64) []byte {
	if v := d.pending[n]; len(v) > 0 {
		return v[len(v)-1]
	}
	if s, ok := d.durable[n]; ok {
		return s
	}
	return d.base[n*sector : (n+1)*sector]
}

func (d *crashDevice) ReadAt(p []byte, off int64) (int, error) {
	for n := 0; n < len(p); {
		at := off + int64(n)
		n += copy(p[n:], d.sector(at / sector)[at%sector:])
	}
	return len(p), nil
}

// op counts an operation and reports whether power is lost during it.
func (d *crashDevice) op() bool {
	d.ops++
	d.left--
	return d.left == -1
}

func (d *crashDevice) WriteAt(p []byte, off int64) (int, error) {
	lost := d.op()
	for n := 0; n < len(p); {
		at := off + int64(n)
		s := bytes.Clone(d.sector(at / sector))
		n += copy(s[at%sector:], p[n:])
		d.pending[at/sector] = append(d.pending[at/sector], s)
	}
	if lost {
		return 0, errCrash
	}
	return len(p), nil
}

func (d *crashDevice) Datasync() error {
	if d.op() {
		return errCrash
	}
	for n, v := range d.pending {
		d.durable[n] = v[len(v)-1]
	}
	clear(d.pending)
	return nil
}

// reboot decides what survived; keep is the share of sectors, in percent,
// that do, in any of the versions written.
func (d *crashDevice) reboot(rng *rand.Rand, keep int) {
	for n, v := range d.pending {
		if rng.IntN(100) < keep {
			d.durable[n] = v[rng.IntN(len(v))]
		}
	}
	clear(d.pending)
	d.left = -1
}

// content is the whole disk as it would be read now.
func (d *crashDevice) content() []byte {
	b := bytes.Clone(d.base)
	for n := range d.durable {
		copy(b[n*sector:], d.sector(n))
	}
	for n := range d.pending {
		copy(b[n*sector:], d.sector(n))
	}
	return b
}

// crashCases are the images the crash tests run on.
func crashCases(t testing.TB) map[string]*synth {
	typical := func(f jbd2.Features, args ...string) *synth {
		s := newSynth(t, f, args...)
		s.typical(1)
		s.store()
		return s
	}
	cases := map[string]*synth{
		"v3 64bit": typical(jbd2.SumV3|jbd2.Bit64|jbd2.Revoke, "-O", "metadata_csum,64bit"),
		"none":     typical(jbd2.Revoke, "-O", "^metadata_csum,^64bit"),
		"errno":    typical(jbd2.SumV3|jbd2.Revoke, "-O", "metadata_csum"),
		"bad data": typical(jbd2.SumV3|jbd2.Revoke, "-O", "metadata_csum"),
		"no super": newSynth(t, jbd2.SumV3, "-O", "metadata_csum"),
		"empty":    newSynth(t, jbd2.SumV3, "-O", "metadata_csum"),
	}
	s := cases["errno"]
	s.b.Super.Errno = -5
	s.store()
	s = cases["bad data"]
	s.b.At(5)[100] ^= 1
	s.store()
	s = cases["no super"]
	s.b.Transaction(5, append(random(rand.New(rand.NewPCG(1, 1)), s.free(5), 1024), s.groupCopy(77, 66)))
	s.store()
	s = cases["empty"]
	s.b.Super.Start, s.b.Super.Errno = 0, -5
	s.store()
	return cases
}

// TestCrashes loses power in every write and every sync of a recovery, and again in the
// recovery from that, and expects the bytes of an undisturbed one.
func TestCrashes(t *testing.T) {
	seed := seedOf(t)
	for name, s := range crashCases(t) {
		t.Run(name, func(t *testing.T) {
			size := int64(len(s.img))
			clean := newCrashDevice(s.img)
			rep, err := Run(clean, 0, size, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if len(clean.pending) != 0 {
				t.Errorf("%d sectors are not durable at the end", len(clean.pending))
			}
			want, resumed := clean.content(), 0
			for round := range 3 * soak(t) {
				for at := range clean.ops {
					rng := rand.New(rand.NewPCG(seed, uint64(round)<<32|uint64(at)))
					d := newCrashDevice(s.img)
					d.left = at
					resumed += crashOnce(t, d, rng, size, fmt.Sprintf("round %d, operation %d", round, at))
					if !bytes.Equal(d.content(), want) {
						t.Fatalf("round %d, power lost in operation %d: another result", round, at)
					}
				}
			}
			if torn := s.fs.Raw(); resumed == 0 && bytes.Contains([]byte(name), []byte("v3")) {
				t.Errorf("no torn superblock was ever resumed from (%x)", torn[0x3fc:])
			}
			t.Logf("%d operations, %d blocks, resumed %d times", clean.ops, rep.Written, resumed)
		})
	}
}

// crashOnce runs until power is lost, then again until it is lost at a random
// moment, then to the end.
func crashOnce(t *testing.T, d *crashDevice, rng *rand.Rand, size int64, what string) (resumed int) {
	t.Helper()
	for try := range 3 {
		rep, err := Run(d, 0, size, Options{})
		if rep.Resumed {
			resumed++
		}
		if err == nil {
			// With needs_recovery off on disk, running again does nothing.
			if rep, err = Run(d, 0, size, Options{}); err != nil || rep.Needed {
				t.Fatalf("%s: run again: needed %v, %v", what, rep.Needed, err)
			}
			return resumed
		}
		if !errors.Is(err, errCrash) {
			t.Fatalf("%s, try %d: %v", what, try, err)
		}
		d.reboot(rng, []int{0, 50, 100, 90}[rng.IntN(4)])
		if try == 0 {
			d.left = rng.IntN(d.ops + 3)
		}
	}
	t.Fatalf("%s: never ends", what)
	return 0
}
