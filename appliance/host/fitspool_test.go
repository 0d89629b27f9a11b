package host

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/ext4j/activelog"
	"kagami/images"
)

const smallSpool = `limits:
  queue_bytes: 1MiB
  inflight_bytes: 1MiB
  spool_bytes: %s
  segment_bytes: 1MiB
  active_log_bytes: 4MiB
  epoch_bytes: 256KiB
  apply_bytes: 1MiB
  epoch_age: 50ms
  apply_age: 50ms
  heartbeat: 100ms
  link_timeout: 2s
`

// TestActiveLogFitsTheSpool: the replica's spool is smaller than what this
// site's active log may name. After a crash here all that the log names
// differs, and the resync fits all the same.
func TestActiveLogFitsTheSpool(t *testing.T) {
	p := newPair(t)
	p.dr.extra = fmt.Sprintf(smallSpool, "9MiB")
	p.up()
	const size = 14 << 20
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, size)})
	p.main.mustProtect(testVM)
	for off := int64(0); off < size; off += 1 << 20 {
		must(t, vm.disk("vda").write(randomBytes(uint64(off), 4096), off))
	}
	if g := p.main.group(testVM); len(g.Alarms) > 0 || !strings.Contains(p.main.log.String(), "the active log is bounded to") {
		t.Errorf("nothing is said of it, or too much: %v", g.Alarms)
	}
	p.main.kill()

	dir := p.main.path("state", "groups", testVM)
	f, err := loadGroupFile(images.OS{}, dir)
	must(t, err)
	image := p.main.path("state", "images", testVM, "vda.raw")
	b := readFile(t, image)
	log, regions, err := activelog.Open(images.OS{}, dir+"/active.log", activelog.Options{Group: f.ID, RegionBytes: regionBytes, MaxRegions: 16})
	must(t, err)
	must(t, log.Close())
	if n := int64(len(regions)); n == 0 || n*regionBytes > resyncRoom(9<<20) {
		t.Errorf("the log names %d regions, %d bytes of them fit the replica's spool", n, resyncRoom(9<<20))
	}
	for _, r := range regions {
		copy(b[r.Index*regionBytes:(r.Index+1)*regionBytes], randomBytes(99+r.Index, regionBytes))
	}
	must(t, os.WriteFile(image, b, 0o600))

	p.start(p.main, p.dr)
	if g := p.main.awaitState(testVM, "streaming"); len(g.Alarms) > 0 {
		t.Errorf("alarms: %v", g.Alarms)
	}
	sameAtReplica(t, p, vm)
}

// TestResyncTooLarge: more differs than fits the replica's spool. The resync is
// given up before the spool is full, the alarm says what to do, the replica keeps
// its old point, and with a larger spool it goes on.
func TestResyncTooLarge(t *testing.T) {
	p := newPair(t)
	p.dr.extra = fmt.Sprintf(smallSpool, "9MiB")
	p.up()
	const size = 14 << 20
	vm := p.main.addVMWith(testVM, map[string][]byte{"vda": randomBytes(1, size)})
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	p.main.kill()
	there := p.dr.path("state", "images", testVM, "vda.raw")
	old := readFile(t, there)
	must(t, os.Remove(p.main.path("state", "groups", testVM, "active.log")))
	overwrite(t, p.main.path("state", "images", testVM, "vda.raw"), randomBytes(2, size), 0)
	p.start(p.main, p.dr)
	await(t, "the alarm", func() bool {
		return strings.Contains(strings.Join(p.main.group(testVM).Alarms, "\n"), "raise spool_bytes at site dr")
	})
	if g := p.main.group(testVM); g.Protected || g.State == "streaming" {
		t.Errorf("%+v", g)
	}
	if !bytes.Equal(readFile(t, there), old) {
		t.Error("the replica's old point is gone")
	}
	p.dr.stop()
	p.dr.extra = fmt.Sprintf(smallSpool, "24MiB")
	p.start(p.dr, p.main)
	if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
		t.Errorf("%+v", g)
	}
	sameAtReplica(t, p, vm)
}

// TestResyncRate: a first sync takes no more of the machine than it may, and says when it will end.
func TestResyncRate(t *testing.T) {
	p := newPair(t)
	must(t, os.MkdirAll(p.main.path("disks"), 0o755))
	must(t, os.WriteFile(p.main.path("disks", "data.raw"), randomBytes(1, 4<<20), 0o600))
	p.main.rate = "2MiB"
	p.main.extra = "groups:\n  - name: scratch\n    peer: dr\n    disks: [{name: data, image: " + p.main.path("disks", "data.raw") + ", size: 4MiB}]\n"
	began := time.Now()
	p.up()
	var g control.Group
	await(t, "half of it", func() bool { g = p.main.group("scratch"); return g.Sync != nil && g.Sync.Done >= 2<<20 })
	if g.State != string(Syncing) || g.Protected || g.Sync.ETASeconds <= 0 || g.Sync.ETASeconds > 5 {
		t.Errorf("%s, protected %v, %+v", g.State, g.Protected, g.Sync)
	}
	p.main.awaitState("scratch", "streaming")
	if took := time.Since(began); took < 1900*time.Millisecond {
		t.Errorf("4 MiB took %v", took)
	}
}
