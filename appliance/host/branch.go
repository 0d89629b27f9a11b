package host

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
)

// A branch is what a site's disks held that the lineage which is served now does not
// have: kept when the site becomes a replica, before any of it is overwritten.
// STATE/groups/NAME/branches holds, for each branch, NAME-DISK.raw for each disk,
// sparse, of the disk's size, with the regions that may differ in their places, and
// NAME.json, which names them and comes last: without it the rest is debris.

// branchFile is NAME.json.
type branchFile struct {
	Version int          `json:"version"` // branchVersion
	Name    string       `json:"name"`
	Group   epoch.UUID   `json:"group"`
	Site    string       `json:"site"`
	At      time.Time    `json:"at"`
	Lineage epoch.UUID   `json:"lineage"`     // whose content it is
	For     epoch.UUID   `json:"replaced_by"` // the lineage that is followed from then on
	Whole   string       `json:"whole,omitempty"`
	Disks   []branchDisk `json:"disks"`
}

type branchDisk struct {
	Name        string     `json:"name"`
	ID          epoch.UUID `json:"id"`
	File        string     `json:"file"` // beside the JSON
	Size        int64      `json:"size"`
	RegionBytes int64      `json:"region_bytes"`
	Runs        []wire.Run `json:"runs"`
}

const (
	branchVersion = 1
	branchMax     = 1 << 20 // bytes of a NAME.json
	branchTime    = "20060102T150405.000Z"
)

func (g *group) branchDir() string { return g.dir + "/branches" }

// saveBranch keeps the regions of r under a name, durably, and returns the name;
// "" when there is nothing to keep. The images are open nowhere.
func (g *group) saveBranch(f *groupFile, m wire.Manifest, r *wire.Returned) (string, error) {
	if len(r.Runs) == 0 {
		return "", nil
	}
	if err := g.d.fs.MkdirAll(g.branchDir(), 0o700); err != nil {
		return "", fmt.Errorf("make folder of branches: %w", err)
	}
	now := time.Now().UTC()
	b := branchFile{Version: branchVersion, Name: g.d.cfg.Site + "-" + now.Format(branchTime), Group: f.ID, Site: g.d.cfg.Site, At: now,
		Lineage: f.Lineage, For: m.Lineage, Whole: r.Whole}
	for _, d := range f.Disks {
		bd := branchDisk{Name: d.Name, ID: d.ID, File: b.Name + "-" + d.Name + ".raw", Size: d.Size, RegionBytes: r.RegionBytes}
		for _, run := range r.Runs {
			if run.Disk == d.Slot {
				bd.Runs = append(bd.Runs, run)
			}
		}
		if len(bd.Runs) == 0 {
			continue
		}
		b.Disks = append(b.Disks, bd)
		if err := g.saveBranchDisk(&d, &bd); err != nil {
			return "", errors.Join(fmt.Errorf("keep what disk %s holds beyond the failover: %w", d.Name, err), g.removeBranch(&b))
		}
	}
	return b.Name, g.finishBranch(&b)
}

func (g *group) finishBranch(b *branchFile) error {
	data, err := json.MarshalIndent(b, "", "  ")
	if err == nil {
		err = images.WriteFileAtomic(g.d.fs, filepath.Join(g.branchDir(), b.Name+".json"), data, 0o600)
	}
	if err != nil {
		return errors.Join(fmt.Errorf("keep what differs: %w", err), g.removeBranch(b))
	}
	return nil
}

func (g *group) saveBranchDisk(d *diskFile, b *branchDisk) error {
	from, err := images.OpenImage(g.d.fs, d.Image, images.Want{Size: d.Size})
	if err != nil {
		return err
	}
	to, err := images.MakeImage(g.d.fs, filepath.Join(g.branchDir(), b.File), d.Size, func(to *images.Image) error {
		need := int64(0)
		count := func(_, n int64) error { need += n; return nil }
		if err := eachData(from, b, count); err != nil {
			return err
		}
		if err := images.CheckSpace(g.d.fs, g.branchDir(), need); err != nil {
			return err
		}
		return eachData(from, b, copier(from, to))
	})
	if err == nil {
		err = to.Close()
	}
	return errors.Join(err, from.Close())
}

// eachData calls f for every piece of data, at most a region, that an image has in
// the branch's runs.
func eachData(img *images.Image, b *branchDisk, f func(off, n int64) error) error {
	for _, run := range b.Runs {
		off, end := int64(run.First)*b.RegionBytes, min(b.Size, int64(run.First+run.Count)*b.RegionBytes)
		for off < end {
			start, stop, err := img.NextData(off)
			if errors.Is(err, io.EOF) || err == nil && start >= end {
				break
			}
			if err != nil {
				return err
			}
			off = max(off, start)
			n := min(end, stop, off+b.RegionBytes) - off
			if err := f(off, n); err != nil {
				return err
			}
			off += n
		}
	}
	return nil
}

func copier(from, to *images.Image) func(off, n int64) error {
	var buf []byte
	return func(off, n int64) error {
		buf = slices.Grow(buf[:0], int(n))[:n]
		if _, err := from.ReadAt(buf, off); err != nil {
			return err
		}
		_, err := to.WriteAt(buf, off)
		return err
	}
}

// removeBranch removes a branch, its JSON first: without it the rest is debris.
func (g *group) removeBranch(b *branchFile) error {
	names := []string{b.Name + ".json"}
	for _, d := range b.Disks {
		names = append(names, d.File)
	}
	for _, name := range names {
		if err := ignoreNotExist(g.d.fs.Remove(filepath.Join(g.branchDir(), name))); err != nil {
			return fmt.Errorf("remove branch %s: %w", b.Name, err)
		}
	}
	if err := g.d.fs.SyncDir(g.branchDir()); err != nil {
		return fmt.Errorf("remove branch %s: fsync folder: %w", b.Name, err)
	}
	return nil
}

// branches reads the group's branches, oldest first.
func (g *group) branches() ([]branchFile, error) {
	names, err := g.d.fs.ReadDir(g.branchDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, fmt.Errorf("list branches: %w", err)
	}
	var out []branchFile
	for _, name := range names {
		if !strings.HasSuffix(name, ".json") {
			continue
		}
		b, err := g.readBranch(name)
		if err != nil {
			return nil, fmt.Errorf("branch %s of %s: %w", strings.TrimSuffix(name, ".json"), g.name, err)
		}
		out = append(out, *b)
	}
	slices.SortFunc(out, func(a, b branchFile) int { return cmp.Or(a.At.Compare(b.At), cmp.Compare(a.Name, b.Name)) })
	return out, nil
}

func (g *group) readBranch(name string) (*branchFile, error) {
	data, err := images.ReadFile(g.d.fs, filepath.Join(g.branchDir(), name), branchMax)
	if err != nil {
		return nil, err
	}
	b := &branchFile{}
	if err := json.Unmarshal(data, b); err != nil {
		return nil, err
	}
	if b.Version != branchVersion {
		return nil, fmt.Errorf("it has version %d, this release reads %d", b.Version, branchVersion)
	}
	if b.Name+".json" != name || slices.ContainsFunc(b.Disks, func(d branchDisk) bool { return filepath.Base(d.File) != d.File }) {
		return nil, errors.New("it is not plausible")
	}
	return b, nil
}

// Branches lists what the sites' groups have kept, or removes one.
func (d *Daemon) Branches(_ context.Context, req control.BranchesRequest) ([]control.Branch, error) {
	if req.Group == "" {
		var all []control.Branch
		for _, g := range d.snapshot() {
			bs, err := g.listBranches()
			if err != nil {
				return nil, explained(err, "see the group's folder")
			}
			all = append(all, bs...)
		}
		slices.SortFunc(all, func(a, b control.Branch) int {
			return cmp.Or(cmp.Compare(a.Group, b.Group), a.At.Compare(b.At))
		})
		return all, nil
	}
	g := d.find(req.Group)
	if g == nil {
		return nil, notFound(fmt.Sprintf("site %s has no group %s", d.cfg.Site, req.Group), "kagami status lists the groups of this site")
	}
	if req.Delete != "" {
		if err := g.deleteBranch(req.Delete); err != nil {
			return nil, explained(err, "kagami branches "+g.name+" lists them")
		}
	}
	bs, err := g.listBranches()
	return bs, explained(err, "see the group's folder")
}

func (g *group) deleteBranch(name string) error {
	if !g.op.TryLock() {
		return refused("another operation is under way on "+g.name, "wait for it; see kagami status "+g.name)
	}
	defer g.op.Unlock()
	bs, err := g.branches()
	if err != nil {
		return err
	}
	i := slices.IndexFunc(bs, func(b branchFile) bool { return b.Name == name })
	if i < 0 {
		return notFound(fmt.Sprintf("%s has no branch %s at this site", g.name, name), "kagami branches "+g.name+" lists them")
	}
	if err := g.removeBranch(&bs[i]); err != nil {
		return err
	}
	g.note("branch " + name + " was removed")
	return nil
}

func (g *group) listBranches() ([]control.Branch, error) {
	bs, err := g.branches()
	if err != nil {
		return nil, err
	}
	out := make([]control.Branch, 0, len(bs))
	for _, b := range bs {
		c := control.Branch{Group: g.name, Name: b.Name, Site: b.Site, At: b.At, Lineage: b.Lineage.String(), ReplacedBy: b.For.String(), Whole: b.Whole}
		for _, d := range b.Disks {
			c.Disks = append(c.Disks, control.BranchDisk{Name: d.Name, File: filepath.Join(g.branchDir(), d.File), Bytes: runBytes(d.Runs)})
			c.Bytes += runBytes(d.Runs)
		}
		out = append(out, c)
	}
	return out, nil
}
