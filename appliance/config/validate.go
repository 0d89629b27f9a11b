package config

import (
	"fmt"
	"net"
	"net/netip"
	"net/url"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// MaxSocketPath is the longest path of a unix socket, in bytes: sun_path has
// 108, the last of them zero.
const MaxSocketPath = 107

// What names look like: those of sites, peers and disks, and those of groups,
// which are names of VMs and may have capitals.
const (
	NameForm      = "a name of 1 to 63 characters a-z 0-9 . _ - that begins with a letter or digit"
	GroupNameForm = "a name of 1 to 63 characters A-Z a-z 0-9 . _ - that begins with a letter or digit"
)

var (
	groupRE  = regexp.MustCompile(`^[A-Za-z0-9][A-Za-z0-9._-]{0,62}$`)
	nameRE   = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)
	targetRE = regexp.MustCompile(`^(vd|sd|hd|xvd|ubd)[a-z]{1,3}$`)
	uuidRE   = regexp.MustCompile(`^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$`)
	hostRE   = regexp.MustCompile(`^[A-Za-z0-9]([A-Za-z0-9_.-]{0,252}[A-Za-z0-9])?\.?$`)
)

// ValidName reports whether s can name a site, peer or disk.
func ValidName(s string) bool { return nameRE.MatchString(s) }

// ValidGroupName reports whether s can name a group.
func ValidGroupName(s string) bool { return groupRE.MatchString(s) }

// Validate checks a configuration that did not come from Load. The error is
// an *Error.
func (c *Config) Validate() error { return asError(validate(c)) }

// validator collects problems; seen holds what must be unique, by kind.
type validator struct {
	problems []Problem
	seen     map[string]string // kind and value → key path that has it
}

func validate(c *Config) []Problem {
	v := &validator{seen: map[string]string{}}
	v.tags(reflect.ValueOf(*c), "")
	v.site(c)
	v.peers(c)
	for i := range c.Groups {
		v.group(c, &c.Groups[i], at("groups", i))
	}
	v.limits(c.Limits, "limits")
	return inherited(v.problems)
}

// inherited drops problems of groups' limits that are the file's limits' own:
// a group inherits what it does not set.
func inherited(ps []Problem) []Problem {
	whole := map[string]bool{}
	for _, p := range ps {
		if strings.HasPrefix(p.Key, "limits.") {
			whole[p.Key+p.What] = true
		}
	}
	return slices.DeleteFunc(ps, func(p Problem) bool {
		_, key, ok := strings.Cut(p.Key, "].limits.")
		return ok && whole["limits."+key+p.What]
	})
}

func (v *validator) add(path, value, what string, args ...any) {
	v.problems = append(v.problems, Problem{Key: path, Value: value, What: fmt.Sprintf(what, args...)})
}

// tags checks ranges and words that the struct tags declare, at every depth.
func (v *validator) tags(val reflect.Value, path string) {
	for _, f := range fieldsOf(val.Type()) {
		fv, at := val.Field(f.index), at(path, f.key)
		switch fv.Kind() {
		case reflect.Struct:
			v.tags(fv, at)
		case reflect.Pointer:
			if !fv.IsNil() {
				v.tags(fv.Elem(), at)
			}
		case reflect.Slice:
			for i := range fv.Len() {
				v.tags(fv.Index(i), at+fmt.Sprintf("[%d]", i))
			}
		case reflect.String:
			v.word(f, fv.String(), at)
		case reflect.Int, reflect.Int64:
			v.bounds(f, fv.Int(), at)
		}
	}
}

func (v *validator) word(f field, s, path string) {
	if strings.ContainsFunc(s, unicode.IsControl) {
		v.add(path, s, "control characters are not allowed")
		return
	}
	if f.oneof == nil || slices.Contains(f.oneof, s) {
		return
	}
	allowed := strings.Join(slices.DeleteFunc(slices.Clone(f.oneof), func(w string) bool { return w == "" }), ", ")
	v.add(path, s, "allowed: %s", allowed)
}

func (v *validator) bounds(f field, n int64, path string) {
	lo, hi := int64(0), int64(1)<<62
	if f.min != "" {
		lo, _ = f.number(f.min)
	}
	if f.max != "" {
		hi, _ = f.number(f.max)
	}
	if n >= lo && n <= hi {
		return
	}
	if f.max == "" {
		v.add(path, f.format(n), "allowed: %s or more", f.format(lo))
		return
	}
	v.add(path, f.format(n), "allowed: %s to %s", f.format(lo), f.format(hi))
}

func (v *validator) site(c *Config) {
	v.name(c.Site, "site")
	v.folder(c.StateDir, "state_dir")
	v.folder(c.RunDir, "run_dir")
	if c.StateDir == c.RunDir {
		v.add("run_dir", c.RunDir, "must not be state_dir: it is emptied at boot")
	}
	v.address(c.Listen, "listen", false)
	if c.Metrics != "" {
		v.address(c.Metrics, "metrics", false)
		if c.Metrics == c.Listen {
			v.add("metrics", c.Metrics, "must differ from listen")
		}
	}
	v.socket(c.Control.Socket, "control.socket")
	for _, f := range []struct{ path, key string }{{c.TLS.CA, "tls.ca"}, {c.TLS.Cert, "tls.cert"}, {c.TLS.Key, "tls.key"}} {
		if v.absolute(f.path, f.key) {
			v.unique("file", f.path, f.key)
		}
	}
	if c.Libvirt.Enabled {
		// The sockets of disks are this host's, and QEMU's alone are known.
		if u, err := url.Parse(c.Libvirt.URI); err != nil || u.Scheme != "qemu" && u.Scheme != "qemu+unix" || u.Host != "" {
			v.add("libvirt.uri", c.Libvirt.URI, "allowed: a libvirt URI of QEMU on this host, such as qemu:///system")
		}
	}
}

func (v *validator) peers(c *Config) {
	for i, p := range c.Peers {
		path := at("peers", i)
		if v.name(p.Name, path+".name") {
			v.unique("peer", p.Name, path+".name")
			if p.Name == c.Site {
				v.add(path+".name", p.Name, "is this site itself: a peer is another site")
			}
		}
		if v.address(p.Address, path+".address", true) {
			v.unique("address", p.Address, path+".address")
		}
	}
}

func (v *validator) name(s, path string) bool { return v.named(s, path, ValidName(s), NameForm) }

func (v *validator) named(s, path string, ok bool, form string) bool {
	switch {
	case s == "":
		v.add(path, "", "missing; wanted: %s", form)
	case !ok:
		v.add(path, s, "allowed: %s", form)
	default:
		return true
	}
	return false
}

// unique notes value as taken; a second key with it is refused.
func (v *validator) unique(kind, value, path string) {
	k := kind + "\x00" + value
	if first, ok := v.seen[k]; ok {
		v.add(path, value, "already used by %s: each %s must be its own", first, kind)
		return
	}
	v.seen[k] = path
}

func (v *validator) absolute(s, path string) bool {
	switch {
	case s == "":
		v.add(path, "", "missing; wanted: an absolute path")
	case !filepath.IsAbs(s) || filepath.Clean(s) != s || s == "/":
		v.add(path, s, "allowed: an absolute path without . or .. and without a slash at its end")
	default:
		return true
	}
	return false
}

// folder is absolute that lets the root stand for nothing.
func (v *validator) folder(s, path string) { v.absolute(s, path) }

func (v *validator) socket(s, path string) {
	if !v.absolute(s, path) {
		return
	}
	if len(s) > MaxSocketPath {
		v.add(path, s, "%d bytes long; a unix socket's path has at most %d: choose a shorter run_dir, name or socket", len(s), MaxSocketPath)
		return
	}
	v.unique("file", s, path)
}

// address checks host:port; a peer's must name a host.
func (v *validator) address(s, path string, host bool) bool {
	want := "host:port, such as :7400 or 192.0.2.1:7400"
	if host {
		want = "host:port, such as dr.example.net:7400"
	}
	if s == "" {
		v.add(path, "", "missing; wanted: %s", want)
		return false
	}
	h, p, err := net.SplitHostPort(s)
	port, perr := strconv.ParseUint(p, 10, 16)
	if err != nil || perr != nil || port == 0 || (host && h == "") || !hostOK(h) {
		v.add(path, s, "allowed: %s (port 1 to 65535)", want)
		return false
	}
	return true
}

func hostOK(h string) bool {
	if h == "" || hostRE.MatchString(h) {
		return true
	}
	_, err := netip.ParseAddr(h)
	return err == nil
}
