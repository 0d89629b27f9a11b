package sim

import (
	"bytes"
	"context"
	"crypto/sha256"
	"hash/crc32"
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
	NoBound         Mutant = "in mode async there is no bound"
	NoSums          Mutant = "a wrong checksum in the spool is not noticed"
	NoFolderSync    Mutant = "folders are not fsynced"
	Reordered       Mutant = "two overlapping writes are applied in the wrong order"
	NoMaps          Mutant = "what changes without the replica is not recorded"
	KeepAlone       Mutant = "FLUSHes are answered alone for ever"
	ForgetApart     Mutant = "that the source went on without the replica is forgotten by a restart"
	ForgetLineage   Mutant = "that the replica was promoted is forgotten by a restart"
	EqualByCRC      Mutant = "contents with the same CRC32C count as equal"
	EarlyRejoin     Mutant = "the source is with the replica again before that has the backlog"
	LateLog         Mutant = "the active log takes over when the maps are gone"
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

// forgetfulFS is a file system whose SyncDir does nothing.
type forgetfulFS struct{ images.FS }

func (forgetfulFS) SyncDir(string) error { return nil }

// swappingImage applies a write after the next one that overlaps it.
type swappingImage struct {
	replica.Image
	mu  sync.Mutex
	p   []byte
	off int64
}

func (i *swappingImage) WriteAt(p []byte, off int64) (int, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	n, err := i.Image.WriteAt(p, off)
	if i.p != nil && err == nil && off < i.off+int64(len(i.p)) && i.off < off+int64(len(p)) {
		_, err = i.Image.WriteAt(i.p, i.off)
	}
	i.p, i.off = bytes.Clone(p), off
	return n, err
}

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
	case NoFolderSync:
		return forgetfulFS{f}
	}
	return f
}

func mutateImage(m Mutant, i replica.Image) replica.Image {
	switch m {
	case HalfApply:
		return &halfImage{Image: i}
	case MarkBeforeImage:
		return eagerImage{i}
	case Reordered:
		return &swappingImage{Image: i}
	}
	return i
}

// equalByCRC makes the replica's hashes those of the source where CRC32C does not tell the two apart.
func (s *source) equalByCRC(slot uint32, offsets []int64, sums [][]byte) {
	there, err := images.ReadFile(s.w.repFS, replicaImage(int(slot)), s.w.c.DiskBytes)
	if err != nil {
		return
	}
	table := crc32.MakeTable(crc32.Castagnoli)
	for i, off := range offsets {
		here := make([]byte, min(ext4j.Chunk, s.w.c.DiskBytes-off))
		if _, err := s.imgs[slot].ReadAt(here, off); err != nil {
			return
		}
		if crc32.Checksum(here, table) == crc32.Checksum(there[off:off+int64(len(here))], table) {
			sum := sha256.Sum256(here)
			sums[i] = sum[:]
		}
	}
}

// rotUnnoticed changes a record of a spool segment and makes its sums right, as if
// nobody looked at them.
func (w *World) rotUnnoticed(name string) {
	b, err := w.repFS.ReadFile(name)
	if err != nil || len(b) < 4096 {
		return
	}
	const incarnation, headerBytes = 72, 4096 // replica/spool/README.md
	seed := crc32.Checksum(b[incarnation:incarnation+8], crc32.MakeTable(crc32.Castagnoli))
	for at := headerBytes; ; {
		r, n, err := epoch.DecodeStored(b[at:], seed, nil)
		if err != nil {
			return
		}
		if r.Type == epoch.TypeWrite && w.rng.IntN(4) == 0 {
			r.Payload[w.rng.IntN(len(r.Payload))] ^= 1 << w.rng.IntN(8)
			r.Seal()
			copy(b[at:], r.AppendStored(nil, epoch.CodecRaw, r.Payload, seed))
			w.repFS.WriteFile(name, b)
			return
		}
		at += n
	}
}
