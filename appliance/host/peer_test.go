package host

import (
	"context"
	"crypto/tls"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/appliance/pki"
	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// mustBeRefused protects a VM and expects that to fail and leave no trace here.
func mustBeRefused(t *testing.T, s *site, exit int, words ...string) {
	t.Helper()
	here := s.traces()
	began := time.Now()
	refusedAs(t, s.protect(t.Context(), control.ProtectRequest{VM: testVM, To: "dr"}), exit, words...)
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("it took %v to find out", took)
	}
	s.untouched(here)
}

// TestPeerUnreachable: nobody listens there; a host that does not answer at
// all; something that is no kagami.
func TestPeerUnreachable(t *testing.T) {
	t.Run("nobody listens", func(t *testing.T) {
		p := newPair(t)
		p.start(p.main, p.dr)
		p.main.addVM(testVM, "vda")
		mustBeRefused(t, p.main, control.ExitFailed, "site dr is not connected", "connection refused", "daemon runs at site dr")
	})
	t.Run("no answer", func(t *testing.T) {
		p := newPair(t)
		l, err := net.Listen("tcp", p.dr.address) // accepts in the kernel, and is silent
		must(t, err)
		t.Cleanup(func() { l.Close() })
		p.start(p.main, p.dr)
		p.main.addVM(testVM, "vda")
		mustBeRefused(t, p.main, control.ExitFailed, "site dr is not connected")
	})
	t.Run("not kagami", func(t *testing.T) {
		p := newPair(t)
		serveFake(t, p.dr.address, func(c net.Conn) {
			_, _ = c.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
		})
		p.start(p.main, p.dr)
		p.main.addVM(testVM, "vda")
		mustBeRefused(t, p.main, control.ExitFailed, "site dr is not connected", "does not speak this protocol", "address of site dr")
	})
}

// serveFake accepts connections until the test ends.
func serveFake(t *testing.T, address string, serve func(net.Conn)) {
	t.Helper()
	l, err := net.Listen("tcp", address)
	must(t, err)
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(5 * time.Second))
				serve(c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		wg.Wait()
	})
}

// TestWrongCertificates: the peer's is of another CA, of another site, expired;
// ours is of another CA than the peer wants.
func TestWrongCertificates(t *testing.T) {
	change := func(t *testing.T, p *pair, s *site, site string, o pki.Options, otherCA bool) {
		t.Helper()
		ca := p.dr.path("pki")
		if otherCA {
			ca = p.dir + "/other"
			must(t, pki.Init(ca, "elsewhere", pki.Options{}))
		}
		out := p.dir + "/new"
		must(t, pki.Issue(ca, site, []string{pki.AllGroups}, out, o))
		for _, f := range []string{pki.CAName, pki.CertName, pki.KeyName} {
			must(t, os.Rename(out+"/"+f, s.path("pki", f)))
		}
	}
	for _, c := range []struct {
		name   string
		change func(*testing.T, *pair)
		words  []string
	}{
		{"of another CA", func(t *testing.T, p *pair) { change(t, p, p.dr, "dr", pki.Options{}, true) },
			[]string{"certificate is not signed by this site's CA", "kagami pki issue dr"}},
		{"of another site", func(t *testing.T, p *pair) {
			change(t, p, p.dr, "venus", pki.Options{}, false)
			p.dr.name = "venus" // a daemon takes its own site's only
		},
			[]string{"wanted dr, reached venus", "address of site dr"}},
		{"expired", func(t *testing.T, p *pair) {
			change(t, p, p.dr, "dr", pki.Options{Now: time.Now().Add(-48 * time.Hour), Lifetime: time.Hour}, false)
		}, []string{"certificate is outside its time", "kagami pki issue dr"}},
		{"ours expired", func(t *testing.T, p *pair) {
			change(t, p, p.main, "main", pki.Options{Now: time.Now().Add(-48 * time.Hour), Lifetime: time.Hour}, false)
		}, []string{"peer refused this site's certificate", "kagami pki issue"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t)
			c.change(t, p)
			p.start(p.dr, p.main)
			p.dr.name = "dr"
			p.start(p.main, p.dr)
			p.main.addVM(testVM, "vda")
			there := p.dr.traces()
			mustBeRefused(t, p.main, control.ExitFailed, append(c.words, "site dr is not connected")...)
			p.dr.untouched(there)
		})
	}
}

// fakeWelcome answers hellos as another release would.
func fakeWelcome(t *testing.T, p *pair, answer func(wire.Hello) wire.Welcome) {
	t.Helper()
	conf, err := pki.ServerConfig(pki.Files{CA: p.dr.path("pki", pki.CAName), Cert: p.dr.path("pki", pki.CertName), Key: p.dr.path("pki", pki.KeyName)})
	must(t, err)
	serveFake(t, p.dr.address, func(c net.Conn) {
		c = tls.Server(c, conf)
		_, body, _, err := wire.ReadFrame(c, nil, wire.MaxHello, 0)
		var h wire.Hello
		if err != nil || wire.DecodeJSON(body, &h) != nil {
			return
		}
		b, err := wire.AppendJSON(nil, wire.TypeWelcome, answer(h), 0)
		if err == nil {
			_, _ = c.Write(b)
		}
		_, _, _, _ = wire.ReadFrame(c, nil, wire.MaxHello, 0) // until it is closed
	})
}

// TestWrongVersion: the peer is of a release that speaks another protocol.
func TestWrongVersion(t *testing.T) {
	for _, c := range []struct {
		name   string
		answer func(wire.Hello) wire.Welcome
		words  []string
	}{
		{"it chooses version 99", func(wire.Hello) wire.Welcome { return wire.Welcome{Version: 99, Site: "dr", Release: "99.0"} },
			[]string{"peer dr (99.0) chose protocol version 99", "upgrade the older"}},
		{"it requires a feature", func(wire.Hello) wire.Welcome {
			return wire.Welcome{Version: 1, Required: 1 << 40, Site: "dr", Release: "99.0"}
		},
			[]string{"peer dr (99.0) requires features 0x10000000000 that this release does not have", "upgrade this site"}},
		{"it refuses ours", func(h wire.Hello) wire.Welcome {
			return wire.Welcome{Site: "dr", Release: "99.0", Error: wire.Errorf(wire.CodeVersion, "peer %s (%s) speaks protocol %d to %d, this release 98 to 99: upgrade the older site", h.Site, h.Release, h.MinVersion, h.MaxVersion)}
		}, []string{"speaks protocol 1 to 1, this release 98 to 99", "upgrade the older"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := newPair(t)
			fakeWelcome(t, p, c.answer)
			p.start(p.main, p.dr)
			p.main.addVM(testVM, "vda")
			mustBeRefused(t, p.main, control.ExitFailed, append(c.words, "site dr is not connected")...)
		})
	}
}

// TestHelloOfAnotherRelease: we are the site that a newer or older peer dials.
func TestHelloOfAnotherRelease(t *testing.T) {
	p := newPair(t)
	p.start(p.dr, p.main)
	conf, err := pki.ClientConfig(pki.Files{CA: p.main.path("pki", pki.CAName), Cert: p.main.path("pki", pki.CertName), Key: p.main.path("pki", pki.KeyName)}, "dr")
	must(t, err)
	for _, c := range []struct {
		name  string
		hello wire.Hello
		words string
	}{
		{"too new", wire.Hello{MinVersion: 98, MaxVersion: 99}, "speaks protocol 98 to 99, this release 1 to 1"},
		{"unknown feature required", wire.Hello{MinVersion: 1, MaxVersion: 1, Required: 1 << 40}, "requires features 0x10000000000"},
		{"of another site", wire.Hello{MinVersion: 1, MaxVersion: 1, Site: "pluto"}, `the certificate is of site "main", the hello says "pluto"`},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			defer cancel()
			d := tls.Dialer{Config: conf}
			nc, err := d.DialContext(ctx, "tcp", p.dr.address)
			must(t, err)
			defer nc.Close()
			if c.hello.Site == "" {
				c.hello.Site = "main"
			}
			c.hello.Link, c.hello.Release = epoch.NewUUID(), "99.0"
			b, err := wire.AppendJSON(nil, wire.TypeHello, c.hello, 0)
			must(t, err)
			_, err = nc.Write(b)
			must(t, err)
			_, body, _, err := wire.ReadFrame(nc, nil, wire.MaxHello, 0)
			must(t, err)
			var w wire.Welcome
			must(t, wire.DecodeJSON(body, &w))
			if w.Error == nil || !strings.Contains(w.Error.Message, c.words) {
				t.Errorf("welcome: %+v, want %q", w, c.words)
			}
			await(t, "the refusal in the log", func() bool { return strings.Contains(p.dr.log.String(), c.words[:20]) })
		})
	}
}

// TestPeerGoneMeanwhile: the peer's daemon dies while the disk is copied. The
// copy waits, says so, and goes on when it is back. The guest notices nothing.
func TestPeerGoneMeanwhile(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	var once sync.Once
	p.main.host.setFault(func(_ context.Context, step string) error {
		if step == "attach vda copy 50" {
			once.Do(p.dr.kill)
		}
		return nil
	})
	warned, done := make(chan string, 20), make(chan error, 1)
	go func() {
		done <- p.main.control.Protect(context.Background(), control.ProtectRequest{VM: testVM, To: "dr"}, func(ev control.Event) {
			if ev.Step == "warning" {
				warned <- ev.Message
			}
		})
	}()
	select {
	case w := <-warned:
		t.Log(w)
		if !strings.Contains(w, "site dr is not connected, the copy waits") {
			t.Errorf("warned of %q", w)
		}
	case err := <-done: // the rest of the copy fitted the queue
		must(t, err)
		t.Fatal("protected without the peer")
	}
	must(t, vm.disk("vda").write([]byte("meanwhile"), 0))
	p.start(p.dr, p.main)
	must(t, <-done)
	if g := p.main.group(testVM); !g.Protected {
		t.Errorf("%+v", g)
	}
	sameAtReplica(t, p, vm)
}
