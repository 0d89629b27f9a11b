package replica

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"kagami/images"
)

// The file `damaged` in the group's folder says, in words, why this replica
// may hold less, or something else, than what it acknowledged. It is there
// until a compare of everything has ended: a source that was itself restarted
// meanwhile does not know what had been acknowledged to it, and would compare
// only what it remembers to have changed.

const damagedMax = 64 << 10

func (g *Group) damagedPath() string { return g.o.Dir + "/damaged" }

// recallDamage finds at start what is known against the replica's content, and
// makes it durable. lost is what the spool's recovery says about acknowledged
// epochs that are not there any more.
func (g *Group) recallDamage(lost string) error {
	b, err := images.ReadFile(g.o.FS, g.damagedPath(), damagedMax)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read what is known to be damaged: %w", err)
	}
	g.damaged = string(b)
	for _, why := range []string{g.o.Damaged, lost} {
		if why == "" {
			continue
		}
		if err := g.storeDamage(why); err != nil {
			return err
		}
		g.damaged = why
	}
	return nil
}

// storeDamage makes the reason durable. It comes before whatever would make
// the damage undetectable.
func (g *Group) storeDamage(why string) error {
	why = why[:min(len(why), damagedMax)]
	if err := images.WriteFileAtomic(g.o.FS, g.damagedPath(), []byte(why), 0o600); err != nil {
		return fmt.Errorf("record that the replica is damaged: %w", err)
	}
	return nil
}

// forgetDamage is called when a compare of everything is durable.
func (g *Group) forgetDamage() error {
	if err := g.o.FS.Remove(g.damagedPath()); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("record that the replica is repaired: %w", err)
	}
	if err := g.o.FS.SyncDir(filepath.Dir(g.damagedPath())); err != nil {
		return fmt.Errorf("record that the replica is repaired: fsync folder: %w", err)
	}
	return nil
}
