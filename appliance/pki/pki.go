// Package pki is trust between sites: one certificate authority per pair (or
// family) of sites, one certificate per site, and TLS 1.3 with certificates
// in both directions, always.
//
// A certificate says who it is for and what that site may touch in URI names:
//
//	kagami://site/NAME    exactly one: the site
//	kagami://group/NAME   any number: groups this site may replicate
//	kagami://group/*      all groups
//
// Both ends check the same things, in one function (verify): the chain ends at
// the one CA of the file, no certificate of it is outside its time, the leaf
// is for this use, the names are well formed; the connecting end also checks that
// it reached the site it meant. Host names play no part.
//
// An expired certificate never keeps a daemon from starting: on the day of a
// disaster a failover needs no link.
package pki

import (
	"errors"
	"regexp"
	"slices"
)

// Names of the files in a PKI folder and in a bundle.
const (
	CAName    = "ca.crt"
	CAKeyName = "ca.key" // stays where `pki init` made it
	CertName  = "site.crt"
	KeyName   = "site.key"
)

// AllGroups is the group name that stands for every group.
const AllGroups = "*"

// Reasons for refusing a peer or a file; errors wrap them.
var (
	ErrExpired     = errors.New("certificate is outside its time")
	ErrUnknownCA   = errors.New("certificate is not signed by this site's CA")
	ErrWrongSite   = errors.New("certificate is another site's")
	ErrBadIdentity = errors.New("certificate is no kagami site certificate")
	ErrNoTLS       = errors.New("peer does not speak this protocol")
	ErrRefused     = errors.New("peer refused this site's certificate")
	ErrName        = errors.New("not fit for a certificate") // of a site or group, on the command line
	ErrKeyMode     = errors.New("private key can be read by others")
)

// Files names the PEM files of one site.
type Files struct {
	CA   string
	Cert string
	Key  string
}

var (
	siteRE  = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	groupRE = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
)

// Identity is who a certificate is for and what it may touch.
type Identity struct {
	Site      string
	Groups    []string // sorted; empty when AllGroups
	AllGroups bool
}

// May reports whether the identity may touch a group.
func (id Identity) May(group string) bool {
	return id.AllGroups || slices.Contains(id.Groups, group)
}
