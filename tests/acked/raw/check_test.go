package raw

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	"kagami/tests/acked/stamp"
)

const testSeed = 99

// picture is what each sector of a small disk holds: a write's number or 0.
type picture [3]uint64

func (p picture) image() io.ReaderAt {
	b := make([]byte, len(p)*stamp.Size)
	for i, seq := range p {
		if seq != 0 {
			off := int64(i) * stamp.Size
			stamp.Fill(b[off:off+stamp.Size], stamp.Stamp{Seed: testSeed, Seq: seq, Offset: off})
		}
	}
	return bytes.NewReader(b)
}

func smallHistory() *History {
	return NewHistory(testSeed, Disk{Len: int64(len(picture{})) * stamp.Size})
}

// randomHistory makes up to six operations, at most width of them under way at once.
func randomHistory(rng *rand.Rand, width int) *History {
	h := smallHistory()
	var open []uint64
	finish := func() {
		i := rng.IntN(len(open))
		h.End(open[i], nil)
		open = append(open[:i], open[i+1:]...)
	}
	for range 1 + rng.IntN(6) {
		for len(open) == width || (len(open) > 0 && rng.IntN(2) == 0) {
			finish()
		}
		op := Op{Kind: []Kind{Write, Write, Write, Zero, Trim, Flush, Flush}[rng.IntN(7)]}
		if op.Kind != Flush {
			op.FUA = rng.IntN(5) == 0
			first := rng.IntN(3)
			op.Off, op.Len = int64(first)*stamp.Size, int64(1+rng.IntN(3-first))*stamp.Size
		}
		open = append(open, h.Begin(op))
	}
	for len(open) > 0 && rng.IntN(3) > 0 {
		finish()
	}
	return h
}

// oracle enumerates the legal pictures by trying every order of the
// operations that the history allows, without the code under test.
type oracle struct {
	ops      []Op
	required []bool
	closed   bool // a crash keeps everything that came before what it keeps
	legal    map[picture]bool
}

func newOracle(h *History, closed bool) *oracle {
	o := &oracle{ops: h.Ops(), closed: closed, legal: map[picture]bool{}}
	o.required = make([]bool, len(o.ops))
	for i, w := range o.ops {
		o.required[i] = w.Kind != Flush && w.Done != 0 && w.FUA
		for _, f := range o.ops {
			if f.Kind == Flush && f.Done != 0 && w.Kind != Flush && w.Done != 0 && w.Done < f.Issue {
				o.required[i] = true
			}
		}
	}
	o.try(make([]bool, len(o.ops)), picture{})
	return o
}

// try places one more operation (or stops).
func (o *oracle) try(placed []bool, now picture) {
	complete := true
	for i := range o.ops {
		complete = complete && (placed[i] || !o.required[i])
	}
	if complete {
		o.legal[now] = true
	}
	for i, op := range o.ops {
		if placed[i] || op.Kind == Flush || !o.mayFollow(i, placed) {
			continue
		}
		next := now
		for s := op.Off / stamp.Size; s < (op.Off+op.Len)/stamp.Size; s++ {
			next[s] = 0
			if op.Kind == Write {
				next[s] = op.Seq
			}
		}
		placed[i] = true
		o.try(placed, next)
		placed[i] = false
	}
}

// mayFollow reports that operation i may come after exactly those placed: none
// of them surely comes after i and, in a closed world, none that surely comes
// before i is left out.
func (o *oracle) mayFollow(i int, placed []bool) bool {
	for j, other := range o.ops {
		switch {
		case other.Kind == Flush || j == i:
		case placed[j] && o.ops[i].Done != 0 && o.ops[i].Done < other.Issue:
			return false
		case o.closed && !placed[j] && other.Done != 0 && other.Done < o.ops[i].Issue:
			return false
		}
	}
	return true
}

// pictures are all that could be made of the operations' content.
func pictures(ops []Op) []picture {
	out := []picture{{}}
	for s := range (picture{}) {
		var more []picture
		for _, p := range out {
			for _, op := range ops {
				off := int64(s) * stamp.Size
				if op.Kind == Write && op.Off <= off && off < op.Off+op.Len {
					q := p
					q[s] = op.Seq
					more = append(more, q)
				}
			}
		}
		out = append(out, more...)
	}
	return out
}

func accepted(t *testing.T, h *History, o Options, p picture) bool {
	t.Helper()
	r, err := Check(h, o, p.image())
	if err != nil {
		t.Fatal(err)
	}
	return r.Err() == nil
}

// TestCheckAgainstOracle compares verdicts on every possible image of small
// random histories. Per sector the checker must agree with the oracle exactly;
// as a cut exactly when the order is known, and otherwise at least accept
// whatever is legal.
func TestCheckAgainstOracle(t *testing.T) {
	const rounds = 1500
	judged, legal, lenient := 0, 0, 0
	for seed := range uint64(rounds) {
		rng := rand.New(rand.NewPCG(seed, 8))
		width := 1 + int(seed%3)
		h := randomHistory(rng, width)
		loose, cut := newOracle(h, false), newOracle(h, true)
		for _, p := range pictures(h.Ops()) {
			judged++
			want := perSector(loose, p)
			if got := accepted(t, h, Options{TrimIsZero: true}, p); got != want {
				t.Fatalf("seed %d: picture %v accepted: %v, want %v\n%+v", seed, p, got, want, h.Ops())
			}
			want, got := cut.legal[p], accepted(t, h, Options{Cut: true, Atomic: true, TrimIsZero: true}, p)
			if want {
				legal++
			}
			if want && !got || got && !want && width == 1 {
				t.Fatalf("seed %d: picture %v accepted as a cut: %v, want %v\n%+v", seed, p, got, want, h.Ops())
			}
			if got && !want {
				lenient++
			}
			if width == 1 {
				comparePrefix(t, seed, h, p, want)
			}
		}
	}
	t.Logf("%d images judged, %d legal cuts, %d illegal cuts of concurrent writes accepted", judged, legal, lenient)
	if legal < rounds || judged < 3*legal/2 || lenient*10 > judged {
		t.Error("the mix of legal and illegal images proves nothing")
	}
}

// perSector: each sector alone is as in some legal picture.
func perSector(o *oracle, p picture) bool {
	for s := range p {
		found := false
		for q := range o.legal {
			found = found || q[s] == p[s]
		}
		if !found {
			return false
		}
	}
	return true
}

func comparePrefix(t *testing.T, seed uint64, h *History, p picture, want bool) {
	t.Helper()
	if _, err := CheckPrefix(h, p.image()); (err == nil) != want {
		t.Fatalf("seed %d: CheckPrefix of %v: %v, want legal: %v\n%+v", seed, p, err, want, h.Ops())
	}
}

// do begins and ends one operation.
func do(h *History, op Op) uint64 {
	seq := h.Begin(op)
	h.End(seq, nil)
	return seq
}

func writeAt(sector, n int64) Op {
	return Op{Kind: Write, Off: sector * stamp.Size, Len: n * stamp.Size}
}

func TestPowerLossAndSettle(t *testing.T) {
	build := func(crash func(*History)) *History {
		h := smallHistory()
		do(h, writeAt(0, 1)) // 1: answered, not flushed
		h.Begin(writeAt(1, 1))
		crash(h)
		do(h, Op{Kind: Flush})
		do(h, writeAt(2, 1)) // 4
		do(h, Op{Kind: Flush})
		return h
	}
	tests := []struct {
		name  string
		crash func(*History)
		p     picture
		o     Options
		ok    bool
	}{
		{"a restart keeps answered writes", (*History).Settle, picture{1, 0, 4}, Options{}, true},
		{"a restart must not lose them", (*History).Settle, picture{0, 0, 4}, Options{}, false},
		{"an unanswered write may show", (*History).Settle, picture{1, 2, 4}, Options{Cut: true, Atomic: true}, true},
		{"a power loss may lose them", (*History).PowerLoss, picture{0, 0, 4}, Options{Cut: true}, true},
		{"but not what was flushed later", (*History).PowerLoss, picture{1, 2, 0}, Options{}, false},
		{"order holds within a life", (*History).PowerLoss, picture{0, 2, 4}, Options{Cut: true}, false},
		{"and only when asked for", (*History).PowerLoss, picture{0, 2, 4}, Options{}, true},
		{"Completed asks for everything", (*History).PowerLoss, picture{0, 2, 4}, Options{Completed: true}, false},
	}
	for _, tt := range tests {
		if got := accepted(t, build(tt.crash), tt.o, tt.p); got != tt.ok {
			t.Errorf("%s: %v accepted: %v", tt.name, tt.p, got)
		}
	}
}

// TestSettledWriteDoesNotComeBack: what had no answer when the server died
// cannot overwrite what was written after.
func TestSettledWriteDoesNotComeBack(t *testing.T) {
	for _, settle := range []bool{false, true} {
		h := smallHistory()
		h.Begin(writeAt(0, 1)) // 1: never answered
		if settle {
			h.Settle()
		}
		do(h, writeAt(0, 1)) // 2
		do(h, Op{Kind: Flush})
		if got := accepted(t, h, Options{}, picture{1}); got == settle {
			t.Errorf("settled: %v, the unanswered write in place of a later, durable one accepted: %v", settle, got)
		}
	}
}

func TestRefusedWriteMayBeTorn(t *testing.T) {
	h := smallHistory()
	h.End(h.Begin(writeAt(0, 3)), syscall.EIO)
	o := Options{Cut: true, Atomic: true, Completed: true}
	for _, p := range []picture{{}, {1, 0, 1}, {1, 1, 1}} {
		if !accepted(t, h, o, p) {
			t.Errorf("%v refused after a write that failed", p)
		}
	}
}

func TestTrimNeedNotBeZero(t *testing.T) {
	h := smallHistory()
	do(h, writeAt(0, 2))
	do(h, Op{Kind: Trim, Len: 2 * stamp.Size})
	do(h, Op{Kind: Flush})
	if p := (picture{1, 0}); !accepted(t, h, Options{}, p) || accepted(t, h, Options{TrimIsZero: true}, p) {
		t.Error("a sector that kept its content after a trim must pass, except with TrimIsZero")
	}
}

// TestFailedFlushPromisesNothing also covers a flush without an answer.
func TestFailedFlushPromisesNothing(t *testing.T) {
	h := smallHistory()
	do(h, writeAt(0, 1))
	h.End(h.Begin(Op{Kind: Flush}), syscall.EIO)
	h.Begin(Op{Kind: Flush})
	if !accepted(t, h, Options{}, picture{}) {
		t.Error("a flush that failed was taken as a promise")
	}
}

// TestCutSpansDisks: what shows on one disk brings what came before on the other.
func TestCutSpansDisks(t *testing.T) {
	d := Disk{Len: stamp.Size}
	h := NewHistory(testSeed, d, d)
	do(h, Op{Kind: Write, Disk: 0, Len: stamp.Size})
	do(h, Op{Kind: Write, Disk: 1, Len: stamp.Size})
	empty, second := make([]byte, stamp.Size), make([]byte, stamp.Size)
	stamp.Fill(second, stamp.Stamp{Seed: testSeed, Seq: 2, Place: 1})
	for _, cut := range []bool{false, true} {
		r, err := Check(h, Options{Cut: cut}, bytes.NewReader(empty), bytes.NewReader(second))
		if err != nil || (r.LostCount == 1) != cut {
			t.Errorf("cut %v: %+v, %v", cut, r, err)
		}
	}
}

// TestInventedContent plants what nobody wrote there.
func TestInventedContent(t *testing.T) {
	plant := map[string]func(b []byte){
		"foreign":        func(b []byte) { copy(b, "hello") },
		"damaged":        func(b []byte) { b[100] ^= 1 },
		"other run":      func(b []byte) { stamp.Fill(b[:512], stamp.Stamp{Seed: 1, Seq: 1}) },
		"other place":    func(b []byte) { stamp.Fill(b[:512], stamp.Stamp{Seed: testSeed, Seq: 1, Place: 1}) },
		"other offset":   func(b []byte) { copy(b[:512], b[512:1024]) },
		"unknown number": func(b []byte) { stamp.Fill(b[:512], stamp.Stamp{Seed: testSeed, Seq: 77}) },
		"not a write":    func(b []byte) { stamp.Fill(b[:512], stamp.Stamp{Seed: testSeed, Seq: 2}) },
		"outside its write": func(b []byte) {
			stamp.Fill(b[1024:], stamp.Stamp{Seed: testSeed, Seq: 1, Offset: 1024})
		},
	}
	for name, f := range plant {
		h := smallHistory()
		do(h, writeAt(0, 2))
		do(h, Op{Kind: Flush})
		b := make([]byte, 3*stamp.Size)
		h.Fill(b[:1024], 1, 0, 0)
		if r, err := Check(h, Options{}, bytes.NewReader(b)); err != nil || r.Err() != nil {
			t.Fatalf("%s: before: %v %v", name, err, r.Err())
		}
		f(b)
		r, err := Check(h, Options{}, bytes.NewReader(b))
		if err != nil || r.InventedCount != 1 || r.LostCount != 0 {
			t.Errorf("%s: %+v, %v", name, r, err)
		}
		if _, err := CheckPrefix(h, bytes.NewReader(b)); !errors.Is(err, ErrNoPrefix) {
			t.Errorf("%s: CheckPrefix: %v", name, err)
		}
	}
}

func TestPrefixRefusesUnknownOrder(t *testing.T) {
	overlapping := smallHistory()
	a, b := overlapping.Begin(writeAt(0, 1)), overlapping.Begin(writeAt(1, 1))
	overlapping.End(a, nil)
	overlapping.End(b, nil)
	two := smallHistory()
	two.Begin(writeAt(0, 1))
	two.Begin(writeAt(1, 1))
	lost := smallHistory()
	do(lost, writeAt(0, 1))
	lost.PowerLoss()
	for i, h := range []*History{overlapping, two, lost} {
		if _, err := CheckPrefix(h, picture{}.image()); err == nil || !strings.Contains(err.Error(), "order is not known") {
			t.Errorf("history %d: %v", i, err)
		}
	}
}

func TestShortImageIsAnError(t *testing.T) {
	if _, err := Check(smallHistory(), Options{}, bytes.NewReader(make([]byte, 600))); err == nil {
		t.Error("an image that ends early was checked")
	}
	if _, err := Check(smallHistory(), Options{}); err == nil {
		t.Error("no image was checked")
	}
}

func TestSaveAndLoad(t *testing.T) {
	h := randomHistory(rand.New(rand.NewPCG(4, 4)), 3)
	h.PowerLoss()
	var b bytes.Buffer
	if err := h.Save(&b); err != nil {
		t.Fatal(err)
	}
	got, err := LoadHistory(bytes.NewReader(b.Bytes()))
	if err != nil || fmt.Sprint(got.data) != fmt.Sprint(h.data) {
		t.Errorf("loaded %+v (%v), saved %+v", got, err, h.data)
	}
	for _, bad := range []string{"", "{", `{"disks":[],"ops":[{"seq":1}]}`, `{"disks":[{"len":512}],"ops":[{"seq":2}]}`} {
		if _, err := LoadHistory(strings.NewReader(bad)); err == nil {
			t.Errorf("%q was loaded", bad)
		}
	}
}
