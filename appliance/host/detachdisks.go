package host

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/qmp"
)

// detachDisks moves every disk that the VM has from here to its file.
func (d *Daemon) detachDisks(ctx context.Context, g *group, files map[string]string, emit func(control.Event)) error {
	for _, disk := range g.snapshot().Disks {
		attached, err := d.attachedDisks(ctx, g)
		if err != nil {
			return err
		}
		if !slices.Contains(attached, disk.Name) {
			say(emit, "detach "+disk.Name, "already runs from a file of its own")
			continue
		}
		if err := d.detachDisk(ctx, g, disk, files[disk.Name], emit); err != nil {
			return err
		}
	}
	return nil
}

// detachDisk moves one disk. A FLUSH of the guest that waits for a replica
// that is away would hold up the pivot, and with it all of QEMU; so without
// the replica the group is first served alone, which answers it. There is no
// way back to the replica from there, but none is wanted.
func (d *Daemon) detachDisk(ctx context.Context, g *group, disk diskFile, file string, emit func(control.Event)) error {
	for {
		if !g.awaitReplica(ctx, d.pause.link) {
			if err := g.served(); err != nil {
				return err // served anew, it might hide what it failed of
			}
			say(emit, "warning", "site %s is not connected: %s goes on without it, unprotected", g.snapshot().Peer, g.name)
			if err := g.serveAlone(); err != nil {
				return err
			}
		}
		err := d.copyBack(ctx, g, disk, file, emit)
		if !errors.Is(err, errLinkLost) {
			return err
		}
		say(emit, "warning", "disk %s: the copy is begun anew: %v", disk.Name, err)
	}
}

// served refuses a group whose disks are not served, or that has failed.
func (g *group) served() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.src != nil && g.state != Failed {
		return nil
	}
	return failure("failed", fmt.Sprintf("the disks of %s are not served: %s", g.name, g.reason), "put that right and restart the daemon")
}

// awaitReplica waits a little until FLUSHes are answered: by the replica, or
// because the group is served alone.
func (g *group) awaitReplica(ctx context.Context, patience time.Duration) bool {
	for end := time.Now().Add(patience); ; {
		if g.flushes() {
			return true
		}
		if ctx.Err() != nil || time.Now().After(end) {
			return false
		}
		select {
		case <-ctx.Done():
		case <-time.After(linkLook):
		}
	}
}

// linkLook is how often the state of a group is looked at while a disk is moved.
const linkLook = 100 * time.Millisecond

// flushes reports whether a FLUSH of the guest can end.
func (g *group) flushes() bool {
	switch g.current() {
	case Streaming, Syncing, Resyncing, CatchingUp, Disconnected, Detached:
		return true
	}
	return false
}

// copyBack has libvirt copy a disk to its file and pivot. It is given up with
// errLinkLost when the replica goes away meanwhile.
func (d *Daemon) copyBack(ctx context.Context, g *group, disk diskFile, file string, emit func(control.Event)) error {
	hv, err := d.virt()
	if err != nil {
		return err
	}
	aside, err := g.releaseKept(file)
	if err != nil {
		return err
	}
	copying, cancel := context.WithCancelCause(ctx)
	var wg sync.WaitGroup
	wg.Go(func() { g.watchReplica(copying, cancel) })
	began := time.Now()
	err = hv.Detach(copying, qmp.DetachSpec{VM: g.domainName(), Target: disk.Name, Socket: disk.Socket, File: file}, func(done, total int64, phase string) {
		emit(progressEvent("detach "+disk.Name, phase, done, total, began))
	})
	lost := context.Cause(copying)
	cancel(nil)
	wg.Wait()
	switch {
	case err == nil && aside != "":
		say(emit, "warning", "the old file of disk %s, as it was before protect, is now %s: remove it when it is of no more use", disk.Name, aside)
		return nil
	case err == nil:
		return nil
	}
	err = errors.Join(fromHypervisor(err), g.restoreKept(aside, file))
	if errors.Is(lost, errLinkLost) {
		return fmt.Errorf("%w (%w)", errLinkLost, err)
	}
	return err
}

// watchReplica cancels when FLUSHes can no longer end.
func (g *group) watchReplica(ctx context.Context, cancel context.CancelCauseFunc) {
	for g.flushes() {
		select {
		case <-ctx.Done():
			return
		case <-time.After(linkLook):
		}
	}
	cancel(errLinkLost)
}

// releaseKept puts an old file aside that lies where a disk is to go, and
// returns its new name; "" when there is none.
func (g *group) releaseKept(file string) (aside string, err error) {
	if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err := g.unlockKept(file); err != nil {
		return "", err
	}
	return g.d.moveAside(file)
}

// unlockKept lets go of an old file.
func (g *group) unlockKept(file string) error {
	g.mu.Lock()
	i := slices.IndexFunc(g.kept, func(img *images.Image) bool { return img.Path() == file })
	if i < 0 {
		g.mu.Unlock()
		return nil
	}
	img := g.kept[i]
	g.kept = slices.Delete(slices.Clone(g.kept), i, i+1)
	g.mu.Unlock()
	if err := img.Close(); err != nil {
		return fmt.Errorf("unlock old file: %w", err)
	}
	return nil
}

// restoreKept undoes releaseKept, provided that nothing lies in the way now.
func (g *group) restoreKept(aside, file string) error {
	if aside == "" {
		return nil
	}
	if _, err := os.Lstat(file); !errors.Is(err, fs.ErrNotExist) {
		return nil // the disk may run from it: the old file stays aside
	}
	if err := g.d.fs.Rename(aside, file); err != nil {
		return fmt.Errorf("put the old file back: %w", err)
	}
	if err := g.d.fs.SyncDir(filepath.Dir(file)); err != nil {
		return fmt.Errorf("put the old file back: %w", err)
	}
	g.keepOld()
	return nil
}

// serveAlone goes on serving a source without its replica. It is for a group
// that is about to end: no record is kept of what changes.
func (g *group) serveAlone() error {
	if err := g.update(func(f *groupFile) { f.Phase, f.Clean = Unprotecting, nil }); err != nil {
		return err
	}
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while stopping: %v", err))
	}
	g.input(Released, "unprotect without the replica")
	g.keepOld()
	return g.startAlone()
}

// unrecorded is an ext4j.Recorder for a group that is about to end.
type unrecorded struct{}

func (unrecorded) Acquire(context.Context, uint32, int64, int64) error { return nil }
func (unrecorded) Release(uint32, int64, int64, epoch.LSN)             {}
func (unrecorded) Begin(uint64, epoch.LSN, epoch.LSN)                  {}
func (unrecorded) Acked(epoch.LSN)                                     {}
func (unrecorded) SyncBegin(uint32) uint64                             { return 0 }
func (unrecorded) SyncEnd(uint32, uint64)                              {}
func (unrecorded) NeedsRoom() <-chan struct{}                          { return nil }
