package host

import (
	"errors"
	"fmt"
	"strconv"
	"time"

	"kagami/appliance/config"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
	"kagami/replica/wire"
)

// maxWindow is the most a source may have unacknowledged, bytes, unless this
// site's own queue is larger.
const maxWindow = 64 << 20

// startReplica opens a replica's images and spool. fresh: the images were made
// just now and read as zeros.
func (g *group) startReplica(fresh bool) error {
	f := g.snapshot()
	damaged, err := g.openReplicaImages(f)
	if err != nil {
		return errors.Join(err, g.closeImages())
	}
	imgs := map[uint32]replica.Image{}
	g.mu.Lock()
	for slot, img := range g.images {
		imgs[slot] = img
	}
	g.mu.Unlock()
	rep, err := replica.Open(replica.Options{FS: g.d.fs, Dir: g.dir, ID: f.ID, Replica: f.Replica, Images: imgs,
		Limits: replicaLimits(g.d.limits(g.name)), Codec: g.d.codec, Lineage: f.Lineage, Session: f.Session, Fresh: fresh,
		Damaged: damaged, Opened: func() error { return g.claimImages(f) }, Event: g.note, Left: func() { g.input(SourceLeft, "link lost") }, Failed: g.fail,
		Persist: func(lineage epoch.UUID, session uint64) error {
			return g.update(func(f *groupFile) { f.Lineage, f.Session = lineage, session })
		}})
	if err != nil {
		return errors.Join(fmt.Errorf("open replica: %w", err), g.closeImages())
	}
	g.mu.Lock()
	g.rep = rep
	g.mu.Unlock()
	return nil
}

func replicaLimits(l config.Limits) replica.Limits {
	return replica.Limits{SegmentBytes: l.SegmentBytes, SpoolBytes: l.SpoolBytes, WindowBytes: max(maxWindow, l.QueueBytes),
		ApplyBytes: l.ApplyBytes, ApplyAge: l.ApplyAge}
}

// openReplicaImages opens and checks the images. One that is not the file that
// kagami made is not trusted: the source compares it.
func (g *group) openReplicaImages(f *groupFile) (damaged string, err error) {
	for _, d := range f.Disks {
		img, err := images.OpenImage(g.d.fs, d.Image, images.Want{Size: d.Size, Identity: d.ID.String()})
		if errors.Is(err, images.ErrIdentity) {
			if img, err = images.OpenImage(g.d.fs, d.Image, images.Want{Size: d.Size}); err == nil {
				damaged = fmt.Sprintf("image %s was replaced by a file that kagami did not make", d.Image)
			}
		}
		if err != nil {
			return "", fmt.Errorf("image of disk %s: %w", d.Name, err)
		}
		g.mu.Lock()
		g.images[d.Slot] = img
		g.mu.Unlock()
		changed, err := changedAtRest(img)
		if err != nil {
			return "", fmt.Errorf("image of disk %s: %w", d.Name, err)
		}
		if changed {
			damaged = fmt.Sprintf("image %s was changed while kagami did not run", d.Image)
		}
	}
	return damaged, nil
}

// restMark is the extended attribute that a cleanly stopped replica leaves on
// an image: the time of its last change. An image that somebody changed since
// then is compared.
const restMark = "user.kagami.rest"

// leaveRestMark sets it when a replica stops.
func leaveRestMark(img *images.Image) error {
	now, err := img.ModTime()
	if err != nil {
		return fmt.Errorf("read time of image %s: %w", img.Path(), err)
	}
	if err := img.SetAttr(restMark, []byte(strconv.FormatInt(now, 10))); err != nil {
		return fmt.Errorf("mark image %s: %w", img.Path(), err)
	}
	return img.Datasync()
}

// changedAtRest tells by the mark whether the image was changed meanwhile.
func changedAtRest(img *images.Image) (bool, error) {
	mark, err := img.Attr(restMark)
	if err != nil || len(mark) == 0 || string(mark) == "-" {
		return false, err
	}
	now, err := img.ModTime()
	return string(mark) != strconv.FormatInt(now, 10), err
}

// claimImages makes the rest marks void and the images these disks'.
//
// Durability: after what marks and identities tell against the images is
// durable elsewhere, and before the images are written to.
func (g *group) claimImages(f *groupFile) error {
	for _, d := range f.Disks {
		g.mu.Lock()
		img := g.images[d.Slot]
		g.mu.Unlock()
		err := img.SetAttr(images.IdentityAttr, []byte(d.ID.String()))
		if err == nil {
			err = img.SetAttr(restMark, []byte("-"))
		}
		if err == nil {
			err = img.Datasync()
		}
		if err != nil {
			return fmt.Errorf("image of disk %s: %w", d.Name, err)
		}
	}
	return nil
}

// makeReplica makes the group that a source asks for: folder, sparse images,
// then the group file, whose presence makes it real. Images that a broken-off
// attempt left are put aside. State without a group file is debris: a removal
// that was broken off leaves spool and applied mark, which would vouch for
// images that are empty now. With an error comes what has been made.
func (d *Daemon) makeReplica(m wire.Manifest, site string) (*group, error) {
	f := &groupFile{Version: groupFileVersion, Name: m.Name, ID: m.ID, Role: RoleReplica, Peer: site, VM: m.VM,
		Lineage: m.Lineage, Replica: epoch.NewUUID(), Past: m.Past, Session: m.Session}
	g := newGroup(d, f)
	if err := removeTree(d.fs, g.dir); err != nil { // durable with the group file
		return g, fmt.Errorf("remove what is left of an earlier group %s: %w", m.Name, err)
	}
	if err := d.fs.MkdirAll(g.dir, 0o700); err != nil {
		return g, fmt.Errorf("make group folder: %w", err)
	}
	dir := d.imageDir(m.Name)
	if err := d.fs.MkdirAll(dir, 0o700); err != nil {
		return g, fmt.Errorf("make image folder: %w", err)
	}
	for _, w := range m.Disks {
		df := diskFile{Slot: w.Slot, ID: w.ID, Name: w.Name, Size: w.Size, BlockSize: w.BlockSize, Image: dir + "/" + w.Name + ".raw", Socket: d.socketPath(m.Name, w.Name)}
		if err := d.makeImage(df); err != nil {
			return g, err
		}
		f.Disks = append(f.Disks, df)
	}
	return g, f.save(d.fs, g.dir)
}

// makeImage makes an empty image, over one that an attempt without a group file left.
func (d *Daemon) makeImage(f diskFile) error {
	if _, err := d.moveAside(f.Image); err != nil { // CreateImage fsyncs the folder
		return err
	}
	img, err := images.CreateImage(d.fs, f.Image, f.Size, f.ID.String())
	if err != nil {
		return fmt.Errorf("make image of disk %s: %w", f.Name, err)
	}
	return img.Close()
}

// asideTime ends the names of what was put aside.
const asideTime = "20060102T150405.000"

// moveAside renames an existing file so that nothing is ever overwritten, and
// returns its new name; "" when there is no such file. The caller fsyncs the folder.
func (d *Daemon) moveAside(path string) (string, error) {
	old, err := d.fs.Open(path)
	if err != nil {
		return "", ignoreNotExist(err)
	}
	if err := old.Close(); err != nil {
		return "", fmt.Errorf("close %s: %w", path, err)
	}
	aside := fmt.Sprintf("%s.old-%s", path, time.Now().UTC().Format(asideTime))
	if err := d.fs.Rename(path, aside); err != nil {
		return "", fmt.Errorf("put %s aside: %w", path, err)
	}
	return aside, nil
}

func (d *Daemon) imageDir(group string) string { return d.cfg.StateDir + "/images/" + group }

func (d *Daemon) socketPath(group, disk string) string {
	return d.cfg.RunDir + "/" + group + "-" + disk + ".sock"
}
