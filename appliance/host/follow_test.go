package host

import (
	"os"
	"strings"
	"testing"

	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/spool"
	"kagami/replica/wire"
)

// swapReplica puts another replica of the same group into the place of the one
// at a stopped site: it says that it is as far, and holds something else.
func swapReplica(t *testing.T, s *site, vm string) {
	t.Helper()
	dir := s.path("state", "groups", vm)
	f, err := loadGroupFile(images.OS{}, dir)
	must(t, err)
	old, other := spool.Owner{Group: f.ID, Replica: f.Replica}, spool.Owner{Group: f.ID, Replica: epoch.NewUUID()}
	for _, name := range []string{dir + "/applied", dir + "/applying"} {
		m, err := spool.OpenMark(images.OS{}, name, old)
		must(t, err)
		was := m.Load()
		must(t, m.Close())
		must(t, os.Remove(name))
		m, err = spool.OpenMark(images.OS{}, name, other)
		must(t, err)
		must(t, m.Store(was))
		must(t, m.Close())
	}
	must(t, os.RemoveAll(dir+"/spool")) // everything in it is applied
	f.Replica = other.Replica
	must(t, f.save(images.OS{}, dir))
	image := f.Disks[0].Image
	st, err := os.Stat(image)
	must(t, err)
	file, err := os.OpenFile(image, os.O_RDWR, 0)
	must(t, err)
	_, err = file.WriteAt([]byte("of another replica"), 300_000)
	must(t, err)
	must(t, file.Close())
	must(t, os.Chtimes(image, st.ModTime(), st.ModTime())) // nothing but the UUID tells
}

// TestReplicaReplaced: another replica stands where the source's was. Whatever
// position it names, everything is compared: under a source that runs, and
// under one that starts again after a clean stop.
func TestReplicaReplaced(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	first := p.main.d.find(testVM).snapshot().Replica
	if there := p.dr.d.find(testVM).snapshot().Replica; first.IsZero() || first != there || first == p.dr.d.siteID {
		t.Fatalf("the source follows replica %s, the replica is %s", first, there)
	}
	sameAtReplica(t, p, vm)
	for _, restart := range []bool{false, true} {
		if restart {
			p.main.stop()
		}
		await(t, "everything to be applied", func() bool {
			st := p.dr.d.find(testVM).rep.Status()
			return st.Applied == st.Durable
		})
		p.dr.stop()
		swapReplica(t, p.dr, testVM)
		p.start(p.dr, p.main)
		if restart {
			p.start(p.main, p.dr)
		}
		await(t, "the other replica to be followed", func() bool {
			f := p.main.d.find(testVM).snapshot()
			return f.Replica == p.dr.d.find(testVM).snapshot().Replica && f.Compare == ""
		})
		p.main.awaitState(testVM, string(Streaming))
		sameAtReplica(t, p, vm)
		if !strings.Contains(p.main.log.String(), "the replica was replaced: this source followed "+first.String()) {
			t.Error("nothing says that the replica was replaced")
		}
		first = p.main.d.find(testVM).snapshot().Replica
	}
}

// TestReplacedReplicaIsWrittenDown: that everything has to be compared outlives
// a source that is killed before it was.
func TestReplacedReplicaIsWrittenDown(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	src := p.main.d.find(testVM).src
	p.dr.stop()
	await(t, "the link to be lost", func() bool { return p.main.group(testVM).State == string(Stalled) })
	must(t, src.follows(activelog.Follower{Lineage: src.g.snapshot().Lineage, Replica: epoch.UUID{5}})) // as the attach of another replica does first
	p.main.kill()
	f, err := loadGroupFile(images.OS{}, p.main.path("state", "groups", testVM))
	must(t, err)
	if f.Replica != (epoch.UUID{5}) || !strings.Contains(f.Compare, "the replica was replaced") {
		t.Errorf("written down: replica %s, compare %q", f.Replica, f.Compare)
	}
	p.start(p.dr, p.main)
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, string(Streaming))
	sameAtReplica(t, p, vm)
	if err := src.follows(activelog.Follower{}); err == nil {
		t.Error("a replica without a UUID is followed")
	}
}

// TestFloorOfAnother: a floor counts only for the replica and lineage it is of.
func TestFloorOfAnother(t *testing.T) {
	me := activelog.Follower{Lineage: epoch.UUID{1}, Replica: epoch.UUID{2}}
	floor := activelog.Floor{Session: 3, LSN: 4}
	for _, c := range []struct {
		floor activelog.Floor
		of    activelog.Follower
		want  bool
	}{{activelog.Floor{}, activelog.Follower{}, false}, {floor, me, false}, {floor, activelog.Follower{}, true},
		{floor, activelog.Follower{Lineage: me.Lineage, Replica: epoch.UUID{9}}, true}, {floor, activelog.Follower{Lineage: epoch.UUID{9}, Replica: me.Replica}, true}} {
		s := &source{floor: c.floor, follower: c.of}
		if got := s.otherFloor(wire.AttachResponse{Replica: me.Replica, Pos: epoch.Pos{Lineage: me.Lineage}}); got != c.want {
			t.Errorf("%+v of %+v: %v", c.floor, c.of, got)
		}
	}
}

// TestFirstSyncEndedUnheard: a source that is killed between the replica's
// acknowledgement of the first sync's end and its own note of it keeps the replica's
// point: what differs arrives as one epoch.
func TestFirstSyncEndedUnheard(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	p.main.kill()
	dir := p.main.path("state", "groups", testVM)
	f, err := loadGroupFile(images.OS{}, dir)
	must(t, err)
	f.Complete = false
	must(t, f.save(images.OS{}, dir))
	p.start(p.main, p.dr)
	p.main.awaitState(testVM, string(Streaming))
	if f := p.main.d.find(testVM).snapshot(); !f.Complete || f.Compare != "" {
		t.Errorf("complete %v, to be compared: %q", f.Complete, f.Compare)
	}
	if log := p.main.log.String(); !strings.Contains(log, "the replica knows of the end of the first sync") {
		t.Error("nothing says that a resync took the place of the first sync")
	}
	sameAtReplica(t, p, vm)
}
