package host

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"path/filepath"
	"strings"

	"kagami/images"
	"kagami/replica/wire"
)

// Bounds of what a site holds. A group costs descriptors, goroutines and a
// spool; a peer may make groups by itself.
const (
	maxGroups     = 1024 // at a site, in whatever role
	maxPeerGroups = 256  // of one peer, at its replica's site
)

// checkCount refuses one more group: of a peer, or with peer "", of this site's own.
func (d *Daemon) checkCount(peer string) error {
	all := d.snapshot()
	if len(all) >= maxGroups {
		return fmt.Errorf("site %s has %d groups, no more are possible", d.cfg.Site, maxGroups)
	}
	n := 0
	for _, g := range all {
		if f := g.snapshot(); peer != "" && f.Peer == peer && f.Role != RoleSource {
			n++
		}
	}
	if n >= maxPeerGroups {
		return fmt.Errorf("site %s has %d groups of site %s, no more are possible", d.cfg.Site, maxPeerGroups, peer)
	}
	return nil
}

// checkNew tells what stands in the way of one more replica. One look at a
// time: a peer may ask often, and all images are looked at.
func (d *Daemon) checkNew(m wire.Manifest, site string) (problems []string) {
	d.making.Lock()
	defer d.making.Unlock()
	if err := d.checkCount(site); err != nil {
		problems = append(problems, err.Error())
	}
	if err := d.roomFor(m); err != nil {
		problems = append(problems, fmt.Sprintf("no space for images and spool at site %s: %v", d.cfg.Site, err))
	}
	return problems
}

// roomFor checks that images and spool of a new replica have space, should
// the images be written full.
func (d *Daemon) roomFor(m wire.Manifest) error {
	need := d.limits(m.Name).SpoolBytes
	for _, disk := range m.Disks {
		need = addBytes(need, disk.Size)
	}
	return d.checkRoom(need)
}

// checkRoom checks that the state folder has space for need bytes beside what
// the groups that are there may still take of it: images are sparse and spools
// are made as they are needed, so free space alone would be promised many times.
func (d *Daemon) checkRoom(need int64) error {
	promised := int64(0)
	for _, g := range d.snapshot() {
		n, err := g.promised()
		if err != nil {
			return fmt.Errorf("group %s: %w", g.name, err)
		}
		promised = addBytes(promised, n)
	}
	err := images.CheckSpace(d.fs, d.cfg.StateDir, addBytes(need, promised))
	if err != nil && promised > 0 {
		err = fmt.Errorf("%w; the groups that are there may still need %d of them", err, promised)
	}
	return err
}

// promised is how much of the state folder's space a group may still take,
// bytes: the holes of its images and the part of its spool that is not made yet.
func (g *group) promised() (int64, error) {
	f, state := g.snapshot(), filepath.Clean(g.d.cfg.StateDir)+"/"
	if f.Phase == Ending || f.Fenced != "" {
		return 0, nil // nobody writes to what it has
	}
	total := int64(0)
	for _, disk := range f.Disks {
		if !strings.HasPrefix(disk.Image, state) {
			continue // of another file system, for all we know
		}
		n, err := holes(g.d.fs, disk.Image)
		if err != nil {
			return 0, err
		}
		total = addBytes(total, n)
	}
	if f.Role != RoleReplica {
		return total, nil
	}
	spool, err := g.spoolMade()
	return addBytes(total, max(0, g.d.limits(g.name).SpoolBytes-spool)), err
}

// spoolMade is the size of a replica's segments, bytes.
func (g *group) spoolMade() (int64, error) {
	dir := g.dir + "/spool"
	names, err := g.d.fs.ReadDir(dir)
	if err != nil {
		return 0, ignoreNotExist(err)
	}
	total := int64(0)
	for _, name := range names {
		n, err := onFile(g.d.fs, filepath.Join(dir, name), images.File.Size)
		if err != nil {
			return 0, err
		}
		total = addBytes(total, n)
	}
	return total, nil
}

// holes is how much of a file's size takes no space yet, bytes; 0 of a file
// that is not there.
func holes(fsys images.FS, name string) (int64, error) {
	return onFile(fsys, name, func(f images.File) (int64, error) {
		size, err := f.Size()
		if err != nil {
			return 0, err
		}
		data := int64(0)
		for off := int64(0); off < size; {
			start, end, err := f.NextData(off)
			if errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				return 0, err
			}
			data, off = data+min(end, size)-start, end
		}
		return size - data, nil
	})
}

// onFile asks a file that may have gone, which counts as 0.
func onFile(fsys images.FS, name string, ask func(images.File) (int64, error)) (int64, error) {
	f, err := fsys.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	} else if err != nil {
		return 0, fmt.Errorf("look at the space of %s: %w", name, err)
	}
	n, err := ask(f)
	if err := errors.Join(err, f.Close()); err != nil {
		return 0, fmt.Errorf("look at the space of %s: %w", name, err)
	}
	return n, nil
}

// addBytes adds sizes from outside, which end at the largest number there is.
func addBytes(a, b int64) int64 {
	if a > math.MaxInt64-b {
		return math.MaxInt64
	}
	return a + b
}
