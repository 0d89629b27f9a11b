package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"math/big"
	"net"
	"net/url"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

func filesIn(dir string) Files {
	return Files{filepath.Join(dir, CAName), filepath.Join(dir, CertName), filepath.Join(dir, KeyName)}
}

// sites makes a CA at "a" and a bundle for "b", which may touch groups.
func sites(t *testing.T, o Options, groups ...string) (a, b Files) {
	t.Helper()
	dir := t.TempDir()
	if err := Init(filepath.Join(dir, "a"), "a", Options{Now: o.Now}); err != nil {
		t.Fatal(err)
	}
	if err := Issue(filepath.Join(dir, "a"), "b", groups, filepath.Join(dir, "b"), o); err != nil {
		t.Fatal(err)
	}
	return filesIn(filepath.Join(dir, "a")), filesIn(filepath.Join(dir, "b"))
}

func server(t *testing.T, f Files) *tls.Config {
	t.Helper()
	c, err := ServerConfig(f)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func client(t *testing.T, f Files, site string) *tls.Config {
	t.Helper()
	c, err := ClientConfig(f, site)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// shake connects the two and exchanges a byte each way. It returns the server's
// view of the client and both ends' errors.
func shake(t *testing.T, ccfg, scfg *tls.Config) (id Identity, cerr, serr error) {
	t.Helper()
	cc, sc := net.Pipe()
	deadline := time.Now().Add(10 * time.Second)
	_, _ = cc.SetDeadline(deadline), sc.SetDeadline(deadline)
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer sc.Close()
		s := tls.Server(sc, scfg)
		if serr = s.Handshake(); serr != nil {
			return
		}
		if id, serr = Peer(s.ConnectionState()); serr != nil {
			return
		}
		_, serr = s.Write([]byte("x"))
	}()
	c := tls.Client(cc, ccfg)
	cerr = c.Handshake()
	if cerr == nil {
		_, cerr = io.ReadFull(c, make([]byte, 1))
	}
	_ = cc.Close()
	<-done
	return id, cerr, serr
}

func TestBothWays(t *testing.T) {
	a, b := sites(t, Options{}, "web", "db", "web")
	id, cerr, serr := shake(t, client(t, b, "a"), server(t, a))
	if cerr != nil || serr != nil {
		t.Fatal(cerr, serr)
	}
	if want := (Identity{Site: "b", Groups: []string{"db", "web"}}); !reflect.DeepEqual(id, want) {
		t.Errorf("the server sees %+v", id)
	}
	id, cerr, serr = shake(t, client(t, a, "b"), server(t, b))
	if cerr != nil || serr != nil || id.Site != "a" || !id.AllGroups {
		t.Errorf("the other way: %+v, %v, %v", id, cerr, serr)
	}
}

func TestOnlyTLS13AndNoTickets(t *testing.T) {
	a, b := sites(t, Options{}, AllGroups)
	c := client(t, b, "a")
	c.MinVersion, c.MaxVersion = tls.VersionTLS12, tls.VersionTLS12
	_, cerr, serr := shake(t, c, server(t, a))
	if cerr == nil || serr == nil || !errors.Is(Explain(cerr), ErrNoTLS) {
		t.Errorf("TLS 1.2: %v, %v", Explain(cerr), serr)
	}
	for _, cfg := range []*tls.Config{client(t, b, "a"), server(t, a)} {
		if cfg.MinVersion != tls.VersionTLS13 || !cfg.SessionTicketsDisabled || cfg.ClientSessionCache != nil {
			t.Errorf("%+v", cfg)
		}
	}
}

func TestRefusals(t *testing.T) {
	a, b := sites(t, Options{}, AllGroups)
	stranger, _ := sites(t, Options{}, AllGroups)
	past := time.Now().Add(-SiteLifetime - 48*time.Hour)
	oldA, oldB := sites(t, Options{Now: past}, AllGroups)
	futureA, futureB := sites(t, Options{Now: time.Now().Add(48 * time.Hour)}, AllGroups)
	deadA, deadB := sites(t, Options{Now: time.Now().Add(-CALifetime - 48*time.Hour)}, AllGroups)

	cases := []struct {
		name         string
		c, s         *tls.Config
		client       error // why the client refuses
		clientReason string
	}{
		{name: "another site answers", c: client(t, b, "c"), s: server(t, a), client: ErrWrongSite, clientReason: "wanted c, reached a"},
		{name: "client of another CA", c: client(t, stranger, "a"), s: server(t, a), client: ErrUnknownCA, clientReason: `site a has one of "kagami CA made at a"`},
		{name: "client expired", c: client(t, oldB, "a"), s: server(t, oldA), client: ErrExpired, clientReason: "site a's ended on "},
		{name: "not yet valid", c: client(t, futureB, "a"), s: server(t, futureA), client: ErrExpired, clientReason: "check the clocks"},
		{name: "CA expired", c: client(t, deadB, "a"), s: server(t, deadA), client: ErrExpired},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, cerr, serr := shake(t, c.c, c.s)
			if !errors.Is(cerr, c.client) || !strings.Contains(cerr.Error(), c.clientReason) {
				t.Errorf("client: %v", cerr)
			}
			if serr == nil || !errors.Is(Explain(serr), ErrRefused) {
				t.Errorf("server: %v", Explain(serr))
			}
		})
	}
	// The server refuses too when the client does not.
	for name, c := range map[string]struct {
		ca   Files
		want error
		cfg  *tls.Config
	}{
		"unknown CA": {a, ErrUnknownCA, client(t, stranger, "a")},
		"expired":    {oldA, ErrExpired, client(t, oldB, "a")},
		"future":     {futureA, ErrExpired, client(t, futureB, "a")},
	} {
		c.cfg.VerifyConnection = nil
		_, cerr, serr := shake(t, c.cfg, server(t, c.ca))
		if !errors.Is(serr, c.want) || !errors.Is(Explain(cerr), ErrRefused) {
			t.Errorf("%s: client %v, server %v", name, Explain(cerr), serr)
		}
	}
	// No certificate at all.
	c := client(t, b, "a")
	c.Certificates = nil
	if _, cerr, serr := shake(t, c, server(t, a)); serr == nil || !errors.Is(Explain(cerr), ErrRefused) {
		t.Errorf("no certificate: %v, %v", Explain(cerr), serr)
	}
	// Another protocol over good TLS.
	c = client(t, b, "a")
	c.NextProtos = []string{"h2"}
	if _, cerr, serr := shake(t, c, server(t, a)); serr == nil || !errors.Is(Explain(cerr), ErrNoTLS) {
		t.Errorf("h2: %v, %v", Explain(cerr), serr)
	}
	c.NextProtos, c.VerifyConnection = nil, nil
	if _, _, serr := shake(t, c, server(t, a)); !errors.Is(serr, ErrNoTLS) {
		t.Errorf("no ALPN: %v", serr)
	}
}

func TestNotTLSAtAll(t *testing.T) {
	_, b := sites(t, Options{}, AllGroups)
	cc, sc := net.Pipe()
	go func() {
		_, _ = sc.Write([]byte("HTTP/1.1 400 Bad Request\r\n\r\n"))
		_ = sc.Close()
	}()
	go func() { _, _ = io.Copy(io.Discard, sc) }()
	defer cc.Close()
	if err := Explain(tls.Client(cc, client(t, b, "a")).Handshake()); !errors.Is(err, ErrNoTLS) {
		t.Error(err)
	}
	if err := Explain(io.EOF); !errors.Is(err, io.EOF) || errors.Is(err, ErrRefused) {
		t.Error(err)
	}
	if Explain(nil) != nil {
		t.Error("nil")
	}
}

// forge signs a certificate with the CA in dir, but with a template of the test.
func forge(t *testing.T, dir string, edit func(*x509.Certificate)) tls.Certificate {
	t.Helper()
	ca, err := loadCA(dir)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "x"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{nameURI("site", "b"), nameURI("group", "g")},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
	}
	edit(tmpl)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, ca.cert, key.Public(), ca.key)
	if err != nil {
		t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

func TestForgedIdentities(t *testing.T) {
	a, b := sites(t, Options{}, AllGroups)
	uris := func(us ...string) func(*x509.Certificate) {
		return func(c *x509.Certificate) {
			c.URIs = nil
			for _, s := range us {
				u, err := url.Parse(s)
				if err != nil {
					t.Fatal(err)
				}
				c.URIs = append(c.URIs, u)
			}
		}
	}
	cases := map[string]func(*x509.Certificate){
		"no names":         uris(),
		"no site":          uris("kagami://group/g"),
		"two sites":        uris("kagami://site/b", "kagami://site/c"),
		"bad site":         uris("kagami://site/B"),
		"empty site":       uris("kagami://site/"),
		"site with folder": uris("kagami://site/b/c"),
		"site with port":   uris("kagami://site:1/b"),
		"site with user":   uris("kagami://u@site/b"),
		"site with query":  uris("kagami://site/b?x"),
		"site with hash":   uris("kagami://site/b#x"),
		"escaped site":     uris("kagami://site/%62%2f"),
		"site star":        uris("kagami://site/*"),
		"other scheme":     uris("kagami://site/b", "spiffe://x/y"),
		"other kind":       uris("kagami://site/b", "kagami://disk/y"),
		"bad group":        uris("kagami://site/b", "kagami://group/a*"),
		"DNS name":         func(c *x509.Certificate) { c.DNSNames = []string{"b"} },
		"IP address":       func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(1, 2, 3, 4)} },
		"e-mail":           func(c *x509.Certificate) { c.EmailAddresses = []string{"b@b"} },
		"server only":      func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} },
		"for code":         func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} },
	}
	for name, edit := range cases {
		t.Run(name, func(t *testing.T) {
			c := client(t, b, "a")
			c.Certificates = []tls.Certificate{forge(t, filepath.Dir(a.CA), edit)}
			if _, _, serr := shake(t, c, server(t, a)); !errors.Is(serr, ErrBadIdentity) {
				t.Errorf("accepted or wrong error: %v", serr)
			}
		})
	}
	// The forger's control: unedited, the certificate is good.
	c := client(t, b, "a")
	c.Certificates = []tls.Certificate{forge(t, filepath.Dir(a.CA), func(*x509.Certificate) {})}
	if id, _, serr := shake(t, c, server(t, a)); serr != nil || !id.May("g") || id.May("h") {
		t.Errorf("%+v, %v", id, serr)
	}
	// A site's certificate cannot sign another one, nor can the CA's own be used.
	c = client(t, b, "a")
	c.Certificates = []tls.Certificate{signedBySite(t, b)}
	if _, _, serr := shake(t, c, server(t, a)); !errors.Is(serr, ErrUnknownCA) {
		t.Errorf("signed by a site: %v", serr)
	}
}

// signedBySite makes a certificate signed with a site's own key, and sends the
// site's certificate along as if it were an intermediate.
func signedBySite(t *testing.T, f Files) tls.Certificate {
	t.Helper()
	m, err := load(f)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, URIs: []*url.URL{nameURI("site", "a"), nameURI("group", AllGroups)},
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, m.pair.Leaf, key.Public(), m.pair.PrivateKey)
	if err != nil {
		t.Fatal(err)
	}
	return tls.Certificate{Certificate: [][]byte{der, m.pair.Certificate[0]}, PrivateKey: key}
}

func TestMay(t *testing.T) {
	all := NewIdentity("b", []string{"web", AllGroups})
	some := NewIdentity("b", []string{"web"})
	none := Identity{Site: "b"}
	if !all.May("x") || !some.May("web") || some.May("we") || some.May(AllGroups) || none.May("web") || none.May("") {
		t.Error(all, some, none)
	}
}
