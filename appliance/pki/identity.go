package pki

import (
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/url"
	"slices"
	"strings"
)

// maxGroups bounds the groups of one certificate.
const maxGroups = 1000

// Peer is the identity of the other end of a connection whose handshake went
// through a Config of this package.
func Peer(state tls.ConnectionState) (Identity, error) {
	if len(state.PeerCertificates) == 0 {
		return Identity{}, fmt.Errorf("%w: the peer sent none", ErrBadIdentity)
	}
	return identityOf(state.PeerCertificates[0])
}

// identityOf reads the names of a certificate. Any name it does not know makes
// the certificate unfit: it was made for something else.
func identityOf(c *x509.Certificate) (Identity, error) {
	var id Identity
	if len(c.DNSNames)+len(c.EmailAddresses)+len(c.IPAddresses) > 0 || len(c.URIs) > maxGroups+1 {
		return id, fmt.Errorf("%w: it carries names of other kinds", ErrBadIdentity)
	}
	for _, u := range c.URIs {
		if err := id.add(u); err != nil {
			return Identity{}, err
		}
	}
	if id.Site == "" {
		return Identity{}, fmt.Errorf("%w: it names no site", ErrBadIdentity)
	}
	slices.Sort(id.Groups)
	if id.AllGroups {
		id.Groups = nil
	}
	return id, nil
}

func (id *Identity) add(u *url.URL) error {
	kind, name, ok := splitName(u)
	switch {
	case ok && kind == "site" && id.Site == "" && siteRE.MatchString(name):
		id.Site = name
	case ok && kind == "group" && name == AllGroups:
		id.AllGroups = true
	case ok && kind == "group" && groupRE.MatchString(name):
		id.Groups = append(id.Groups, name)
	default:
		return fmt.Errorf("%w: it carries the name %q", ErrBadIdentity, u)
	}
	return nil
}

// splitName takes kagami://KIND/NAME apart.
func splitName(u *url.URL) (kind, name string, ok bool) {
	name, ok = strings.CutPrefix(u.Path, "/")
	plain := url.URL{Scheme: "kagami", Host: u.Host, Path: u.Path}
	return u.Host, name, ok && *u == plain
}

func nameURI(kind, name string) *url.URL {
	return &url.URL{Scheme: "kagami", Host: kind, Path: "/" + name}
}

// uris makes the names of a certificate. Errors wrap ErrName.
func (id Identity) uris() ([]*url.URL, error) {
	if !siteRE.MatchString(id.Site) {
		return nil, fmt.Errorf("%w: site name %q: allowed are 1 to 63 characters a-z 0-9 . _ - beginning with a letter or digit", ErrName, id.Site)
	}
	out := []*url.URL{nameURI("site", id.Site)}
	if id.AllGroups {
		return append(out, nameURI("group", AllGroups)), nil
	}
	if len(id.Groups) == 0 {
		return nil, fmt.Errorf("%w: site %s would be allowed no group: name its groups, or %s for all", ErrName, id.Site, AllGroups)
	}
	if len(id.Groups) > maxGroups {
		return nil, fmt.Errorf("%w: %d groups in one certificate: at most %d; use %s for all", ErrName, len(id.Groups), maxGroups, AllGroups)
	}
	for _, g := range slices.Compact(slices.Sorted(slices.Values(id.Groups))) {
		if !groupRE.MatchString(g) {
			return nil, fmt.Errorf("%w: group name %q: allowed are 1 to 63 characters A-Z a-z 0-9 . _ - beginning with a letter or digit", ErrName, g)
		}
		out = append(out, nameURI("group", g))
	}
	return out, nil
}

// NewIdentity makes the identity of a site that may touch the named groups; the
// name * stands for all of them.
func NewIdentity(site string, groups []string) Identity {
	if slices.Contains(groups, AllGroups) {
		return Identity{Site: site, AllGroups: true}
	}
	return Identity{Site: site, Groups: slices.Clone(groups)}
}
