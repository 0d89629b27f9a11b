package workload

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func write(t *testing.T, dir string, count uint64) (Acks, string) {
	t.Helper()
	var lines strings.Builder
	w, err := Start(Options{Dir: dir, Seed: 7, Slots: 16, Count: count}, func(e Event) { lines.WriteString(e.Line()) })
	if err != nil {
		t.Fatal(err)
	}
	w.Wait()
	if _, _, err := w.Progress(); err != nil {
		t.Fatal(err)
	}
	a, err := ReadAcks(strings.NewReader(lines.String()))
	if err != nil {
		t.Fatal(err)
	}
	return a, lines.String()
}

func check(t *testing.T, dir string) Report {
	t.Helper()
	r, err := Check(dir, 7)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestWriterGoesOnWhereItWas(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 50)
	a, _ := write(t, dir, 7)
	if a.Append != 57 || a.Blocks != 57 {
		t.Fatalf("acknowledged %+v, want 57 in both", a)
	}
	r := check(t, dir)
	if !r.OK() || r.Append.Highest != 57 || r.Blocks.Highest != 57 || r.Append.Torn != 0 {
		t.Fatalf("found %v", r)
	}
	back, err := ParseReport(r.String())
	if err != nil || back.String() != r.String() {
		t.Fatalf("report read back as %v, %v", back, err)
	}
}

func TestEveryDamageIsFound(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 40)
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rnd := rand.New(rand.NewPCG(seed, 0))
	for _, name := range []string{AppendName, BlocksName} {
		path := filepath.Join(dir, name)
		good, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for range 200 {
			bad := bytes.Clone(good)
			i := rnd.IntN(len(bad))
			bad[i] ^= byte(1 + rnd.IntN(255))
			if err := os.WriteFile(path, bad, 0o600); err != nil {
				t.Fatal(err)
			}
			if r := check(t, dir); r.OK() && r.Append.Highest == 40 && r.Blocks.Highest == 40 {
				t.Fatalf("%s: changed byte %d was not found: %v", name, i, r)
			}
		}
		if err := os.WriteFile(path, good, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

func TestTornTailIsNoDamage(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 20)
	path := filepath.Join(dir, AppendName)
	whole := check(t, dir).Append.Bytes
	next := Record(Append, 7, 21)
	for cut := 0; cut < len(next); cut += 1 + len(next)/60 {
		if err := os.Truncate(path, whole); err != nil {
			t.Fatal(err)
		}
		f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.Write(next[:cut]); err != nil {
			t.Fatal(err)
		}
		f.Close()
		if r := check(t, dir); !r.OK() || r.Append.Highest != 20 || r.Append.Torn != int64(cut) {
			t.Fatalf("cut at %d: %v", cut, r)
		}
	}
}

func TestOldSlotIsFound(t *testing.T) {
	dir := t.TempDir()
	write(t, dir, 40)
	f, err := os.OpenFile(filepath.Join(dir, BlocksName), os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	// 33 lives in slot 1 of 16; 17 was there before.
	if _, err := f.WriteAt(Record(Blocks, 7, 17), 1*blockSize); err != nil {
		t.Fatal(err)
	}
	if r := check(t, dir); r.OK() {
		t.Fatal("a lost overwrite was not found")
	}
}

func TestAcksIgnoreTheUnfinishedLine(t *testing.T) {
	a, err := ReadAcks(strings.NewReader("noise\nACK A 1\r\nACK B 5\nERR B 6 input/output error\nACK A 12"))
	if err != nil || a.Append != 1 || a.Blocks != 5 || len(a.Errors) != 1 {
		t.Fatalf("%+v %v", a, err)
	}
	la, lb := a.Lost(Report{Append: Found{Highest: 3}, Blocks: Found{Highest: 2}})
	if la != 0 || lb != 3 {
		t.Fatalf("lost %d %d", la, lb)
	}
}

func TestExpected(t *testing.T) {
	for slots := uint64(1); slots < 9; slots++ {
		have := make([]uint64, slots)
		for n := uint64(1); n < 40; n++ {
			have[n%slots] = n
			for s := range slots {
				if got := expected(n, s, slots); got != have[s] {
					t.Fatalf("expected(%d, %d, %d) = %d, want %d", n, s, slots, got, have[s])
				}
			}
		}
	}
}
