package lab

import (
	"context"
	"os"
	"testing"
	"time"
)

// ForTest starts a Lab that ends with the test. Where it cannot run, the
// test is skipped, or fails if CI=true.
func ForTest(t testing.TB, o Options) *Lab {
	t.Helper()
	missing := ""
	for _, p := range Programs {
		if _, err := os.Stat(p); err != nil {
			missing = p
		}
	}
	if os.Geteuid() != 0 {
		missing = "root"
	}
	if missing != "" && os.Getenv("CI") == "true" {
		t.Fatalf("a private libvirt needs %s", missing)
	} else if missing != "" {
		t.Skipf("a private libvirt needs %s", missing)
	}
	ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
	defer cancel()
	l, err := Start(ctx, o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			if b, err := os.ReadFile(l.Log()); err == nil {
				t.Logf("libvirtd's log:\n%s", b)
			}
		}
		if err := l.Stop(); err != nil {
			t.Errorf("stop the private libvirt: %v", err)
		}
	})
	return l
}
