package host

import (
	"errors"
	"os"
	"strings"
	"testing"

	"kagami/appliance/control"
	"kagami/images"
)

// TestDeclaredDiskUnusable: a declared disk that cannot be used fails its group
// alone, with an alarm that says what to do; the daemon starts, other groups
// are served, and nothing is left half-made. When it is put right, the next
// start makes the group.
func TestDeclaredDiskUnusable(t *testing.T) {
	for name, c := range map[string]struct {
		prepare func(t *testing.T, image string) func()
		size    string
		words   []string
	}{
		"in use": {func(t *testing.T, image string) func() {
			must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600))
			img, err := images.OpenImage(images.OS{}, image, images.Want{})
			must(t, err)
			return func() { must(t, img.Close()) }
		}, "1MiB", []string{"in use by another process", "stop what uses the file"}},
		"other size": {func(t *testing.T, image string) func() {
			must(t, os.WriteFile(image, make([]byte, 2<<20), 0o600))
			return func() { must(t, os.Truncate(image, 1<<20)) }
		}, "1MiB", []string{"wrong size: 2097152 bytes, want 1048576", "put the size right in the config file"}},
		"missing, without a size": {func(t *testing.T, image string) func() {
			return func() { must(t, os.WriteFile(image, make([]byte, 1<<20), 0o600)) }
		}, "0B", []string{"no such file", "put the file back"}},
		"no folder": {func(t *testing.T, image string) func() {
			dir := strings.TrimSuffix(image, "/b.raw")
			must(t, os.Remove(dir))
			return func() { must(t, os.MkdirAll(dir, 0o755)) }
		}, "1MiB", []string{"no such file", "put the file back"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t)
			must(t, os.MkdirAll(p.main.path("more"), 0o755))
			bad := p.main.path("more", "b.raw")
			p.main.extra = p.scratch() + "  - name: twin\n    peer: dr\n    disks: [{name: a, image: " + p.main.path("disks", "a.raw") + ", size: 1MiB}, {name: b, image: " +
				bad + ", size: " + c.size + "}]\n"
			repair := c.prepare(t, bad)
			p.up()
			p.main.awaitState("scratch", "streaming")
			g := p.main.group("twin")
			alarms := strings.Join(g.Alarms, " ")
			if g.State != "failed" || g.Protected {
				t.Errorf("%+v", g)
			}
			for _, w := range append(c.words, bad, "restart the daemon") {
				if !strings.Contains(alarms, w) {
					t.Errorf("no %q in %q", w, alarms)
				}
			}
			for _, path := range []string{p.main.path("disks", "a.raw"), p.main.path("state", "groups", "twin")} {
				if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
					t.Errorf("%s was made: %v", path, err)
				}
			}
			refusedAs(t, p.main.unprotect(control.UnprotectRequest{VM: "twin"}), control.ExitRefused, c.words...)
			repair()
			p.main.stop()
			p.start(p.main, p.dr)
			if g := p.main.awaitState("twin", "streaming"); len(g.Alarms) > 0 {
				t.Errorf("%+v", g)
			}
		})
	}
}

// TestDeclaredDiskChanged: the file of a group that is there is in use, gone or
// of another size, or its section says something else. That group alone stops.
func TestDeclaredDiskChanged(t *testing.T) {
	p := newPair(t)
	twin := func(size string) string {
		return p.scratch() + "  - name: twin\n    peer: dr\n    disks: [{name: a, image: " + p.main.path("disks", "a.raw") + ", size: " + size + "}]\n"
	}
	p.main.extra = twin("1MiB")
	p.up()
	p.main.awaitState("scratch", "streaming")
	p.main.awaitState("twin", "streaming")
	image := p.main.path("disks", "a.raw")
	restart := func(words ...string) {
		t.Helper()
		p.main.stop()
		p.start(p.main, p.dr)
		p.main.awaitState("scratch", "streaming")
		if len(words) == 0 {
			p.main.awaitState("twin", "streaming")
			return
		}
		alarms := strings.Join(p.main.awaitState("twin", "failed").Alarms, " ")
		for _, w := range append(words, "restart the daemon") {
			if !strings.Contains(alarms, w) {
				t.Errorf("no %q in %q", w, alarms)
			}
		}
	}
	p.main.extra = twin("2MiB")
	restart("disk a of group twin was made with 1048576 bytes; the config file says 2097152")
	p.main.extra = twin("1MiB")
	restart()

	p.main.stop()
	must(t, os.Rename(image, image+".away"))
	p.start(p.main, p.dr)
	restart("no such file", "put the file back")
	must(t, os.Rename(image+".away", image))
	restart()

	p.main.stop()
	img, err := images.OpenImage(images.OS{}, image, images.Want{})
	must(t, err)
	p.start(p.main, p.dr)
	restart("in use by another process", "stop what uses the file")
	must(t, img.Close())
	restart()
}

// TestDeclaredWhereTheReplicaIs: the replica goes on; the section has no effect.
func TestDeclaredWhereTheReplicaIs(t *testing.T) {
	p := newPair(t)
	p.main.extra = p.scratch()
	p.up()
	p.main.awaitState("scratch", "streaming")
	p.dr.extra = "groups:\n  - name: scratch\n    peer: main\n    disks: [{name: data, image: " + p.dr.path("disks", "data.raw") + ", size: 1MiB}]\n"
	p.dr.stop()
	p.start(p.dr, p.main)
	p.main.awaitState("scratch", "streaming")
	g := p.dr.group("scratch")
	if g.Role != "replica" || len(g.Alarms) != 1 || !strings.Contains(g.Alarms[0], "the config file declares disks for it") {
		t.Errorf("%+v", g)
	}
}
