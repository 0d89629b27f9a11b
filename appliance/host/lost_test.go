package host

import (
	"os"
	"testing"
)

// overwrite changes a file behind kagami's back.
func overwrite(t *testing.T, name string, p []byte, off int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	must(t, err)
	_, err = f.WriteAt(p, off)
	must(t, err)
	must(t, f.Close())
}

// TestActiveLogMissing: the active log is gone, not damaged, after a crash.
// What may differ is then not known, and everything is compared.
func TestActiveLogMissing(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	must(t, vm.disk("vda").write([]byte("before"), 4096))
	sameAtReplica(t, p, vm)
	p.main.kill()
	// The local image has less than the replica, as after a power loss.
	overwrite(t, p.main.path("state", "images", testVM, "vda.raw"), make([]byte, 512), 4096)
	must(t, os.Remove(p.main.path("state", "groups", testVM, "active.log")))
	p.start(p.main, p.dr)
	if g := p.main.awaitState(testVM, "streaming"); !g.Protected || len(g.Alarms) > 0 {
		t.Errorf("after the compare: %+v", g)
	}
	sameAtReplica(t, p, vm)
}

// TestChangedReplicaIsRemembered: one image of a replica was changed, or
// replaced, while the daemon was down, and the next start fails because of the
// other image. The start after that still knows.
func TestChangedReplicaIsRemembered(t *testing.T) {
	for name, change := range map[string]func(t *testing.T, image string){
		"changed": func(t *testing.T, image string) { overwrite(t, image, []byte("somebody else's"), 8192) },
		"replaced": func(t *testing.T, image string) {
			must(t, os.Remove(image))
			must(t, os.WriteFile(image, make([]byte, diskSize), 0o600))
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda", "vdb")
			p.main.mustProtect(testVM)
			sameAtReplica(t, p, vm)
			p.dr.stop()
			other := p.dr.path("state", "images", testVM, "vdb.raw")
			change(t, p.dr.path("state", "images", testVM, "vda.raw"))
			must(t, os.Rename(other, other+".away"))
			p.start(p.dr, p.main)
			p.dr.awaitState(testVM, "failed")
			p.dr.stop()
			must(t, os.Rename(other+".away", other))
			p.start(p.dr, p.main)
			p.main.awaitState(testVM, "streaming")
			sameAtReplica(t, p, vm)
		})
	}
}
