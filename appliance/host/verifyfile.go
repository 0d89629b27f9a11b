package host

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j"
	"kagami/ext4j/epoch"
	"kagami/images"
)

// verifyFile is how far the last comparison of a group with its replica came,
// STATE/groups/NAME/verify.json: one that was broken off can be gone on with. It is
// written now and then; what is lost of it is compared again.
type verifyFile struct {
	Version    int        `json:"version"` // verifyVersion
	Lineage    epoch.UUID `json:"lineage"`
	BeganNs    int64      `json:"began_ns"`
	EndedNs    int64      `json:"ended_ns,omitempty"` // 0: it was broken off, or runs
	DoneBytes  int64      `json:"done_bytes"`
	TotalBytes int64      `json:"total_bytes"`
	Compared   int64      `json:"compared"` // chunks
	Differ     int64      `json:"differ"`
	Repaired   int64      `json:"repaired"`
	Evidence   string     `json:"evidence,omitempty"`
}

const (
	verifyVersion = 1
	verifyFileMax = 64 << 10
	// verifySave is how often it is written.
	verifySave = 10 * time.Second
)

func verifyPath(dir string) string { return dir + "/verify.json" }

// loadVerified reads the file of a group; nil when there is none that makes sense.
func loadVerified(fsys images.FS, dir string, f *groupFile) *verifyFile {
	var v verifyFile
	b, err := images.ReadFile(fsys, verifyPath(dir), verifyFileMax)
	if err != nil || json.Unmarshal(b, &v) != nil || v.Version != verifyVersion || v.Lineage != f.Lineage || v.DoneBytes < 0 || v.BeganNs <= 0 {
		return nil
	}
	return &v
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
	g      *group
	saved  time.Time
	before verifyFile // what it goes on with
}

// beginVerify begins a comparison, or goes on with one that was broken off. The caller holds comparing.
func (g *group) beginVerify(resume bool) *verifyRun {
	f := g.snapshot()
	r := &verifyRun{g: g, saved: time.Now(), verifyFile: verifyFile{Version: verifyVersion, Lineage: f.Lineage, BeganNs: time.Now().UnixNano()}}
	for _, d := range f.Disks {
		r.TotalBytes += (d.Size + ext4j.Chunk - 1) / ext4j.Chunk * ext4j.Chunk
	}
	g.mu.Lock()
	old := g.verified
	g.mu.Unlock()
	if resume && old != nil && old.EndedNs == 0 && old.Lineage == f.Lineage && old.TotalBytes == r.TotalBytes {
		r.verifyFile, r.before = *old, *old
	}
	return r
}

// at notes how far it is.
func (r *verifyRun) at(done, total int64) {
	r.DoneBytes, r.TotalBytes = done, total
	if time.Since(r.saved) >= verifySave {
		r.save()
	}
}

// end notes what it found, and returns that with what the part before had.
func (r *verifyRun) end(found ext4j.Verified, err error, evidence string) (began time.Time, compared, differ, repaired int64) {
	if r.Evidence = cmp.Or(evidence, r.Evidence); err == nil {
		r.EndedNs = time.Now().UnixNano()
	}
	r.Compared, r.Differ, r.Repaired = r.before.Compared+found.Compared, r.before.Differ+found.Differ, r.before.Repaired+found.Repaired
	r.save()
	return time.Unix(0, r.BeganNs).UTC(), r.Compared, r.Differ, r.Repaired
}

// save keeps what is known by now.
func (r *verifyRun) save() {
	r.saved = time.Now()
	v := r.verifyFile
	b, err := json.Marshal(v)
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
	return v == nil || v.EndedNs == 0 || v.Lineage != f.Lineage || time.Since(time.Unix(0, v.EndedNs)) >= g.d.cfg.Verify.Every
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
