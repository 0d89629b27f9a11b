package host

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"kagami/appliance/control"
	"kagami/ext4j/changemap"
	"kagami/images"
)

// TestChangesLost: a promoted group whose record of changes is gone, damaged or
// another's goes on, with all of the disk changed, and says so over restarts.
func TestChangesLost(t *testing.T) {
	for name, harm := range map[string]func(t *testing.T, path string){
		"missing": func(t *testing.T, path string) { must(t, os.Remove(path)) },
		"damaged": func(t *testing.T, path string) { must(t, os.WriteFile(path, make([]byte, 8192), 0o600)) },
		"cut":     func(t *testing.T, path string) { must(t, os.Truncate(path, 5000)) },
		"anothers": func(t *testing.T, path string) {
			other := readFile(t, strings.Replace(path, "changes-0", "changes-1", 1))
			must(t, os.WriteFile(path, other, 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda", "vdb")
			p.main.mustProtect(testVM)
			sameAtReplica(t, p, vm)
			p.main.kill()
			vm.destroy()
			p.dr.awaitState(testVM, "waiting")
			_, err := p.dr.failover(control.FailoverRequest{VM: testVM, NoStart: true})
			must(t, err)
			must(t, p.dr.d.find(testVM).src.eng.Disk(0).WriteAt([]byte("changed here"), 0, true))
			p.dr.stop()
			p.start(p.dr, p.main)
			if g := p.dr.group(testVM); len(g.Alarms) != 0 {
				t.Errorf("after a clean restart: alarms %q", g.Alarms)
			}
			p.dr.stop()
			if n, other := p.dr.changed(testVM, 0), p.dr.changed(testVM, 1); n != 1 || other != 0 {
				t.Errorf("%d and %d regions were recorded, want 1 and 0", n, other)
			}
			harm(t, p.dr.path("state", "groups", testVM, "changes-0.map"))
			for i := range 2 { // it is still known at the next start
				p.start(p.dr, p.main)
				g := p.dr.group(testVM)
				if g.State != string(Detached) || !strings.Contains(strings.Join(g.Alarms, " "), "the record of changes of disk vda was lost, all of the disk counts as changed") {
					t.Errorf("state %s, alarms %q", g.State, g.Alarms)
				}
				if i == 1 {
					must(t, p.dr.d.find(testVM).src.eng.Disk(0).WriteAt([]byte("serves"), 512, true))
				}
				p.dr.stop()
				if n, other := p.dr.changed(testVM, 0), p.dr.changed(testVM, 1); n != (diskSize-1)/regionBytes+1 || other != 0 {
					t.Errorf("%d and %d regions count as changed", n, other)
				}
			}
		})
	}
}

// changed counts the regions that a stopped site's record of a disk names.
func (s *site) changed(vm string, slot int) int {
	s.t.Helper()
	dir := s.path("state", "groups", vm)
	f, err := loadGroupFile(images.OS{}, dir)
	must(s.t, err)
	m, err := changemap.Open(images.OS{}, fmt.Sprintf("%s/changes-%d.map", dir, slot), f.origin(&f.Disks[slot]))
	must(s.t, err)
	defer m.Close()
	return m.Count()
}
