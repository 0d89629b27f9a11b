package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"kagami/appliance/control"
	"kagami/qmp"
	"kagami/replica/wire"
)

// Unprotect moves the disks of a VM back to plain files, live, and ends the
// group at both sites. Each disk is copied by libvirt into a new file and
// pivoted; until its pivot it runs from its export as before. The images that
// kagami kept here are removed afterwards, those at the replica are kept.
func (d *Daemon) Unprotect(ctx context.Context, req control.UnprotectRequest, emit func(control.Event)) error {
	g, err := d.lookup(req.VM)
	if err != nil {
		return err
	}
	if !g.op.TryLock() {
		return refused("another operation is under way on "+g.name, "wait for it; see kagami status "+g.name)
	}
	defer g.op.Unlock()
	files, err := d.planUnprotect(g, req)
	if err != nil {
		return err
	}
	for _, disk := range g.snapshot().Disks {
		say(emit, "plan", "disk %s goes back to %s", disk.Name, files[disk.Name])
	}
	if req.DryRun {
		return nil
	}
	for _, disk := range g.snapshot().Disks {
		if err := d.detachDisk(ctx, g, disk, files[disk.Name], emit); err != nil {
			return err
		}
	}
	return d.endGroup(context.WithoutCancel(ctx), g, emit)
}

// planUnprotect chooses the files: those asked for, else where the disks came
// from, what lies there now being put aside first.
func (d *Daemon) planUnprotect(g *group, req control.UnprotectRequest) (map[string]string, error) {
	f := g.snapshot()
	if f.Role == RoleReplica {
		return nil, refused(fmt.Sprintf("site %s holds the replica of %s", d.cfg.Site, g.name), "run kagami unprotect at site "+f.Peer)
	}
	if f.VM == "" {
		return nil, refused(g.name+" belongs to no VM", "take it out of the config file and restart the daemon")
	}
	if _, err := d.virt(); err != nil {
		return nil, err
	}
	files := map[string]string{}
	for _, disk := range f.Disks {
		file := req.Files[disk.Name]
		switch {
		case file != "":
			if _, err := os.Lstat(file); err == nil {
				return nil, refused(fmt.Sprintf("%s exists", file), "name a file that does not")
			}
		case filepath.IsAbs(disk.Kept) && !isDevice(disk.Kept):
			file = disk.Kept
		default:
			return nil, usage(fmt.Sprintf("it is not known where disk %s came from", disk.Name), fmt.Sprintf("name a file: --file %s=PATH", disk.Name))
		}
		if !filepath.IsAbs(file) {
			return nil, usage(fmt.Sprintf("file %q of disk %s is not absolute", file, disk.Name), "give the whole path")
		}
		files[disk.Name] = file
	}
	return files, nil
}

func isDevice(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.Mode().IsRegular()
}

// detachDisk moves one disk, if it has not been moved yet.
func (d *Daemon) detachDisk(ctx context.Context, g *group, disk diskFile, file string, emit func(control.Event)) error {
	f := g.snapshot()
	attached, err := d.attachedDisks(ctx, g)
	if err != nil {
		return err
	}
	if !contains(attached, disk.Name) {
		say(emit, "detach "+disk.Name, "already runs from a file of its own")
		return nil
	}
	if err := g.releaseKept(file); err != nil {
		return err
	}
	began := time.Now()
	hv, err := d.virt()
	if err != nil {
		return err
	}
	err = hv.Detach(ctx, qmp.DetachSpec{VM: f.VM, Target: disk.Name, Socket: disk.Socket, File: file}, func(done, total int64, phase string) {
		emit(progressEvent("detach "+disk.Name, phase, done, total, began))
	})
	if err != nil {
		return fromHypervisor(err)
	}
	return nil
}

func contains(names []string, name string) bool {
	for _, n := range names {
		if n == name {
			return true
		}
	}
	return false
}

// releaseKept puts an old file aside that lies where the disk is to go.
func (g *group) releaseKept(file string) error {
	if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	g.mu.Lock()
	kept := g.kept
	g.kept = nil
	g.mu.Unlock()
	var errs []error
	for _, img := range kept {
		errs = append(errs, img.Close())
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("unlock old file: %w", err)
	}
	return g.d.moveAside(file)
}

// endGroup takes the group away at both sites once no VM uses it.
func (d *Daemon) endGroup(ctx context.Context, g *group, emit func(control.Event)) error {
	f := g.snapshot()
	say(emit, "finish", "ending the group here and at site %s", f.Peer)
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while stopping: %v", err))
	}
	if f.Role == RoleSource {
		if err := d.callPeer(ctx, f.Peer, wire.MethodRemove, wire.RemoveRequest{Group: f.ID}, nil); err != nil && !isCode(err, string(wire.CodeNotFound)) {
			say(emit, "warning", "the replica at site %s was not removed: %v", f.Peer, err)
		}
	}
	if err := g.removeState(true); err != nil {
		return err
	}
	d.forget(g)
	say(emit, "done", "%s runs from plain files again and is no longer protected", g.name)
	return nil
}
