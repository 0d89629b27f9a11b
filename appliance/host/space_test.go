package host

import (
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
)

// TestSpaceIsPromisedOnce: what the groups that are there may still write is
// not free for new ones, at the source and at the replica.
func TestSpaceIsPromisedOnce(t *testing.T) {
	p := newPair(t).up()
	p.main.addVMWith("first", map[string][]byte{"vda": make([]byte, 8*diskSize)})
	p.main.mustProtect("first")
	for _, s := range []*site{p.main, p.dr} { // zeros, as a guest that trims leaves them
		f, err := os.OpenFile(s.path("state", "images", "first", "vda.raw"), os.O_RDWR, 0)
		must(t, err)
		must(t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 8*diskSize))
		must(t, f.Close())
	}
	p.main.addVM("second", "vda")
	req := control.ProtectRequest{VM: "second", To: "dr"}
	here, there := p.main.d.find("first"), p.dr.d.find("first")
	for _, c := range []struct {
		s      *site
		g      *group
		own    int64 // what the new group needs itself
		exit   int
		wanted string
	}{
		{p.main, here, diskSize, control.ExitFailed, "no space for the images of second"},
		{p.dr, there, diskSize + 32<<20, control.ExitRefused, "no space for images and spool at site dr"},
	} {
		promised, err := c.g.promised()
		must(t, err)
		if promised < 7*diskSize {
			t.Fatalf("site %s: the first group is said to need no more than %d bytes", c.s.name, promised)
		}
		c.s.fs.set(func() { c.s.fs.free[c.s.path("state")] = c.own + promised - 1 })
		refusedAs(t, p.main.protect(t.Context(), req), c.exit, c.wanted, fmt.Sprintf("may still need %d", promised))
		c.s.fs.set(func() { c.s.fs.free[c.s.path("state")] = c.own + promised + 32<<20 }) // the spool grows meanwhile
	}
	must(t, p.main.protect(t.Context(), req))
}

// TestFencedPromisesNothing: nobody writes to the images of a superseded source.
func TestFencedPromisesNothing(t *testing.T) {
	dir := t.TempDir()
	d := newDaemon(&config.Config{StateDir: dir}, "test", images.OS{}, nil)
	must(t, os.WriteFile(dir+"/vda.raw", nil, 0o600))
	must(t, os.Truncate(dir+"/vda.raw", diskSize))
	f := &groupFile{Name: testVM, Role: RoleSource, Disks: []diskFile{{Name: "vda", Image: dir + "/vda.raw", Size: diskSize}}}
	for fenced, want := range map[string]int64{"": diskSize, "superseded": 0} {
		f.Fenced = fenced
		if n, err := newGroup(d, f).promised(); n != want || err != nil {
			t.Errorf("fenced %q: %d bytes, %v", fenced, n, err)
		}
	}
}

// TestGroupsAreCounted: a peer cannot make groups without end, and all peers
// together neither.
func TestGroupsAreCounted(t *testing.T) {
	p := newPair(t).up()
	crowd := func(n int, peer string) {
		for range n {
			f := &groupFile{Name: epoch.NewUUID().String(), ID: epoch.NewUUID(), Role: RoleReplica, Peer: peer}
			p.dr.d.add(newGroup(p.dr.d, f))
		}
	}
	m := wire.Manifest{Name: "more", ID: epoch.NewUUID(), Lineage: epoch.NewUUID(), Session: 1,
		Disks: []wire.Disk{{Name: "vda", ID: epoch.NewUUID(), Size: diskSize, BlockSize: 512}}}
	refusedWith := func(site, words string) {
		t.Helper()
		if _, err := p.dr.d.newReplica(m, site); err == nil || err.Error() != words {
			t.Errorf("one more group of %s: %v", site, err)
		}
		if _, err := os.Stat(p.dr.path("state", "groups", "more")); err == nil {
			t.Error("it has left a folder")
		}
	}
	crowd(maxPeerGroups, "main")
	refusedWith("main", "site dr has 256 groups of site main, no more are possible")
	p.main.addVM(testVM, "vda")
	refusedAs(t, p.main.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), control.ExitRefused, "256 groups of site main")
	crowd(maxGroups-maxPeerGroups, "elsewhere")
	refusedWith("third", "site dr has 1024 groups, no more are possible")
	p.dr.addVM(testVM, "vda")
	refusedAs(t, p.dr.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "main"}), control.ExitRefused, "site dr has 1024 groups", "kagami unprotect")
	for _, g := range p.dr.d.snapshot() {
		p.dr.d.forget(g)
	}
}
