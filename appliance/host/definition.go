package host

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"kagami/images"
	"kagami/qmp"
)

// The replica's site keeps the definition of the VM for the day it has to run
// it. What protect shipped grows old: a network card or a disk that is added
// later has to be known there, and has to be possible there. So the definition
// is shipped and checked again whenever libvirt says that it was changed, at
// every attach, since the replica's site may have changed instead, and when it
// is found to have changed without an event: virsh attach-device --config makes none.

// definitionAlarm is the alarm that the replica's site could not run the VM as
// it is defined now.
const definitionAlarm = "definition"

// reshipPause is the least time between two shipments of a VM's definition:
// whatever else happens meanwhile is in the second.
const reshipPause = time.Second

// reshipDomain ships and checks the VM's definition in its own goroutine, of
// which a group has at most one: what comes while it works is one more round.
// A round that fails because the link is lost is made up for at the next attach.
func (g *group) reshipDomain() {
	g.mu.Lock()
	f := g.file
	mine := f.defines() && f.Complete && f.Fenced == "" && g.d.dial != nil
	begin := mine && !g.shipping
	g.shipping = g.shipping || mine
	g.reship = mine
	g.mu.Unlock()
	if begin {
		g.d.wg.Go(func() { g.shipRounds(g.d.ctx) })
	}
}

// reshipChanged ships the definition of a VM that is not what was shipped last.
// While the other site could not run it, it is asked again.
func (d *Daemon) reshipChanged(ctx context.Context, hv Hypervisor, g *group) {
	g.mu.Lock()
	f, refused := g.file, g.alarms[definitionAlarm] != ""
	mine := g.state == Streaming && f.defines()
	g.mu.Unlock()
	if !mine {
		return
	}
	if !refused {
		ctx, cancel := context.WithTimeout(ctx, tendPatience)
		defer cancel()
		xml, err := hv.DomainXML(ctx, f.VM)
		if err != nil {
			return // gone, or looked at again when libvirt is back
		}
		if g.hasDomain(xml) {
			return
		}
	}
	g.reshipDomain()
}

// defines tells whether the VM's definition is this site's: after a failover it is
// what the other site had, mapped, and stays as it is there.
func (f *groupFile) defines() bool {
	return f.VM != "" && f.Role == RoleSource && f.Phase == "" && f.home()
}

// home tells whether the VM was protected at this site: it is defined in libvirt here,
// and what is kept beside the group is that definition, not one that came from a peer.
func (f *groupFile) home() bool {
	return f.VM != "" && slices.ContainsFunc(f.Disks, func(d diskFile) bool { return d.Pivoted })
}

func (g *group) shipRounds(ctx context.Context) {
	for {
		g.mu.Lock()
		pause := time.Until(g.shipped.Add(reshipPause))
		g.mu.Unlock()
		select {
		case <-ctx.Done():
		case <-time.After(pause):
		}
		g.mu.Lock()
		again := g.reship && ctx.Err() == nil
		g.shipping, g.reship, g.shipped = again, false, time.Now()
		g.mu.Unlock()
		if !again {
			return
		}
		if err := g.d.oneReship(ctx, g.shipNow); err != nil && ctx.Err() == nil {
			g.note(fmt.Sprintf("the definition of VM %s could not be shipped, it is at the next attach: %s", g.snapshot().VM, text(err)))
		}
		g.mu.Lock()
		g.shipping = g.reship
		again = g.reship
		g.mu.Unlock()
		if !again {
			return
		}
	}
}

// oneReship waits for the turn of one round.
func (d *Daemon) oneReship(ctx context.Context, round func(context.Context) error) error {
	select {
	case d.reships <- struct{}{}:
		defer func() { <-d.reships }()
		return round(ctx)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// shipNow is one round. The definition is shipped even if it could not run
// there: it is what the VM is now.
func (g *group) shipNow(ctx context.Context) error {
	f := g.snapshot()
	if !g.d.connected(f.Peer) {
		return nil // its turn is another group's; the next attach makes up for it
	}
	hv, err := g.d.virt()
	if err != nil {
		return nil //nolint:nilerr // looked at again when libvirt is back
	}
	xml, err := hv.DomainXML(ctx, f.VM)
	if errors.Is(err, qmp.ErrNoDomain) {
		return nil // what was shipped is what is left of it
	} else if err != nil {
		return fromHypervisor(err)
	}
	resp, err := g.d.askPeer(ctx, f, xml)
	if err != nil {
		return err
	}
	problem := ""
	if len(resp.Problems) > 0 {
		problem = fmt.Sprintf("site %s could not run %s as it is defined now: %s", f.Peer, f.VM, strings.Join(resp.Problems, "; "))
	}
	g.alarm(definitionAlarm, problem)
	if !g.hasDomain(xml) { // warnings are said once for each definition
		for _, w := range resp.Warnings {
			g.note(fmt.Sprintf("site %s: %s", f.Peer, w))
		}
	}
	return g.shipXML(ctx, xml) // even if it was before: the replica may be another one, or an older state of it
}

// storeDomain keeps the VM's definition beside the group, durably; one that is
// there already is not written again. The caller holds mu.
func (g *group) storeDomain(xml string) error {
	if g.hasDomain(xml) {
		return nil
	}
	if err := images.WriteFileAtomic(g.d.fs, g.dir+"/domain.xml", []byte(xml), 0o600); err != nil {
		return fmt.Errorf("store definition of VM: %w", err)
	}
	return nil
}

// hasDomain tells whether this is the definition that is kept here.
func (g *group) hasDomain(xml string) bool {
	was, err := images.ReadFile(g.d.fs, g.dir+"/domain.xml", maxXML)
	return err == nil && string(was) == xml
}
