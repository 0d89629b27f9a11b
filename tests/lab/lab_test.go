package lab

import (
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"kagami/tests/acked"
)

func virsh(t *testing.T, l *Lab, args ...string) string {
	t.Helper()
	out, err := exec.Command("virsh", append([]string{"-q", "-c", l.URI}, args...)...).CombinedOutput()
	if err != nil {
		t.Fatalf("virsh %v: %v: %s", args, err, out)
	}
	return strings.TrimSpace(string(out))
}

func TestTwoLabsShareNothing(t *testing.T) {
	a, b := ForTest(t, Options{}), ForTest(t, Options{})
	xml := "<domain type='qemu'><name>same</name><memory>65536</memory><os><type arch='x86_64'>hvm</type></os></domain>"
	file := a.Dir + "/d.xml"
	if err := os.WriteFile(file, []byte(xml), 0o600); err != nil {
		t.Fatal(err)
	}
	virsh(t, a, "define", file)
	if got := virsh(t, b, "list", "--all", "--name"); got != "" {
		t.Fatalf("the other libvirt knows %q", got)
	}
	virsh(t, a, "start", "same")
	pid, err := a.GuestPID("same")
	if err != nil {
		t.Fatal(err)
	}
	if err := a.KillLibvirtd(); err != nil {
		t.Fatal(err)
	}
	if err := a.StartLibvirtd(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := virsh(t, a, "domstate", "same"); got != "running" {
		t.Fatalf("after a crash of libvirtd the guest is %q", got)
	}
	if err := a.Stop(); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat"); err == nil && !strings.Contains(string(b), ") Z") {
		t.Fatalf("the guest outlived its lab: %s", b)
	}
}

// TestLabHoldsNoMounts: a file system that another test has mounted is gone
// when that test unmounts it, its loop device too.
func TestLabHoldsNoMounts(t *testing.T) {
	image := filepath.Join(t.TempDir(), "fs")
	if out, err := exec.Command("mke2fs", "-q", "-t", "ext4", image, "16M").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	m, err := acked.MountImage(t.Context(), image, 0, false)
	if err != nil {
		t.Fatal(err)
	}
	ForTest(t, Options{})
	t.Cleanup(func() {
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	if err := m.Unmount(); err != nil { // and no more: the kernel takes all mounts off a folder that is removed
		t.Fatal(err)
	}
	for end := time.Now().Add(5 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		out, err := exec.Command("losetup", "-j", image).CombinedOutput()
		if err == nil && len(out) == 0 {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("still in use: %v %s", err, out)
		}
	}
}
