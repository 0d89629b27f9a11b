package pki

import (
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"time"
)

// Info describes a certificate file.
type Info struct {
	CA          bool      `json:"ca"`
	Subject     string    `json:"subject"`
	Issuer      string    `json:"issuer"`
	Site        string    `json:"site,omitempty"`
	Groups      []string  `json:"groups,omitempty"` // ["*"] for all
	NotBefore   time.Time `json:"not_before"`
	NotAfter    time.Time `json:"not_after"`
	Fingerprint string    `json:"sha256"`
}

// Describe reads a certificate file, a CA's or a site's.
func Describe(path string) (Info, error) {
	c, err := readCert(path)
	if err != nil {
		return Info{}, err
	}
	return describe(c)
}

func describe(c *x509.Certificate) (Info, error) {
	sum := sha256.Sum256(c.Raw)
	info := Info{
		CA: c.IsCA, Subject: c.Subject.CommonName, Issuer: c.Issuer.CommonName,
		NotBefore: c.NotBefore.UTC(), NotAfter: c.NotAfter.UTC(), Fingerprint: hex.EncodeToString(sum[:]),
	}
	if c.IsCA {
		return info, nil
	}
	id, err := identityOf(c)
	if err != nil {
		return info, err
	}
	info.Site, info.Groups = id.Site, id.Groups
	if id.AllGroups {
		info.Groups = []string{AllGroups}
	}
	return info, nil
}
