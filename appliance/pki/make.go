package pki

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"math/big"
	"os"
	"path/filepath"
	"time"
)

// Lifetimes of certificates. They are long because nothing renews them
// by itself and an expired one stops replication.
const (
	CALifetime   = 20 * 365 * 24 * time.Hour
	SiteLifetime = 10 * 365 * 24 * time.Hour
	// backdate lets a certificate be used at once by a site whose clock is behind.
	backdate = time.Hour
)

// Options of making certificates. The zero value is fit for use.
type Options struct {
	Force    bool          // replace files that exist
	Lifetime time.Duration // of a site's certificate; 0: SiteLifetime
	Now      time.Time     // zero: time.Now
}

func (o Options) now() time.Time {
	if o.Now.IsZero() {
		return time.Now()
	}
	return o.Now
}

func (o Options) lifetime() time.Duration {
	if o.Lifetime == 0 {
		return SiteLifetime
	}
	return o.Lifetime
}

// Init makes a CA and this site's certificate, allowed all groups, in dir:
// ca.crt, ca.key, site.crt, site.key. Without Force it changes nothing when
// one of them exists; with Force every certificate of the old CA becomes
// worthless.
func Init(dir, site string, o Options) error {
	id := NewIdentity(site, []string{AllGroups})
	if _, err := id.uris(); err != nil {
		return fmt.Errorf("make site certificate: %w", err)
	}
	if !o.Force {
		if err := absent(dir, CAKeyName, CAName, KeyName, CertName); err != nil {
			return fmt.Errorf("make CA: %w", err)
		}
	}
	ca, err := newCA(site, o)
	if err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	cert, key, err := ca.issue(id, o)
	if err != nil {
		return fmt.Errorf("make site certificate: %w", err)
	}
	caKey, err := keyPEM(ca.key)
	if err != nil {
		return fmt.Errorf("make CA: %w", err)
	}
	return writeFiles(dir, o.Force, []file{
		{CAKeyName, caKey, 0o600}, {CAName, certPEM(ca.cert.Raw), 0o644},
		{KeyName, key, 0o600}, {CertName, cert, 0o644},
	})
}

// Issue makes a certificate of the CA in dir for a site that may touch the
// named groups (* for all), and writes ca.crt, site.crt and site.key to out: a
// tar archive when its name ends in .tar, else a folder.
func Issue(dir, site string, groups []string, out string, o Options) error {
	id := NewIdentity(site, groups)
	if _, err := id.uris(); err != nil {
		return fmt.Errorf("issue certificate: %w", err)
	}
	ca, err := loadCA(dir)
	if err != nil {
		return err
	}
	if o.now().Add(o.lifetime()).After(ca.cert.NotAfter) {
		o.Lifetime = ca.cert.NotAfter.Sub(o.now())
	}
	if o.lifetime() <= 0 {
		return fmt.Errorf("issue certificate: %w: the CA expired on %s", ErrExpired, day(ca.cert.NotAfter))
	}
	cert, key, err := ca.issue(id, o)
	if err != nil {
		return fmt.Errorf("issue certificate: %w", err)
	}
	files := []file{
		{CAName, certPEM(ca.cert.Raw), 0o644}, {CertName, cert, 0o644}, {KeyName, key, 0o600},
	}
	if filepath.Ext(out) == ".tar" {
		return writeTar(out, o.Force, o.now(), files)
	}
	return writeFiles(out, o.Force, files)
}

// authority is a CA that can sign.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCA(site string, o Options) (authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return authority{}, err
	}
	serial, err := newSerial()
	if err != nil {
		return authority{}, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "kagami CA made at " + site},
		NotBefore: o.now().Add(-backdate), NotAfter: o.now().Add(CALifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return authority{}, err
	}
	cert, err := x509.ParseCertificate(der)
	return authority{cert, key}, err
}

// issue makes a certificate and its key, as PEM.
func (a authority) issue(id Identity, o Options) (cert, key []byte, err error) {
	uris, err := id.uris()
	if err != nil {
		return nil, nil, err
	}
	priv, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, nil, err
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "kagami site " + id.Site},
		NotBefore: o.now().Add(-backdate), NotAfter: o.now().Add(o.lifetime()),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		URIs:        uris,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, a.cert, priv.Public(), a.key)
	if err != nil {
		return nil, nil, err
	}
	key, err = keyPEM(priv)
	return certPEM(der), key, err
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

func loadCA(dir string) (authority, error) {
	cert, err := readCert(filepath.Join(dir, CAName))
	if err != nil {
		return authority{}, fmt.Errorf("read CA: %w", err)
	}
	if !cert.IsCA {
		return authority{}, fmt.Errorf("read CA: %s is not a CA's certificate", filepath.Join(dir, CAName))
	}
	path := filepath.Join(dir, CAKeyName)
	if err := checkKeyMode(path); errors.Is(err, fs.ErrNotExist) {
		return authority{}, fmt.Errorf("read CA's key: %w; certificates are issued where `kagami pki init` was run", err)
	} else if err != nil {
		return authority{}, fmt.Errorf("read CA's key: %w", err)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return authority{}, fmt.Errorf("read CA's key: %w", err)
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return authority{}, fmt.Errorf("read CA's key: no PEM in %s", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return authority{}, fmt.Errorf("read CA's key %s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok || !ec.PublicKey.Equal(cert.PublicKey) {
		return authority{}, fmt.Errorf("read CA: %s is not the key of %s", path, filepath.Join(dir, CAName))
	}
	return authority{cert, ec}, nil
}

func certPEM(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func keyPEM(key *ecdsa.PrivateKey) ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

func day(t time.Time) string { return t.UTC().Format("2006-01-02 15:04 UTC") }
