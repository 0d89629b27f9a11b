package pki

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"time"
)

// protocol is the ALPN name of the connections between sites.
const protocol = "kagami"

// ServerConfig is TLS for the end that accepts: TLS 1.3, the peer's
// certificate required and checked. Whom it belongs to is for Peer to say.
func ServerConfig(f Files) (*tls.Config, error) {
	return newConfig(f, func(Identity) error { return nil }, x509.ExtKeyUsageClientAuth)
}

// ClientConfig is TLS for the end that connects to peerSite. The handshake
// fails when another site answers.
func ClientConfig(f Files, peerSite string) (*tls.Config, error) {
	return newConfig(f, func(id Identity) error {
		if id.Site != peerSite {
			return fmt.Errorf("%w: wanted %s, reached %s", ErrWrongSite, peerSite, id.Site)
		}
		return nil
	}, x509.ExtKeyUsageServerAuth)
}

func newConfig(f Files, check func(Identity) error, use x509.ExtKeyUsage) (*tls.Config, error) {
	m, err := load(f)
	if err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:   tls.VersionTLS13,
		Certificates: []tls.Certificate{m.pair},
		NextProtos:   []string{protocol},
		RootCAs:      m.roots,
		ClientCAs:    m.roots,
		// Names of sites are no host names, so the standard check is switched
		// off and verify does all of it, at both ends alike, in VerifyConnection,
		// which runs in every handshake. There is no resumption to skip it.
		InsecureSkipVerify:     true,
		ClientAuth:             tls.RequireAnyClientCert,
		SessionTicketsDisabled: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			id, err := verify(state, m.roots, use, time.Now())
			if err != nil {
				return err
			}
			return check(id)
		},
	}, nil
}

// verify checks the peer's certificate and says whose it is.
func verify(state tls.ConnectionState, roots *x509.CertPool, use x509.ExtKeyUsage, now time.Time) (Identity, error) {
	if state.NegotiatedProtocol != protocol {
		return Identity{}, fmt.Errorf("%w: no agreement on %q", ErrNoTLS, protocol)
	}
	id, err := Peer(state)
	if err != nil {
		return id, err
	}
	leaf := state.PeerCertificates[0]
	_, err = leaf.Verify(x509.VerifyOptions{
		Roots: roots, Intermediates: x509.NewCertPool(), CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{use},
	})
	if err != nil {
		return Identity{}, reason(leaf, id, now, err)
	}
	return id, nil
}

// reason puts a refusal in exact words.
func reason(leaf *x509.Certificate, id Identity, now time.Time, err error) error {
	var unknown x509.UnknownAuthorityError
	var invalid x509.CertificateInvalidError
	switch {
	case errors.As(err, &unknown):
		return fmt.Errorf("%w: site %s has one of %q", ErrUnknownCA, id.Site, leaf.Issuer.CommonName)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.Before(leaf.NotBefore):
		return fmt.Errorf("%w: site %s's begins on %s; check the clocks", ErrExpired, id.Site, day(leaf.NotBefore))
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired && now.After(leaf.NotAfter):
		return fmt.Errorf("%w: site %s's ended on %s", ErrExpired, id.Site, day(leaf.NotAfter))
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("%w: the CA's, which signed site %s's", ErrExpired, id.Site)
	}
	return fmt.Errorf("%w: site %s: %w", ErrBadIdentity, id.Site, err)
}

// Explain adds to an error of a handshake, or of the first read after it, what
// it means for an operator. Other errors, and nil, come back as they are.
func Explain(err error) error {
	var header tls.RecordHeaderError
	if errors.As(err, &header) {
		return fmt.Errorf("%w: %w", ErrNoTLS, err)
	}
	switch remoteAlert(err) {
	case "bad certificate", "unsupported certificate", "revoked certificate", "expired certificate",
		"unknown certificate", "unknown certificate authority", "certificate required":
		return fmt.Errorf("%w (its log says why): %w", ErrRefused, err)
	case "protocol version not supported", "no application protocol":
		return fmt.Errorf("%w: %w", ErrNoTLS, err)
	}
	return err
}

// remoteAlert is the text of the alert the peer sent, or "". The standard
// library has no exported type for it, only this shape of *net.OpError.
func remoteAlert(err error) string {
	var op *net.OpError
	if !errors.As(err, &op) || op.Op != "remote error" {
		return ""
	}
	return strings.TrimPrefix(op.Err.Error(), "tls: ")
}

// material is what a site's files hold.
type material struct {
	pair  tls.Certificate
	roots *x509.CertPool
	id    Identity
}

// load reads a site's files and checks that they belong together. It does not
// look at the time: see the package's documentation.
func load(f Files) (material, error) {
	ca, err := readCert(f.CA)
	if err != nil {
		return material{}, fmt.Errorf("read CA: %w", err)
	}
	if !ca.IsCA {
		return material{}, fmt.Errorf("read CA: %s is not a CA's certificate", f.CA)
	}
	if err := checkKeyMode(f.Key); err != nil {
		return material{}, fmt.Errorf("read key: %w", err)
	}
	pair, err := tls.LoadX509KeyPair(f.Cert, f.Key)
	if err != nil {
		return material{}, fmt.Errorf("read certificate %s and key %s: %w", f.Cert, f.Key, err)
	}
	id, err := identityOf(pair.Leaf)
	if err != nil {
		return material{}, fmt.Errorf("read certificate %s: %w", f.Cert, err)
	}
	if err := pair.Leaf.CheckSignatureFrom(ca); err != nil {
		return material{}, fmt.Errorf("read certificate %s: %w: %w", f.Cert, ErrUnknownCA, err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca)
	return material{pair, roots, id}, nil
}

// Own is the identity in a site's own files, and when its certificate ends.
// Files that do not belong together are an error; an expired certificate is not.
func Own(f Files) (Identity, time.Time, error) {
	m, err := load(f)
	if err != nil {
		return Identity{}, time.Time{}, err
	}
	return m.id, m.pair.Leaf.NotAfter, nil
}

// checkKeyMode refuses a private key that others can read.
func checkKeyMode(path string) error {
	st, err := os.Stat(path)
	if err != nil {
		return err
	}
	if st.Mode().Perm()&0o077 != 0 {
		return fmt.Errorf("%w: %s has mode %04o; run: chmod 600 %s", ErrKeyMode, path, st.Mode().Perm(), path)
	}
	return nil
}

// maxPEM bounds a certificate file, in bytes.
const maxPEM = 1 << 20

// readCert reads a file that holds exactly one certificate.
func readCert(path string) (*x509.Certificate, error) {
	st, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	if st.Size() > maxPEM {
		return nil, fmt.Errorf("%s is too large for a certificate", path)
	}
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, rest := pem.Decode(data)
	if block == nil || block.Type != "CERTIFICATE" {
		return nil, fmt.Errorf("%s holds no certificate in PEM form", path)
	}
	if next, _ := pem.Decode(rest); next != nil {
		return nil, fmt.Errorf("%s holds more than one certificate", path)
	}
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return cert, nil
}
