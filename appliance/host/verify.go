package host

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"sync"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j"
	"kagami/images"
)

// maxEvidence bounds the differences that are written down, and with them the file.
const maxEvidence = 10_000

// evidence is what a verify found, STATE/groups/NAME/verify-TIME.json.
type evidence struct {
	Version     int          `json:"version"`
	Group       string       `json:"group"`
	At          time.Time    `json:"at"`
	Repair      bool         `json:"repair"`
	Differences []difference `json:"differences"` // the first maxEvidence
	More        int64        `json:"more,omitempty"`
}

type difference struct {
	Disk   string `json:"disk"`
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	Here   string `json:"sha256"`
	There  string `json:"sha256_at_replica"`
}

// Verify compares every byte of a group with its replica, at the same LSN, while its
// clients write on.
func (d *Daemon) Verify(ctx context.Context, req control.VerifyRequest, emit func(control.Event)) (control.VerifyReport, error) {
	g := d.find(req.Group)
	if g == nil {
		return control.VerifyReport{}, notFound(fmt.Sprintf("site %s has no group %s", d.cfg.Site, req.Group), "kagami status lists the groups of this site")
	}
	if !g.op.TryLock() {
		return control.VerifyReport{}, refused("another operation is under way on "+g.name, "wait for it; see kagami status "+g.name)
	}
	defer g.op.Unlock()
	src, err := g.verifiable()
	if err != nil {
		return control.VerifyReport{}, err
	}
	if !g.comparing.TryLock() {
		return control.VerifyReport{}, refused("a comparison of "+g.name+" is under way that verify.every in the configuration asks for", "kagami status "+g.name+" shows how far it is")
	}
	defer g.comparing.Unlock()
	rep, err := src.verify(ctx, req, emit)
	return rep, explained(err, "when "+g.name+" is streaming again, run kagami verify "+g.name+" again")
}

// verifiable returns the source of a group whose replica follows it.
func (g *group) verifiable() (*source, error) {
	f, st := g.snapshot(), g.status()
	g.mu.Lock()
	src := g.src
	g.mu.Unlock()
	switch {
	case f.Role == RoleReplica:
		return nil, refused(fmt.Sprintf("the source of %s is at site %s", g.name, f.Peer), fmt.Sprintf("at site %s: kagami verify %s", f.Peer, g.name))
	case src == nil || src.link == nil:
		return nil, refused(fmt.Sprintf("%s has no replica", g.name), "kagami status "+g.name)
	case st.State != string(Streaming) || !f.Complete:
		return nil, refused(fmt.Sprintf("%s is %s: there is nothing to compare with yet", g.name, st.State), "wait until kagami status says streaming")
	}
	return src, nil
}

func (s *source) verify(ctx context.Context, req control.VerifyRequest, emit func(control.Event)) (control.VerifyReport, error) {
	sess, err := s.link.Session(ctx)
	if err != nil {
		return control.VerifyReport{}, fmt.Errorf("wait for the link: %w", err)
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stop := make(chan struct{})
	var watching sync.WaitGroup
	defer watching.Wait()
	defer close(stop)
	watching.Go(func() { // a chunk may be held still while the replica is asked: not for longer than the link is up
		select {
		case <-sess.Done():
			cancel(errLinkLost)
		case <-s.eng.Done():
			cancel(s.eng.Err())
		case <-stop:
		}
	})
	began, run := time.Now(), s.g.beginVerify(req)
	defer s.g.setProgress("", 0, 0)
	found, err := s.eng.Verify(ctx, s.eng.WholeRanges(), s.hasher(sess), ext4j.VerifyOptions{
		Repair:  req.Repair,
		From:    run.DoneBytes,
		Pace:    pacer(req.BytesPerSecond),
		Differs: func(d ext4j.Difference) error { run.differs(d); return nil },
		Progress: func(done, total int64) {
			emit(progressEvent("compare", "", done, total, began))
			s.g.setProgress("verify", done, total)
			run.at(done)
		},
	})
	werr := run.end(found.Repaired, err)
	rep := control.VerifyReport{Group: s.g.name, Began: time.Unix(0, run.BeganNs).UTC(), Compared: run.DoneBytes / ext4j.Chunk, Differ: run.Differ, Repaired: run.Repaired,
		Again: found.Again, ChunkBytes: ext4j.Chunk, LSN: uint64(s.eng.Stats().Ack), Seconds: time.Since(began).Seconds(), Evidence: run.Evidence}
	s.noteVerified(rep, err)
	return rep, errors.Join(err, werr)
}

func (e *evidence) add(f *groupFile, d ext4j.Difference) {
	if len(e.Differences) >= maxEvidence {
		e.More++
		return
	}
	name := fmt.Sprint(d.Slot)
	for _, disk := range f.Disks {
		if disk.Slot == d.Slot {
			name = disk.Name
		}
	}
	e.Differences = append(e.Differences, difference{name, d.Off, d.Len, hex.EncodeToString(d.Here), hex.EncodeToString(d.There)})
}

// keepEvidence writes down what differed; durable when it returns.
func (g *group) keepEvidence(e evidence) (string, error) {
	name := fmt.Sprintf("%s/verify-%s.json", g.dir, e.At.Format("20060102T150405Z"))
	data, err := json.MarshalIndent(e, "", "  ")
	if err == nil {
		err = images.WriteFileAtomic(g.d.fs, name, data, 0o600)
	}
	if err != nil {
		return "", fmt.Errorf("write down what differs: %w", err)
	}
	return name, nil
}

// noteVerified tells the group's log.
func (s *source) noteVerified(r control.VerifyReport, err error) {
	what := fmt.Sprintf("compared with its replica: %d of %d chunks differ, %d repaired", r.Differ, r.Compared, r.Repaired)
	if err != nil {
		what += ", broken off: " + err.Error()
	}
	s.g.note(what)
}

// pacer spreads what is compared over time; nil without a rate.
func pacer(rate int64) func(context.Context, int64) error {
	if rate <= 0 {
		return nil
	}
	next := time.Now()
	return func(ctx context.Context, n int64) error {
		wait := time.Until(next)
		next = time.Now().Add(max(0, wait) + time.Duration(float64(n)/float64(rate)*float64(time.Second)))
		if wait <= 0 {
			return nil
		}
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(wait):
			return nil
		}
	}
}
