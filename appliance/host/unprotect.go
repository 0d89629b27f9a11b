package host

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"kagami/appliance/control"
	"kagami/images"
)

// Unprotect moves the disks of a VM back to plain files, live, and ends the
// group at both sites. Each disk is copied by libvirt into a new file and
// pivoted; until its pivot it runs from its export as before. The images that
// kagami kept here are removed afterwards, those at the replica are kept.
//
// It works without the replica, too: see detachDisk.
func (d *Daemon) Unprotect(ctx context.Context, req control.UnprotectRequest, emit func(control.Event)) error {
	return explained(d.unprotect(ctx, req, emit), "put that right, then run kagami unprotect "+req.VM+" again")
}

func (d *Daemon) unprotect(ctx context.Context, req control.UnprotectRequest, emit func(control.Event)) error {
	g, err := d.operate(req.VM)
	if err != nil {
		return err
	}
	defer g.op.Unlock()
	files, err := d.planUnprotect(ctx, g, req)
	if err != nil {
		return err
	}
	f := g.snapshot()
	for _, disk := range f.Disks {
		say(emit, "plan", "disk %s goes back to %s", disk.Name, files[disk.Name])
	}
	if req.DryRun {
		return nil
	}
	// Durable before the first disk leaves: no restart may call the rest protected.
	if err := g.update(func(f *groupFile) { f.Phase = Unprotecting }); err != nil {
		return err
	}
	if err := d.detachDisks(ctx, g, files, emit); err != nil {
		return d.keepProtecting(g, f.Phase, err)
	}
	say(emit, "finish", "ending the group here and at site %s", f.Peer)
	if err := d.end(g, ending{tell: true}, emit); err != nil {
		return err
	}
	say(emit, "done", "%s runs from plain files again and is no longer protected", g.name)
	return nil
}

// keepProtecting takes an unprotect back that failed before any disk had left.
func (d *Daemon) keepProtecting(g *group, was Phase, cause error) error {
	ctx, cancel := context.WithTimeout(context.Background(), undoPatience)
	defer cancel()
	moved, err := d.attachedDisks(ctx, g)
	if err == nil && len(moved) == len(g.snapshot().Disks) && g.current() != Detached && was == "" {
		if err := g.update(func(f *groupFile) { f.Phase = was }); err != nil {
			return because(cause, "and %s", text(err))
		}
		return because(cause, "%s stays as it was, protected", g.name)
	}
	g.alarm("unprotect", fmt.Sprintf("unprotect was broken off: disks %s of %s run from kagami, none of it is protected", orNone(moved), g.name))
	return failure("half-done", fmt.Sprintf("%s; disks %s of %s go on from kagami, unprotected", text(cause), orNone(moved), g.name), "put that right, then run kagami unprotect "+g.name+" again: it goes on where it stopped")
}

// planUnprotect looks at what stands in the way and chooses the files.
func (d *Daemon) planUnprotect(ctx context.Context, g *group, req control.UnprotectRequest) (map[string]string, error) {
	f := g.snapshot()
	switch {
	case f.Role == RoleReplica:
		return nil, refused(fmt.Sprintf("site %s holds the replica of %s", d.cfg.Site, g.name), "run kagami unprotect at site "+f.Peer)
	case f.Phase == Ending:
		return nil, f.leaving()
	case f.Phase == Recovering || f.Phase == Booting:
		return nil, refused("the failover of "+g.name+" has not ended", "run kagami failover "+g.name+" again first")
	case f.Fenced != "":
		return nil, refused(fmt.Sprintf("%s was promoted at site %s; what is here is superseded", g.name, f.Peer), fmt.Sprintf("run kagami unprotect at site %s; kagami forget %s gives up what is left here", f.Peer, g.name))
	case f.VM == "":
		return nil, refused(g.name+" belongs to no VM", fmt.Sprintf("take it out of the config file, restart the daemon, then run kagami forget %s", g.name))
	}
	if err := d.mustRun(ctx, g); err != nil {
		return nil, err
	}
	if err := g.served(); err != nil {
		return nil, err
	}
	files, err := g.filesFor(req.Files)
	if err != nil {
		return nil, err
	}
	return files, d.roomForFiles(g, files)
}

// leaving refuses a command for a group that has ended here, and whose
// replica's site is not told yet.
func (f *groupFile) leaving() error {
	what := "was unprotected"
	if f.Purge {
		what = "is not protected, its protect was taken back"
	}
	return refused(fmt.Sprintf("%s %s, but site %s could not be told yet", f.Name, what, f.Peer),
		fmt.Sprintf("bring that site back: it is told as soon as it is connected; or give it up with kagami forget %s", f.Name))
}

// mustRun refuses a VM that does not run here: a disk moves live.
func (d *Daemon) mustRun(ctx context.Context, g *group) error {
	hv, err := d.virt()
	if err != nil {
		return err
	}
	vm := g.domainName()
	st, err := hv.State(ctx, vm)
	if err != nil {
		return fromHypervisor(err)
	}
	if !st.Active() {
		return refused(fmt.Sprintf("VM %s is not running", vm), "start it (virsh start "+vm+"): the disks are moved while it runs")
	}
	return nil
}

// filesFor chooses where the disks go: to the files asked for, else where they
// came from, what lies there now being put aside first.
func (g *group) filesFor(asked map[string]string) (map[string]string, error) {
	files, disks, homeless := map[string]string{}, g.snapshot().Disks, []string(nil)
	for _, disk := range disks {
		file := asked[disk.Name]
		switch {
		case file != "" && !filepath.IsAbs(file):
			return nil, usage(fmt.Sprintf("file %q of disk %s is not absolute", file, disk.Name), "give the whole path")
		case file != "":
			if _, err := os.Lstat(file); err == nil {
				return nil, refused(fmt.Sprintf("file %s for disk %s exists", file, disk.Name), "name a file that does not")
			}
		case filepath.IsAbs(disk.Kept) && !isDevice(disk.Kept):
			file = disk.Kept
		default:
			homeless = append(homeless, disk.Name)
			continue
		}
		for other, taken := range files {
			if taken == file {
				return nil, usage(fmt.Sprintf("disks %s and %s would go to the same file, %s", other, disk.Name, file), "name two files")
			}
		}
		files[disk.Name] = file
	}
	if len(homeless) > 0 {
		return nil, usage(fmt.Sprintf("disks of %s did not come from a file: %s", g.name, strings.Join(homeless, ", ")),
			fmt.Sprintf("name one for each: kagami unprotect %s --file %s=PATH", g.name, strings.Join(homeless, "=PATH --file ")))
	}
	for _, name := range slices.Sorted(maps.Keys(asked)) {
		if files[name] == "" {
			return nil, usage(fmt.Sprintf("%s has no disk %s", g.name, name), "kagami status "+g.name+" lists its disks")
		}
	}
	return files, nil
}

func isDevice(path string) bool {
	info, err := os.Stat(path)
	return err == nil && !info.Mode().IsRegular()
}

// roomForFiles checks that the folders are there and have space, should the
// disks be written full.
func (d *Daemon) roomForFiles(g *group, files map[string]string) error {
	need := map[string]int64{}
	for _, disk := range g.snapshot().Disks {
		dir := filepath.Dir(files[disk.Name])
		if info, err := os.Stat(dir); err != nil || !info.IsDir() {
			return refused(fmt.Sprintf("disk %s of %s would go to %s, but there is no such folder", disk.Name, g.name, files[disk.Name]), "make the folder, or name another file")
		}
		need[dir] += disk.Size
	}
	for _, dir := range slices.Sorted(maps.Keys(need)) {
		if err := images.CheckSpace(d.fs, dir, need[dir]); err != nil {
			return failure("no-space", fmt.Sprintf("no space for the disks of %s: %v", g.name, err), "make room, or name files elsewhere")
		}
	}
	return nil
}
