package pki

import (
	"archive/tar"
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
	"time"
)

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
