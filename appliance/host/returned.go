package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"kagami/ext4j/activelog"
	"kagami/ext4j/changemap"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
	"kagami/replica/wire"
)

// A site that a group has left becomes its replica by delta. Let F be the record
// where the lineage that is served now was forked. The replica held, at F, all that
// the source had ever been acknowledged; so this site's images differ from what the
// other one had at F only
//
//   - in the regions of the active log: whatever left it was acknowledged and is durable
//     here; the log's floor says up to where, and has to be at or below F;
//   - if this site was promoted itself: in the regions of its record of changes.
//
// The other site's own record of changes names what differs there. Both together
// are compared by hash, and what differs is shipped (source.deltaRanges). Where
// anything of this cannot be known, everything is compared.
//
// Order: what may differ is kept under a name, durably (branch.go); then what an
// earlier life as a replica left is removed, durably; then the group's file says
// that this is a replica, and of what. Broken off before that, it is what it was.

// returns serves wire.MethodReturn.
func (a *acceptor) returns(ctx context.Context, p replica.Peer, req wire.ReturnRequest) (wire.ReturnResponse, error) {
	var none wire.ReturnResponse
	m := req.Manifest
	if err := checkManifest(m); err != nil {
		return none, err
	}
	if !p.May(m.Name) {
		return none, denied(p, m.Name)
	}
	g := a.d.find(m.Name)
	if g == nil {
		return none, wire.Errorf(wire.CodeNotFound, "site %s has no group %s", a.d.cfg.Site, m.Name)
	}
	if !g.op.TryLock() {
		return none, wire.Errorf(wire.CodeBusy, "another operation is under way on group %s at site %s", g.name, a.d.cfg.Site)
	}
	defer g.op.Unlock()
	f := g.snapshot()
	if f.Peer == p.Site() && f.ID == m.ID && f.Role == RoleReplica && f.Lineage == m.Lineage && f.Returned != nil {
		return wire.ReturnResponse{Already: true, Whole: f.Returned.Whole, Bytes: runBytes(f.Returned.Runs)}, nil
	}
	if err := a.mayReturn(ctx, g, p, m); err != nil {
		return none, err
	}
	resp, err := g.takeReturn(m, req.DryRun)
	if err != nil && images.NoSpace(err) {
		return none, wire.Errorf(wire.CodeNoSpace, "no space at site %s to keep what its disks of %s hold beyond the failover: %v", a.d.cfg.Site, g.name, err)
	}
	return resp, err
}

// mayReturn tells what keeps a group from becoming the replica that m describes.
func (a *acceptor) mayReturn(ctx context.Context, g *group, p replica.Peer, m wire.Manifest) error {
	f, site := g.snapshot(), a.d.cfg.Site
	switch {
	case g.broken != nil:
		return wire.Errorf(wire.CodeFailed, "group %s is failed at site %s: kagami status there says why", m.Name, site)
	case f.Peer != p.Site():
		return wire.Errorf(wire.CodeDenied, "group %s belongs to another site", m.Name)
	case f.ID != m.ID:
		return wire.Errorf(wire.CodeConflict, "site %s has another group named %s: kagami forget %s there gives it up", site, m.Name, m.Name)
	case f.Role == RoleReplica:
		return wire.Errorf(wire.CodeConflict, "site %s has a replica of %s that follows lineage %s", site, m.Name, f.Lineage)
	case !sameDisks(f, m):
		return wire.Errorf(wire.CodeConflict, "group %s has other disks at site %s", m.Name, site)
	}
	if err := standing(f, m, site); err != nil {
		return err
	}
	switch state := g.current(); {
	case f.Role == RoleSource && f.Fenced == "", f.Phase != "", state != Fenced && state != Detached:
		return wire.Errorf(wire.CodeBusy, "site %s still serves group %s (%s): it gives that up when it is told of the promotion", site, m.Name, state)
	}
	return a.d.unused(ctx, g)
}

// standing tells whether m's lineage takes precedence over that of f, by ancestry
// alone or because an operator said so. Neither's numbers count.
func standing(f *groupFile, m wire.Manifest, site string) error {
	switch {
	case f.Lineage == m.Lineage:
		return wire.Errorf(wire.CodeConflict, "site %s has group %s in the same lineage, %s", site, f.Name, f.Lineage)
	case hasLineage(m.Past, f.Lineage), slices.Contains(m.Discards, f.Lineage):
		return nil
	case hasLineage(f.Past, m.Lineage):
		return fencedBy(f, site)
	}
	return splitBrain(f, m, site)
}

func hasLineage(past []epoch.Pos, id epoch.UUID) bool {
	return slices.ContainsFunc(past, func(p epoch.Pos) bool { return p.Lineage == id })
}

func fencedBy(f *groupFile, site string) *wire.Error {
	return wire.Errorf(wire.CodeFenced, "group %s was promoted at site %s at %s", f.Name, site, f.promotedAt())
}

func splitBrain(f *groupFile, m wire.Manifest, site string) *wire.Error {
	return wire.Errorf(wire.CodeConflict, "split brain: site %s has group %s as %s in lineage %s, promoted at %s, and this one is of lineage %s: neither comes from the other; kagami survivor %s at the site whose data is to be kept",
		site, f.Name, f.Role, f.Lineage, f.promotedAt(), m.Lineage, f.Name)
}

// unused refuses while something runs from the group's disks here: it would go
// on with what it remembers of them when they are served again.
func (d *Daemon) unused(ctx context.Context, g *group) error {
	f := g.snapshot()
	for _, disk := range g.status().Disks {
		if disk.Clients > 0 {
			return wire.Errorf(wire.CodeConflict, "%d clients are connected to disk %s of %s at site %s: stop what uses it there", disk.Clients, disk.Name, g.name, d.cfg.Site)
		}
	}
	if f.VM == "" || d.dial == nil {
		return nil
	}
	hv, err := d.virt()
	if err != nil {
		return wire.Errorf(wire.CodeFailed, "whether VM %s still runs at site %s cannot be told: %s", f.VM, d.cfg.Site, text(err))
	}
	ctx, cancel := context.WithTimeout(ctx, checkPatience)
	defer cancel()
	vms, err := hv.VMs(ctx)
	if err != nil {
		return wire.Errorf(wire.CodeFailed, "whether VM %s still runs at site %s cannot be told: %v", f.VM, d.cfg.Site, err)
	}
	for _, vm := range vms {
		if vm.Name == g.domainName() && vm.State.Active() {
			return wire.Errorf(wire.CodeConflict, "VM %s, whose disks are superseded, still runs at site %s: virsh destroy %s there ends it", vm.Name, d.cfg.Site, vm.Name)
		}
	}
	return nil
}

// takeReturn makes the group a replica. The caller holds op.
func (g *group) takeReturn(m wire.Manifest, dry bool) (wire.ReturnResponse, error) {
	f := g.snapshot()
	if dry {
		r, err := g.preview(f, m)
		return response(r, ""), err
	}
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while stopping: %v", err))
	}
	r, branch, err := g.settleReturn(f, m)
	if err != nil {
		if aerr := g.startAgain(); aerr != nil {
			g.fail(aerr)
		}
		return wire.ReturnResponse{}, err
	}
	g.alarm(fencedAlarm, "")
	g.alarm("changes", "")
	g.alarm(splitAlarm, "")
	g.alarm(takeBackAlarm, "")
	g.removeApart(f)
	g.input(Returned, fmt.Sprintf("site %s is the source now, what differs here is overwritten", f.Peer))
	if branch != "" {
		g.note(fmt.Sprintf("what this site has beyond the failover is kept as %s (kagami branches %s)", branch, g.name))
	}
	if err := g.startReplica(false); err != nil {
		g.fail(err)
		return wire.ReturnResponse{}, wire.Errorf(wire.CodeFailed, "the replica of %s does not start at site %s: %v", g.name, g.d.cfg.Site, err)
	}
	return response(r, branch), nil
}

// startAgain goes on as before a return that failed.
func (g *group) startAgain() error {
	if g.snapshot().Fenced != "" {
		g.keepSuperseded()
		return nil
	}
	return g.startPromoted()
}

func response(r *wire.Returned, branch string) wire.ReturnResponse {
	return wire.ReturnResponse{Branch: branch, Whole: r.Whole, Bytes: runBytes(r.Runs)}
}

func runBytes(runs []wire.Run) (n int64) {
	for _, r := range runs {
		n += int64(r.Count) * regionBytes
	}
	return n
}

// preview says what a return would come to: while the group is open, its log is.
func (g *group) preview(f *groupFile, m wire.Manifest) (*wire.Returned, error) {
	g.mu.Lock()
	src := g.src
	g.mu.Unlock()
	r := &wire.Returned{Lineage: m.Lineage, RegionBytes: regionBytes}
	switch {
	case src == nil:
		whole, all, err := g.divergedActive(f, m) // not a promoted group: that is open
		if r.Whole, r.Runs = whole, runsOf(all); whole != "" {
			r.Runs = wholeRuns(f)
		}
		return r, err
	case src.log != nil:
		r.Runs = runsOf(src.mayDiffer())
		if r.Whole = cmp.Or(f.Compare, behindFork(f, m, src.log.Floor(), src.log.Follower())); r.Whole != "" {
			r.Runs = wholeRuns(f)
		}
	default:
		r.Runs = runsOf(src.changedRegions())
	}
	return r, nil
}

// settleReturn does the durable part, on a stopped group.
func (g *group) settleReturn(f *groupFile, m wire.Manifest) (*wire.Returned, string, error) {
	r, err := g.diverged(f, m)
	if err != nil {
		return nil, "", err
	}
	branch, err := g.saveBranch(f, m, r)
	if err != nil {
		return nil, "", err
	}
	if err := g.clearReplica(f); err != nil {
		return nil, "", err
	}
	return r, branch, g.update(func(f *groupFile) {
		f.Role, f.Lineage, f.Past, f.Session = RoleReplica, m.Lineage, m.Past, m.Session
		f.Replica, f.Begun, f.Complete, f.Phase, f.Clean, f.Compare = epoch.NewUUID(), 0, false, "", nil, ""
		f.Changes, f.ChangesLost, f.Delta, f.TakeBack = false, "", false, false
		f.Fenced, f.Failover, f.Returned, f.Discards = "", nil, r, nil
		f.Apart, f.Required, f.Boot = nil, f.Required&^featureApart, ""
	})
}

// clearReplica removes, durably, what an earlier life as a replica has left: its
// spool and marks would vouch for other content.
func (g *group) clearReplica(f *groupFile) error {
	fsys := g.d.fs
	if err := removeTree(fsys, g.dir+"/spool"); err != nil {
		return fmt.Errorf("remove old spool: %w", err)
	}
	for _, name := range []string{"applied", "applying", "damaged"} {
		if err := ignoreNotExist(fsys.Remove(g.dir + "/" + name)); err != nil {
			return fmt.Errorf("remove old state of a replica: %w", err)
		}
	}
	if err := fsys.SyncDir(g.dir); err != nil {
		return fmt.Errorf("remove old state of a replica: fsync folder: %w", err)
	}
	for _, d := range f.Disks {
		if err := g.clearRestMark(&d); err != nil {
			return fmt.Errorf("image of disk %s: %w", d.Name, err)
		}
	}
	return nil
}

// clearRestMark makes void what a stopped replica left on an image; it was
// written to since.
func (g *group) clearRestMark(d *diskFile) error {
	img, err := images.OpenImage(g.d.fs, d.Image, images.Want{Size: d.Size})
	if err != nil {
		return err
	}
	err = img.SetAttr(restMark, []byte("-"))
	if err == nil {
		err = img.Settle() // what is compared is what the disk has
	}
	return errors.Join(err, img.Close())
}

// diverged is what a stopped group may hold that the other site did not have at
// the fork.
func (g *group) diverged(f *groupFile, m wire.Manifest) (*wire.Returned, error) {
	r := &wire.Returned{Lineage: m.Lineage, RegionBytes: regionBytes}
	var all map[uint32][]uint64
	var err error
	if f.Role == RolePromoted {
		r.Whole, all, err = g.divergedChanges(f, m)
	} else {
		r.Whole, all, err = g.divergedActive(f, m)
	}
	if err != nil {
		return nil, err
	}
	if r.Whole == "" {
		r.Whole, err = g.imagesChanged(f)
	}
	if r.Runs = runsOf(all); r.Whole != "" {
		r.Runs = wholeRuns(f)
	}
	return r, err
}

// divergedActive reads the active log of a source.
func (g *group) divergedActive(f *groupFile, m wire.Manifest) (whole string, all map[uint32][]uint64, err error) {
	if f.Compare != "" {
		return f.Compare, nil, nil
	}
	if !f.Complete {
		return "its first sync had not ended", nil, nil
	}
	path := g.dir + "/active.log"
	old, err := g.d.fs.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "the active log is missing", nil, nil
	} else if err != nil {
		return "", nil, fmt.Errorf("open active log: %w", err)
	}
	if err := old.Close(); err != nil {
		return "", nil, fmt.Errorf("close active log: %w", err)
	}
	limits := g.d.limits(g.name)
	log, regions, err := activelog.Open(g.d.fs, path, activelog.Options{Group: f.ID, RegionBytes: regionBytes, MaxRegions: int(limits.ActiveLogBytes / regionBytes)})
	if errors.Is(err, activelog.ErrCorrupt) {
		return err.Error(), nil, nil
	} else if err != nil {
		return "", nil, err
	}
	floor, who := log.Floor(), log.Follower()
	if err := log.Close(); err != nil {
		return "", nil, err
	}
	whole, all, err = g.apartRegions(f)
	if err != nil || whole != "" {
		return whole, nil, err
	}
	for slot, active := range regionsOf(regions) {
		all[slot] = mergeRegions(all[slot], active)
	}
	return behindFork(f, m, floor, who), all, nil
}

// behindFork says why the active log does not name all that may differ from what
// the other site had at the fork; "" when it does.
func behindFork(f *groupFile, m wire.Manifest, floor activelog.Floor, who activelog.Follower) string {
	i := slices.IndexFunc(m.Past, func(p epoch.Pos) bool { return p.Lineage == f.Lineage })
	switch {
	case i < 0:
		return "the other site's lineage was chosen, it does not come from this one"
	case floor == activelog.Floor{}:
		return ""
	case who.Lineage != f.Lineage || who.Replica != f.Replica:
		return "the active log was kept for another replica"
	}
	if fork := m.Past[i]; fork.Session < floor.Session || fork.Session == floor.Session && fork.LSN < floor.LSN {
		return fmt.Sprintf("the other site was promoted at record %d and had acknowledged record %d", fork.LSN, floor.LSN)
	}
	return ""
}

// divergedChanges reads the records of changes of a promoted group. They count
// from its own fork; if the other site's lineage comes from elsewhere, what that
// has changed since the two parted is not known here, and is not in its record.
func (g *group) divergedChanges(f *groupFile, m wire.Manifest) (whole string, all map[uint32][]uint64, err error) {
	if !slices.Contains(m.Past, f.Past[len(f.Past)-1]) {
		whole = "the two lineages were forked at different records"
	}
	if f.ChangesLost != "" {
		whole = f.ChangesLost
	}
	all = map[uint32][]uint64{}
	for _, d := range f.Disks {
		regions, err := readMap(g.d.fs, g.mapPath(&d), f.origin(&d))
		if lost(err) {
			return err.Error(), nil, nil
		} else if err != nil {
			return "", nil, err
		}
		all[d.Slot] = regions
	}
	return whole, all, nil
}

// readMap reads a record of changes that nobody writes any more.
func readMap(fsys images.FS, path string, o changemap.Origin) ([]uint64, error) {
	m, err := changemap.Open(fsys, path, o)
	if err != nil {
		return nil, err
	}
	return m.Regions(), m.Close()
}

// lost tells of an error of changemap.Open that the map cannot be known.
func lost(err error) bool {
	return errors.Is(err, changemap.ErrCorrupt) || errors.Is(err, fs.ErrNotExist)
}

// mergeRegions is the union of two lists.
func mergeRegions(a, b []uint64) []uint64 {
	out := slices.Concat(a, b)
	slices.Sort(out)
	return slices.Compact(out)
}

// imagesChanged says which image is not what this group left; "" when all are.
func (g *group) imagesChanged(f *groupFile) (why string, err error) {
	for _, d := range f.Disks {
		img, err := images.OpenImage(g.d.fs, d.Image, images.Want{Size: d.Size, Identity: d.ID.String()})
		if errors.Is(err, images.ErrIdentity) {
			why = fmt.Sprintf("image %s was replaced by a file that kagami did not make", d.Image)
			continue
		} else if err != nil {
			return "", fmt.Errorf("image of disk %s: %w", d.Name, err)
		}
		now, err := img.ModTime()
		if err = errors.Join(err, img.Close()); err != nil {
			return "", fmt.Errorf("image of disk %s: %w", d.Name, err)
		}
		if f.Clean != nil && f.Clean.Mtime[d.Slot] != now {
			why = fmt.Sprintf("image %s was changed while kagami did not run", d.Image)
		}
	}
	return why, nil
}

// wholeRuns are all regions of all disks.
func wholeRuns(f *groupFile) (runs []wire.Run) {
	for _, d := range f.Disks {
		runs = append(runs, wire.Run{Disk: d.Slot, Count: uint64((d.Size-1)/regionBytes + 1)})
	}
	return runs
}

func regionsOf(regions []activelog.Region) map[uint32][]uint64 {
	all := map[uint32][]uint64{}
	for _, r := range regions {
		all[r.Disk] = append(all[r.Disk], r.Index)
	}
	return all
}

// runsOf joins regions to at most wire.MaxRuns runs: where there are more, the
// smallest gaps between them are taken in.
func runsOf(all map[uint32][]uint64) []wire.Run {
	slots := make([]uint32, 0, len(all))
	for slot := range all {
		slots = append(slots, slot)
		slices.Sort(all[slot])
	}
	slices.Sort(slots)
	for gap := uint64(1); ; gap *= 2 {
		var runs []wire.Run
		for _, slot := range slots {
			runs = append(runs, join(slot, all[slot], gap)...)
		}
		if len(runs) <= wire.MaxRuns {
			return runs
		}
	}
}

// join makes runs of sorted regions; those whose distance is at most gap are one.
func join(slot uint32, regions []uint64, gap uint64) []wire.Run {
	var runs []wire.Run
	for _, i := range regions {
		if n := len(runs); n > 0 && i-(runs[n-1].First+runs[n-1].Count-1) <= gap {
			runs[n-1].Count = i - runs[n-1].First + 1
			continue
		}
		runs = append(runs, wire.Run{Disk: slot, First: i, Count: 1})
	}
	return runs
}

func (g *group) mapPath(d *diskFile) string {
	return filepath.Join(g.dir, fmt.Sprintf("changes-%d.map", d.Slot))
}
