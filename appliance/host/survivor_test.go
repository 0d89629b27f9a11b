package host

import (
	"context"
	"os"
	"strings"
	"testing"

	"kagami/appliance/control"
	"kagami/qmp"
)

func (s *site) survivor(req control.SurvivorRequest) error {
	ctx, cancel := context.WithTimeout(context.Background(), commandLimit)
	defer cancel()
	return s.control.Survivor(ctx, req, func(ev control.Event) { s.log.event(ev) })
}

// TestSurvivorIsTheOldSource: the failover was a mistake, what was written since then
// counts for nothing, and what the old source had counts again.
func TestSurvivorIsTheOldSource(t *testing.T) {
	p, there := disaster(t)
	must(t, there.disk("vda").write(sector("a mistake"), 20<<20))
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "fenced")
	refusedAs(t, p.main.survivor(control.SurvivorRequest{Group: testVM, Yes: true}), control.ExitFailed, "site dr", "stop what uses it there")
	there.destroy()
	refusedAs(t, p.main.survivor(control.SurvivorRequest{Group: testVM}), control.ExitRefused, "would be served no more", "--yes")
	must(t, p.main.survivor(control.SurvivorRequest{Group: testVM, DryRun: true}))
	if g := p.main.group(testVM); g.State != "fenced" {
		t.Fatalf("decided without --yes: %+v", g)
	}
	must(t, p.main.survivor(control.SurvivorRequest{Group: testVM, Yes: true}))
	g := p.main.awaitState(testVM, "streaming")
	await(t, "the chosen site to be protected", func() bool { g = p.main.group(testVM); return g.Protected })
	home := p.main.host.vm(testVM)
	must(t, home.start())
	if got, err := home.disk("vda").read(8<<20, 512); err != nil || !strings.HasPrefix(string(got), "never left the site") {
		t.Errorf("%q, %v", got, err)
	}
	must(t, home.disk("vda").write(sector("goes on"), 1<<20))
	imagesEqual(t, p, home)
	bs := p.dr.branches(testVM)
	if len(bs) != 1 || !strings.HasPrefix(string(readFile(t, bs[0].Disks[0].File)[20<<20:]), "a mistake") {
		t.Fatalf("what was written at the other site is not kept: %+v", bs)
	}
	bs, err := p.dr.control.Branches(context.Background(), control.BranchesRequest{Group: testVM, Delete: bs[0].Name})
	must(t, err)
	if left, err := os.ReadDir(p.dr.path("state", "groups", testVM, "branches")); err != nil || len(bs) > 0 || len(left) > 0 {
		t.Errorf("left of a removed branch: %v, %v, %v", bs, left, err)
	}
}

// TestSplitBrain: both sites were promoted while they could not see each other. Both
// say so, nothing is overwritten, and one command decides.
func TestSplitBrain(t *testing.T) {
	p, there := disaster(t)
	must(t, there.disk("vda").write(sector("of site dr"), 20<<20))
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, "fenced")
	there.destroy()
	// What a survivor command leaves whose other site was lost right after it.
	g := p.main.d.find(testVM)
	next := g.snapshot().chosen(p.dr.d.find(testVM).snapshot().Lineage)
	next.Discards, next.TakeBack = nil, false
	must(t, g.choose(next))
	home := p.main.host.vm(testVM)
	must(t, home.start())
	must(t, home.disk("vda").write(sector("of site main"), 30<<20))
	for _, s := range []*site{p.main, p.dr} {
		await(t, "site "+s.name+" to notice", func() bool {
			alarms := strings.Join(s.group(testVM).Alarms, " ")
			return strings.Contains(alarms, "split brain") && strings.Contains(alarms, "kagami survivor vm1")
		})
		refusedAs(t, s.reprotect(control.ReprotectRequest{Group: testVM}), control.ExitFailed, "split brain")
	}
	refusedAs(t, p.dr.survivor(control.SurvivorRequest{Group: testVM, Yes: true}), control.ExitFailed, "site main", "stop what uses it there")
	home.destroy()
	must(t, p.dr.survivor(control.SurvivorRequest{Group: testVM, Yes: true}))
	p.dr.awaitState(testVM, "streaming")
	await(t, "the survivor to be protected", func() bool { return p.dr.group(testVM).Protected })
	must(t, there.start())
	must(t, there.disk("vda").write(sector("and on"), 0))
	imagesEqual(t, p, there)
	if got, err := there.disk("vda").read(30<<20, 512); err != nil || strings.HasPrefix(string(got), "of site main") {
		t.Errorf("merged: %q, %v", got, err)
	}
	if bs := p.main.branches(testVM); len(bs) != 1 || !strings.HasPrefix(string(readFile(t, bs[0].Disks[0].File)[30<<20:]), "of site main") {
		t.Errorf("branches: %+v", bs)
	}
	for _, s := range []*site{p.main, p.dr} {
		if alarms := s.group(testVM).Alarms; len(alarms) > 0 {
			t.Errorf("site %s still has alarms: %q", s.name, alarms)
		}
	}
	p.main.host.vm(testVM).setState(qmp.StateShutoff)
}
