package replica

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/spool"
)

// Two files in the group's folder keep what the applied mark cannot say.
//
// `damaged` says why this replica may hold less, or something else, than what
// it acknowledged. It is there until a compare of everything has ended: a source
// that was itself restarted meanwhile does not know what had been acknowledged
// to it, and would compare only what it remembers to have changed.
//
// `applying` has the form of the applied mark and names the last epoch of the
// batch that is being written to the images. It is durable before the first
// write. If it is above the applied mark and the spool can no longer redo up to
// it, the images hold parts of epochs: they are torn.

// damage is the content of the file `damaged`, as JSON.
type damage struct {
	Version int    `json:"version"` // damageVersion
	Why     string `json:"why"`     // in words; "" when there is none
	Torn    bool   `json:"torn"`    // the images are no epoch's: parts of several, or somebody else's
}

const (
	damagedMax    = 64 << 10
	damageVersion = 1
)

func (g *Group) damagedPath() string { return g.o.Dir + "/damaged" }

// recallDamage finds at start what is known against the replica's content, and
// makes it durable. lost is what the spool's recovery says about acknowledged
// epochs that are not there any more.
func (g *Group) recallDamage(lost string) error {
	b, err := images.ReadFile(g.o.FS, g.damagedPath(), damagedMax)
	if err == nil {
		err = json.Unmarshal(b, &g.damaged)
		if v := g.damaged.Version; err == nil && v != damageVersion {
			err = fmt.Errorf("%s has version %d, this release reads %d", g.damagedPath(), v, damageVersion)
		}
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("read what is known to be damaged: %w", err)
	}
	reasons := []damage{{Why: g.o.Damaged, Torn: true}, {Why: lost}}
	if err := g.settleImages(); err != nil {
		return err
	}
	if to := g.redoing.Load().Pos.LSN; to > g.durable.LSN {
		reasons = append(reasons, damage{Why: tornText(g.applied.LSN, to), Torn: true})
	}
	for _, d := range reasons {
		if d.Why == "" {
			continue
		}
		if err := g.storeDamage(d); err != nil {
			return err
		}
	}
	return nil
}

// settleImages is for images that a batch was being written to, at the last end or when
// its spool turned out to be damaged. That end may have come from a failed fdatasync, after
// which what the cache holds is not what the disk does; and what the batch has written by
// now may be in the cache alone. A redo writes all of it again; without one, a compare has
// to see the disk. Called by recover, or with applying held.
func (g *Group) settleImages() error {
	if g.redoing.Load().Pos.LSN <= g.applied.LSN {
		return nil
	}
	for slot, img := range g.o.Images {
		if err := img.Settle(); err != nil {
			return fmt.Errorf("settle image of disk %d: %w", slot, err)
		}
	}
	return nil
}

func tornText(applied, to epoch.LSN) string {
	return fmt.Sprintf("records %d to %d were being applied, cannot be read again, and are in the images in part: the images are not consistent", applied+1, to)
}

// storeDamage adds to what is known and makes it durable. It comes before
// whatever would make the damage undetectable. Called by recover, or with
// applying and switching held.
func (g *Group) storeDamage(d damage) error {
	g.mu.Lock()
	old := g.damaged
	g.mu.Unlock()
	d.Torn = d.Torn || old.Torn
	if old.Torn {
		d.Why = old.Why // nothing is worse
	}
	d.Why = d.Why[:min(len(d.Why), damagedMax/8)] // JSON may take six bytes for one
	d.Version = damageVersion
	b, err := json.Marshal(d)
	if err == nil {
		err = images.WriteFileAtomic(g.o.FS, g.damagedPath(), b, 0o600)
	}
	if err == nil && d.Torn {
		err = g.redoing.Store(spool.Applied{Pos: g.applied}) // it has been heard
	}
	if err != nil {
		return fmt.Errorf("record that the replica is damaged: %w", err)
	}
	g.mu.Lock()
	g.damaged = d
	g.mu.Unlock()
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
