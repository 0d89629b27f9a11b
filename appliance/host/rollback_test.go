package host

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

func copyTree(t *testing.T, from, to string) {
	t.Helper()
	must(t, os.MkdirAll(to, 0o700))
	entries, err := os.ReadDir(from)
	must(t, err)
	for _, e := range entries {
		src, dst := filepath.Join(from, e.Name()), filepath.Join(to, e.Name())
		if e.IsDir() {
			copyTree(t, src, dst)
			continue
		}
		must(t, os.WriteFile(dst, readFile(t, src), 0o600))
	}
}

// TestOlderStatePutBack: the source's state of a group is one that was saved
// before its last starts. It does not know what those changed: the replica has
// seen their sessions, and everything is compared. So it does when it started so
// often without its replica that its own session is above those.
func TestOlderStatePutBack(t *testing.T) {
	for name, c := range map[string]struct{ starts, alone int }{"of the start before": {1, 0}, "older": {3, 0}, "older, and started alone": {1, 3}} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t).up()
			content := randomBytes(7, 32<<20)
			vm := p.main.addVMWith(testVM, map[string][]byte{"vda": content})
			p.main.mustProtect(testVM)
			must(t, vm.disk("vda").write([]byte("before"), 31<<20))
			p.main.kill()
			dir, saved := p.main.path("state", "groups", testVM), p.main.path("saved")
			copyTree(t, dir, saved)
			const at = 1 << 20
			for i := range c.starts {
				p.start(p.main, p.dr)
				p.main.awaitState(testVM, "streaming")
				must(t, vm.disk("vda").write([]byte("written later"), at+int64(i)*4096))
				p.main.kill()
			}
			seen := p.dr.group(testVM).Session
			must(t, os.RemoveAll(dir))
			copyTree(t, saved, dir)
			// And the local image lost the writes, as after a power loss.
			overwrite(t, p.main.path("state", "images", testVM, "vda.raw"), content[at:at+64<<10], at)
			if c.alone > 0 {
				p.dr.stop()
			}
			for range c.alone {
				p.start(p.main, p.dr)
				p.main.awaitState(testVM, "stalled")
				p.main.kill()
			}
			if c.alone > 0 {
				p.start(p.dr, p.main)
			}
			p.start(p.main, p.dr)
			if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 || g.Session <= seen {
				t.Errorf("after the compare: %+v", g)
			}
			if !strings.Contains(p.main.log.String(), "its state is an older one that was put back") {
				t.Error("nothing says that the state is an older one")
			}
			sameAtReplica(t, p, vm)
		})
	}
}

// TestTwoSourcesOfOneState: the state of a running source is copied, and a
// second daemon replicates from it. The first one says so, and does not take the
// replica back and forth.
func TestTwoSourcesOfOneState(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	p.dr.stop()
	// The other daemon was here, in a later session.
	file := p.dr.path("state", "groups", testVM, "group.json")
	f, err := decodeGroupFile(readFile(t, file))
	must(t, err)
	f.Session = 9
	later, err := f.encode()
	must(t, err)
	must(t, os.WriteFile(file, later, 0o600))
	p.start(p.dr, p.main)
	await(t, "an alarm", func() bool {
		g := p.main.group(testVM)
		return g.State == "stalled" && !g.Protected && len(g.Alarms) == 1 && strings.Contains(g.Alarms[0], "another daemon replicates from a copy of this group's state")
	})
	if g := p.dr.group(testVM); g.Session != 9 {
		t.Errorf("the replica: %+v", g)
	}
}

// TestAttachedNumbers: what a replica says about itself becomes positions and
// limits at the source only if it can be.
func TestAttachedNumbers(t *testing.T) {
	f := &groupFile{Lineage: epoch.UUID{1}}
	good := wire.AttachResponse{Pos: epoch.Pos{Lineage: f.Lineage, Session: 3, LSN: 1 << 62}, SpoolBytes: 1}
	must(t, checkAttached(f, good))
	must(t, checkAttached(f, wire.AttachResponse{SpoolBytes: 1 << 30})) // a new one
	for name, change := range map[string]func(*wire.AttachResponse){
		"other lineage":   func(r *wire.AttachResponse) { r.Pos.Lineage = epoch.UUID{2} },
		"last record":     func(r *wire.AttachResponse) { r.Pos.LSN = ^epoch.LSN(0) },
		"last session":    func(r *wire.AttachResponse) { r.Pos.Session = ^uint64(0) },
		"no spool":        func(r *wire.AttachResponse) { r.SpoolBytes = 0 },
		"spool of less":   func(r *wire.AttachResponse) { r.SpoolBytes = -1 << 63 },
		"first too large": func(r *wire.AttachResponse) { r.Pos.LSN = 1<<62 + 1 },
	} {
		r := good
		change(&r)
		if err := checkAttached(f, r); err == nil || !refuses(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
