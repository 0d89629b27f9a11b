package config

import (
	"fmt"
	"reflect"
	"slices"
	"strings"
	"testing"
)

// base has one of everything, so that a test can change one line.
const base = `site: here
state_dir: /var/lib/kagami
run_dir: /run/kagami
listen: :7400
metrics: :7401
control:
  socket: /run/kagami/control.sock
  group: ops
tls:
  ca: /t/ca
  cert: /t/cert
  key: /t/key
libvirt:
  uri: qemu:///system
  enabled: true
peers:
- name: dr
  address: dr.example:7400
  connections: 4
groups:
- name: web
  peer: dr
  mode: sync
  on_link_loss: stall
  disks:
  - name: data
    image: /i/data
    size: 10GiB
    socket: /s/data
  - name: log
    image: /i/log
  domain:
    name: webhere
    uuid: keep
    mac: keep
    kernel: /boot/k
    networks:
    - from: a
      to: b
    paths:
    - from: /a
      to: /b
    disks:
    - target: sda
      file: /f
      format: raw
    type: qemu
    autostart: true
  limits:
    spool_bytes: 4GiB
limits:
  spool_bytes: 2GiB
  epoch_age: 1s
log:
  level: info
  format: text
`

func TestRefused(t *testing.T) {
	if ps := problems(t, base, nil); ps != nil {
		t.Fatalf("base: %v", ps)
	}
	name := `allowed: ` + NameForm
	path := "allowed: an absolute path without . or .. and without a slash at its end"
	cases := []struct{ old, new, want string }{
		// names
		{"site: here", "site: ''", "k.yaml:1: site: missing; wanted: " + NameForm},
		{"site: here", "site:", "k.yaml: site: missing; wanted: " + NameForm},
		{"site: here", "site: Here", `k.yaml:1: site: "Here": ` + name},
		{"site: here", "site: -a", `k.yaml:1: site: "-a": ` + name},
		{"site: here", "site: " + strings.Repeat("a", 64), `k.yaml:1: site: "` + strings.Repeat("a", 64) + `": ` + name},
		{"site: here", "site: 5", `k.yaml:1: site: "5": text is wanted here: put it in quotes`},
		{"site: here", "site: [a]", `k.yaml:1: site: text is wanted here, not a list`},
		{"site: here", "site: {a: b}", `k.yaml:1: site: text is wanted here, not a mapping`},
		{"site: here", `site: "a\0b"`, `k.yaml:1: site: "a\x00b": control characters are not allowed`},
		{"site: here", "site: dr", `k.yaml:17: peers[0].name: "dr": is this site itself: a peer is another site`},
		{"site: here", "Site: here", `k.yaml:1: Site: unknown key; did you mean site?`},
		{"site: here", "site: here\nsite: there", `k.yaml:2: site: given twice; first on line 1`},
		{"site: here", "site: here\nnonsense: 1", `k.yaml:2: nonsense: unknown key; allowed: control, ext4, groups, libvirt, limits, listen, log, metrics, peers, run_dir, site, state_dir, tls, verify`},
		{"- name: dr", "- name: DR", `k.yaml:17: peers[0].name: "DR": ` + name},
		{"- name: dr", "- nam: dr", `k.yaml:17: peers[0].nam: unknown key; did you mean name?`},
		{"- name: web", "- name: a/b", `k.yaml:21: groups[0].name: "a/b": allowed: ` + GroupNameForm},
		{"- name: web", "- name: Web", ""},
		{"- name: web", "- name: ''", `k.yaml:21: groups[0].name: missing; wanted: ` + GroupNameForm},
		{"  - name: log", "  - name: data", `k.yaml:30: groups[0].disks[1].name: "data": already used by groups[0].disks[0].name: each disk of group web must be its own`},
		{"  - name: log", "  - name: ..", `k.yaml:30: groups[0].disks[1].name: "..": ` + name},
		// folders, sockets, files
		{"state_dir: /var/lib/kagami", "state_dir: var", `k.yaml:2: state_dir: "var": ` + path},
		{"state_dir: /var/lib/kagami", "state_dir: /", `k.yaml:2: state_dir: "/": ` + path},
		{"state_dir: /var/lib/kagami", "state_dir: /var/", `k.yaml:2: state_dir: "/var/": ` + path},
		{"state_dir: /var/lib/kagami", "state_dir: ''", `k.yaml:2: state_dir: missing; wanted: an absolute path`},
		{"run_dir: /run/kagami", "run_dir: /var/lib/kagami", `k.yaml:3: run_dir: "/var/lib/kagami": must not be state_dir: it is emptied at boot`},
		{"run_dir: /run/kagami", "run_dir: /r/../k", `k.yaml:3: run_dir: "/r/../k": ` + path},
		{"  socket: /run/kagami/control.sock", "  socket: c.sock", `k.yaml:7: control.socket: "c.sock": ` + path},
		{"  socket: /run/kagami/control.sock", "  socket: /s/data", `k.yaml:29: groups[0].disks[0].socket: "/s/data": already used by control.socket: each file must be its own`},
		{"socket: /s/data", "socket: /" + strings.Repeat("s", 107), `k.yaml:29: groups[0].disks[0].socket: "/` + strings.Repeat("s", 107) + `": 108 bytes long; a unix socket's path has at most 107: choose a shorter run_dir, name or socket`},
		{"run_dir: /run/kagami", "run_dir: /" + strings.Repeat("r", 95), `k.yaml:30: groups[0].disks[1].socket: "/` + strings.Repeat("r", 95) + `/web-log.sock": 109 bytes long; a unix socket's path has at most 107: choose a shorter run_dir, name or socket`},
		{"image: /i/log", "image: /i/data", `k.yaml:31: groups[0].disks[1].image: "/i/data": already used by groups[0].disks[0].image: each file must be its own`},
		{"image: /i/log", "image: ''", `k.yaml:31: groups[0].disks[1].image: missing; wanted: an absolute path`},
		{"image: /i/log", "image: /t/key", `k.yaml:31: groups[0].disks[1].image: "/t/key": already used by tls.key: each file must be its own`},
		{"  cert: /t/cert", "  cert: cert.pem", `k.yaml:11: tls.cert: "cert.pem": ` + path},
		// addresses
		{"listen: :7400", "listen: 7400", `k.yaml:4: listen: "7400": text is wanted here: put it in quotes`},
		{"listen: :7400", "listen: '7400'", `k.yaml:4: listen: "7400": allowed: host:port, such as :7400 or 192.0.2.1:7400 (port 1 to 65535)`},
		{"listen: :7400", "listen: :0", `k.yaml:4: listen: ":0": allowed: host:port, such as :7400 or 192.0.2.1:7400 (port 1 to 65535)`},
		{"listen: :7400", "listen: :65536", `k.yaml:4: listen: ":65536": allowed: host:port, such as :7400 or 192.0.2.1:7400 (port 1 to 65535)`},
		{"listen: :7400", "listen: a b:1", `k.yaml:4: listen: "a b:1": allowed: host:port, such as :7400 or 192.0.2.1:7400 (port 1 to 65535)`},
		{"metrics: :7401", "metrics: :7400", `k.yaml:5: metrics: ":7400": must differ from listen`},
		{"metrics: :7401", "metrics: on", `k.yaml:5: metrics: "on": allowed: host:port, such as :7400 or 192.0.2.1:7400 (port 1 to 65535)`},
		{"address: dr.example:7400", "address: :7400", `k.yaml:18: peers[0].address: ":7400": allowed: host:port, such as dr.example.net:7400 (port 1 to 65535)`},
		{"address: dr.example:7400", "address: dr.example", `k.yaml:18: peers[0].address: "dr.example": allowed: host:port, such as dr.example.net:7400 (port 1 to 65535)`},
		{"  address: dr.example:7400\n", "", `k.yaml:17: peers[0].address: missing; wanted: host:port, such as dr.example.net:7400`},
		{"connections: 4", "connections: 0", `k.yaml:19: peers[0].connections: "0": allowed: 1 to 32`},
		{"connections: 4", "connections: 33", `k.yaml:19: peers[0].connections: "33": allowed: 1 to 32`},
		{"connections: 4", "connections: -1", `k.yaml:19: peers[0].connections: "-1": allowed: 1 to 32`},
		{"connections: 4", "connections: 5.7", `k.yaml:19: peers[0].connections: "5.7": allowed: a whole number, without quotes`},
		{"connections: 4", "connections: '4'", `k.yaml:19: peers[0].connections: "4": allowed: a whole number, without quotes`},
		{"connections: 4", "connections: 0x10", `k.yaml:19: peers[0].connections: "0x10": allowed: a whole number`},
		{"connections: 4", "connections: 99999999999", `k.yaml:19: peers[0].connections: "99999999999": allowed: a whole number below 2147483648`},
		{"connections: 4", "connections: true", `k.yaml:19: peers[0].connections: "true": allowed: a whole number, without quotes`},
		// libvirt
		{"enabled: true", "enabled: yes", `k.yaml:15: libvirt.enabled: "yes": allowed: true or false, without quotes`},
		{"enabled: true", "enabled: 'true'", `k.yaml:15: libvirt.enabled: "true": allowed: true or false, without quotes`},
		{"enabled: true", "enabled: 1", `k.yaml:15: libvirt.enabled: "1": allowed: true or false, without quotes`},
		{"enabled: true", "enabled: True", `k.yaml:15: libvirt.enabled: "True": allowed: true or false`},
		{"enabled: true", "enabled: false", `k.yaml:32: groups[0].domain: needs libvirt, and libvirt.enabled is false`},
		{"enabled: true", "emulation: xen", `k.yaml:15: libvirt.emulation: "xen": allowed: auto, kvm, qemu`},
		{"uri: qemu:///system", "uri: local", `k.yaml:14: libvirt.uri: "local": allowed: a libvirt URI of QEMU on this host, such as qemu:///system`},
		{"uri: qemu:///system", "uri: test:///default", `k.yaml:14: libvirt.uri: "test:///default": allowed: a libvirt URI of QEMU on this host, such as qemu:///system`},
		{"uri: qemu:///system", "uri: qemu+ssh://dr/system", `k.yaml:14: libvirt.uri: "qemu+ssh://dr/system": allowed: a libvirt URI of QEMU on this host, such as qemu:///system`},
		// groups
		{"  peer: dr", "  peer: dr2", `k.yaml:22: groups[0].peer: "dr2": no such peer; allowed: dr`},
		{"  peer: dr\n", "", `k.yaml:21: groups[0].peer: missing; a group with declared disks needs the peer it replicates with: dr`},
		{"mode: sync", "mode: fast", `k.yaml:23: groups[0].mode: "fast": allowed: sync, async`},
		{"mode: sync", "async_bytes: 1TiB", `k.yaml:23: groups[0].async_bytes: "1TiB": more than limits.queue_bytes (16MiB), where what is not acknowledged is kept`},
		{"mode: sync", "async_age: 10ms", `k.yaml:23: groups[0].async_age: "10ms": allowed: 100ms to 1h`},
		{"on_link_loss: stall", "on_link_loss: stop", `k.yaml:24: groups[0].on_link_loss: "stop": allowed: stall, continue`},
		{"size: 10GiB", "size: 10GB", `k.yaml:28: groups[0].disks[0].size: "10GB": allowed: ` + sizeForm},
		{"size: 10GiB", "size: 10737418240", `k.yaml:28: groups[0].disks[0].size: "10737418240": allowed: ` + sizeForm},
		{"size: 10GiB", "size: 1000B", `k.yaml:28: groups[0].disks[0].size: "1000B": allowed: a multiple of 512 bytes, at most 1048576TiB; 0 takes the image's`},
		{"size: 10GiB", "size: 2000000TiB", `k.yaml:28: groups[0].disks[0].size: "2000000TiB": allowed: a multiple of 512 bytes, at most 1048576TiB; 0 takes the image's`},
		{"size: 10GiB", "size: -1GiB", `k.yaml:28: groups[0].disks[0].size: "-1GiB": allowed: ` + sizeForm},
		{"size: 10GiB", "size: 1.5GiB", `k.yaml:28: groups[0].disks[0].size: "1.5GiB": allowed: ` + sizeForm},
		{"size: 10GiB", "size: 99999999TiB", `k.yaml:28: groups[0].disks[0].size: "99999999TiB": too large: at most 8388607TiB`},
		{"size: 10GiB", "size: true", `k.yaml:28: groups[0].disks[0].size: "true": allowed: ` + sizeForm},
		// domain
		{"name: webhere", "name: a/b", `k.yaml:33: groups[0].domain.name: "a/b": allowed: a libvirt domain's name: no slash, no space at its ends, at most 200 bytes`},
		{"uuid: keep", "uuid: new", `k.yaml:34: groups[0].domain.uuid: "new": allowed: keep, derive, or a UUID in lower case`},
		{"uuid: keep", "uuid: 0B0E7A3C-1111-2222-3333-444455556666", `k.yaml:34: groups[0].domain.uuid: "0B0E7A3C-1111-2222-3333-444455556666": allowed: keep, derive, or a UUID in lower case`},
		{"mac: keep", "mac: random", `k.yaml:35: groups[0].domain.mac: "random": allowed: keep, derive`},
		{"kernel: /boot/k", "kernel: k", `k.yaml:36: groups[0].domain.kernel: "k": ` + path},
		{"      to: b\n", "", `k.yaml:38: groups[0].domain.networks[0].to: missing; wanted: a network's or bridge's name`},
		{"      to: b\n", "      to: b\n    - {from: a, to: c}\n", `k.yaml:40: groups[0].domain.networks[1].from: "a": already used by groups[0].domain.networks[0].from: each groups[0].domain.networks must be its own`},
		{"      to: /b", "      to: b", `k.yaml:42: groups[0].domain.paths[0].to: "b": ` + path},
		{"target: sda", "target: 5", `k.yaml:44: groups[0].domain.disks[0].target: "5": text is wanted here: put it in quotes`},
		{"target: sda", "target: disk0", `k.yaml:44: groups[0].domain.disks[0].target: "disk0": allowed: a disk's target in the VM, such as vdb or sda`},
		{"      file: /f\n      format: raw\n", "", `k.yaml:44: groups[0].domain.disks[0].file: missing; name the file that stands for this disk here, or say drop: true`},
		{"      format: raw", "      drop: true", `k.yaml:46: groups[0].domain.disks[0].drop: "true": a dropped disk has neither file nor format`},
		{"format: raw", "format: vmdk", `k.yaml:46: groups[0].domain.disks[0].format: "vmdk": allowed: raw, qcow2`},
		{"    - target: sda", "    - {target: sda, drop: true}\n    - target: sda", `k.yaml:45: groups[0].domain.disks[1].target: "sda": already used by groups[0].domain.disks[0].target: each target in groups[0].domain must be its own`},
		{"type: qemu", "type: xen", `k.yaml:47: groups[0].domain.type: "xen": allowed: kvm, qemu`},
		{"autostart: true", "autostart: 2", `k.yaml:48: groups[0].domain.autostart: "2": allowed: true or false, without quotes`},
		// limits
		{"  spool_bytes: 2GiB", "  spool_bytes: 1GiB", `k.yaml:52: limits.spool_bytes: "1GiB": must exceed active_log_bytes (1GiB): a resync of all active regions goes through the spool`},
		{"    spool_bytes: 4GiB", "    active_log_bytes: 2GiB", `k.yaml:49: groups[0].limits.spool_bytes: "2GiB": must exceed active_log_bytes (2GiB): a resync of all active regions goes through the spool`},
		{"    spool_bytes: 4GiB", "    heartbeat: 2s", `k.yaml:50: groups[0].limits.heartbeat: "2s": not a group's: all groups share the peer's connections; set limits.heartbeat`},
		{"    spool_bytes: 4GiB", "    link_timeout: 9s", `k.yaml:50: groups[0].limits.link_timeout: "9s": not a group's: all groups share the peer's connections; set limits.link_timeout`},
		{"    spool_bytes: 4GiB", "    inflight_bytes: 9MiB", `k.yaml:50: groups[0].limits.inflight_bytes: "9MiB": not a group's: all groups share the peer's connections; set limits.inflight_bytes`},
		{"    spool_bytes: 4GiB", "    compression: none", `k.yaml:50: groups[0].limits.compression: "none": not a group's: all groups share the peer's connections; set limits.compression`},
		{"    spool_bytes: 4GiB", "    epoch_age: 0s", `k.yaml:50: groups[0].limits.epoch_age: "0s": allowed: 10ms to 1m`},
		{"epoch_age: 1s", "epoch_age: 1", `k.yaml:53: limits.epoch_age: "1": allowed: a duration with its unit, such as 1s, 250ms or 1h`},
		{"epoch_age: 1s", "epoch_age: -1s", `k.yaml:53: limits.epoch_age: "-1s": allowed: 10ms to 1m`},
		{"epoch_age: 1s", "epoch_age: 2m", `k.yaml:53: limits.epoch_age: "2m": allowed: 10ms to 1m`},
		{"epoch_age: 1s", "segment_bytes: 1GiB", `k.yaml:52: limits.spool_bytes: "2GiB": must hold at least 4 segments of segment_bytes (1GiB)`},
		{"epoch_age: 1s", "segment_bytes: 1048577B", `k.yaml:53: limits.segment_bytes: "1048577B": allowed: a multiple of 4KiB`},
		{"epoch_age: 1s", "active_log_bytes: 1048577B", `k.yaml:53: limits.active_log_bytes: "1048577B": allowed: a multiple of a region, 1MiB`},
		{"epoch_age: 1s", "backlog_bytes: 2MiB", `k.yaml:53: limits.backlog_bytes: "2MiB": allowed: 0, or at least queue_bytes (16MiB)`},
		{"epoch_age: 1s", "epoch_bytes: 32MiB", `k.yaml:53: limits.epoch_bytes: "32MiB": must not exceed queue_bytes (16MiB)`},
		{"epoch_age: 1s", "apply_bytes: 2GiB", `k.yaml:53: limits.apply_bytes: "2GiB": must not exceed half of spool_bytes (2GiB)`},
		{"epoch_age: 1s", "link_timeout: 1s", `k.yaml:53: limits.link_timeout: "1s": must be at least twice heartbeat (1s)`},
		{"epoch_age: 1s", "compression: gzip", `k.yaml:53: limits.compression: "gzip": allowed: zstd, none`},
		{"epoch_age: 1s", "queue_bytes: 1B", `k.yaml:53: limits.queue_bytes: "1B": allowed: 1MiB to 1TiB`},
		// log
		{"level: info", "level: trace", `k.yaml:55: log.level: "trace": allowed: debug, info, warn, error`},
		{"format: text", "format: xml", `k.yaml:56: log.format: "xml": allowed: auto, text, json`},
		// YAML itself
		{"tls:\n", "tls: &t\n", ""},
		{"site: here", "site: *x", "k.yaml: not valid YAML: unknown anchor 'x' referenced"},
		{"site: here", "site: [", "k.yaml:2: not valid YAML: did not find expected ',' or ']'"},
		{"site: here", "? [a, b]\n: c\nsite: here", `k.yaml:1: unknown key`},
	}
	for _, c := range cases {
		t.Run(c.new, func(t *testing.T) {
			text := strings.Replace(base, c.old, c.new, 1)
			if text == base {
				t.Fatalf("%q is not in the base file", c.old)
			}
			got := problems(t, text, nil)
			if c.want == "" {
				if got != nil {
					t.Fatalf("refused: %v", got)
				}
				return
			}
			if !slices.ContainsFunc(got, func(p string) bool { return strings.HasPrefix(p, c.want) }) {
				t.Fatalf("got  %q\nwant %q", got, c.want)
			}
		})
	}
}

func TestBadShapes(t *testing.T) {
	cases := map[string][]string{
		"":                      {"k.yaml: site: missing; wanted: " + NameForm},
		"# nothing\n":           {"k.yaml: site: missing; wanted: " + NameForm},
		"null\n":                {"k.yaml: site: missing; wanted: " + NameForm},
		"site: a\n...\n":        nil,
		"5\n":                   {`k.yaml:1: "5": a mapping of keys is wanted here`},
		"- a\n":                 {`k.yaml:1: a mapping of keys is wanted here, not a list`},
		"site: a\npeers: {}\n":  {`k.yaml:2: peers: a list (lines that begin with "- ") is wanted here, not a mapping`},
		"site: a\npeers: x\n":   {`k.yaml:2: peers: "x": a list (lines that begin with "- ") is wanted here`},
		"site: a\npeers: []\n":  nil,
		"site: a\npeers:\n":     nil,
		"site: a\ntls:\n":       nil,
		"site: a\ntls: {}\n":    nil,
		"site: a\ntls: x\n":     {`k.yaml:2: tls: "x": a mapping of keys is wanted here`},
		"site: a\npeers: [5]\n": {`k.yaml:2: peers[0]: "5": a mapping of keys is wanted here`},
		"site: a\nx: &a 1\ny: *a\n": {
			"k.yaml:2: x: unknown key; allowed: control, ext4, groups, libvirt, limits, listen, log, metrics, peers, run_dir, site, state_dir, tls, verify",
			"k.yaml:3: y: unknown key; allowed: control, ext4, groups, libvirt, limits, listen, log, metrics, peers, run_dir, site, state_dir, tls, verify",
		},
		"site: &a here\nlisten: *a\n": {`k.yaml:2: listen: aliases (*name) are not supported: write the value out`},
		"site: a\n  b: c\n":           {`k.yaml:2: not valid YAML: mapping values are not allowed in this context`},
		"site: a\n---\nsite: b\n":     {`k.yaml:2: a second document: the file must hold one`},
		"site: a\n<<: {listen: b}\n":  {"k.yaml:2: <<: unknown key; allowed: control, ext4, groups, libvirt, limits, listen, log, metrics, peers, run_dir, site, state_dir, tls, verify"},
	}
	for text, want := range cases {
		got := problems(t, text, nil)
		if !reflect.DeepEqual(slices.Sorted(slices.Values(got)), slices.Sorted(slices.Values(want))) {
			t.Errorf("%q:\ngot  %q\nwant %q", text, got, want)
		}
	}
}

func TestAllAtOnceInTheFilesOrder(t *testing.T) {
	text := "site: A\nlistn: x\npeers:\n- name: b\n  address: b\ngroups:\n- name: g\n  peer: c\nlimits:\n  epoch_age: 1\n  queue_bytes: 1B\n"
	got := problems(t, text, nil)
	var keys []string
	for _, p := range got {
		keys = append(keys, strings.Join(strings.SplitN(p, ":", 4)[1:3], ":"))
	}
	want := []string{"1: site", "2: listn", "5: peers[0].address", "8: groups[0].peer", "10: limits.epoch_age", "11: limits.queue_bytes"}
	slices.Sort(keys)
	slices.Sort(want)
	for _, w := range want {
		if !slices.Contains(keys, w) {
			t.Errorf("missing %s in %q", w, got)
		}
	}
	_, err := parse("k.yaml", []byte(text), noEnv)
	if first := fmt.Sprintf("configuration: %d problems\n  k.yaml:1: site: ", len(got)); !strings.HasPrefix(err.Error(), first) {
		t.Errorf("%v", err)
	}
}

func TestOneProblemIsOneLine(t *testing.T) {
	_, err := parse("k.yaml", []byte("site: A\n"), noEnv)
	if want := `configuration: k.yaml:1: site: "A": allowed: ` + NameForm; err == nil || err.Error() != want {
		t.Errorf("got %v", err)
	}
}

func TestLongValuesAreShortened(t *testing.T) {
	got := problems(t, "site: "+strings.Repeat("é", 500)+"\n", nil)
	if len(got) != 1 || len(got[0]) > 400 || !strings.Contains(got[0], "…") {
		t.Errorf("%q", got)
	}
}

func TestGroupInheritsFaultsSilently(t *testing.T) {
	got := problems(t, "site: a\nlimits: {queue_bytes: 1B}\ngroups:\n- name: g\n  limits: {epoch_age: 2s}\n", nil)
	for _, p := range got {
		if strings.Contains(p, "groups[0]") {
			t.Errorf("the file's fault is reported again: %s", p)
		}
	}
	if len(got) == 0 {
		t.Error("accepted")
	}
}
