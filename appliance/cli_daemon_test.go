package main

import (
	"context"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"kagami/appliance/control"
	"kagami/appliance/pki"
	"kagami/images"
)

// daemonFile writes the configuration of a site that can start, with certificates.
func daemonFile(t *testing.T, more string) (file, dir string) {
	t.Helper()
	dir, err := os.MkdirTemp("", "kg-") // short: paths of sockets end at 107 bytes
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	if err := pki.Init(filepath.Join(dir, "pki"), "primary", pki.Options{}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	file = filepath.Join(dir, "kagami.yaml")
	write(t, file, "site: primary\nstate_dir: DIR/state\nrun_dir: DIR/run\nlisten: "+l.Addr().String()+"\nlibvirt: {enabled: false}\n"+
		"tls: {ca: DIR/pki/ca.crt, cert: DIR/pki/site.crt, key: DIR/pki/site.key}\n"+more)
	edit(t, file, "DIR", dir)
	return file, dir
}

// edit replaces a part of a file.
func edit(t *testing.T, file, part, with string) {
	t.Helper()
	text := read(t, file)
	if !strings.Contains(text, part) {
		t.Fatalf("no %q in %s", part, file)
	}
	write(t, file, strings.ReplaceAll(text, part, with))
}

func read(t *testing.T, file string) string {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// TestDaemonDoesNotStart: each reason in one sentence, with what to do next.
func TestDaemonDoesNotStart(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	for name, c := range map[string]struct {
		part, with string
		want       []string
	}{
		"port taken":       {"\nlisten: ", "\nlisten: " + l.Addr().String() + " # ", []string{"listen for peers", "address already in use", "change listen"}},
		"metrics taken":    {"site: primary", "site: primary\nmetrics: " + l.Addr().String(), []string{"listen for metrics", "change metrics"}},
		"no CA":            {"pki/ca.crt", "nowhere/ca.crt", []string{"TLS set-up: read CA", "kagami pki --help"}},
		"another site's":   {"site: primary", "site: other", []string{"is the certificate of site primary, and this is site other", "kagami pki issue other"}},
		"state folder":     {"/state", "/kagami.yaml/state", []string{"make state folder", "state_dir"}},
		"run folder":       {"/run\n", "/kagami.yaml/run\n", []string{"make run folder", "run_dir"}},
		"no socket":        {"libvirt: ", "control: {socket: /proc/nowhere/c.sock}\nlibvirt: ", []string{"open control socket", "control.socket"}},
		"no such group":    {"libvirt: ", "control: {group: no-such-group}\nlibvirt: ", []string{"open control socket", "no-such-group", "control.group"}},
		"no configuration": {"site: primary", "sote: primary", []string{"sote", "kagami config init -"}},
	} {
		t.Run(name, func(t *testing.T) {
			file, _ := daemonFile(t, "")
			edit(t, file, c.part, c.with)
			code := control.ExitRefused
			if name == "no configuration" {
				code = control.ExitUsage
			}
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			r := kagamiWith(ctx, t, &app{}, "daemon", "--config", file)
			if r.code != code || strings.Count(r.err, "\n  next: ") != 1 {
				t.Errorf("%d: %s", r.code, r.err)
			}
			for _, w := range c.want {
				if !strings.Contains(r.err, w) {
					t.Errorf("no %q in %s", w, r.err)
				}
			}
		})
	}
}

// TestDaemonWithUnusableDisks: declared disks that are in use or of another size
// do not keep the daemon from starting; status says what to do, and so do commands.
func TestDaemonWithUnusableDisks(t *testing.T) {
	file, dir := daemonFile(t, "peers: [{name: dr, address: 127.0.0.1:1}]\ngroups:\n"+
		"  - {name: good, peer: dr, disks: [{name: d, image: DIR/good.raw, size: 1MiB}]}\n"+
		"  - {name: used, peer: dr, disks: [{name: d, image: DIR/used.raw, size: 1MiB}]}\n"+
		"  - {name: large, peer: dr, disks: [{name: d, image: DIR/large.raw, size: 1MiB}]}\n")
	write(t, filepath.Join(dir, "large.raw"), strings.Repeat("x", 2<<20))
	img, err := images.CreateImage(images.OS{}, filepath.Join(dir, "used.raw"), 1<<20, "")
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	ctx, stop := context.WithCancel(t.Context())
	done := make(chan result, 1)
	go func() { done <- kagamiWith(ctx, t, &app{}, "daemon", "--config", file) }()
	defer func() {
		stop()
		if r := <-done; r.code != 0 {
			t.Errorf("daemon: %+v", r)
		}
	}()
	var r result
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		if r = kagami(t, "status", "--config", file); r.code == 0 {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("no daemon: %+v", r)
		}
	}
	for _, want := range []string{"good   source  stalled", "used   source  failed", "large  source  failed", "used.raw: in use by another process", "stop what uses the file",
		"wrong size: 2097152 bytes, want 1048576", "put the size right"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("no %q in\n%s", want, r.out)
		}
	}
	for group, next := range map[string]string{"used": "stop what uses the file", "large": "put the size right in the config file"} {
		if r := kagami(t, "unprotect", group, "--config", file); r.code != control.ExitRefused || !strings.Contains(r.err, "\n  next: "+next) {
			t.Errorf("%s: %+v", group, r)
		}
	}
}
