package host

import (
	"slices"
	"testing"

	"kagami/appliance/config"
	"kagami/ext4j"
	"kagami/ext4j/activelog"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
)

// brokenOff is a source, of one disk, in session 5 whose resync of the first
// region was broken off. It is attached to nothing.
func brokenOff(t *testing.T) *source {
	t.Helper()
	dir := t.TempDir()
	g := newGroup(&Daemon{cfg: &config.Config{StateDir: dir}}, &groupFile{Name: "g", Lineage: epoch.UUID{1}, Session: 5, Complete: true})
	img, err := images.CreateImage(images.OS{}, dir+"/vda.raw", 16<<20, "")
	must(t, err)
	log, _, err := activelog.Open(images.OS{}, dir+"/active.log", activelog.Options{Group: epoch.UUID{2}, RegionBytes: regionBytes, MaxRegions: 8})
	must(t, err)
	s := &source{g: g, log: log, begun: true, eng: ext4j.NewGroup(ext4j.Options{Recorder: log, Limits: ext4j.Limits{QueueBytes: 1 << 20, EpochBytes: 1 << 20}})}
	s.eng.AddDisk(0, img)
	t.Cleanup(func() {
		s.eng.Close()
		must(t, log.Close())
		must(t, img.Close())
	})
	s.eng.Begin(epoch.UUID{1}, 5, 11, true)
	s.eng.OpenGate()
	s.unfinished = &plan{begin: true, hold: true, what: "resync", hashes: true, scan: []ext4j.Range{{Slot: 0, Off: 0, Len: regionBytes}}}
	return s
}

var replicaAtTen = wire.AttachResponse{Pos: epoch.Pos{Lineage: epoch.UUID{1}, Session: 4, LSN: 10}, Complete: true, SpoolBytes: 1 << 30}

// TestResyncTakenUp: what clients write until the next session begins was queued
// for the one before, and goes with it. The resync that is taken up scans it.
func TestResyncTakenUp(t *testing.T) {
	s := brokenOff(t)
	for round := range 3 {
		p := s.plan(replicaAtTen)
		must(t, s.eng.Disk(0).WriteAt([]byte("late"), int64(5+round)*regionBytes, false))
		p = s.beginSession(p, replicaAtTen)
		if p.what != "resync" || !p.hold || s.eng.Stats().QueueRecords != 0 {
			t.Fatalf("round %d: %+v", round, p)
		}
		want := []ext4j.Range{{Slot: 0, Off: 0, Len: regionBytes}}
		for i := range round + 1 {
			want = append(want, ext4j.Range{Slot: 0, Off: int64(5+i) * regionBytes, Len: regionBytes})
		}
		if !slices.Equal(p.scan, want) {
			t.Errorf("round %d: scans %v, want %v", round, p.scan, want)
		}
		s.unfinished = &p // broken off again
	}
}

// TestFirstSyncReplacesResync: a resync was broken off, and the replica then has
// to be rebuilt. When the rebuild's link is lost, it goes on; what was sent of
// it is not taken for the resync's end.
func TestFirstSyncReplacesResync(t *testing.T) {
	s := brokenOff(t)
	torn := replicaAtTen
	torn.Damaged, torn.Torn = "the images are not consistent", true
	p := s.plan(torn)
	if p.what != "first sync" || !p.whole {
		t.Fatalf("%+v", p)
	}
	s.g.file.Compare = p.why
	s.beginSession(p, torn)
	if p := s.plan(replicaAtTen); p.what != "first sync" || !p.hashes {
		t.Errorf("after the link was lost: %+v", p)
	}
}
