package host

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"slices"
	"time"

	"kagami/appliance/control"
	"kagami/appliance/pki"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
	"kagami/replica/wire"
)

// acceptor answers what peers ask of this site (replica.Backend). Everything
// in a request is a stranger's: names become paths only after validName, sizes
// and counts are bounded, and a group is touched only by the site it belongs to.
type acceptor struct {
	d   *Daemon
	tls *tls.Config
}

// peer is a site known by its certificate.
type peer struct{ pki.Identity }

func (p peer) Site() string          { return p.Identity.Site }
func (p peer) May(group string) bool { return p.Identity.May(group) }

// Identify completes the TLS handshake.
func (a *acceptor) Identify(ctx context.Context, c net.Conn) (replica.Peer, net.Conn, error) {
	t := tls.Server(c, a.tls)
	if err := t.HandshakeContext(ctx); err != nil {
		return nil, nil, fmt.Errorf("TLS handshake: %w", err)
	}
	id, err := pki.Peer(t.ConnectionState())
	if err != nil {
		return nil, nil, err
	}
	return peer{id}, t, nil
}

// Attach finds or makes the group and attaches the channel.
func (a *acceptor) Attach(_ context.Context, p replica.Peer, req wire.AttachRequest, ch *replica.Channel) (*replica.Group, wire.AttachResponse, error) {
	var none wire.AttachResponse
	m := req.Manifest
	if err := checkManifest(m); err != nil {
		return nil, none, err
	}
	if !p.May(m.Name) {
		return nil, none, denied(p, m.Name)
	}
	g, err := a.groupFor(p, req)
	if err != nil {
		return nil, none, err
	}
	g.mu.Lock()
	rep := g.rep
	g.mu.Unlock()
	switch state := g.current(); {
	case rep == nil && (state == Waiting || state == Receiving): // the daemon starts or stops
		return nil, none, wire.Errorf(wire.CodeBusy, "group %s is not open at site %s just now", m.Name, a.d.cfg.Site)
	case rep == nil:
		return nil, none, wire.Errorf(wire.CodeFailed, "group %s is %s at site %s", m.Name, state, a.d.cfg.Site)
	}
	resp, err := rep.Attach(m, req.Resync, ch)
	var werr *wire.Error
	if errors.As(err, &werr) && werr.Code == wire.CodeFenced && g.snapshot().Role == RoleReplica {
		// Sealed, but a failover that does not get as far as the promotion is
		// taken back: this source is not superseded yet.
		err = wire.Errorf(wire.CodeBusy, "a failover of group %s is under way at site %s", m.Name, a.d.cfg.Site)
	}
	if err != nil && !errors.As(err, &werr) {
		err = wire.Errorf(wire.CodeFailed, "the replica of group %s at site %s: %v", m.Name, a.d.cfg.Site, err)
	}
	if err != nil {
		return nil, none, err
	}
	if f := g.snapshot(); !resp.Complete {
		resp.Returned = f.Returned
	}
	g.setStopped(epoch.Pos{})
	g.input(SourceCame, "site "+p.Site())
	return rep, resp, nil
}

func denied(p replica.Peer, group string) *wire.Error {
	return wire.Errorf(wire.CodeDenied, "the certificate of site %s does not allow group %s", p.Site(), group)
}

// groupFor returns the replica that a manifest describes.
func (a *acceptor) groupFor(p replica.Peer, req wire.AttachRequest) (*group, error) {
	m, d := req.Manifest, a.d
	if d.find(m.Name) == nil && !req.Create {
		return nil, wire.Errorf(wire.CodeNotFound, "site %s has no group %s", d.cfg.Site, m.Name)
	}
	g, err := d.take(m.Name)
	if err == nil {
		defer d.untake(m.Name)
		return d.newReplica(m, p.Site())
	}
	if g == nil {
		return nil, wire.Errorf(wire.CodeBusy, "site %s is making a group %s just now", d.cfg.Site, m.Name)
	}
	f := g.snapshot()
	switch {
	case g.broken != nil: // whose it is need not be known
		return nil, wire.Errorf(wire.CodeFailed, "group %s is failed at site %s: kagami status there says why", m.Name, d.cfg.Site)
	case f.Peer != p.Site():
		return nil, wire.Errorf(wire.CodeDenied, "group %s belongs to another site", m.Name)
	case f.ID != m.ID:
		return nil, wire.Errorf(wire.CodeConflict, "site %s has another group named %s: kagami forget %s there gives it up (a declared one is taken out of the config file first)", d.cfg.Site, m.Name, m.Name)
	case f.Role != RoleReplica:
		return nil, d.superior(f, m)
	case !sameDisks(f, m):
		return nil, wire.Errorf(wire.CodeConflict, "group %s has other disks at site %s", m.Name, d.cfg.Site)
	}
	return g, nil
}

// superior is the answer to a source of a group that is none's replica here: one
// whose lineage this site's comes from is superseded, any other has to be chosen
// or given up by an operator.
func (d *Daemon) superior(f *groupFile, m wire.Manifest) error {
	if hasLineage(f.Past, m.Lineage) {
		return fencedBy(f, d.cfg.Site)
	}
	if f.Lineage == m.Lineage {
		return wire.Errorf(wire.CodeConflict, "site %s is itself the source of group %s, in the same lineage", d.cfg.Site, f.Name)
	}
	return splitBrain(f, m, d.cfg.Site)
}

// newReplica makes and starts a group whose name is taken. A failure leaves
// nothing. One at a time: they share bounds and space.
func (d *Daemon) newReplica(m wire.Manifest, site string) (*group, error) {
	d.making.Lock()
	defer d.making.Unlock()
	if err := d.checkCount(site); err != nil {
		return nil, wire.Errorf(wire.CodeConflict, "%v", err)
	}
	if err := d.roomFor(m); err != nil {
		return nil, wire.Errorf(wire.CodeNoSpace, "no space for images and spool at site %s: %v", d.cfg.Site, err)
	}
	g, err := d.makeReplica(m, site)
	if err == nil {
		err = g.startReplica(true)
	}
	if err != nil {
		code := wire.CodeFailed
		if images.NoSpace(err) {
			code = wire.CodeNoSpace
		}
		err = errors.Join(err, g.removeImages(), g.removeFolder())
		return nil, wire.Errorf(code, "site %s cannot make the replica: %v", d.cfg.Site, err)
	}
	d.add(g)
	return g, nil
}

func sameDisks(f *groupFile, m wire.Manifest) bool {
	return slices.EqualFunc(f.Disks, m.Disks, func(a diskFile, b wire.Disk) bool {
		return a.Slot == b.Slot && a.ID == b.ID && a.Size == b.Size && a.BlockSize == b.BlockSize && a.Name == b.Name
	})
}

// checkManifest looks at everything that becomes a path, a size or a loop here.
func checkManifest(m wire.Manifest) error {
	if !validName.MatchString(m.Name) || (m.VM != "" && !validName.MatchString(m.VM)) {
		return wire.Errorf(wire.CodeConflict, "group name %q is not allowed", m.Name)
	}
	if m.ID.IsZero() || m.Lineage.IsZero() || m.Session == 0 {
		return wire.Errorf(wire.CodeConflict, "group %s comes without id, lineage or session", m.Name)
	}
	if len(m.Disks) == 0 || len(m.Disks) > maxDisks || len(m.Past) > 1000 || len(m.Discards) > 1000 {
		return wire.Errorf(wire.CodeConflict, "group %s has %d disks, 1 to %d are allowed", m.Name, len(m.Disks), maxDisks)
	}
	slots, names := map[uint32]bool{}, map[string]bool{}
	for _, d := range m.Disks {
		if !validName.MatchString(d.Name) || d.Slot > 1<<16-2 || slots[d.Slot] || names[d.Name] || d.ID.IsZero() {
			return wire.Errorf(wire.CodeConflict, "disk %q (slot %d) of group %s is not allowed", d.Name, d.Slot, m.Name)
		}
		if d.Size <= 0 || d.Size > maxDiskBytes {
			return wire.Errorf(wire.CodeConflict, "disk %s of group %s has %d bytes", d.Name, m.Name, d.Size)
		}
		if d.BlockSize != blockSize {
			return wire.Errorf(wire.CodeConflict, "disk %s of group %s has blocks of %d bytes, this release serves %d", d.Name, m.Name, d.BlockSize, blockSize)
		}
		slots[d.Slot], names[d.Name] = true, true
	}
	return nil
}

// Find returns a replica that the peer may touch.
func (a *acceptor) Find(p replica.Peer, id epoch.UUID) (*replica.Group, error) {
	g, err := a.owned(p, id)
	if err != nil {
		return nil, err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.rep == nil {
		return nil, wire.Errorf(wire.CodeFailed, "group %s is %s", g.name, g.state)
	}
	return g.rep, nil
}

// owned finds a group by id among those that belong to the peer's site.
func (a *acceptor) owned(p replica.Peer, id epoch.UUID) (*group, error) {
	for _, g := range a.d.snapshot() {
		f := g.snapshot()
		if f.ID == id && f.Peer == p.Site() && p.May(f.Name) && f.Role == RoleReplica {
			return g, nil
		}
	}
	return nil, a.unknown(p)
}

func (a *acceptor) unknown(p replica.Peer) *wire.Error {
	return wire.Errorf(wire.CodeNotFound, "site %s has no such replica of site %s", a.d.cfg.Site, p.Site())
}

// Call serves the remaining methods.
func (a *acceptor) Call(ctx context.Context, p replica.Peer, method string, params []byte) (any, error) {
	switch method {
	case wire.MethodRemove:
		var req wire.RemoveRequest
		if err := wire.DecodeJSON(params, &req); err != nil {
			return nil, err
		}
		return nil, a.remove(p, req)
	case wire.MethodStop:
		var req wire.StopRequest
		if err := wire.DecodeJSON(params, &req); err != nil {
			return nil, err
		}
		return nil, a.stops(p, req)
	case wire.MethodDomain:
		var req wire.DomainRequest
		if err := wire.DecodeJSON(params, &req); err != nil {
			return nil, err
		}
		return nil, a.domain(p, req)
	case wire.MethodReturn:
		var req wire.ReturnRequest
		if err := wire.DecodeJSON(params, &req); err != nil {
			return nil, err
		}
		return a.returns(ctx, p, req)
	case wire.MethodTakeover:
		var req wire.TakeoverRequest
		if err := wire.DecodeJSON(params, &req); err != nil {
			return nil, err
		}
		return a.takeover(p, req)
	case wire.MethodLineage:
		var req wire.LineageRequest
		if err := wire.DecodeJSON(params, &req); err != nil {
			return nil, err
		}
		return a.lineage(p, req)
	case wire.MethodCheck:
		var req wire.CheckRequest
		if err := wire.DecodeJSON(params, &req); err != nil {
			return nil, err
		}
		return a.check(ctx, p, req)
	default:
		return nil, wire.Errorf(wire.CodeVersion, "method %q is not known to this release", method)
	}
}

// remove ends a replica. Its images stay, under their names, unless purged.
func (a *acceptor) remove(p replica.Peer, req wire.RemoveRequest) error {
	g, err := a.owned(p, req.Group)
	if err != nil {
		return err
	}
	if !g.op.TryLock() {
		return wire.Errorf(wire.CodeBusy, "another operation is under way on group %s at site %s", g.name, a.d.cfg.Site)
	}
	defer g.op.Unlock()
	if !g.condemn() {
		return a.unknown(p)
	}
	if err := g.stop(); err != nil {
		g.note(fmt.Sprintf("while removing: %v", err))
	}
	// Of a VM that was protected here nothing is deleted on another site's word.
	if req.Purge && !g.snapshot().home() {
		if err := g.removeImages(); err != nil {
			return err
		}
	}
	if err := a.d.removeState(g); err != nil {
		return err
	}
	g.note("removed on request of site " + p.Site())
	a.d.forget(g)
	return nil
}

// removeState deletes what a group has in the state folder; what keeps branches is put aside.
func (d *Daemon) removeState(g *group) error {
	if bs, err := g.branches(); err == nil && len(bs) == 0 {
		return g.removeFolder()
	}
	return d.moveState(g, func(ev control.Event) { g.note("the group ended, its branches are kept: " + ev.Message) })
}

// condemn marks a replica that is going to be removed. It reports false when
// the group is none any more: promoted, or removed, while the request came to
// the lock. The caller holds op, which a promotion needs too.
func (g *group) condemn() bool {
	known := g.d.find(g.name) == g
	g.mu.Lock()
	defer g.mu.Unlock()
	if !known || g.file.Role != RoleReplica {
		return false
	}
	g.gone = true
	return true
}

// maxXML bounds a domain's definition, bytes.
const maxXML = 512 << 10

// domain stores the VM's definition, durably, beside the group.
func (a *acceptor) domain(p replica.Peer, req wire.DomainRequest) error {
	g, err := a.owned(p, req.Group)
	if err != nil {
		return err
	}
	if len(req.XML) > maxXML {
		return wire.Errorf(wire.CodeFailed, "the VM's definition has %d bytes, at most %d are taken", len(req.XML), maxXML)
	}
	return a.storeDomain(g, p, req.XML)
}

func (a *acceptor) storeDomain(g *group, p replica.Peer, xml string) error {
	g.mu.Lock() // one definition at a time, and none beside a promotion or a removal
	defer g.mu.Unlock()
	if g.gone || g.file.Role != RoleReplica {
		return a.unknown(p)
	}
	if g.file.home() {
		return wire.Errorf(wire.CodeConflict, "VM %s is of site %s: no other site defines it", g.file.VM, a.d.cfg.Site)
	}
	return g.storeDomain(xml)
}

// stops notes that a source stops with nothing that this site lacks. It is not
// durable: forgotten, it makes the RPO of a failover look larger than it is.
func (a *acceptor) stops(p replica.Peer, req wire.StopRequest) error {
	g, err := a.owned(p, req.Group)
	if err != nil {
		return err
	}
	g.setStopped(req.Pos)
	return nil
}

// checkPatience bounds what libvirt may take for a check: a link has few
// requests at a time, and sources attach over it.
const checkPatience = 20 * time.Second

// check tells whether this site could take a group and boot its VM.
func (a *acceptor) check(ctx context.Context, p replica.Peer, req wire.CheckRequest) (wire.CheckResponse, error) {
	var resp wire.CheckResponse
	if err := checkManifest(req.Manifest); err != nil {
		return resp, err
	}
	m := req.Manifest
	if !p.May(m.Name) {
		return resp, denied(p, m.Name)
	}
	switch g := a.d.find(m.Name); {
	case g != nil && g.snapshot().ID != m.ID:
		resp.Problems = append(resp.Problems, fmt.Sprintf("it has another group named %s: kagami forget %s there gives it up", m.Name, m.Name))
	case g == nil: // one that is there already has its space
		resp.Problems = append(resp.Problems, a.d.checkNew(m, p.Site())...)
	}
	if len(req.XML) > maxXML {
		return resp, wire.Errorf(wire.CodeFailed, "the VM's definition has %d bytes, at most %d are taken", len(req.XML), maxXML)
	}
	if req.XML != "" {
		ctx, cancel := context.WithTimeout(ctx, checkPatience)
		defer cancel()
		problems, warnings := a.d.checkDomain(ctx, m.Name, req.XML, m.Disks)
		resp.Problems, resp.Warnings = append(resp.Problems, problems...), append(resp.Warnings, warnings...)
	}
	return resp, nil
}
