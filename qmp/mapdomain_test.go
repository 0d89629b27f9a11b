package qmp

import (
	"encoding/xml"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

var update = flag.Bool("update", false, "write the golden files anew")

// The definitions in testdata are libvirt 9.0's own dumpxml of VMs of four kinds.
var mapCases = []struct {
	name, file string
	m          Mapping
}{
	{"guest-same-host", "guest", Mapping{
		Name: "g1-dr", UUID: "derive", MAC: "derive", Site: "tokyo",
		Disks:  map[string]DiskMap{"vda": {Socket: "/run/kagami-dr/g1-vda.sock", Export: "g1-vda", ReconnectDelay: time.Hour}},
		Paths:  []Rename{{"/srv/vm/", "/srv/dr/"}, {"/srv/vm/guest.cpio", "/srv/boot/guest.cpio"}},
		Kernel: "/srv/dr/vmlinuz-6.1", Cmdline: "console=ttyS0",
	}},
	{"debian-mapped", "debian", Mapping{
		Site: "tokyo",
		Disks: map[string]DiskMap{
			"vda": {Socket: "/run/kagami/web1-vda.sock", Export: "web1-vda", ReconnectDelay: time.Hour},
			"vdb": {Socket: "/run/kagami/web1-vdb.sock", Export: "web1-vdb", ReconnectDelay: time.Hour},
		},
		Networks: []Rename{{"default", "dr-net"}, {"br-lan", "br0"}},
		Exists:   func(string) bool { return true }, Network: networks("dr-net", "br0"),
	}},
	{"debian-nothing-there", "debian", Mapping{
		Type:  "qemu",
		Disks: map[string]DiskMap{"vda": {Socket: "/run/kagami/web1-vda.sock", Export: "web1-vda", ReconnectDelay: time.Hour}, "vdz": {File: "/x"}},

		Exists: func(string) bool { return false }, Network: networks(),
	}},
	{"windows-emulated", "windows", Mapping{
		Type: "qemu", UUID: "11111111-2222-4333-8444-555555555555", Site: "tokyo",
		Disks: map[string]DiskMap{
			"vda": {Socket: "/run/kagami/win-vda.sock", Export: "win-vda", ReconnectDelay: time.Hour},
			"sda": {File: "/srv/scratch.raw"},
		},
		Networks: []Rename{{"eno1", "ens3"}}, Paths: []Rename{{"/var/log/vm/win2022", "/var/log/vm"}, {"/usr/share/OVMF", "/usr/share/edk2"}},
		Exists: func(p string) bool { return !strings.HasSuffix(p, "VARS_4M.ms.fd") },
	}},
	{"db-partly", "db", Mapping{
		Name: "db-1-replica", MAC: "derive", Site: "osaka",
		Disks: map[string]DiskMap{
			"sda": {Socket: "/run/kagami/db-sda.sock", Export: "db-sda", ReconnectDelay: 90 * time.Second},
			"sdb": {File: "/srv/swap.qcow2", Format: "qcow2"},
			"vda": {Drop: true},
		},
		Paths: []Rename{{"/srv/share", "/srv/share"}, {"/srv/boot/", "/srv/boot/"}}, QEMUArguments: KeepArguments,
		Networks: []Rename{{"storage", ""}}, Kernel: "/boot/vmlinuz-db",
		Exists: func(p string) bool { return p != "/srv/share" }, Network: networks("backend"),
	}},
}

// networks are those that a site has.
func networks(names ...string) func(string) NetworkState {
	return func(n string) NetworkState {
		if slices.Contains(names, n) {
			return NetworkReady
		}
		return NetworkMissing
	}
}

// A network that is defined and not active would let the replica be defined,
// and not start.
func TestMapDomainInactiveNetwork(t *testing.T) {
	m := mapCases[1].m
	m.Network = func(n string) NetworkState {
		if n == "dr-net" {
			return NetworkInactive
		}
		return NetworkReady
	}
	_, problems, err := MapDomain(readDefinition(t, "debian"), m)
	if err != nil {
		t.Fatal(err)
	}
	for _, p := range problems {
		if p.Fatal && strings.Contains(p.Text, "virsh net-start dr-net") && strings.Contains(p.Text, "net-autostart") {
			return
		}
	}
	t.Errorf("not refused: %v", problems)
}

func TestHasKVM(t *testing.T) {
	const caps = `<capabilities><host/><guest><os_type>hvm</os_type><arch name='i686'><domain type='qemu'/></arch></guest>` +
		`<guest><os_type>hvm</os_type><arch name='x86_64'><domain type='qemu'/>%s</arch></guest></capabilities>`
	for kvm, want := range map[string]bool{"": false, "<domain type='kvm'/>": true} {
		if has, err := hasKVM(fmt.Sprintf(caps, kvm)); err != nil || has != want {
			t.Errorf("%q: %v, %v", kvm, has, err)
		}
	}
	if _, err := hasKVM("<capabilities>"); err == nil {
		t.Error("half a document was taken")
	}
}

func readDefinition(t testing.TB, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", name+".xml"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

func TestMapDomain(t *testing.T) {
	for _, c := range mapCases {
		t.Run(c.name, func(t *testing.T) {
			doc := readDefinition(t, c.file)
			out, problems, err := MapDomain(doc, c.m)
			if err != nil {
				t.Fatal(err)
			}
			var b strings.Builder
			b.WriteString(out)
			for _, p := range problems {
				fmt.Fprintf(&b, "%v fatal=%v\n", p, p.Fatal)
			}
			golden := filepath.Join("testdata", c.name+".golden")
			if *update {
				if err := os.WriteFile(golden, []byte(b.String()), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if b.String() != string(want) {
				t.Fatalf("differs from %s (run with -update, then look at the difference):\n%s", golden, b.String())
			}
			again, _, err := MapDomain(doc, c.m)
			if err != nil || again != out {
				t.Fatalf("mapped again it differs: %v", err)
			}
		})
	}
}

// A replica that is mapped once more, by the same names, stays as it is: so
// failing over again changes nothing.
func TestMapDomainIsStable(t *testing.T) {
	for _, c := range mapCases {
		m := Mapping{Disks: c.m.Disks}
		once, _, err := MapDomain(readDefinition(t, c.file), m)
		if err != nil {
			t.Fatal(err)
		}
		twice, _, err := MapDomain(once, m)
		if err != nil || twice != once {
			t.Fatalf("%s: %v\n%s\n%s", c.name, err, once, twice)
		}
	}
}

func TestMapDomainRefuses(t *testing.T) {
	for _, doc := range []string{"", "x", "<domain/>", "<domain><name>a</name></domain>", "<network><name>a</name></network>",
		"<domain type='kvm'><name>a</name><uuid>b</uuid><devices><disk type='file'><source file='x'/></disk></devices></domain>",
		"<domain><name>a</name>"} {
		if out, _, err := MapDomain(doc, Mapping{}); err == nil {
			t.Errorf("%q became %q", doc, out)
		}
	}
	if _, _, err := MapDomain(readDefinition(t, "guest"), Mapping{UUID: "nonsense"}); err == nil {
		t.Error("a UUID that is none was taken")
	}
}

func FuzzMapDomain(f *testing.F) {
	for _, n := range []string{"guest", "debian", "windows", "db"} {
		f.Add(readDefinition(f, n))
	}
	f.Fuzz(func(t *testing.T, doc string) {
		m := mapCases[len(doc)%len(mapCases)].m
		out, _, err := MapDomain(doc, m)
		if err != nil {
			return
		}
		if err := xml.Unmarshal([]byte(out), new(struct{})); err != nil {
			t.Fatalf("the result is no XML: %v\n%s", err, out)
		}
	})
}
