package sim

import (
	"context"
	"io/fs"
	"path"
	"sync"

	"kagami/ext4j"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
)

// Mutant is a mistake built into a run, to prove that the oracle sees it. It
// lives in the wrappers of this package, never in the product.
type Mutant string

// The mutants.
const (
	NoMutant        Mutant = ""
	AckBeforeCommit Mutant = "epochs are acknowledged before the spool is durable"
	HalfApply       Mutant = "an epoch is applied in part"
	MarkBeforeImage Mutant = "the applied mark is stored before the images are durable"
	FlushHere       Mutant = "FLUSH does not wait for the replica"
	FlushThere      Mutant = "FLUSH does not wait for the local image"
	NoActiveLog     Mutant = "changes are not recorded in the active log"
	UnsyncedLog     Mutant = "pwrite does not wait until the active log is durable"
	ReuseSession    Mutant = "the session is not raised at a restart"
	DropRequeue     Mutant = "frames of a dead connection are not sent again"
	EarlyResync     Mutant = "a resync ends half-way"
	NoHold          Mutant = "FLUSH does not wait for the end of a resync"
	NoEntryFlush    Mutant = "the first client reads at once"
	ForgetCompare   Mutant = "that everything must be compared is forgotten by a restart"
	NoFloor         Mutant = "the source does not remember what had been acknowledged"
	StaleView       Mutant = "the view of an ext4 is never updated"
	ClearPending    Mutant = "what must be waited for is forgotten when a FLUSH arrives"
	WritesOvertake  Mutant = "a record enters the stream after its request was answered"
)

// lyingFS is a file system whose Datasync does nothing for files of some name.
type lyingFS struct {
	images.FS
	pattern string
}

func (f lyingFS) Open(name string) (images.File, error) {
	h, err := f.FS.Open(name)
	return f.wrap(name, h, err)
}

func (f lyingFS) Create(name string, perm fs.FileMode) (images.File, error) {
	h, err := f.FS.Create(name, perm)
	return f.wrap(name, h, err)
}

func (f lyingFS) wrap(name string, h images.File, err error) (images.File, error) {
	if ok, _ := path.Match(f.pattern, path.Base(name)); ok && err == nil {
		h = lyingFile{h}
	}
	return h, err
}

type lyingFile struct{ images.File }

func (lyingFile) Datasync() error { return nil }

// halfImage leaves out some of what is applied.
type halfImage struct {
	replica.Image
	mu     sync.Mutex
	writes int
}

func (i *halfImage) WriteAt(p []byte, off int64) (int, error) {
	i.mu.Lock()
	i.writes++
	skip := i.writes%4 == 3
	i.mu.Unlock()
	if skip {
		return len(p), nil
	}
	return i.Image.WriteAt(p, off)
}

// blindRecorder records nothing.
type blindRecorder struct{ ext4j.Recorder }

func (blindRecorder) Acquire(context.Context, uint32, int64, int64) error { return nil }
func (blindRecorder) Release(uint32, int64, int64, epoch.LSN)             {}

// eagerImage promises durability at once.
type eagerImage struct{ replica.Image }

func (eagerImage) Datasync() error { return nil }

func mutateRecorder(m Mutant, r ext4j.Recorder) ext4j.Recorder {
	if m == NoActiveLog {
		return blindRecorder{r}
	}
	return r
}

func mutateFS(m Mutant, f images.FS) images.FS {
	switch m {
	case AckBeforeCommit:
		return lyingFS{f, "*.seg"}
	case UnsyncedLog:
		return lyingFS{f, "active.log"}
	}
	return f
}

func mutateImage(m Mutant, i replica.Image) replica.Image {
	switch m {
	case HalfApply:
		return &halfImage{Image: i}
	case MarkBeforeImage:
		return eagerImage{i}
	}
	return i
}
