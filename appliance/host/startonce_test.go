package host

import (
	"crypto/tls"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kagami/appliance/pki"
	"kagami/images"
)

// slowStart is a file system that holds up the opening of one file, and counts.
type slowStart struct {
	images.FS
	name     string // its path ends so
	opened   atomic.Int64
	reached  chan struct{} // closed by the first opening
	released chan struct{}
}

func (s *slowStart) Open(name string) (images.File, error) {
	if strings.HasSuffix(name, s.name) {
		if s.opened.Add(1) == 1 {
			close(s.reached)
		}
		<-s.released
	}
	return s.FS.Open(name)
}

// TestReplicaStartsOnce: a source that comes while its replica is being opened
// waits, and does not have it opened again.
func TestReplicaStartsOnce(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.dr.stop()
	d := p.dr.daemon(p.main)
	slow := &slowStart{FS: d.fs, name: testVM + "/applied", reached: make(chan struct{}), released: make(chan struct{})}
	d.fs = slow
	p.dr.run(d)
	<-slow.reached
	conf, err := pki.ClientConfig(pki.Files{CA: p.main.path("pki", pki.CAName), Cert: p.main.path("pki", pki.CertName), Key: p.main.path("pki", pki.KeyName)}, "dr")
	must(t, err)
	nc, err := net.Dial("tcp", p.dr.address) // into the queue of the listening socket
	must(t, err)
	defer nc.Close()
	must(t, nc.SetDeadline(time.Now().Add(500*time.Millisecond)))
	if err := tls.Client(nc, conf).Handshake(); err == nil {
		t.Error("peers are served while groups are being opened")
	}
	close(slow.released)
	p.main.awaitState(testVM, "streaming")
	sameAtReplica(t, p, vm)
	if n := slow.opened.Load(); n != 1 {
		t.Errorf("the replica was opened %d times", n)
	}
}
