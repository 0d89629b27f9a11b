package config

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"
)

func noEnv(string) (string, bool) { return "", false }

func envOf(m map[string]string) func(string) (string, bool) {
	return func(k string) (string, bool) { v, ok := m[k]; return v, ok }
}

// minimal is the shortest file that is accepted.
const minimal = "site: here\n"

func mustParse(t *testing.T, text string) *Config {
	t.Helper()
	c, err := parse("k.yaml", []byte(text), noEnv)
	if err != nil {
		t.Fatalf("%v\nin:\n%s", err, text)
	}
	return c
}

// problems parses text and returns what is refused, one string each.
func problems(t *testing.T, text string, env map[string]string) []string {
	t.Helper()
	_, err := parse("k.yaml", []byte(text), envOf(env))
	if err == nil {
		return nil
	}
	var e *Error
	if !errors.As(err, &e) {
		t.Fatalf("not an *Error: %v", err)
	}
	out := make([]string, 0, len(e.Problems))
	for _, p := range e.Problems {
		out = append(out, p.String())
	}
	return out
}

func TestMinimalHasAllDefaults(t *testing.T) {
	want := &Config{
		Site: "here", StateDir: "/var/lib/kagami", RunDir: "/run/kagami", Listen: ":7400",
		Control: Control{Socket: "/run/kagami/control.sock"},
		TLS:     TLS{CA: "/etc/kagami/pki/ca.crt", Cert: "/etc/kagami/pki/site.crt", Key: "/etc/kagami/pki/site.key"},
		Libvirt: Libvirt{URI: "qemu:///system", SocketGroup: "libvirt-qemu", Enabled: true, Emulation: "auto"},
		Ext4:    Ext4{Follow: true, LocalFlushes: true},
		Verify:  Verify{Rate: 32 << 20},
		Limits: Limits{
			QueueBytes: 16 << 20, InflightBytes: 8 << 20, SpoolBytes: 2 << 30, SegmentBytes: 64 << 20,
			ActiveLogBytes: 1 << 30, BacklogBytes: 4 << 30, EpochBytes: 4 << 20, ApplyBytes: 64 << 20,
			EpochAge: time.Second, ApplyAge: 2 * time.Second, Heartbeat: time.Second,
			LinkTimeout: 5 * time.Second, ReconnectDelay: time.Hour, Compression: "zstd",
		},
		Log: Log{Level: "info", Format: "auto"},
	}
	if got := mustParse(t, minimal); !reflect.DeepEqual(got, want) {
		t.Fatalf("got  %+v\nwant %+v", got, want)
	}
}

// TestSocketGroupWithoutLibvirt: there is no group of QEMU by default, but one
// that is asked for stays.
func TestSocketGroupWithoutLibvirt(t *testing.T) {
	for text, want := range map[string]string{
		"libvirt: {enabled: false}\n": "", "libvirt: {enabled: false, socket_group: kvm}\n": "kvm", "libvirt: {enabled: true}\n": "libvirt-qemu",
	} {
		if got := mustParse(t, minimal+text).Libvirt.SocketGroup; got != want {
			t.Errorf("%s: %q", text, got)
		}
	}
}

const full = `
site: here
state_dir: /srv/state
run_dir: /srv/run
listen: "[::1]:7000"
metrics: 127.0.0.1:7001
control: {socket: /srv/run/c.sock, group: ops}
tls: {ca: /t/ca, cert: /t/cert, key: /t/key}
libvirt: {uri: "qemu:///session", socket_group: kvm, enabled: true, emulation: qemu}
peers:
  - {name: dr.1x, address: "192.0.2.1:7400", connections: 10}
  - {name: other, address: "[2001:db8::1]:7400"}
groups:
  - name: web
    peer: dr.1x
    mode: sync
    on_link_loss: stall
    disks:
      - {name: data, image: /i/data, size: 3GiB, socket: /s/data}
      - {name: log, image: /i/log}
    domain:
      name: Web Here
      uuid: 0b0e7a3c-1111-2222-3333-444455556666
      mac: derive
      networks: [{from: a, to: b}, {from: c, to: b}]
      paths: [{from: /a/, to: /b/}]
      kernel: /k
      initrd: /i
      cmdline: "console=ttyS0"
      disks: [{target: sda, file: /f, format: qcow2}, {target: vdc, drop: true}]
      type: kvm
      autostart: true
    limits: {spool_bytes: 8GiB, epoch_age: 250ms}
  - name: db
    domain: {}
limits: {queue_bytes: 32MiB, compression: none}
log: {level: debug, format: json}
ext4: {local_flushes: false}
verify: {every: 168h, rate: 8MiB}
`

func TestFull(t *testing.T) {
	c := mustParse(t, full)
	own := DefaultLimits()
	own.QueueBytes, own.Compression = 32<<20, "none"
	grp := own
	grp.SpoolBytes, grp.EpochAge = 8<<30, 250*time.Millisecond
	want := &Config{
		Site: "here", StateDir: "/srv/state", RunDir: "/srv/run", Listen: "[::1]:7000", Metrics: "127.0.0.1:7001",
		Control: Control{Socket: "/srv/run/c.sock", Group: "ops"},
		TLS:     TLS{CA: "/t/ca", Cert: "/t/cert", Key: "/t/key"},
		Libvirt: Libvirt{URI: "qemu:///session", SocketGroup: "kvm", Enabled: true, Emulation: "qemu"},
		Ext4:    Ext4{Follow: true, LocalFlushes: false},
		Verify:  Verify{Every: 168 * time.Hour, Rate: 8 << 20},
		Peers: []Peer{
			{Name: "dr.1x", Address: "192.0.2.1:7400", Connections: 10},
			{Name: "other", Address: "[2001:db8::1]:7400", Connections: 4},
		},
		Groups: []Group{{
			Name: "web", Peer: "dr.1x", Mode: "sync", AsyncAge: 5 * time.Second, OnLinkLoss: "stall",
			Disks: []Disk{
				{Name: "data", Image: "/i/data", Size: 3 << 30, Socket: "/s/data"},
				{Name: "log", Image: "/i/log", Socket: "/srv/run/web-log.sock"},
			},
			Domain: &Domain{
				Name: "Web Here", UUID: "0b0e7a3c-1111-2222-3333-444455556666", MAC: "derive",
				Networks: []Map{{"a", "b"}, {"c", "b"}}, Paths: []Map{{"/a/", "/b/"}},
				Kernel: "/k", Initrd: "/i", Cmdline: "console=ttyS0",
				Disks: []DomainDisk{{Target: "sda", File: "/f", Format: "qcow2"}, {Target: "vdc", Drop: true}},
				Type:  "kvm", Autostart: true,
			},
			Limits: &grp,
		}, {
			Name: "db", Mode: "sync", AsyncAge: 5 * time.Second, OnLinkLoss: "stall", Domain: &Domain{UUID: "keep", MAC: "keep"},
		}},
		Limits: own,
		Log:    Log{Level: "debug", Format: "json"},
	}
	if !reflect.DeepEqual(c, want) {
		t.Fatalf("got  %+v\nwant %+v", c, want)
	}
	if got := c.LimitsFor("web"); got != grp {
		t.Errorf("limits of web: %+v", got)
	}
	if got := c.LimitsFor("db"); got != own {
		t.Errorf("limits of db: %+v", got)
	}
	if err := c.Validate(); err != nil {
		t.Errorf("Validate after Load: %v", err)
	}
}

func TestYAMLRoundTrip(t *testing.T) {
	for _, text := range []string{minimal, full, string(Example())} {
		c := mustParse(t, text)
		out, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		if again := mustParse(t, string(out)); !reflect.DeepEqual(c, again) {
			t.Errorf("written and read back:\n%s\ngot  %+v\nwant %+v", out, again, c)
		}
	}
}

func TestYAMLQuotesWhatIsNotPlain(t *testing.T) {
	for _, cmdline := range []string{"5", "true", "null", "~", "a: b", "#x", " x ", "ünï", "2020-01-01", "1e3", "-", "'", `"`, "&a", "*a"} {
		c := mustParse(t, minimal)
		c.Groups = []Group{{Name: "g", Mode: "sync", AsyncAge: time.Second, OnLinkLoss: "stall", Domain: &Domain{UUID: "keep", MAC: "keep", Cmdline: cmdline}}}
		out, err := c.YAML()
		if err != nil {
			t.Fatal(err)
		}
		if got := mustParse(t, string(out)).Groups[0].Domain.Cmdline; got != cmdline {
			t.Errorf("%q came back as %q", cmdline, got)
		}
	}
}

func TestExampleIsAcceptedAndComplete(t *testing.T) {
	if c := mustParse(t, string(Example())); len(c.Groups) != 0 {
		t.Errorf("the example, filled in at both sites, declares groups: %+v", c.Groups)
	}
	// With every optional line uncommented it must name every key there is.
	text := uncomment(string(Example()))
	r := newReader("example.yaml")
	r.read([]byte(text), reflect.TypeFor[Config]())
	if len(r.problems) != 0 {
		t.Fatalf("%v\nin:\n%s", asError(r.problems), text)
	}
	seen := map[string]bool{}
	index := regexp.MustCompile(`\[\d+\]`)
	for path := range r.lines {
		seen[index.ReplaceAllString(path, "[]")] = true
	}
	limit := func(key string) bool { return strings.HasPrefix(key, "groups[].limits.") }
	for _, key := range allKeys(reflect.TypeFor[Config](), "") {
		if !seen[key] && !limit(key) {
			t.Errorf("the example does not show %s", key)
		}
	}
	if _, err := parse("example.yaml", []byte(text), noEnv); err != nil {
		t.Errorf("uncommented: %v", err)
	}
}

// uncomment turns the example's optional lines into settings: "#" in the first
// column, followed by the setting with its own indent of 0 or of 2 and more.
func uncomment(s string) string {
	return regexp.MustCompile(`(?m)^#((  +(- )?)?[a-z_]+:.*)$`).ReplaceAllString(s, "$1")
}

// allKeys lists every key, with [] for the items of lists.
func allKeys(t reflect.Type, path string) []string {
	var out []string
	for _, f := range fieldsOf(t) {
		at := at(path, f.key)
		out = append(out, at)
		ft := f.typ
		switch ft.Kind() {
		case reflect.Slice:
			out = append(out, allKeys(ft.Elem(), at+"[]")...)
		case reflect.Pointer:
			out = append(out, allKeys(ft.Elem(), at)...)
		case reflect.Struct:
			out = append(out, allKeys(ft, at)...)
		}
	}
	return out
}

func TestExampleShowsDefaults(t *testing.T) {
	def := defaultValues(reflect.ValueOf(*Default()), "")
	r := newReader("example.yaml")
	r.read([]byte(uncomment(string(Example()))), reflect.TypeFor[Config]())
	fields := scalars(reflect.TypeFor[Config](), "")
	differs := map[string]bool{"site": true, "metrics": true, "control.socket": true, "control.group": true}
	for key, val := range def {
		if differs[key] {
			continue
		}
		want := fmt.Sprint(val)
		switch f := fields[key]; {
		case f.typ == durationType:
			want = FormatDuration(val.(time.Duration))
		case f.size:
			want = FormatSize(val.(int64))
		}
		if got := r.values[key]; got != want {
			t.Errorf("%s: the example shows %q, the default is %q", key, got, want)
		}
	}
}

func TestEveryFieldIsTagged(t *testing.T) {
	keyRE := regexp.MustCompile(`^[a-z][a-z0-9_]*$`)
	var walk func(typ reflect.Type)
	walk = func(typ reflect.Type) {
		for i := range typ.NumField() {
			sf := typ.Field(i)
			if !keyRE.MatchString(sf.Tag.Get("mapstructure")) {
				t.Errorf("%s.%s has no snake_case key", typ.Name(), sf.Name)
			}
		}
		for _, f := range fieldsOf(typ) {
			for _, bound := range []string{f.min, f.max} {
				if bound == "" {
					continue
				}
				if n, err := f.number(bound); err != nil || n < 0 {
					t.Errorf("%s.%s: bound %q: %v", typ.Name(), f.key, bound, err)
				}
			}
			ft := f.typ
			if ft.Kind() == reflect.Slice || ft.Kind() == reflect.Pointer {
				ft = ft.Elem()
			}
			if ft.Kind() == reflect.Struct {
				walk(ft)
			}
		}
	}
	walk(reflect.TypeFor[Config]())
}

func TestLoad(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "kagami.yaml")
	if _, err := Load(file); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing file: %v", err)
	}
	if err := WriteExample(file); err != nil {
		t.Fatal(err)
	}
	if err := WriteExample(file); !errors.Is(err, os.ErrExist) {
		t.Errorf("writing over a file: %v", err)
	}
	if c, err := Load(file); err != nil || c.Site != "primary" {
		t.Errorf("the example: %v", err)
	}
	t.Setenv("KAGAMI_SITE", "elsewhere")
	if c, err := Load(file); err != nil || c.Site != "elsewhere" {
		t.Errorf("with KAGAMI_SITE: %v", err)
	}
	if err := os.WriteFile(file, make([]byte, maxFile+1), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Load(file); err == nil || !strings.Contains(err.Error(), "larger than 1MiB") {
		t.Errorf("large file: %v", err)
	}
}
