package acked

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kagami/tests/acked/stamp"
)

// finished plays a workload of n operations per writer in a plain folder.
func finished(t *testing.T, seed uint64, n int, writers ...Writer) (dir string, l *Ledger) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "w")
	l, err := NewLedger(Config{Seed: seed, Writers: writers, MaxOps: n, Blocks: 4}, "")
	if err != nil {
		t.Fatal(err)
	}
	w, err := Start(dir, l)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Wait(); err != nil {
		t.Fatal(err)
	}
	return dir, l
}

func check(t *testing.T, dir string, l *Ledger) Report {
	t.Helper()
	r, err := Check(dir, l)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func TestUndamagedIsAccepted(t *testing.T) {
	dir, l := finished(t, 1, 60)
	r := check(t, dir, l)
	if r.Err() != nil || r.Acked != 60*len(AllWriters()) {
		t.Errorf("%v: %v", r, r.Err())
	}
}

// edit changes the file's content.
func edit(t *testing.T, path string, f func([]byte) []byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, f(b), 0o600); err != nil {
		t.Fatal(err)
	}
}

var one = map[Kind]Writer{
	Append:    {Kind: Append, Sync: Fdatasync},
	Overwrite: {Kind: Overwrite, Sync: Fdatasync},
	Files:     {Kind: Files},
}

// anyFile is a file of a Files writer that is there.
func anyFile(t *testing.T, dir string) string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(dir, "files-0/*/file-*"))
	if err != nil || len(files) < 3 {
		t.Fatalf("%d files (%v)", len(files), err)
	}
	return files[1]
}

// TestDamageIsFound breaks a finished workload in one way each and wants it
// told apart: lost or invented.
func TestDamageIsFound(t *testing.T) {
	const n = 50
	log := func(dir string) string { return filepath.Join(dir, "append-0.log") }
	blk := func(dir string) string { return filepath.Join(dir, "overwrite-0.blk") }
	tests := []struct {
		name  string
		kind  Kind
		wants string // lost, invented
		brk   func(t *testing.T, dir string)
	}{
		{"last byte gone", Append, "lost", func(t *testing.T, dir string) {
			edit(t, log(dir), func(b []byte) []byte { return b[:len(b)-1] })
		}},
		{"a byte in the middle", Append, "lost", func(t *testing.T, dir string) {
			edit(t, log(dir), func(b []byte) []byte { b[len(b)/2] ^= 1; return b })
		}},
		{"zeros at the end", Append, "lost", func(t *testing.T, dir string) {
			edit(t, log(dir), func(b []byte) []byte { clear(b[len(b)-40:]); return b })
		}},
		{"a repeated record", Append, "invented", func(t *testing.T, dir string) {
			edit(t, log(dir), func(b []byte) []byte { return append(b, b[:bytes.IndexByte(b, '\n')+1]...) })
		}},
		{"grown by zeros", Append, "invented", func(t *testing.T, dir string) {
			edit(t, log(dir), func(b []byte) []byte { return append(b, 0) })
		}},
		{"file gone", Append, "lost", func(t *testing.T, dir string) { remove(t, log(dir)) }},
		{"a sector back in time", Overwrite, "lost", func(t *testing.T, dir string) {
			edit(t, blk(dir), func(b []byte) []byte { return restamp(t, b, func(s uint64) uint64 { return s - 1 }) })
		}},
		{"a sector from the future", Overwrite, "invented", func(t *testing.T, dir string) {
			edit(t, blk(dir), func(b []byte) []byte { return restamp(t, b, func(uint64) uint64 { return n + 1 }) })
		}},
		{"a sector of zeros", Overwrite, "lost", func(t *testing.T, dir string) {
			edit(t, blk(dir), func(b []byte) []byte { clear(b[512:1024]); return b })
		}},
		{"a bit", Overwrite, "lost", func(t *testing.T, dir string) {
			edit(t, blk(dir), func(b []byte) []byte { b[5000] ^= 4; return b })
		}},
		{"two sectors swapped", Overwrite, "lost", func(t *testing.T, dir string) {
			edit(t, blk(dir), func(b []byte) []byte {
				c := bytes.Clone(b)
				copy(c, b[512:1024])
				copy(c[512:], b[:512])
				return c
			})
		}},
		{"cut short", Overwrite, "lost", func(t *testing.T, dir string) {
			edit(t, blk(dir), func(b []byte) []byte { return b[:len(b)-512] })
		}},
		{"too long", Overwrite, "lost", func(t *testing.T, dir string) {
			edit(t, blk(dir), func(b []byte) []byte { return append(b, 0) })
		}},
		{"a file gone", Files, "lost", func(t *testing.T, dir string) { remove(t, anyFile(t, dir)) }},
		{"a file in the other folder", Files, "lost", func(t *testing.T, dir string) {
			p := anyFile(t, dir)
			rename(t, p, otherFolder(p))
		}},
		{"a file in both folders", Files, "invented", func(t *testing.T, dir string) {
			p := anyFile(t, dir)
			if err := os.Link(p, otherFolder(p)); err != nil {
				t.Fatal(err)
			}
		}},
		{"a file of another operation", Files, "lost", func(t *testing.T, dir string) {
			edit(t, anyFile(t, dir), func([]byte) []byte { return (&filer{common: common{seed: 7}}).content(1) })
		}},
		{"a file cut short", Files, "lost", func(t *testing.T, dir string) {
			edit(t, anyFile(t, dir), func(b []byte) []byte { return b[:len(b)-1] })
		}},
		{"a removed file is back", Files, "lost", func(t *testing.T, dir string) {
			for i := range slots {
				p := filepath.Join(dir, "files-0/0", slotName(i))
				if !exists(p) && !exists(otherFolder(p)) {
					if err := os.WriteFile(p, nil, 0o600); err != nil {
						t.Fatal(err)
					}
					return
				}
			}
			t.Fatal("every slot has a file; choose another seed")
		}},
		{"a temporary file without an operation", Files, "invented", func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, "files-0/1", temporary), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"a strange name", Append, "invented", func(t *testing.T, dir string) {
			if err := os.WriteFile(filepath.Join(dir, "lost+found"), nil, 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{"everything gone", Files, "lost", func(t *testing.T, dir string) {
			if err := os.RemoveAll(dir); err != nil {
				t.Fatal(err)
			}
		}},
	}
	dirs, ledgers := map[Kind]string{}, map[Kind]*Ledger{}
	for kind, w := range one {
		dirs[kind], ledgers[kind] = finished(t, 7, n, w)
	}
	for _, tt := range tests {
		t.Run(fmt.Sprintf("%s/%s", tt.kind, strings.ReplaceAll(tt.name, " ", "_")), func(t *testing.T) {
			dir, l := filepath.Join(t.TempDir(), "w"), ledgers[tt.kind]
			if err := os.CopyFS(dir, os.DirFS(dirs[tt.kind])); err != nil {
				t.Fatal(err)
			}
			if r := check(t, dir, l); r.Err() != nil {
				t.Fatal(r.Err())
			}
			tt.brk(t, dir)
			r := check(t, dir, l)
			if r.Err() == nil || (tt.wants == "lost" && r.LostCount == 0) || (tt.wants == "invented" && r.InventedCount == 0) {
				t.Errorf("want %s: %v", tt.wants, r)
			}
		})
	}
}

// restamp changes the number in one sector, leaving it intact.
func restamp(t *testing.T, b []byte, f func(uint64) uint64) []byte {
	t.Helper()
	for i := 0; i < len(b); i += stamp.Size {
		if s, kind := stamp.Read(b[i : i+stamp.Size]); kind == stamp.Intact && s.Seq > 1 {
			s.Seq = f(s.Seq)
			stamp.Fill(b[i:i+stamp.Size], s)
			return b
		}
	}
	t.Fatal("no sector was written twice")
	return nil
}

func otherFolder(p string) string {
	d, name := filepath.Split(p)
	return filepath.Join(filepath.Dir(filepath.Clean(d)), map[string]string{"0": "1", "1": "0"}[filepath.Base(d)], name)
}

func exists(p string) bool { _, err := os.Lstat(p); return err == nil }

func remove(t *testing.T, p string) {
	t.Helper()
	if err := os.Remove(p); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, from, to string) {
	t.Helper()
	if err := os.Rename(from, to); err != nil {
		t.Fatal(err)
	}
}

// TestOperationUnderWay leaves each writer's last operation unacknowledged and
// brings it to the disk in no, some or all parts: all must pass.
func TestOperationUnderWay(t *testing.T) {
	for kind, writer := range one {
		for n := uint64(2); n < 18; n++ {
			dir, l := finished(t, n, int(n), writer)
			acks := l.acks[0]
			l.acks[0] = acks[:n-1]
			if r := check(t, dir, l); r.Err() != nil {
				t.Errorf("%s: operation %d whole: %v", kind, n, r.Err())
			}
			before, _ := finished(t, n, int(n-1), writer)
			l.acks[0] = acks[:n-1]
			if r := check(t, before, l); r.Err() != nil {
				t.Errorf("%s: operation %d not there at all: %v", kind, n, r.Err())
			}
			l.acks[0] = acks
			if r := check(t, before, l); r.LostCount == 0 {
				t.Errorf("%s: acknowledged operation %d not there: accepted", kind, n)
			}
		}
	}
}

// TestTornOperations: parts of the operation under way.
func TestTornOperations(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 1))
	for n := uint64(2); n < 20; n++ {
		dir, l := finished(t, n, int(n), one[Append])
		l.acks[0] = l.acks[0][:n-1]
		record := len((&appender{common: common{seed: n, spec: one[Append]}}).record(n))
		edit(t, filepath.Join(dir, "append-0.log"), func(b []byte) []byte {
			tail := b[len(b)-record:]
			from := rng.IntN(len(tail))
			clear(tail[from : from+rng.IntN(len(tail)-from)])
			return b[:len(b)-rng.IntN(record+1)]
		})
		if r := check(t, dir, l); r.Err() != nil {
			t.Errorf("append, operation %d torn: %v", n, r.Err())
		}
		edit(t, filepath.Join(dir, "append-0.log"), func(b []byte) []byte { return append(b, 1) }) // no record has it
		if r := check(t, dir, l); r.Err() == nil {
			t.Errorf("append, operation %d torn and a byte invented: accepted", n)
		}
		old, _ := finished(t, n, int(n-1), one[Overwrite])
		dir, l = finished(t, n, int(n), one[Overwrite])
		l.acks[0] = l.acks[0][:n-1]
		before, err := os.ReadFile(filepath.Join(old, "overwrite-0.blk"))
		if err != nil {
			t.Fatal(err)
		}
		edit(t, filepath.Join(dir, "overwrite-0.blk"), func(b []byte) []byte {
			for i := 0; i < len(b); i += stamp.Size {
				if rng.IntN(2) == 0 {
					copy(b[i:i+stamp.Size], before[i:])
				}
			}
			return b
		})
		if r := check(t, dir, l); r.Err() != nil {
			t.Errorf("overwrite, operation %d torn: %v", n, r.Err())
		}
	}
}

// TestOldCopyIsFound: a copy of the folder made earlier lacks what came later,
// whichever writer made it.
func TestOldCopyIsFound(t *testing.T) {
	for _, w := range AllWriters() {
		dir := filepath.Join(t.TempDir(), "w")
		l, err := NewLedger(Config{Seed: 3, Writers: []Writer{w}, MaxOps: 40, Blocks: 4}, "")
		if err != nil {
			t.Fatal(err)
		}
		load, err := Start(dir, l)
		if err != nil {
			t.Fatal(err)
		}
		load.Pause()
		old := filepath.Join(t.TempDir(), "old")
		if err := os.CopyFS(old, os.DirFS(dir)); err != nil {
			t.Fatal(err)
		}
		missing := 40 - l.Acked()
		load.Resume()
		if err := load.Wait(); err != nil {
			t.Fatal(err)
		}
		r := check(t, old, l)
		if missing > 0 && (r.LostCount == 0 || r.LostSince.IsZero() || r.LostSince.After(r.LastAck)) {
			t.Errorf("%+v: %d operations missing, %+v", w, missing, r)
		}
		if missing == 0 {
			t.Logf("%+v was done before it was paused", w)
		}
	}
}
