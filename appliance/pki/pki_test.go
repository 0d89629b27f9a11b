package pki

import (
	"archive/tar"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"io"
	"io/fs"
	"math/big"
	"net"
	"net/url"
	"os"
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

func TestInit(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	if err := Init(dir, "a", Options{}); err != nil {
		t.Fatal(err)
	}
	for name, mode := range map[string]fs.FileMode{CAName: 0o644, CertName: 0o644, CAKeyName: 0o600, KeyName: 0o600} {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil || st.Mode().Perm() != mode {
			t.Errorf("%s: %v, %v", name, st, err)
		}
	}
	if names, err := os.ReadDir(dir); err != nil || len(names) != 4 {
		t.Errorf("left behind: %v, %v", names, err)
	}
	before := readAll(t, dir)
	if err := Init(dir, "a", Options{}); !errors.Is(err, fs.ErrExist) || !strings.Contains(err.Error(), "--force") {
		t.Errorf("over existing files: %v", err)
	}
	if !reflect.DeepEqual(before, readAll(t, dir)) {
		t.Error("a refused init changed something")
	}
	if err := Init(dir, "a", Options{Force: true}); err != nil {
		t.Fatal(err)
	}
	if reflect.DeepEqual(before, readAll(t, dir)) {
		t.Error("--force changed nothing")
	}
	if _, _, err := Own(filesIn(dir)); err != nil {
		t.Error(err)
	}
	if err := Init(filepath.Join(t.TempDir(), "x"), "Bad Name", Options{}); err == nil {
		t.Error("a bad site name is accepted")
	}
}

func readAll(t *testing.T, dir string) map[string]string {
	t.Helper()
	out := map[string]string{}
	names, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range names {
		data, err := os.ReadFile(filepath.Join(dir, n.Name()))
		if err != nil {
			t.Fatal(err)
		}
		out[n.Name()] = string(data)
	}
	return out
}

func TestIssue(t *testing.T) {
	dir := t.TempDir()
	if err := Init(dir, "a", Options{}); err != nil {
		t.Fatal(err)
	}
	out := filepath.Join(t.TempDir(), "b.tar")
	if err := Issue(dir, "b", []string{"web"}, out, Options{}); err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(out); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("bundle: %v, %v", st, err)
	}
	bundle := unpack(t, out)
	if id, end, err := Own(filesIn(bundle)); err != nil || id.Site != "b" || !id.May("web") || time.Until(end) < SiteLifetime-time.Hour {
		t.Errorf("%+v, %v, %v", id, end, err)
	}
	if err := Issue(dir, "b", []string{"web"}, out, Options{}); !errors.Is(err, fs.ErrExist) {
		t.Errorf("over an existing bundle: %v", err)
	}
	if err := Issue(dir, "b", []string{"web"}, out, Options{Force: true}); err != nil {
		t.Errorf("with force: %v", err)
	}
	folder := filepath.Join(t.TempDir(), "bundle")
	if err := Issue(dir, "c", []string{AllGroups}, folder, Options{Lifetime: time.Hour}); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(filepath.Join(folder, CAKeyName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the CA's key is in the bundle: %v", err)
	}
	if _, end, err := Own(filesIn(folder)); err != nil || time.Until(end) > time.Hour {
		t.Errorf("lifetime: %v, %v", end, err)
	}
	// Never longer than the CA.
	long := filepath.Join(t.TempDir(), "long")
	if err := Issue(dir, "c", []string{AllGroups}, long, Options{Lifetime: 2 * CALifetime}); err != nil {
		t.Fatal(err)
	}
	if ca, err := readCert(filepath.Join(dir, CAName)); err != nil {
		t.Error(err)
	} else if _, end, _ := Own(filesIn(long)); end.After(ca.NotAfter) {
		t.Errorf("ends %v, its CA %v", end, ca.NotAfter)
	}
}

func unpack(t *testing.T, path string) string {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	dir := t.TempDir()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return dir
		}
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, h.Name), data, fs.FileMode(h.Mode)); err != nil {
			t.Fatal(err)
		}
	}
}

func TestIssueRefusals(t *testing.T) {
	dir := t.TempDir()
	out := filepath.Join(t.TempDir(), "out")
	if err := Issue(dir, "b", []string{AllGroups}, out, Options{}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a CA: %v", err)
	}
	if err := Init(dir, "a", Options{}); err != nil {
		t.Fatal(err)
	}
	many := make([]string, maxGroups+1)
	for i := range many {
		many[i] = "g" + strings.Repeat("x", i%60)
	}
	for want, err := range map[string]error{
		"would be allowed no group":        Issue(dir, "b", nil, out, Options{}),
		`group name "A/b"`:                 Issue(dir, "b", []string{"A/b"}, out, Options{}),
		`site name "B"`:                    Issue(dir, "B", []string{AllGroups}, out, Options{}),
		"at most 1000":                     Issue(dir, "b", many, out, Options{}),
		"the CA expired":                   Issue(dir, "b", []string{AllGroups}, out, Options{Now: time.Now().Add(2 * CALifetime)}),
		"no such file or directory":        Issue(dir, "b", []string{AllGroups}, "/nonexistent/b.tar", Options{}),
		"certificates are issued where ":   issueWithoutKey(t, dir, out),
		"is not the key of ":               issueWithOtherKey(t, out),
		"private key can be read by other": issueWithOpenKey(t, out),
	} {
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("want %q, got %v", want, err)
		}
	}
	if _, err := os.Stat(out); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a refused issue left %s: %v", out, err)
	}
}

func issueWithoutKey(t *testing.T, dir, out string) error {
	t.Helper()
	b := filepath.Join(t.TempDir(), "b")
	if err := Issue(dir, "b", []string{AllGroups}, b, Options{}); err != nil {
		t.Fatal(err)
	}
	return Issue(b, "c", []string{AllGroups}, out, Options{})
}

func issueWithOtherKey(t *testing.T, out string) error {
	t.Helper()
	one, two := t.TempDir(), t.TempDir()
	if err := errors.Join(Init(one, "a", Options{}), Init(two, "a", Options{})); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(two, CAKeyName), filepath.Join(one, CAKeyName)); err != nil {
		t.Fatal(err)
	}
	return Issue(one, "b", []string{AllGroups}, out, Options{})
}

func issueWithOpenKey(t *testing.T, out string) error {
	t.Helper()
	dir := t.TempDir()
	if err := Init(dir, "a", Options{}); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(filepath.Join(dir, CAKeyName), 0o640); err != nil {
		t.Fatal(err)
	}
	return Issue(dir, "b", []string{AllGroups}, out, Options{})
}

func TestOwnRefusals(t *testing.T) {
	a, b := sites(t, Options{}, AllGroups)
	other, _ := sites(t, Options{}, AllGroups)
	junk := filepath.Join(t.TempDir(), "junk")
	if err := os.WriteFile(junk, []byte("junk"), 0o600); err != nil {
		t.Fatal(err)
	}
	two := filepath.Join(t.TempDir(), "two")
	ca, err := os.ReadFile(a.CA)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(two, append(ca, ca...), 0o600); err != nil {
		t.Fatal(err)
	}
	big := filepath.Join(t.TempDir(), "big")
	if err := os.WriteFile(big, make([]byte, maxPEM+1), 0o600); err != nil {
		t.Fatal(err)
	}
	open := filepath.Join(t.TempDir(), "open")
	key, err := os.ReadFile(b.Key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(open, key, 0o644); err != nil {
		t.Fatal(err)
	}
	caKey := filepath.Join(filepath.Dir(a.CA), CAKeyName)
	cases := []struct {
		f    Files
		is   error
		want string
	}{
		{Files{"/nonexistent", b.Cert, b.Key}, fs.ErrNotExist, "read CA: "},
		{Files{b.CA, "/nonexistent", b.Key}, fs.ErrNotExist, "read certificate /nonexistent"},
		{Files{b.CA, b.Cert, "/nonexistent"}, fs.ErrNotExist, "read key: "},
		{Files{junk, b.Cert, b.Key}, nil, "holds no certificate in PEM form"},
		{Files{two, b.Cert, b.Key}, nil, "holds more than one certificate"},
		{Files{big, b.Cert, b.Key}, nil, "is too large for a certificate"},
		{Files{b.Cert, b.Cert, b.Key}, nil, "is not a CA's certificate"},
		{Files{other.CA, b.Cert, b.Key}, ErrUnknownCA, "read certificate"},
		{Files{b.CA, b.Cert, a.Key}, nil, "private key does not match"},
		{Files{b.CA, junk, b.Key}, nil, "read certificate"},
		{Files{b.CA, b.Cert, junk}, nil, "and key"},
		{Files{b.CA, b.Cert, open}, ErrKeyMode, "chmod 600"},
		{Files{a.CA, a.CA, caKey}, ErrBadIdentity, "it names no site"},
	}
	for _, c := range cases {
		_, _, err := Own(c.f)
		if err == nil || !strings.Contains(err.Error(), c.want) || (c.is != nil && !errors.Is(err, c.is)) {
			t.Errorf("%+v: %v, want %q", c.f, err, c.want)
		}
		if _, err := ServerConfig(c.f); err == nil {
			t.Errorf("ServerConfig takes %+v", c.f)
		}
		if _, err := ClientConfig(c.f, "x"); err == nil {
			t.Errorf("ClientConfig takes %+v", c.f)
		}
	}
}

func TestExpiredCertificateStillStarts(t *testing.T) {
	a, _ := sites(t, Options{Now: time.Now().Add(-2 * CALifetime)}, AllGroups)
	if _, end, err := Own(a); err != nil || !end.Before(time.Now()) {
		t.Errorf("%v, %v", end, err)
	}
	server(t, a)
}

func TestDescribe(t *testing.T) {
	a, b := sites(t, Options{}, "web", "db")
	info, err := Describe(b.Cert)
	if err != nil || info.Site != "b" || !reflect.DeepEqual(info.Groups, []string{"db", "web"}) || len(info.Fingerprint) != 64 || info.CA {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err = Describe(a.Cert); err != nil || !reflect.DeepEqual(info.Groups, []string{"*"}) {
		t.Errorf("%+v, %v", info, err)
	}
	if info, err = Describe(a.CA); err != nil || !info.CA || info.Site != "" || info.Subject != "kagami CA made at a" {
		t.Errorf("%+v, %v", info, err)
	}
	if _, err = Describe(b.Key); err == nil {
		t.Error("a key is described")
	}
}

func TestUnwritableFolder(t *testing.T) {
	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := Init(filepath.Join(file, "pki"), "a", Options{}); err == nil {
		t.Error("made a folder in a file")
	}
}
