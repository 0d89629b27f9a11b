// Package guest makes and talks to test guests: small virtual machines with the
// machine's own Debian cloud kernel and tests/guest/init as their only program.
//
// BuildInitrd makes a guest that runs from memory, BuildGPTDisk a disk that boots by
// itself; Domain describes either to libvirt; Console runs commands in it; the files
// it acknowledges in and their checker are in tests/guest/workload.
package guest

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
)

// BuildInitrd puts a guest's kernel and initramfs into dir, readable by
// everyone, and returns their paths. What is there already with the same content is used.
// Programs are further ones that the guest shall have, with their paths.
func BuildInitrd(dir string, programs ...string) (kernel, initrd string, err error) {
	version, err := Version()
	if err != nil {
		return "", "", err
	}
	es, err := memoryTree(version, programs)
	if err != nil {
		return "", "", err
	}
	kernel = filepath.Join(dir, "vmlinuz-"+version)
	if err := copyOnce("/boot/vmlinuz-"+version, kernel); err != nil {
		return "", "", err
	}
	initrd = filepath.Join(dir, "guest-"+digest(es)+".cpio.gz")
	if _, err := os.Stat(initrd); err == nil {
		return kernel, initrd, nil
	}
	b, err := gzipCPIO(es)
	if err != nil {
		return "", "", err
	}
	return kernel, initrd, writeOnce(initrd, b)
}

// digest names a tree by its content.
func digest(es []entry) string {
	h := sha256.New()
	for _, e := range es {
		fmt.Fprintf(h, "%q %o %d\n", e.name, e.mode, len(e.data))
		h.Write(e.data)
	}
	return fmt.Sprintf("%x", h.Sum(nil)[:8])
}

// memoryTree is the whole guest in memory.
func memoryTree(version string, programs []string) ([]entry, error) {
	init, err := buildInit()
	if err != nil {
		return nil, err
	}
	es := []entry{{"init", modeExec, init}}
	ms, err := moduleTree(version, bootModules, extraModules)
	if err != nil {
		return nil, err
	}
	ps, err := programTree(programs...)
	return slices.Concat(es, ms, ps), err
}

func moduleTree(version string, boot, extra []string) ([]entry, error) {
	all, err := modules(version, slices.Concat(boot, extra))
	if err != nil {
		return nil, err
	}
	first, err := modules(version, boot)
	if err != nil {
		return nil, err
	}
	var es []entry
	for _, m := range all {
		es = append(es, entry{"lib/mod/" + m.name, modeFile, m.data})
	}
	var order strings.Builder
	for _, m := range first {
		order.WriteString(m.name + "\n")
	}
	return append(es, entry{"lib/mod/order", modeFile, []byte(order.String())}), nil
}

// programs run in guests; scripts/packages.txt installs them.
var programs = []string{"/usr/sbin/qemu-ga", "/sbin/mke2fs"}

var libPath = regexp.MustCompile(`(/\S+\.so\S*)`)

// programTree is the programs, and more, with the libraries they are linked to.
func programTree(more ...string) ([]entry, error) {
	var es []entry
	seen := map[string]bool{}
	for _, p := range slices.Concat(programs, more) {
		if _, err := os.Stat(p); err != nil {
			return nil, fmt.Errorf("a program for the guest is missing, scripts/packages.txt says which package has it: %w", err)
		}
		out, err := exec.Command("ldd", p).Output()
		if err != nil {
			return nil, fmt.Errorf("ldd %s: %w", p, err)
		}
		for _, f := range append(libPath.FindAllString(string(out), -1), p) {
			if seen[f] {
				continue
			}
			seen[f] = true
			b, err := os.ReadFile(f)
			if err != nil {
				return nil, err
			}
			es = append(es, entry{strings.TrimPrefix(f, "/"), modeExec, b})
		}
	}
	return es, nil
}

// buildInit compiles tests/guest/init, static and small, once per process.
var buildInit = sync.OnceValues(func() ([]byte, error) {
	dir, err := os.MkdirTemp("", "kagami-guest-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(dir)
	out := filepath.Join(dir, "init")
	c := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", out, "kagami/tests/guest/init")
	c.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH=amd64", "GOFLAGS=")
	if b, err := c.CombinedOutput(); err != nil {
		return nil, fmt.Errorf("build the guest's init: %w\n%s", err, b)
	}
	return os.ReadFile(out)
})

func copyOnce(from, to string) error {
	if a, err := os.Stat(to); err == nil {
		if b, err := os.Stat(from); err == nil && a.Size() == b.Size() && !a.ModTime().Before(b.ModTime()) {
			return nil
		}
	}
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	return writeOnce(to, b)
}

// writeOnce makes a file whole or not at all; several processes may do so at once.
func writeOnce(name string, b []byte) error {
	f, err := os.CreateTemp(filepath.Dir(name), ".tmp-*")
	if err != nil {
		return err
	}
	_, err = f.Write(b)
	err = errors.Join(err, f.Chmod(0o644), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return nil
}
