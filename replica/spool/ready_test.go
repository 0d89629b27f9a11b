package spool

import (
	"errors"
	"io/fs"
	"testing"
	"testing/synctest"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/tests/fault"
)

// slowFS takes a second to fill a segment, or fails to.
type slowFS struct {
	images.FS
	segment int
	err     error
}

func (s *slowFS) Create(name string, perm fs.FileMode) (images.File, error) {
	f, err := s.FS.Create(name, perm)
	if err != nil {
		return nil, err
	}
	return slowFile{f, s}, nil
}

type slowFile struct {
	images.File
	s *slowFS
}

func (f slowFile) WriteAt(p []byte, off int64) (int, error) {
	if len(p) == f.s.segment {
		time.Sleep(time.Second)
		if f.s.err != nil {
			return 0, f.s.err
		}
	}
	return f.File.WriteAt(p, off)
}

// TestAppendDoesNotWait: with Ready, Append never waits for a segment, and is
// told once when it may go on, also when that is for an error.
func TestAppendDoesNotWait(t *testing.T) {
	boom := errors.New("boom")
	for _, fails := range []error{nil, boom} {
		synctest.Test(t, func(t *testing.T) {
			disk := &slowFS{FS: fault.NewFS(1)}
			o := small(disk, "/")
			calls := make(chan struct{}, 100)
			o.FS, o.Inline, o.Ready = disk, false, func() { calls <- struct{}{} }
			disk.segment = int(o.SegmentBytes)
			sp, _ := open(t, o, 0)
			add := func(lsn epoch.LSN) error {
				r := writeRec(lsn, 1, 3000)
				began := time.Now()
				err := sp.Append(&r, epoch.CodecRaw, r.Payload)
				if d := time.Since(began); d > 0 {
					t.Errorf("record %d waited for %v", lsn, d)
				}
				return err
			}
			told := func(want int) {
				t.Helper()
				time.Sleep(1500 * time.Millisecond)
				synctest.Wait()
				if len(calls) != want {
					t.Errorf("told %d times, want %d", len(calls), want)
				}
			}
			if a, b := add(1), add(1); !errors.Is(a, ErrNotReady) || !errors.Is(b, ErrNotReady) {
				t.Errorf("before the first segment: %v, %v", a, b)
			}
			told(1)
			disk.err = fails
			lsn := epoch.LSN(1)
			var err error
			for err = add(lsn); err == nil; err = add(lsn) {
				lsn++
			}
			if lsn == 1 || !errors.Is(err, ErrNotReady) {
				t.Errorf("record %d does not fit the first segment, and %v", lsn, err)
			}
			told(2) // the second one was begun ahead, with the first record
			if err := add(lsn); !errors.Is(err, fails) {
				t.Errorf("after the second segment: %v, want %v", err, fails)
			}
			if err := sp.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}
