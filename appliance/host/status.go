package host

import (
	"cmp"
	"context"
	"maps"
	"slices"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j"
	"kagami/ext4j/epoch"
	"kagami/replica"
)

// Status is everything this site knows.
func (d *Daemon) Status(context.Context) (control.Status, error) {
	st := control.Status{Site: d.cfg.Site, Version: d.release, Since: d.started, Peers: d.peerStatus(), Alarms: d.alarms(), Groups: []control.Group{}}
	for _, g := range d.snapshot() {
		st.Groups = append(st.Groups, g.status())
	}
	slices.SortFunc(st.Groups, func(a, b control.Group) int { return cmp.Compare(a.Name, b.Name) })
	return st, nil
}

// alarms are those of the site as a whole.
func (d *Daemon) alarms() []string {
	if d.dial == nil {
		return nil
	}
	if _, err := d.virt(); err != nil {
		return []string{text(err) + ": VMs are neither treated nor started"}
	}
	return nil
}

func (d *Daemon) peerStatus() []control.Peer {
	out := []control.Peer{}
	for _, p := range d.cfg.Peers {
		l := d.links[p.Name].Status()
		cp := control.Peer{Name: p.Name, Address: p.Address, Connected: l.Connected, Since: l.Since, Connections: l.Connections,
			RTTMs: float64(l.RTT.Microseconds()) / 1e3, Inflight: l.Inflight, SentBytes: l.Sent, Version: l.Release}
		if l.Error != nil {
			cp.Error = l.Error.Error()
		}
		out = append(out, cp)
	}
	return out
}

// status is one group for people and programs.
func (g *group) status() control.Group {
	g.mu.Lock()
	f, src, rep := g.file, g.src, g.rep
	st := control.Group{Name: f.Name, ID: f.ID.String(), VM: f.VM, Role: string(f.Role), State: string(g.state), Since: g.since, Reason: g.reason,
		Complete: f.Complete, Peer: f.Peer, Lineage: f.Lineage.String(), Session: f.Session, Disks: []control.Disk{}}
	for _, kind := range slices.Sorted(maps.Keys(g.alarms)) {
		st.Alarms = append(st.Alarms, g.alarms[kind])
	}
	for _, e := range g.events {
		st.Events = append(st.Events, control.LoggedEvent{At: e.At, Text: e.Text})
	}
	if g.sync.What != "" {
		st.Sync = g.sync.control()
	}
	verified := g.verified
	g.mu.Unlock()
	if f.Role == RoleSource && f.Complete {
		st.Verified = verified.control()
	}
	p := g.policy().control(g.name, g.d.limits(g.name).QueueBytes)
	st.Mode, st.AsyncBytes, st.AsyncSeconds, st.OnLinkLoss = p.Mode, p.AsyncBytes, p.AsyncSeconds, p.OnLinkLoss
	if link := g.d.links[f.Peer]; link != nil {
		st.PeerUp = link.Status().Connected
	}
	for _, d := range f.Disks {
		st.Disks = append(st.Disks, control.Disk{Name: d.Name, Slot: d.Slot, ID: d.ID.String(), Size: d.Size, Image: d.Image, Socket: d.Socket, OldFile: d.Kept})
	}
	if f.Failover != nil {
		r := f.report()
		st.Failover = &r
	}
	switch {
	case rep != nil:
		g.replicaStatus(&st, rep)
	case src != nil:
		src.status(&st)
	}
	st.Protected = st.Protected && f.Phase == ""
	return st
}

func (p syncProgress) control() *control.Sync {
	ev := progressEvent(p.What, "", p.Done, p.Total, p.Since)
	return &control.Sync{What: p.What, Done: p.Done, Total: p.Total, Rate: ev.Rate, ETASeconds: ev.ETASeconds}
}

// status adds what a serving group knows.
func (s *source) status(st *control.Group) {
	e := s.eng.Stats()
	if e.Next > 0 { // a session has begun
		st.LSN = control.LSN{Assigned: uint64(e.Next - 1), Durable: uint64(e.Ack)}
	}
	st.QueueBytes, st.QueueLimit, st.Flushes = e.QueueBytes, s.limits.QueueBytes, e.UnackedFlushes
	st.BacklogBytes, st.BacklogLimit = e.BacklogBytes, s.limits.BacklogBytes
	st.AllFlushes, st.LocalFlushes = e.Flushes, e.LocalFlushes
	st.Written, st.Resynced, st.RPOSeconds = e.WrittenBytes, e.ResyncBytes, e.Lag.Seconds()
	for i := range st.Disks {
		disk := s.eng.Disk(st.Disks[i].Slot)
		st.Disks[i].Clients = disk.Clients()
		if seen, ok := disk.Seen(); ok {
			st.Disks[i].FileSystems = fileSystems(seen)
		}
	}
	if e.Bounded {
		st.Alarms = append(st.Alarms, "the replica lacks as much as mode async allows: the guest waits")
	}
	if s.link == nil {
		return
	}
	for _, regions := range s.mayDiffer() {
		st.Regions += len(regions)
	}
	if why := s.g.snapshot().Compare; why != "" {
		st.Alarms = append(st.Alarms, "not protected until both sites have been compared: "+why)
	}
	// Stalled too: while FLUSH waits, what has returned is safe. The end of a first sync is
	// durable a moment before the state says so.
	st.Protected = st.Complete && st.State != string(Failed) && st.State != string(Fenced) && st.State != string(Syncing) && s.g.replicaVouchedFor()
	s.mu.Lock()
	st.LSN.Received, st.LSN.Applied = uint64(s.last.Received), uint64(s.last.Applied)
	s.mu.Unlock()
	st.LSN.Received = max(st.LSN.Received, st.LSN.Durable)
}

// fileSystems are those of a disk.
func fileSystems(seen ext4j.Seen) []control.FileSystem {
	var out []control.FileSystem
	for i, p := range seen.Parts {
		fs := control.FileSystem{Offset: p.Off, State: p.State, Live: p.Live}
		if p.Blocks > 0 {
			fs.UUID, fs.JournalBlocks, fs.TID = epoch.UUID(p.UUID).String(), p.Blocks, p.TID
		}
		if c := seen.Commit; c.Part == i && c.TID == fs.TID && !c.Time.IsZero() {
			fs.CommitTime = &c.Time
		}
		out = append(out, fs)
	}
	return out
}

// replicaVouchedFor tells whether nothing is known against the replica.
func (g *group) replicaVouchedFor() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.file.Compare == "" && g.file.Apart == nil && g.alarms[noReplica] == ""
}

// replicaStatus adds what a replica knows.
func (g *group) replicaStatus(st *control.Group, rep *replica.Group) {
	r := rep.Status()
	st.Complete, st.PeerUp, st.Session = r.Complete, r.Attached, r.Session
	st.LSN = control.LSN{Assigned: uint64(r.Received), Received: uint64(r.Received), Durable: uint64(r.Durable), Applied: uint64(r.Applied)}
	st.SpoolBytes, st.SpoolLimit, st.ApplySeconds = r.SpoolUsed, r.SpoolMax, r.ToApply.Seconds()
	st.Protected = r.Complete && r.Err == nil && r.Damaged == ""
	// Nothing open: the source has sent no more than what is durable here.
	if !r.CloseTime.IsZero() && (!r.Attached || r.Received > r.Durable) && !g.lacksNothing(r) {
		st.RPOSeconds = max(0, time.Since(r.CloseTime).Seconds())
	}
	for _, text := range []string{r.Stalled, r.Damaged, r.Recovery} {
		if text != "" {
			st.Alarms = append(st.Alarms, text)
		}
	}
	switch {
	case r.SpoolShort != "":
		st.Alarms = append(st.Alarms, "no space for the spool: records wait until there is some: "+r.SpoolShort)
	case r.SpoolFull:
		st.Alarms = append(st.Alarms, "the spool is full: records wait until some of it is applied")
	}
}
