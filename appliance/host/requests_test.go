package host

import (
	"context"
	"errors"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// slowPeer is site main whose request is held up between the look at the group
// and what is done with it.
type slowPeer struct{ meanwhile func() }

func (s *slowPeer) Site() string { return "main" }

func (s *slowPeer) May(string) bool {
	if f := s.meanwhile; f != nil {
		s.meanwhile = nil
		f()
	}
	return true
}

// mustNotBeFound checks a refusal for a group that is none any more.
func mustNotBeFound(t *testing.T, err error) {
	t.Helper()
	var werr *wire.Error
	if !errors.As(err, &werr) || werr.Code != wire.CodeNotFound {
		t.Errorf("not refused as unknown: %v", err)
	}
}

// TestRequestMeetsFailover: a request of the source is held up, and the group is
// promoted meanwhile. It neither takes the images away nor changes what is booted.
func TestRequestMeetsFailover(t *testing.T) {
	for name, request := range map[string]func(*pair, *slowPeer) error{
		"remove": func(p *pair, by *slowPeer) error {
			return (&acceptor{d: p.dr.d}).remove(by, wire.RemoveRequest{Group: p.dr.d.find(testVM).snapshot().ID, Purge: true})
		},
		"domain": func(p *pair, by *slowPeer) error {
			return (&acceptor{d: p.dr.d}).domain(by, wire.DomainRequest{Group: p.dr.d.find(testVM).snapshot().ID, XML: "<domain/>"})
		},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t).up()
			vm := p.main.addVM(testVM, "vda")
			p.main.mustProtect(testVM)
			sameAtReplica(t, p, vm)
			p.main.kill()
			vm.destroy()
			definition := p.dr.path("state", "groups", testVM, "domain.xml")
			var was string
			mustNotBeFound(t, request(p, &slowPeer{func() {
				_, err := p.dr.failover(control.FailoverRequest{VM: testVM, NoStart: true, Force: true})
				must(t, err)
				was = string(readFile(t, definition))
			}}))
			if _, err := os.Stat(p.dr.path("state", "images", testVM, "vda.raw")); err != nil {
				t.Errorf("the promoted group's image is gone: %v", err)
			}
			if string(readFile(t, definition)) != was {
				t.Error("the promoted group's definition was replaced")
			}
		})
	}
}

// TestDefinitionMeetsForget: the group of a late definition was forgotten, and
// its name is another group's now.
func TestDefinitionMeetsForget(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.stop()
	vm.destroy()
	p.dr.awaitState(testVM, "waiting")
	g := p.dr.d.find(testVM)
	p.dr.d.forget(g)
	mustNotBeFound(t, (&acceptor{d: p.dr.d}).storeDomain(g, &slowPeer{}, "<domain/>"))
}

// TestDefinitionsOneByOne: of two definitions that come at once, one is stored as a whole.
func TestDefinitionsOneByOne(t *testing.T) {
	p := newPair(t).up()
	p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	p.main.stop() // it ships definitions of its own
	p.dr.awaitState(testVM, "waiting")
	id := p.dr.d.find(testVM).snapshot().ID
	var storing, together atomic.Int32
	p.dr.fs.set(func() {
		p.dr.fs.fail = func(op, path string) error {
			switch {
			case !strings.Contains(path, testVM+"/domain.xml"):
			case op == "create":
				if storing.Add(1) > 1 {
					together.Add(1)
				}
				time.Sleep(50 * time.Millisecond)
			case op == "rename":
				storing.Add(-1)
			}
			return nil
		}
	})
	done := make(chan error)
	texts := []string{"<domain>" + strings.Repeat("a", 5000) + "</domain>", "<domain>b</domain>"}
	for _, xml := range texts {
		go func() { done <- (&acceptor{d: p.dr.d}).domain(&slowPeer{}, wire.DomainRequest{Group: id, XML: xml}) }()
	}
	for range texts {
		must(t, <-done)
	}
	if got := string(readFile(t, p.dr.path("state", "groups", testVM, "domain.xml"))); got != texts[0] && got != texts[1] {
		t.Errorf("stored: %.60q", got)
	}
	if together.Load() > 0 {
		t.Error("two definitions were being stored at once")
	}
}

// TestMoreRequestsThanALinkTakes: groups that have something to ask at the same
// time wait for their turn; a resync that is told "busy" would begin anew.
func TestMoreRequestsThanALinkTakes(t *testing.T) {
	p := newPair(t).up()
	sess, err := p.main.d.links["dr"].Session(t.Context())
	must(t, err)
	m := wire.Manifest{Name: "more", ID: epoch.NewUUID(), Lineage: epoch.NewUUID(), Session: 1,
		Disks: []wire.Disk{{Name: "vda", ID: epoch.NewUUID(), Size: diskSize, BlockSize: 512}}}
	ask := func(patience time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), patience)
		defer cancel()
		return sess.Call(ctx, wire.MethodCheck, wire.CheckRequest{Manifest: m}, &wire.CheckResponse{})
	}
	p.dr.d.making.Lock() // a check of a new group waits
	if err := ask(100 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one that is given up: %v", err) // the peer goes on with it
	}
	const requests = 3 * wire.MaxCalls
	answers := make(chan error, requests)
	for range requests {
		go func() { answers <- ask(commandLimit) }()
	}
	time.Sleep(300 * time.Millisecond)
	if err := ask(100 * time.Millisecond); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("one more, while all wait: %v", err)
	}
	p.dr.d.making.Unlock()
	for range requests {
		if err := <-answers; err != nil {
			t.Error(err)
		}
	}
}

// TestDefinitionsTakeTurns: one definition at a time is shipped again, so that
// a peer that takes long over it does not hold up what groups wait for.
func TestDefinitionsTakeTurns(t *testing.T) {
	d := newDaemon(&config.Config{}, "test", nil, nil)
	began, end := make(chan struct{}), make(chan struct{})
	first := make(chan error)
	go func() {
		first <- d.oneReship(t.Context(), func(context.Context) error {
			close(began)
			<-end
			return nil
		})
	}()
	<-began
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	err := d.oneReship(ctx, func(context.Context) error {
		t.Error("two at a time")
		return nil
	})
	if !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("the second, whose daemon stops: %v", err)
	}
	close(end)
	must(t, <-first)
	must(t, d.oneReship(t.Context(), func(context.Context) error { return nil }))
}
