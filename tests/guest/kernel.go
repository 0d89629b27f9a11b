package guest

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/klauspost/compress/zstd"
)

// ErrNoKernel says that the machine has no kernel for test guests.
var ErrNoKernel = errors.New("no /boot/vmlinuz-*-cloud-amd64 with its modules: install Debian's linux-image-cloud-amd64")

// Version is that of the newest cloud kernel installed with its modules, for
// instance 6.1.0-18-cloud-amd64.
func Version() (string, error) {
	names, err := filepath.Glob("/boot/vmlinuz-*-cloud-amd64")
	if err != nil {
		return "", err
	}
	var best string
	for _, n := range names {
		v := strings.TrimPrefix(filepath.Base(n), "vmlinuz-")
		if _, err := os.Stat(filepath.Join(moduleDir(v), "modules.dep")); err == nil && (best == "" || newer(v, best)) {
			best = v
		}
	}
	if best == "" {
		return "", ErrNoKernel
	}
	return best, nil
}

func moduleDir(version string) string { return filepath.Join("/lib/modules", version) }

// newer compares the runs of digits of two versions as numbers.
func newer(a, b string) bool { return slices.Compare(numbers(a), numbers(b)) > 0 }

func numbers(v string) []int {
	var ns []int
	for _, s := range strings.FieldsFunc(v, func(r rune) bool { return r < '0' || r > '9' }) {
		if n, err := strconv.Atoi(s); err == nil {
			ns = append(ns, n)
		}
	}
	return ns
}

// Modules a guest loads at boot, and those it carries to load on demand.
var (
	bootModules  = []string{"virtio_pci", "virtio_blk", "virtio_scsi", "sd_mod", "virtio_console", "virtio-rng", "virtio_net"}
	extraModules = []string{"nbd"}
)

// module is one kernel module, ready to load.
type module struct {
	name string // file name, ends in .ko
	data []byte
}

// modules reads the named modules and what they depend on, dependencies
// first. What is not there as a module is taken to be built into the kernel.
func modules(version string, names []string) ([]module, error) {
	dep, err := os.ReadFile(filepath.Join(moduleDir(version), "modules.dep"))
	if err != nil {
		return nil, err
	}
	var ms []module
	for _, p := range loadOrder(string(dep), names) {
		b, err := readModule(filepath.Join(moduleDir(version), p))
		if err != nil {
			return nil, fmt.Errorf("read module %s: %w", p, err)
		}
		ms = append(ms, module{name: moduleName(p) + ".ko", data: b})
	}
	return ms, nil
}

// moduleName is the name without folder, .ko and compression.
func moduleName(p string) string {
	n, _, _ := strings.Cut(path.Base(p), ".ko")
	return n
}

// loadOrder finds the paths to load for the named modules in the text of a
// modules.dep. A line is "path: dependency …", the last dependency to be loaded first.
func loadOrder(dep string, names []string) []string {
	var order []string
	add := func(p string) {
		if !slices.Contains(order, p) {
			order = append(order, p)
		}
	}
	for _, name := range names {
		for l := range strings.Lines(dep) {
			p, deps, ok := strings.Cut(strings.TrimSpace(l), ":")
			if !ok || moduleName(p) != name {
				continue
			}
			ds := strings.Fields(deps)
			slices.Reverse(ds)
			for _, d := range append(ds, p) {
				add(d)
			}
		}
	}
	return order
}

func readModule(p string) ([]byte, error) {
	b, err := os.ReadFile(p)
	if err != nil {
		return nil, err
	}
	switch filepath.Ext(p) {
	case ".xz":
		c := exec.Command("xz", "-dc")
		c.Stdin = bytes.NewReader(b)
		return c.Output()
	case ".zst":
		d, err := zstd.NewReader(nil)
		if err != nil {
			return nil, err
		}
		defer d.Close()
		return d.DecodeAll(b, nil)
	}
	return b, nil
}
