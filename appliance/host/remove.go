package host

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"kagami/images"
)

// removeImages deletes the images that kagami made for a group, and their
// folder unless there is something else in it.
func (g *group) removeImages() error {
	fsys, dir := g.d.fs, g.d.imageDir(g.name)
	for _, disk := range g.snapshot().Disks {
		if disk.Declared {
			continue
		}
		if err := ignoreNotExist(fsys.Remove(disk.Image)); err != nil {
			return fmt.Errorf("remove image: %w", err)
		}
	}
	err := ignoreNotExist(fsys.Remove(dir))
	if err != nil && !errors.Is(err, fs.ErrExist) { // ENOTEMPTY is one
		return fmt.Errorf("remove folder of images: %w", err)
	}
	return nil
}

// removeFolder deletes a stopped group's state, its file first, and durably:
// without it the rest is debris.
func (g *group) removeFolder() error {
	fsys := g.d.fs
	err := fsys.Remove(g.dir + "/group.json")
	if err == nil {
		err = fsys.SyncDir(g.dir)
	}
	if ignoreNotExist(err) != nil {
		return fmt.Errorf("remove group file: %w", err)
	}
	if err := removeTree(fsys, g.dir); err != nil {
		return fmt.Errorf("remove group folder: %w", err)
	}
	return nil
}

// removeTree deletes a folder and what is in it, at most two levels deep, as
// groups' folders are. One that does not exist is no error.
func removeTree(fsys images.FS, dir string) error {
	return removeLevels(fsys, dir, 2)
}

func removeLevels(fsys images.FS, dir string, levels int) error {
	names, err := fsys.ReadDir(dir)
	if err != nil {
		return ignoreNotExist(err)
	}
	for _, name := range names {
		path := filepath.Join(dir, name)
		err := ignoreNotExist(fsys.Remove(path))
		if err != nil && levels > 1 {
			err = removeLevels(fsys, path, levels-1)
		}
		if err != nil {
			return err
		}
	}
	return ignoreNotExist(fsys.Remove(dir))
}

func ignoreNotExist(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
