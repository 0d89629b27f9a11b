package replica

import (
	"net"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

type anyPeer struct{}

func (anyPeer) Site() string    { return "a" }
func (anyPeer) May(string) bool { return true }

// TestNoConnectionJoinsAnEndedLink: a link that has ended, but is not yet
// forgotten, takes no data connection: nobody would close it.
func TestNoConnectionJoinsAnEndedLink(t *testing.T) {
	s := NewServer(ServerOptions{Site: "b"})
	a, b := net.Pipe()
	defer a.Close()
	defer b.Close()
	hello := wire.Hello{MinVersion: 1, MaxVersion: 1, Site: "a", Link: epoch.UUID{5}}
	l, err := s.admit(a, anyPeer{}, hello)
	if err != nil {
		t.Fatal(err)
	}
	l.close()
	hello.Data = true
	if _, err := s.admit(b, anyPeer{}, hello); err == nil || err.Code != wire.CodeStale {
		t.Errorf("a data connection joins an ended link: %v", err)
	}
}
