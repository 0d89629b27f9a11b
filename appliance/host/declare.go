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
// folder does not have yet, and checks those it has.
func (d *Daemon) declareGroups() error {
	for i := range d.cfg.Groups {
		c := &d.cfg.Groups[i]
		if len(c.Disks) == 0 {
			continue // settings of a VM's group, or a mapping
		}
		if g := d.groups[c.Name]; g != nil && g.broken != nil {
			continue // failed, and says so
		} else if g != nil {
			if err := g.checkDeclared(c); err != nil {
				return err
			}
			continue
		}
		f, err := d.declare(c)
		if err != nil {
			return fmt.Errorf("declared group %s: %w", c.Name, err)
		}
		d.groups[c.Name] = newGroup(d, f)
	}
	return nil
}

// declare makes the group of a config section: its images, if they do not
// exist, then its file.
func (d *Daemon) declare(c *config.Group) (*groupFile, error) {
	f := &groupFile{Version: groupFileVersion, Name: c.Name, ID: epoch.NewUUID(), Role: RoleSource, Peer: c.Peer, Lineage: epoch.NewUUID()}
	dir := d.cfg.StateDir + "/groups/" + c.Name
	if err := d.fs.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make group folder: %w", err)
	}
	for i, disk := range c.Disks {
		df := diskFile{Slot: uint32(i), ID: epoch.NewUUID(), Name: disk.Name, Image: disk.Image, Socket: disk.Socket, Declared: true}
		if df.Socket == "" {
			df.Socket = d.socketPath(c.Name, disk.Name)
		}
		size, err := d.adopt(disk, df.ID)
		if err != nil {
			return nil, fmt.Errorf("disk %s: %w", disk.Name, err)
		}
		df.Size = size
		f.Disks = append(f.Disks, df)
	}
	return f, f.save(d.fs, dir)
}

// adopt opens or makes a declared image, gives it its identity, and returns its size.
func (d *Daemon) adopt(disk config.Disk, id epoch.UUID) (int64, error) {
	img, err := images.OpenImage(d.fs, disk.Image, images.Want{Size: disk.Size})
	if errors.Is(err, fs.ErrNotExist) && disk.Size > 0 {
		img, err = images.CreateImage(d.fs, disk.Image, disk.Size, id.String())
	}
	if err != nil {
		return 0, err
	}
	size := img.Size()
	err = img.SetAttr(images.IdentityAttr, []byte(id.String()))
	if err == nil {
		err = img.Datasync()
	}
	return size, errors.Join(err, img.Close())
}

// checkDeclared compares a config section with what the group was made from.
func (g *group) checkDeclared(c *config.Group) error {
	f := g.snapshot()
	if f.Role == RoleReplica || f.Role == RolePromoted {
		return fmt.Errorf("group %s is a %s at this site, but the config file declares disks for it: take them out of groups[%s]", g.name, f.Role, g.name)
	}
	if f.Peer != c.Peer || len(f.Disks) != len(c.Disks) {
		return fmt.Errorf("group %s was made with %d disk(s) for peer %s; the config file now says %d for %q: a group's disks and peer cannot change in this release",
			g.name, len(f.Disks), f.Peer, len(c.Disks), c.Peer)
	}
	for i, disk := range c.Disks {
		df := f.Disks[i]
		if df.Name != disk.Name || df.Image != disk.Image || (disk.Size != 0 && disk.Size != df.Size) {
			return fmt.Errorf("disk %s of group %s was made as %s (%d bytes); the config file now says %s, %s: a group's disks cannot change in this release",
				df.Name, g.name, df.Image, df.Size, disk.Name, disk.Image)
		}
	}
	return nil
}
