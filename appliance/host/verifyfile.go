package host

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"log/slog"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j"
	"kagami/ext4j/epoch"
	"kagami/images"
)

// verifyFile is how far the last comparison of a group with its replica came,
// STATE/groups/NAME/verify.json: one that was broken off can be gone on with. It is
// written now and then; what is lost of it is compared again. What differed is in it, and
// the evidence durable, before it counts as done.
type verifyFile struct {
	Version    int        `json:"version"` // verifyVersion
	Lineage    epoch.UUID `json:"lineage"`
	BeganNs    int64      `json:"began_ns"`
	EndedNs    int64      `json:"ended_ns,omitempty"` // 0: it was broken off, or runs
	DoneBytes  int64      `json:"done_bytes"`         // whole chunks
	TotalBytes int64      `json:"total_bytes"`
	Differ     int64      `json:"differ"`   // chunks
	Repaired   int64      `json:"repaired"` // of these
	Evidence   string     `json:"evidence,omitempty"`
	Sum        uint32     `json:"sum"` // sumOf the file
}

const (
	verifyVersion = 1
	verifyFileMax = 64 << 10
	// verifySave is how often it is written.
	verifySave = 10 * time.Second
)

func verifyPath(dir string) string { return dir + "/verify.json" }

// loadVerified reads the file of a group; nil when there is none that makes sense: then
// everything is compared.
func loadVerified(fsys images.FS, dir string, f *groupFile) *verifyFile {
	b, err := images.ReadFile(fsys, verifyPath(dir), verifyFileMax)
	if err != nil {
		return nil
	}
	return decodeVerified(b, f)
}

func decodeVerified(b []byte, f *groupFile) *verifyFile {
	var v verifyFile
	if json.Unmarshal(b, &v) != nil {
		return nil
	}
	fits := v.Version == verifyVersion && v.Lineage == f.Lineage && v.BeganNs > 0 && v.TotalBytes == f.chunkBytes() &&
		v.DoneBytes >= 0 && v.DoneBytes <= v.TotalBytes && v.Differ >= 0 && v.Repaired >= 0 && v.Repaired <= v.Differ
	if sum, err := v.sumOf(); err != nil || sum != v.Sum || !fits {
		return nil
	}
	return &v
}

// sumOf is the CRC32C of the file with no sum.
func (v verifyFile) sumOf() (uint32, error) {
	v.Sum = 0
	b, err := json.Marshal(v)
	return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)), err
}

// chunkBytes is what a comparison of all disks comes to, in whole chunks.
func (f *groupFile) chunkBytes() (n int64) {
	for _, d := range f.Disks {
		n += (d.Size + ext4j.Chunk - 1) / ext4j.Chunk * ext4j.Chunk
	}
	return n
}

// alarmDiffers raises the alarm about what differs, or ends it when a comparison has.
func (g *group) alarmDiffers(v *verifyFile) {
	switch {
	case v == nil:
	case v.Differ > v.Repaired:
		g.alarm("verify", fmt.Sprintf("the sites differ in %d chunks of %d bytes; %s names them; kagami verify %s --repair ships them", v.Differ-v.Repaired, ext4j.Chunk, v.Evidence, g.name))
	case v.EndedNs > 0:
		g.alarm("verify", "")
	}
}

// control is the file for people and programs.
func (v *verifyFile) control() *control.Verified {
	if v == nil {
		return nil
	}
	out := &control.Verified{Began: time.Unix(0, v.BeganNs).UTC(), Done: v.DoneBytes, Total: v.TotalBytes, Differ: v.Differ, Repaired: v.Repaired}
	if v.EndedNs > 0 {
		ended := time.Unix(0, v.EndedNs).UTC()
		out.Ended = &ended
	}
	return out
}

// verifyRun is a comparison under way. The goroutine that makes it owns it.
type verifyRun struct {
	verifyFile
	g     *group
	saved time.Time
	ev    evidence
	noted int64 // of Differ, what the evidence on disk names, or that of an earlier part did
}

// beginVerify begins a comparison, or goes on with one that was broken off. The caller holds comparing.
func (g *group) beginVerify(req control.VerifyRequest) *verifyRun {
	f, now := g.snapshot(), time.Now()
	r := &verifyRun{g: g, saved: now, ev: evidence{Version: 1, Group: g.name, At: now.UTC(), Repair: req.Repair},
		verifyFile: verifyFile{Version: verifyVersion, Lineage: f.Lineage, BeganNs: now.UnixNano(), TotalBytes: f.chunkBytes()}}
	g.mu.Lock()
	old := g.verified
	g.mu.Unlock()
	if req.Resume && old != nil && old.EndedNs == 0 && old.Lineage == f.Lineage && old.TotalBytes == r.TotalBytes {
		r.verifyFile, r.noted = *old, old.Differ
	}
	return r
}

func (r *verifyRun) differs(d ext4j.Difference) {
	r.ev.add(r.g.snapshot(), d)
	r.Differ++
}

// at notes how far it is. Where something differs, that is durable first.
func (r *verifyRun) at(done int64) {
	news := r.Differ > r.noted
	if news && r.keepEvidence() != nil {
		return // compared again, if it comes to that; the end says why
	}
	if r.DoneBytes = done; news || time.Since(r.saved) >= verifySave {
		r.save()
	}
	if news {
		r.g.alarmDiffers(&r.verifyFile)
	}
}

func (r *verifyRun) keepEvidence() error {
	name, err := r.g.keepEvidence(r.ev)
	if err == nil {
		r.Evidence, r.noted = name, r.Differ
	}
	return err
}

// end notes what it found, all parts of it together.
func (r *verifyRun) end(repaired int64, err error) error {
	r.Repaired += repaired
	if r.Differ > r.noted {
		if werr := r.keepEvidence(); werr != nil {
			return werr
		}
	}
	if err == nil {
		r.EndedNs = time.Now().UnixNano()
	}
	r.save()
	r.g.alarmDiffers(&r.verifyFile)
	return nil
}

// save keeps what is known by now.
func (r *verifyRun) save() {
	r.saved = time.Now()
	v := r.verifyFile
	sum, err := v.sumOf()
	v.Sum = sum
	b, merr := json.Marshal(v)
	err = errors.Join(err, merr)
	r.g.mu.Lock()
	defer r.g.mu.Unlock()
	if r.g.gone {
		return // its folder may be another group's
	}
	if err == nil {
		err = images.WriteFileAtomic(r.g.d.fs, verifyPath(r.g.dir), b, 0o600)
	}
	if err != nil {
		r.g.noteLocked(slog.LevelWarn, fmt.Sprintf("how far the comparison is could not be kept: %v", err))
	}
	r.g.verified = &v
}

// verifyRegularly compares the groups of this site, one after another, as the
// configuration asks. It holds up no operator: what an operation does to a
// group under it ends the comparison, which is gone on with later.
func (d *Daemon) verifyRegularly(ctx context.Context) {
	if d.cfg.Verify.Every == 0 {
		return
	}
	tick := time.NewTicker(d.pause.verify)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		for _, g := range d.snapshot() {
			if ctx.Err() == nil && g.verifyDue() {
				d.verifyOne(ctx, g)
			}
		}
	}
}

func (g *group) verifyDue() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	f, v := g.file, g.verified
	if f.Role != RoleSource || g.state != Streaming || !f.Complete || f.Phase != "" || f.Compare != "" || f.Apart != nil {
		return false
	}
	if v == nil || v.EndedNs == 0 || v.Lineage != f.Lineage {
		return true
	}
	since := time.Since(time.Unix(0, v.EndedNs))
	return since < 0 || since >= g.d.cfg.Verify.Every // in the future: the clock was put back
}

func (d *Daemon) verifyOne(ctx context.Context, g *group) {
	if !g.comparing.TryLock() {
		return // an operator's
	}
	defer g.comparing.Unlock()
	src, err := g.verifiable()
	if err != nil {
		return // it was a moment ago
	}
	req := control.VerifyRequest{Group: g.name, BytesPerSecond: d.cfg.Verify.Rate, Resume: true}
	_, _ = src.verify(ctx, req, func(control.Event) {}) // its error is in the group's log, and what differs an alarm
}
