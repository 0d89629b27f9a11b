package sim

import (
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"sync"
)

// Sector is the unit in which the guest writes and the oracle compares, bytes.
const Sector = 512

// version is one content of a sector: the write that made it, or zeros.
type version uint64

const zeros version = 0

// stamp fills a sector-aligned buffer with a write's number.
func stamp(p []byte, op version) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], uint64(op))
	}
}

// torn is set in the version of a sector that holds a mixture, as a process
// leaves it that dies within a write; the rest is a hash of the content.
const torn version = 1 << 63

// readStamp tells which write a sector's content is of.
func readStamp(p []byte) version {
	v := version(binary.LittleEndian.Uint64(p))
	for i := 8; i < len(p); i += 8 {
		if version(binary.LittleEndian.Uint64(p[i:])) != v {
			h := fnv.New64a()
			_, _ = h.Write(p) // never fails
			return version(h.Sum64()) | torn
		}
	}
	return v
}

// marks has, for every sector of every disk, an index into its versions.
type marks [][]int32

func newMarks(disks int, size int64) marks {
	m := make(marks, disks)
	for d := range m {
		m[d] = make([]int32, size/Sector)
	}
	return m
}

func (m marks) clone() marks {
	out := make(marks, len(m))
	for d := range m {
		out[d] = append([]int32(nil), m[d]...)
	}
	return out
}

// raise sets every index to at least that of o, on one disk, or on all (disk < 0).
func (m marks) raise(o marks, disk int) {
	for d := range m {
		if disk >= 0 && d != disk {
			continue
		}
		for i, v := range o[d] {
			m[d][i] = max(m[d][i], v)
		}
	}
}

// History is what the source's images held at any time, sector by sector, in
// the order of the changes, and what the guest was promised about it.
type History struct {
	mu       sync.Mutex
	versions [][][]version // of each disk and sector, the oldest first
	answered marks         // the newest version that an answered request made
	local    marks         // what an answered FLUSH covers at the source
	remote   marks         // and at the replica
	nextOp   version
}

// NewHistory describes empty disks.
func NewHistory(disks int, size int64) *History {
	h := &History{versions: make([][][]version, disks), answered: newMarks(disks, size), local: newMarks(disks, size), remote: newMarks(disks, size)}
	for d := range h.versions {
		h.versions[d] = make([][]version, size/Sector)
		for s := range h.versions[d] {
			h.versions[d][s] = []version{zeros}
		}
	}
	return h
}

// Op numbers a write.
func (h *History) Op() version {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.nextOp++
	return h.nextOp
}

// changing notes that sectors are about to get new content. p is nil for zeros.
func (h *History) changing(disk uint32, off, n int64, p []byte) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := off / Sector; s < (off+n)/Sector; s++ {
		v := zeros
		if p != nil {
			v = readStamp(p[s*Sector-off : s*Sector-off+Sector])
		}
		h.versions[disk][s] = append(h.versions[disk][s], v)
	}
}

// newest returns the indexes of the newest versions in a range.
func (h *History) newest(disk uint32, off, n int64) []int32 {
	h.mu.Lock()
	defer h.mu.Unlock()
	var out []int32
	for s := off / Sector; s < (off+n)/Sector; s++ {
		out = append(out, int32(len(h.versions[disk][s])-1))
	}
	return out
}

// answer notes that a request which made version v of a range was answered.
// before are the newest versions from before the request.
func (h *History) answer(disk uint32, off int64, v version, before []int32) {
	h.answerEach(disk, off, func(int) version { return v }, before)
}

// answerEach is answer for a range whose sectors are of different versions.
func (h *History) answerEach(disk uint32, off int64, version func(sector int) version, before []int32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, b := range before {
		s := off/Sector + int64(i)
		vs, v := h.versions[disk][s], version(i)
		for j := int(b) + 1; j < len(vs); j++ {
			if vs[j] == v {
				h.answered[disk][s] = max(h.answered[disk][s], int32(j))
				break
			}
		}
	}
}

// Answered is a snapshot of what was answered.
func (h *History) Answered() marks {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.answered.clone()
}

// Remote is a snapshot of what the replica must have.
func (h *History) Remote() marks {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.remote.clone()
}

// flushed notes that a FLUSH of a disk, begun when m was answered, was answered.
func (h *History) flushed(m marks, disk uint32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.local.raise(m, int(disk))
}

// shipped notes that the replica must have what m says of a disk, or of all (disk < 0).
func (h *History) shipped(m marks, disk int) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.remote.raise(m, disk)
}

// check compares content with the versions at or above the given indexes.
// inFlight allows a mixture where an unanswered request was changing a sector.
func (h *History) check(disk int, content []byte, least []int32, inFlight bool) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range least {
		v, vs := readStamp(content[s*Sector:(s+1)*Sector]), h.versions[disk][s]
		if inFlight && v&torn != 0 && int(h.answered[disk][s]) < len(vs)-1 {
			continue
		}
		if !h.has(disk, s, v, least[s]) {
			return fmt.Errorf("disk %d, sector %d holds write %d; write %d is the least it must hold; its history ends with %v", disk, s, v, vs[least[s]], vs[max(0, len(vs)-20):])
		}
	}
	return nil
}

func (h *History) has(disk, s int, v version, least int32) bool {
	vs := h.versions[disk][s]
	for i := len(vs) - 1; i >= int(least); i-- {
		if vs[i] == v {
			return true
		}
	}
	return false
}

// Reboot takes over what a restart of the source found in an image. What was
// flushed must be there. Everything that is there counts as answered: a guest
// may now read it.
func (h *History) Reboot(disk int, content []byte) error {
	if err := h.check(disk, content, h.local[disk], true); err != nil {
		return fmt.Errorf("after the restart of the source: %w", err)
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	for s := range h.versions[disk] {
		v := readStamp(content[s*Sector : (s+1)*Sector])
		if vs := h.versions[disk][s]; vs[len(vs)-1] != v {
			h.versions[disk][s] = append(vs, v)
		}
		h.answered[disk][s] = int32(len(h.versions[disk][s]) - 1)
	}
	return nil
}

// answerInto raises m by what a request made, as answer does for the history.
func (h *History) answerInto(m marks, disk uint32, off int64, v version, before []int32) {
	h.mu.Lock()
	defer h.mu.Unlock()
	for i, b := range before {
		s := off/Sector + int64(i)
		vs := h.versions[disk][s]
		for j := int(b) + 1; j < len(vs); j++ {
			if vs[j] == v {
				m[disk][s] = max(m[disk][s], int32(j))
				break
			}
		}
	}
}

// checkSector checks what was read from one sector.
func (h *History) checkSector(disk uint32, s int64, p []byte, least int32) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	v := readStamp(p)
	if !h.has(int(disk), int(s), v, least) {
		return fmt.Errorf("disk %d, sector %d: write %d, which %v does not have from %d on", disk, s, v, h.versions[disk][s], least)
	}
	return nil
}
