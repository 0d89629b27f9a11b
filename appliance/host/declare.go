package host

import (
	"errors"
	"fmt"
	"io/fs"

	"kagami/appliance/config"
	"kagami/ext4j/epoch"
	"kagami/images"
)

// declareGroups makes the groups that the config file declares and the state
// folder does not have yet, and checks those it has. One that cannot be made,
// or is not as the file says, is failed and says why; the others go on.
func (d *Daemon) declareGroups() {
	for i := range d.cfg.Groups {
		c := &d.cfg.Groups[i]
		if len(c.Disks) == 0 {
			continue // settings of a VM's group, or a mapping
		}
		g := d.groups[c.Name]
		switch {
		case g == nil:
			f, err := d.declare(c)
			g = newGroup(d, f)
			g.broken = err
			d.groups[c.Name] = g
		case g.broken == nil && g.file.Fenced == "": // else it serves nothing, and says why
			g.checkDeclared(c)
		}
	}
	for _, g := range d.groups {
		if c := d.groupConfig(g.name); g.broken == nil && g.file.isDeclared() && (c == nil || len(c.Disks) == 0) {
			g.state = Undeclared
		}
	}
}

// undeclaredAlarm is the alarm of a group whose section is gone from the config file.
const undeclaredAlarm = "undeclared"

// isDeclared tells whether this is a source that the config file asked for. One
// that is fenced is ended by what it lost, not by the file.
func (f *groupFile) isDeclared() bool {
	return f.Role == RoleSource && f.Fenced == "" && len(f.Disks) > 0 && f.Disks[0].Declared
}

// declare makes the group of a config section. Every image that exists is
// opened before anything is made. Then come the images that do not, the
// identity of all, durably, and last the group's file, whose presence makes the
// group real. With an error comes the group as it was to be, and nothing is left.
func (d *Daemon) declare(c *config.Group) (*groupFile, error) {
	f := &groupFile{Version: groupFileVersion, Name: c.Name, ID: epoch.NewUUID(), Role: RoleSource, Peer: c.Peer, Lineage: epoch.NewUUID()}
	for i, disk := range c.Disks {
		df := diskFile{Slot: uint32(i), ID: epoch.NewUUID(), Name: disk.Name, Image: disk.Image, Size: disk.Size, BlockSize: blockSize, Socket: disk.Socket, Declared: true}
		if df.Socket == "" {
			df.Socket = d.socketPath(c.Name, disk.Name)
		}
		f.Disks = append(f.Disks, df)
	}
	imgs, made, err := d.adopt(f)
	if err == nil {
		err = d.makeDeclared(f, imgs)
	}
	for _, img := range imgs {
		err = errors.Join(err, img.Close())
	}
	if err == nil {
		return f, nil
	}
	for _, path := range made {
		err = errors.Join(err, d.fs.Remove(path)) // made just now, and empty
	}
	return f, explained(imageTrouble(err), "put that right, then restart the daemon")
}

// adopt opens every image of a new group that exists, then makes the others.
// made are their names. With an error come those that were opened.
func (d *Daemon) adopt(f *groupFile) (imgs []*images.Image, made []string, err error) {
	var found, missing []*diskFile
	for i := range f.Disks {
		df := &f.Disks[i]
		img, err := images.OpenImage(d.fs, df.Image, images.Want{Size: df.Size})
		if errors.Is(err, fs.ErrNotExist) && df.Size > 0 {
			missing = append(missing, df)
			continue
		}
		if err != nil {
			return imgs, nil, fmt.Errorf("disk %s: %w", df.Name, err)
		}
		imgs, df.Size = append(imgs, img), img.Size()
		found = append(found, df)
	}
	for i, df := range found {
		if err := imgs[i].SetAttr(images.IdentityAttr, []byte(df.ID.String())); err != nil {
			return imgs, nil, fmt.Errorf("disk %s: %w", df.Name, err)
		}
	}
	for _, df := range missing {
		img, err := images.CreateImage(d.fs, df.Image, df.Size, df.ID.String())
		if err != nil {
			return imgs, made, fmt.Errorf("disk %s: %w", df.Name, err)
		}
		imgs, made = append(imgs, img), append(made, df.Image)
	}
	return imgs, made, nil
}

// makeDeclared makes the images' identities durable, then the group's folder
// and file. State without a group file is what a broken-off removal left.
func (d *Daemon) makeDeclared(f *groupFile, imgs []*images.Image) error {
	for _, img := range imgs {
		if err := img.Datasync(); err != nil {
			return err
		}
	}
	dir := d.cfg.StateDir + "/groups/" + f.Name
	if err := removeTree(d.fs, dir); err != nil { // durable with the group file
		return fmt.Errorf("remove what is left of an earlier group %s: %w", f.Name, err)
	}
	if err := d.fs.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make group folder: %w", err)
	}
	if err := f.save(d.fs, dir); err != nil {
		return errors.Join(err, removeTree(d.fs, dir))
	}
	return nil
}

// imageTrouble says of an image that cannot be used what to do about it.
func imageTrouble(err error) error {
	switch {
	case errors.Is(err, images.ErrLocked):
		return refused(err.Error(), "stop what uses the file (fuser -v FILE shows it), then restart the daemon")
	case errors.Is(err, images.ErrSize):
		return refused(err.Error(), "put the size right in the config file, or the right file in its place, then restart the daemon")
	case errors.Is(err, fs.ErrNotExist):
		return refused(err.Error(), "put the file back, or name the right one (with its size, a declared image is made new), then restart the daemon")
	}
	return err
}

// checkDeclared compares a config section with what the group was made from. A
// replica and a promoted group go on: the section is wrong, not they.
func (g *group) checkDeclared(c *config.Group) {
	f := g.file
	if moved := f.Role == RoleReplica || f.Role == RolePromoted; moved && f.Disks[0].Declared {
		return // it was failed over, or comes back: the section counts again when this is the source
	} else if moved {
		g.alarm(undeclaredAlarm, fmt.Sprintf("%s is a %s at this site, but the config file declares disks for it, which count for nothing: take them out of groups there", g.name, f.Role))
		return
	}
	if text := f.differsFrom(c); text != "" {
		g.broken = refused(text, "a group's disks and peer cannot change in this release: put the config file right and restart the daemon")
	}
}

// differsFrom says in what a group is not as its config section says; "" when it is.
func (f *groupFile) differsFrom(c *config.Group) string {
	switch {
	case f.Peer != c.Peer:
		return fmt.Sprintf("group %s was made for peer %s, the config file says %q", f.Name, f.Peer, c.Peer)
	case len(f.Disks) != len(c.Disks):
		return fmt.Sprintf("group %s was made with %d disk(s), the config file declares %d", f.Name, len(f.Disks), len(c.Disks))
	}
	for i, disk := range c.Disks {
		df := f.Disks[i]
		if df.Name != disk.Name || df.Image != disk.Image {
			return fmt.Sprintf("disk %d of group %s was made as %s, %s; the config file says %s, %s", i+1, f.Name, df.Name, df.Image, disk.Name, disk.Image)
		}
		if disk.Size != 0 && disk.Size != df.Size {
			return fmt.Sprintf("disk %s of group %s was made with %d bytes; the config file says %d", df.Name, f.Name, df.Size, disk.Size)
		}
	}
	return ""
}
