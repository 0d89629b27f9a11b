package ext4vectors

import (
	"compress/gzip"
	"context"
	"errors"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"testing"
	"time"

	"kagami/appliance/offline"
	"kagami/ext4j/epoch"
	"kagami/ext4j/ext4"
	"kagami/ext4j/follow"
	"kagami/ext4j/recover"
)

// onBytes and onFiles must bear any image, in memory or in a file. They return an error only when they
// behaved in a way that they must not. An image in memory may be changed.
var onBytes = map[string]func(img []byte) error{
	"replay of a copy": func(img []byte) error {
		return readable(recover.Run(memory(img), 0, int64(len(img)), recover.Options{}))
	},
	"replay, cut in half": func(img []byte) error {
		return readable(recover.Run(memory(img[:len(img)/2]), 0, int64(len(img)/2), recover.Options{}))
	},
	"follower": follows,
}

var onFiles = map[string]func(path string) error{
	"recover --dry-run": func(path string) error {
		r, err := offline.Recover(context.Background(), path, offline.Place{}, offline.RecoverOptions{DryRun: true})
		return readable(r.Report, err)
	},
	"info": func(path string) error {
		_, err := offline.ReadInfo(path, offline.Place{}, false)
		return readable(recover.Report{}, err)
	},
	"log": func(path string) error {
		_, err := offline.ReadLog(path, offline.Place{}, false)
		return readable(recover.Report{}, err)
	},
	"check": func(path string) error {
		c, err := offline.Check(context.Background(), path, offline.Place{}, false, nil)
		if err == nil && c.Clean() {
			healthy.Add(1)
		}
		return worded(err)
	},
	"ls -R": func(path string) error {
		return worded(offline.List(path, offline.Place{}, "/", offline.ListOptions{Recursive: true}, func(offline.FileInfo) error { return nil }))
	},
	"cat": catAll,
	"restore": func(path string) error {
		_, err := offline.Restore(context.Background(), path, offline.Place{}, "/", filepath.Join(filepath.Dir(path), "restored"), offline.RestoreOptions{})
		if errors.Is(err, fs.ErrExist) { // a folder that is there twice
			err = nil
		}
		return worded(err)
	},
}

// healthy counts images in which check finds nothing.
var healthy atomic.Int64

// worded accepts what tells of the image.
func worded(err error) error {
	for _, kind := range []error{ext4.ErrCorrupt, ext4.ErrChecksum, ext4.ErrUnsupported, offline.ErrRefused, offline.ErrNotThere, errEnough} {
		if err == nil || errors.Is(err, kind) {
			return nil
		}
	}
	return err
}

var errEnough = errors.New("enough")

// sink takes so many bytes.
type sink int64

func (s *sink) Write(p []byte) (int, error) {
	if *s -= sink(len(p)); *s < 0 {
		return 0, errEnough
	}
	return len(p), nil
}

// catAll reads every file.
func catAll(path string) error {
	var names []string
	err := offline.List(path, offline.Place{}, "/", offline.ListOptions{Recursive: true}, func(f offline.FileInfo) error {
		if len(names) < 20 {
			names = append(names, f.Path)
		}
		return nil
	})
	for _, name := range names {
		most := sink(32 << 20)
		err = errors.Join(err, worded(offline.Cat(context.Background(), path, offline.Place{}, name, false, &most)))
	}
	return worded(err)
}

// readable accepts a replay and a refusal in words.
func readable(rep recover.Report, err error) error {
	if err == nil || errors.Is(err, recover.ErrRefused) || errors.Is(err, ext4.ErrNotExt4) || errors.Is(err, offline.ErrRefused) {
		return nil
	}
	return err
}

// memory is an image in memory.
type memory []byte

func (m memory) ReadAt(p []byte, off int64) (int, error) {
	if off < 0 || off >= int64(len(m)) {
		return 0, io.EOF
	}
	n := copy(p, m[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (m memory) WriteAt(p []byte, off int64) (int, error) {
	if off < 0 || off+int64(len(p)) > int64(len(m)) {
		return 0, errors.New("write outside the image")
	}
	return copy(m[off:], p), nil
}

func (m memory) Datasync() error { return nil }

// follows lets a follower read all that it wants, and see writes of parts of the image.
func follows(img []byte) error {
	f := follow.New(follow.Options{Size: int64(len(img))})
	f.Reset(0)
	rnd := rand.New(rand.NewPCG(1, 2))
	for lsn := epoch.LSN(1); lsn < 500; lsn++ {
		for _, w := range f.Wants(16) {
			if w.Off < 0 || w.Len <= 0 || w.Off+w.Len > int64(len(img)) {
				return errors.New("wants what is not there")
			}
			f.Loaded(w, img[w.Off:w.Off+w.Len])
		}
		off := rnd.Int64N(int64(len(img))/1024) * 1024
		n := min(1024*(1+rnd.Int64N(8)), int64(len(img))-off)
		f.Observe(follow.Write{LSN: lsn, Range: follow.Range{Off: off, Len: n}, Data: img[off : off+n]})
		_ = f.Local(lsn / 2)
	}
	_ = f.Status()
	return nil
}

// Bounds of one trial of one image.
const (
	maxTime  = 30 * time.Second // the slowest take a tenth of a second
	maxAlloc = 256 << 20        // bytes allocated in all, which is more than are in use at once
)

func unpack(t *testing.T, path string) []byte {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewReader(f)
	if err != nil {
		t.Fatal(err)
	}
	img, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return img
}

// sample is the share of the images, 1/sample, that is tried under the race detector; all
// are in the step of the crash tests.
const sample = 10

func TestCorrupted(t *testing.T) {
	dir := filepath.Join(fetched(t), "f")
	all, err := names(dir, ".img.gz")
	if err != nil {
		t.Fatal(err)
	}
	if len(all) < 185 {
		t.Errorf("only %d images", len(all))
	}
	if _, err := os.Stat("/dev/shm"); err == nil {
		t.Setenv("TMPDIR", "/dev/shm") // one of them restores 70,000 folders
	}
	for i, name := range all {
		if !everything && i%sample != 0 {
			continue
		}
		t.Run(name, func(t *testing.T) {
			img := unpack(t, filepath.Join(dir, name+".img.gz"))
			path := filepath.Join(t.TempDir(), "image")
			if err := os.WriteFile(path, img, 0o600); err != nil {
				t.Fatal(err)
			}
			for what, try := range onBytes {
				bounded(t, what, func() error { return try(append([]byte(nil), img...)) }, int64(len(img)))
			}
			for what, try := range onFiles {
				bounded(t, what, func() error { return try(path) }, 0)
			}
		})
	}
	t.Logf("check finds nothing in %d of %d images", healthy.Load(), len(all))
}

// bounded runs a trial and looks at what it took. copied is what the caller allocates.
func bounded(t *testing.T, what string, try func() error, copied int64) {
	t.Helper()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	done := make(chan error, 1)
	go func() { done <- try() }()
	select {
	case err := <-done:
		if err != nil {
			t.Errorf("%s: %v", what, err)
		}
	case <-time.After(maxTime):
		t.Fatalf("%s: not done after %v", what, maxTime) // what hangs cannot be waited for
	}
	runtime.ReadMemStats(&after)
	if used := int64(after.TotalAlloc-before.TotalAlloc) - copied; used > maxAlloc {
		t.Errorf("%s: allocated %d MiB", what, used>>20)
	}
}
