package fault

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"strings"
	"sync"
	"syscall"
	"testing"

	"kagami/images"
)

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func create(t *testing.T, f *FS, name string) images.File {
	t.Helper()
	h, err := f.Create(name, 0o600)
	must(t, err)
	return h
}

func write(t *testing.T, h images.File, p []byte, off int64) {
	t.Helper()
	n, err := h.WriteAt(p, off)
	if err != nil || n != len(p) {
		t.Fatalf("wrote %d of %d: %v", n, len(p), err)
	}
}

func fill(c byte, n int) []byte { return bytes.Repeat([]byte{c}, n) }

// TestContentModel compares random operations with a plain byte slice.
func TestContentModel(t *testing.T) {
	for seed := range scale(uint64(200)) {
		rng := rand.New(rand.NewPCG(seed, 1))
		f := NewFS(int64(seed))
		h := create(t, f, "/a")
		model := []byte{}
		for range 60 {
			off, n := rng.Int64N(40000), rng.Int64N(9000)
			clip := func() []byte {
				o := min(off, int64(len(model)))
				return model[o:min(off+n, int64(len(model)))]
			}
			switch rng.IntN(6) {
			case 0, 1:
				p := fill(byte(rng.IntN(4)), int(n))
				write(t, h, p, off)
				if n > 0 {
					model = append(model, make([]byte, max(0, int(off+n)-len(model)))...)
				}
				copy(model[min(off, int64(len(model))):], p)
			case 2:
				must(t, h.PunchHole(off, n))
				clear(clip())
			case 3:
				must(t, h.ZeroRange(off, n))
				clear(clip())
			case 4:
				must(t, h.Truncate(off))
				model = append(model, make([]byte, max(0, int(off)-len(model)))...)[:off:off]
			case 5:
				must(t, h.Allocate(off, n))
			}
			got, err := f.ReadFile("/a")
			must(t, err)
			if !bytes.Equal(got, model) {
				t.Fatalf("seed %d: content differs from the model", seed)
			}
		}
		if rng.IntN(2) == 0 {
			must(t, h.Datasync())
			must(t, f.SyncDir("/"))
			f = f.Crash()
		} else {
			f = f.Kill()
		}
		if got, err := f.ReadFile("/a"); err != nil || !bytes.Equal(got, model) {
			t.Fatalf("seed %d: content differs after restart: %v", seed, err)
		}
	}
}

// TestCrashSectors: after a crash every sector is one that was written, what was
// synced is never older than the sync, and both loss and survival happen.
func TestCrashSectors(t *testing.T) {
	lost, kept, torn := 0, 0, 0
	for seed := range int64(400) {
		f := NewFS(seed)
		h := create(t, f, "/a")
		write(t, h, fill('A', 8192), 0)
		must(t, h.Datasync())
		must(t, f.SyncDir("/"))
		write(t, h, fill('B', 5000), 1000)
		write(t, h, fill('C', 3000), 4000)
		must(t, h.PunchHole(0, 4096))
		f = f.Crash()
		b, err := f.ReadFile("/a")
		must(t, err)
		if len(b) != 8192 {
			t.Fatalf("seed %d: size %d", seed, len(b))
		}
		may := func(i int) string {
			s := "A"
			if i >= 1000 && i < 6000 {
				s += "B"
			}
			if i >= 4000 && i < 7000 {
				s += "C"
			}
			if i < 4096 {
				s += "\x00"
			}
			return s
		}
		for i, c := range b {
			if !strings.Contains(may(i), string(rune(c))) {
				t.Fatalf("seed %d: byte %d is %q", seed, i, c)
			}
		}
		switch nB := bytes.Count(b, []byte{'B'}); {
		case bytes.Count(b, []byte{'A'}) == 8192:
			lost++
		case nB == 0:
			kept++
		default:
			torn++
		}
	}
	if lost == 0 || kept == 0 || torn == 0 {
		t.Fatalf("lost %d, kept %d, torn %d: not all happen", lost, kept, torn)
	}
}

// TestCrashNames: a folder keeps a prefix of its pending operations.
func TestCrashNames(t *testing.T) {
	seen := map[string]int{}
	for seed := range int64(300) {
		f := NewFS(seed)
		must(t, f.MkdirAll("/d", 0o700))
		create(t, f, "/d/a")
		must(t, f.SyncDir("/d"))
		create(t, f, "/d/b")
		must(t, f.Rename("/d/b", "/d/a"))
		create(t, f, "/d/c")
		must(t, f.Remove("/d/a"))
		names, err := f.Crash().ReadDir("/d")
		must(t, err)
		seen[strings.Join(names, " ")]++
	}
	for _, want := range []string{"a", "a b", "a c", "c"} {
		if seen[want] == 0 {
			t.Errorf("%q never happened: %v", want, seen)
		}
		delete(seen, want)
	}
	if len(seen) != 0 {
		t.Errorf("impossible: %v", seen)
	}
}

// TestCrossFolderRename: the file is in one of the two folders, never in none.
func TestCrossFolderRename(t *testing.T) {
	seen := map[string]int{}
	for seed := range int64(200) {
		f := NewFS(seed)
		must(t, f.MkdirAll("/x", 0o700))
		must(t, f.MkdirAll("/y", 0o700))
		f.WriteFile("/x/a", []byte("a"))
		create(t, f, "/x/before")
		must(t, f.Rename("/x/a", "/y/a"))
		if seed%2 == 1 {
			must(t, f.SyncDir("/y"))
		}
		f = f.Crash()
		x, _ := f.ReadDir("/x")
		y, _ := f.ReadDir("/y")
		seen[fmt.Sprint(x, y)]++
		if seed%2 == 1 && fmt.Sprint(x, y) != "[before] [a]" {
			t.Fatalf("seed %d: %v %v after SyncDir", seed, x, y)
		}
		if len(x)+len(y) < 1 {
			t.Fatalf("seed %d: file is gone", seed)
		}
	}
	if len(seen) != 3 {
		t.Errorf("outcomes: %v", seen)
	}
}

func TestKillKeepsCacheButNotDurability(t *testing.T) {
	lost := 0
	for seed := range int64(50) {
		f := NewFS(seed)
		f.WriteFile("/a", fill('A', 512))
		h, err := f.Open("/a")
		must(t, err)
		write(t, h, fill('B', 512), 0)
		f = f.Kill()
		if _, err := h.WriteAt([]byte("x"), 0); !errors.Is(err, ErrStopped) {
			t.Fatalf("old handle: %v", err)
		}
		if b, _ := f.ReadFile("/a"); !bytes.Equal(b, fill('B', 512)) {
			t.Fatal("killed process lost a write")
		}
		if b, _ := f.Crash().ReadFile("/a"); bytes.Equal(b, fill('A', 512)) {
			lost++
		}
	}
	if lost == 0 || lost == 50 {
		t.Fatalf("lost %d of 50", lost)
	}
}

// TestSyncError: after EIO a later sync succeeds and still does not save the data.
func TestSyncError(t *testing.T) {
	shown, lost := 0, 0
	for seed := range int64(200) {
		f := NewFS(seed)
		f.WriteFile("/a", fill('A', 512))
		h, err := f.Open("/a")
		must(t, err)
		write(t, h, fill('B', 512), 0)
		f.Inject(Fault{Op: OpSync, Name: "a", Err: syscall.EIO})
		if err := h.Datasync(); !errors.Is(err, syscall.EIO) {
			t.Fatal(err)
		}
		must(t, h.Datasync())
		b, _ := f.ReadFile("/a")
		if b[0] != 'B' {
			continue
		}
		shown++
		if b, _ := f.Crash().ReadFile("/a"); b[0] == 'A' {
			lost++
		}
	}
	if lost == 0 || lost == shown {
		t.Fatalf("%d shown after EIO, %d of them lost", shown, lost)
	}
}

func TestSpace(t *testing.T) {
	f := NewFS(1)
	f.SetCapacity(10 * 4096)
	h := create(t, f, "/a")
	n, err := h.WriteAt(make([]byte, 12*4096), 100)
	if !errors.Is(err, syscall.ENOSPC) || n != 10*4096-100 {
		t.Fatalf("wrote %d: %v", n, err)
	}
	write(t, h, fill('x', 4096), 0) // overwriting needs no space
	must(t, h.PunchHole(0, 3*4096+1))
	if free, _ := f.Free("/"); free != 3*4096 {
		t.Fatalf("free %d", free)
	}
	must(t, h.ZeroRange(0, 4096))
	must(t, h.Allocate(4096, 2*4096))
	if err := h.Allocate(1<<30, 4096); !errors.Is(err, syscall.ENOSPC) {
		t.Fatalf("allocate: %v", err)
	}
	write(t, h, fill('x', 2*4096), 4096) // allocated above
	must(t, f.Remove("/a"))
	if free, _ := f.Free("/"); free != 0 {
		t.Fatalf("free %d while open", free)
	}
	must(t, h.Close())
	if free, _ := f.Free("/"); free != 10*4096 {
		t.Fatalf("free %d after close", free)
	}
}

func TestGiantSparse(t *testing.T) {
	f := NewFS(1)
	h := create(t, f, "/a")
	must(t, h.Truncate(1<<40))
	write(t, h, fill('x', 8192), 1<<39-4096)
	must(t, h.PunchHole(0, 1<<38))
	must(t, h.ZeroRange(1<<39, 1<<21))
	must(t, h.Datasync())
	must(t, f.SyncDir("/"))
	f = f.Crash()
	h, err := f.Open("/a")
	must(t, err)
	if s, e, err := h.NextData(5); err != nil || s != 1<<39-4096 || e != 1<<39 {
		t.Fatalf("data %d..%d: %v", s, e, err)
	}
	if _, _, err := h.NextData(1 << 39); err != io.EOF {
		t.Fatalf("data after the last: %v", err)
	}
	var b [2]byte
	if n, err := h.ReadAt(b[:], 1<<40-1); n != 1 || err != io.EOF {
		t.Fatalf("read at the end: %d %v", n, err)
	}
}

func TestLocks(t *testing.T) {
	f := NewFS(1)
	f.WriteFile("/a", nil)
	a, _ := f.Open("/a")
	b, _ := f.Open("/a")
	must(t, a.Lock())
	must(t, a.Lock())
	if err := b.Lock(); !errors.Is(err, images.ErrLocked) {
		t.Fatalf("second lock: %v", err)
	}
	must(t, a.Close())
	must(t, b.Lock())
	f = f.Kill()
	c, _ := f.Open("/a")
	must(t, c.Lock())
	f = f.Crash()
	d, _ := f.Open("/a")
	must(t, d.Lock())
	if err := a.Close(); !errors.Is(err, fs.ErrClosed) {
		t.Fatalf("second close: %v", err)
	}
}

func TestNamesErrors(t *testing.T) {
	f := NewFS(1)
	must(t, f.MkdirAll("/d/e", 0o700))
	create(t, f, "/d/a")
	for what, got := range map[string]struct{ err, want error }{
		"create twice":     {func() error { _, err := f.Create("/d/./a", 0); return err }(), fs.ErrExist},
		"create nowhere":   {func() error { _, err := f.Create("/no/a", 0); return err }(), fs.ErrNotExist},
		"open missing":     {func() error { _, err := f.Open("/d/b"); return err }(), fs.ErrNotExist},
		"open folder":      {func() error { _, err := f.Open("/d"); return err }(), syscall.EISDIR},
		"rename missing":   {f.Rename("/d/b", "/d/c"), fs.ErrNotExist},
		"remove missing":   {f.Remove("/d/b"), fs.ErrNotExist},
		"sync missing":     {f.SyncDir("/no"), fs.ErrNotExist},
		"mkdir over file":  {f.MkdirAll("/d/a/b", 0), fs.ErrExist},
		"list missing":     {func() error { _, err := f.ReadDir("/no"); return err }(), fs.ErrNotExist},
		"rename to folder": {f.Rename("/d/a", "/d/e"), fs.ErrExist},
	} {
		if !errors.Is(got.err, got.want) {
			t.Errorf("%s: %v, want %v", what, got.err, got.want)
		}
	}
	if n, err := f.ReadDir("/d"); err != nil || fmt.Sprint(n) != "[a e]" {
		t.Errorf("folder holds %v: %v", n, err)
	}
}

func TestTimesAndXattrs(t *testing.T) {
	keptX, keptT := 0, 0
	for seed := range int64(100) {
		f := NewFS(seed)
		f.WriteFile("/a", []byte("a"))
		h, _ := f.Open("/a")
		m0, _ := h.ModTime()
		must(t, h.SetXattr("user.k", []byte("v")))
		write(t, h, []byte("b"), 0)
		m1, _ := h.ModTime()
		if m1 <= m0 {
			t.Fatal("time did not move")
		}
		if v, err := h.Xattr("user.none"); v != nil || err != nil {
			t.Fatalf("missing xattr: %q %v", v, err)
		}
		f = f.Crash()
		h, _ = f.Open("/a")
		if v, _ := h.Xattr("user.k"); string(v) == "v" {
			keptX++
		}
		if m, _ := h.ModTime(); m == m1 {
			keptT++
		} else if m != m0 {
			t.Fatalf("time %d, want %d or %d", m, m0, m1)
		}
	}
	if keptX == 0 || keptX == 100 || keptT == 0 || keptT == 100 {
		t.Fatalf("kept %d xattrs, %d times of 100", keptX, keptT)
	}
}

func TestFlipBit(t *testing.T) {
	f := NewFS(1)
	f.WriteFile("/a", make([]byte, 1000))
	at, err := f.FlipBit("/a", 500, 100)
	must(t, err)
	b, _ := f.Crash().ReadFile("/a")
	if at < 500 || at >= 600 || len(b) != 1000 || bytes.Count(b, []byte{0}) != 999 || b[at] == 0 {
		t.Fatalf("flipped at %d", at)
	}
}

func TestShortWriteAndHook(t *testing.T) {
	f := NewFS(3)
	var ops []string
	f.SetHook(func(op Op, name string) error {
		ops = append(ops, string(op))
		if op == OpTruncate {
			return syscall.EPERM
		}
		return nil
	})
	h := create(t, f, "/a")
	f.Inject(Fault{Op: OpWrite, Nth: 2, Err: syscall.EIO, Short: true})
	write(t, h, fill('a', 100), 0)
	n, err := h.WriteAt(fill('b', 100), 0)
	if !errors.Is(err, syscall.EIO) || n >= 100 {
		t.Fatalf("short write: %d %v", n, err)
	}
	b, _ := f.ReadFile("/a")
	if bytes.Count(b, []byte{'b'}) != n {
		t.Fatalf("%d bytes written, said %d", bytes.Count(b, []byte{'b'}), n)
	}
	if err := h.Truncate(5); !errors.Is(err, syscall.EPERM) {
		t.Fatalf("hook: %v", err)
	}
	if s, _ := h.Size(); s != 100 {
		t.Fatalf("size %d", s)
	}
	if fmt.Sprint(ops) != "[create write write truncate]" {
		t.Fatalf("hooked %v", ops)
	}
}

// script runs random operations until the machine stops and returns a picture of it after a crash.
func script(seed, stop int64) (string, int64) {
	f := NewFS(seed)
	rng := rand.New(rand.NewPCG(uint64(seed), 2))
	if stop > 0 {
		f.StopAfter(stop)
	}
	var open []images.File
	for i := range 40 {
		name := fmt.Sprintf("/f%d", rng.IntN(4))
		switch rng.IntN(5) {
		case 0:
			if h, err := f.Create(name, 0); err == nil {
				open = append(open, h)
			}
		case 1:
			_ = f.Rename(name, fmt.Sprintf("/f%d", rng.IntN(4)))
		case 2:
			_ = f.SyncDir("/")
		default:
			if len(open) > 0 {
				h := open[rng.IntN(len(open))]
				_, _ = h.WriteAt(fill(byte(i), rng.IntN(6000)), rng.Int64N(9000))
				if rng.IntN(3) == 0 {
					_ = h.Datasync()
				}
			}
		}
	}
	steps := f.Steps()
	f = f.Crash()
	names, _ := f.ReadDir("/")
	var s strings.Builder
	for _, n := range names {
		b, _ := f.ReadFile("/" + n)
		fmt.Fprintf(&s, "%s %x\n", n, b)
	}
	return s.String(), steps
}

func TestDeterministic(t *testing.T) {
	pictures := map[string]bool{}
	for seed := range scale(int64(20)) {
		_, steps := script(seed, 0)
		for stop := range steps {
			a, n := script(seed, stop)
			b, _ := script(seed, stop)
			if a != b {
				t.Fatalf("seed %d stop %d: two runs differ", seed, stop)
			}
			if stop > 0 && n != stop {
				t.Fatalf("seed %d: stopped after %d steps, want %d", seed, n, stop)
			}
			pictures[a] = true
		}
	}
	if len(pictures) < scale(50) {
		t.Fatalf("only %d different outcomes", len(pictures))
	}
}

func TestFork(t *testing.T) {
	f := NewFS(1)
	f.WriteFile("/a", fill('A', 4096))
	h, _ := f.Open("/a")
	write(t, h, fill('B', 4096), 0)
	must(t, f.Rename("/a", "/b"))
	seen := map[string]bool{}
	for seed := range int64(100) {
		g := f.Fork(seed).Crash()
		names, _ := g.ReadDir("/")
		b, err := g.ReadFile("/" + names[0])
		must(t, err)
		seen[names[0]+string(b)] = true
	}
	if len(seen) < 8 {
		t.Fatalf("%d outcomes", len(seen))
	}
	if b, _ := f.ReadFile("/b"); !bytes.Equal(b, fill('B', 4096)) {
		t.Fatal("the original changed")
	}
}

func TestRestartTwicePanics(t *testing.T) {
	f := NewFS(1)
	f.Crash()
	defer func() {
		if recover() == nil {
			t.Fatal("no panic")
		}
	}()
	f.Kill()
}

func TestConcurrent(t *testing.T) {
	f := NewFS(1)
	f.SetCapacity(1 << 20)
	h := create(t, f, "/a")
	var wg sync.WaitGroup
	for g := range 4 {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for i := range 100 {
				off := int64(g*4096 + i)
				if _, err := h.WriteAt([]byte{byte(g)}, off); err != nil && !errors.Is(err, ErrStopped) {
					t.Error(err)
				}
				_ = h.Datasync()
				_, _ = h.ReadAt(make([]byte, 10), off)
				if g == 0 && i == 80 {
					f.Kill()
				}
			}
		}()
	}
	wg.Wait()
}
