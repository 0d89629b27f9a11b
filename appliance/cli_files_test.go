package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/appliance/pki"
)

func TestConfigCommands(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "etc", "kagami.yaml")
	if r := kagami(t, "config", "check", file); r.code != control.ExitUsage || !strings.Contains(r.err, "no such file") || !strings.Contains(r.err, "next: kagami config init") {
		t.Errorf("missing: %+v", r)
	}
	if r := kagami(t, "config", "init", file); r.code != 0 || !strings.HasPrefix(r.out, file+" written") {
		t.Errorf("init: %+v", r)
	}
	if r := kagami(t, "config", "init", "--config", file); r.code != control.ExitRefused || !strings.Contains(r.err, "exists and is left as it is") {
		t.Errorf("init again: %+v", r)
	}
	if r := kagami(t, "config", "init", file+"/below/kagami.yaml"); r.code != control.ExitFailed || !strings.Contains(r.err, "\n  next: run it as a user") {
		t.Errorf("init below a file: %+v", r)
	}
	if r := kagami(t, "config", "init", "-"); r.code != 0 || r.out != string(config.Example()) {
		t.Errorf("init -: %+v", r)
	}
	if r := kagami(t, "config", "check", file, "--file-only"); r.code != 0 || r.out != file+": ok\n" || r.err != "" {
		t.Errorf("check: %+v", r)
	}
	a := &app{environ: []string{"KAGAMI_STIE=x"}}
	if r := kagamiWith(t.Context(), t, a, "config", "check", file, "--file-only"); r.code != control.ExitUsage || r.err != "kagami: configuration: the environment sets what overrides nothing: KAGAMI_STIE\n  next: unset it, or spell it as kagami help environment does\n" {
		t.Errorf("misspelt variable: %+v", r)
	}
	r := kagami(t, "config", "show", "--config", file)
	if r.code != 0 || !strings.Contains(r.out, "spool_bytes: 2GiB") {
		t.Errorf("show: %+v", r)
	}
	again := filepath.Join(dir, "again.yaml")
	write(t, again, r.out)
	if r2 := kagami(t, "config", "show", again); r2.out != r.out {
		t.Errorf("shown, read and shown again:\n%s", r2.out)
	}
	write(t, again, "site: A\nlisten: 5\nnonsense: 1\n")
	if r := kagami(t, "config", "check", again); r.code != control.ExitUsage || strings.Count(r.err, again+":") != 3 || r.out != "" {
		t.Errorf("three problems: %+v", r)
	}
	if r := kagami(t, "config", "show", again); r.code != control.ExitUsage || r.out != "" {
		t.Errorf("show of a broken file: %+v", r)
	}
}

func TestConfigCheckLooksAtTheMachine(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "kagami.yaml")
	conf := func(site, group string) {
		write(t, file, "site: "+site+"\ncontrol: {group: "+group+"}\nlibvirt: {enabled: false}\ntls: {ca: "+dir+"/pki/ca.crt, cert: "+dir+"/pki/site.crt, key: "+dir+"/pki/site.key}\n")
	}
	conf("primary", "no-such-group")
	r := kagami(t, "config", "check", file)
	if r.code != control.ExitUsage || !strings.Contains(r.err, `control.group: "no-such-group": no such group`) || !strings.Contains(r.err, "tls: read CA") {
		t.Errorf("%+v", r)
	}
	if err := pki.Init(filepath.Join(dir, "pki"), "primary", pki.Options{Now: clock}); err != nil {
		t.Fatal(err)
	}
	conf("primary", "root")
	if r := kagami(t, "config", "check", file); r.code != 0 || r.out != file+": ok\n" {
		t.Errorf("%+v", r)
	}
	write(t, file, strings.Replace(read(t, file), "enabled: false", "enabled: false, socket_group: no-such-group", 1))
	if r := kagami(t, "config", "check", file); r.code != control.ExitUsage || !strings.Contains(r.err, `libvirt.socket_group: "no-such-group": no such group`) || !strings.Contains(r.err, "next: name a group of this machine") {
		t.Errorf("a group of sockets without libvirt: %+v", r)
	}
	conf("dr", "root")
	if r := kagami(t, "config", "check", file); r.code != control.ExitUsage || !strings.Contains(r.err, "is the certificate of site primary, and this is site dr") {
		t.Errorf("%+v", r)
	}
	conf("primary", "root")
	for ago, want := range map[time.Duration]string{
		pki.SiteLifetime - 24*time.Hour: "certificate ends on 2026-11-23: issue a new one",
		pki.SiteLifetime + 24*time.Hour: "certificate ended on 2026-11-21: peers refuse it",
	} {
		if err := pki.Init(filepath.Join(dir, "pki"), "primary", pki.Options{Now: clock.Add(-ago), Force: true}); err != nil {
			t.Fatal(err)
		}
		if r := kagami(t, "config", "check", file); r.code != 0 || !strings.Contains(r.out, want) {
			t.Errorf("%+v", r)
		}
	}
}

func TestPKICommands(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "pki")
	out := filepath.Join(t.TempDir(), "dr.tar")
	if r := kagami(t, "pki", "init", "--dir", dir); r.code != control.ExitUsage {
		t.Errorf("without a site: %+v", r)
	}
	if r := kagami(t, "pki", "issue", "dr", "--dir", dir, "--out", out); r.code != control.ExitFailed || !strings.Contains(r.err, "read CA") || !strings.Contains(r.err, "next: certificates are issued at the site where") {
		t.Errorf("without a CA: %+v", r)
	}
	if r := kagami(t, "pki", "init", "--site", "primary", "--dir", dir); r.code != 0 {
		t.Errorf("init: %+v", r)
	}
	if r := kagami(t, "pki", "init", "--site", "primary", "--dir", dir); r.code != control.ExitRefused || !strings.Contains(r.err, "nothing was changed") || !strings.Contains(r.err, "next: ") {
		t.Errorf("init again: %+v", r)
	}
	if r := kagami(t, "pki", "issue", "dr", "--dir", dir, "--out", out, "--group", "web", "--group", "db"); r.code != 0 || !strings.Contains(r.out, out) {
		t.Errorf("issue: %+v", r)
	}
	if r := kagami(t, "pki", "issue", "dr", "--dir", dir, "--out", out); r.code != control.ExitRefused {
		t.Errorf("issue again: %+v", r)
	}
	if r := kagami(t, "pki", "issue", "dr", "--dir", dir, "--out", out, "--days", "0"); r.code != control.ExitUsage {
		t.Errorf("no days: %+v", r)
	}
	folder := filepath.Join(t.TempDir(), "bundle")
	if r := kagami(t, "pki", "issue", "dr", "--dir", dir, "--out", folder, "--days", "30"); r.code != 0 {
		t.Errorf("issue to a folder: %+v", r)
	}
	r := kagami(t, "pki", "show", filepath.Join(folder, pki.CertName))
	for _, want := range []string{"for      kagami site dr", "groups   *", "by       kagami CA made at primary", "until    2026-12-22"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("show: %q is missing in %+v", want, r)
		}
	}
	if r := kagami(t, "pki", "show", "--dir", dir, "--json"); r.code != 0 || strings.Count(r.out, `"sha256"`) != 2 {
		t.Errorf("show --json: %+v", r)
	}
	for _, args := range [][]string{{"init", "--site", "Bad"}, {"issue", "DR"}, {"issue", "dr", "--group", "a/b"}} {
		if r := kagami(t, append(append([]string{"pki"}, args...), "--dir", dir)...); r.code != control.ExitUsage || !strings.Contains(r.err, "name \"") || !strings.Contains(r.err, "next: ") {
			t.Errorf("%v: %+v", args, r)
		}
	}
	if r := kagami(t, "pki", "show", filepath.Join(dir, pki.KeyName)); r.code != control.ExitFailed || !strings.Contains(r.err, "next: ") {
		t.Errorf("show of a key: %+v", r)
	}
}

// TestNamesAgree: what the configuration takes as a name, certificates can carry.
func TestNamesAgree(t *testing.T) {
	dir := t.TempDir()
	if err := pki.Init(dir, "a", pki.Options{}); err != nil {
		t.Fatal(err)
	}
	out := 0
	for _, name := range []string{"a", "A", "0", "-a", ".a", "_a", "a.b_c-d", "a b", "a/b", "", "ä", strings.Repeat("a", 63), strings.Repeat("a", 64), "*"} {
		issue := func(site, group string) bool {
			out++
			return pki.Issue(dir, site, []string{group}, filepath.Join(dir, "out", string(rune('a'+out%26)), strings.Repeat("x", out)), pki.Options{}) == nil
		}
		if got, want := issue(name, "g"), config.ValidName(name); got != want {
			t.Errorf("site %q: certificate %v, configuration %v", name, got, want)
		}
		if got, want := issue("s", name), config.ValidGroupName(name) || name == pki.AllGroups; got != want {
			t.Errorf("group %q: certificate %v, configuration %v", name, got, want)
		}
	}
}

func TestHuman(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1 KiB", 1536: "1.5 KiB", 1 << 20: "1 MiB", 1<<20 - 1: "1 MiB", 1000 << 10: "1 MiB",
		112 << 20: "112 MiB", 10 << 30: "10 GiB", 1 << 62: "4096 PiB", -5: "-5 B",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 0: "0s", 20 * time.Millisecond: "20ms", time.Second: "1s", 5500 * time.Millisecond: "5.5s", 9999 * time.Millisecond: "9.9s",
		59 * time.Second: "59s", 61 * time.Second: "1m01s", time.Hour + 5*time.Minute: "1h05m", 50 * time.Hour: "2d2h",
	} {
		if got := span(d); got != want {
			t.Errorf("span(%v) = %q, want %q", d, got, want)
		}
	}
}

// everyCommand lists the commands and topics that users see, parents first.
func everyCommand(c *cobra.Command) []*cobra.Command {
	out := []*cobra.Command{c}
	for _, sub := range c.Commands() {
		if sub.Name() != "help" && sub.Name() != "completion" && !sub.Hidden {
			out = append(out, everyCommand(sub)...)
		}
	}
	return out
}

func TestEveryCommandHasHelp(t *testing.T) {
	a := &app{}
	for _, c := range everyCommand(a.root()) {
		if c.Short == "" || c.Long == "" {
			t.Errorf("%s has no help", c.CommandPath())
		}
		if c.Runnable() && c.Example == "" {
			t.Errorf("%s has no example", c.CommandPath())
		}
	}
}

// TestCommandReference keeps docs/cli.md true: it is made of the commands' help.
func TestCommandReference(t *testing.T) {
	a := &app{}
	var b strings.Builder
	b.WriteString("# Command reference\n\nMade from the commands' own help by `go test ./appliance -run CommandReference -update`.\n")
	for _, c := range everyCommand(a.root()) {
		b.WriteString("\n## " + c.CommandPath() + "\n\n" + c.Short + ".\n\n```text\n" + strings.TrimRight(help(t, c), "\n") + "\n```\n")
	}
	path := filepath.Join("..", "docs", "cli.md")
	if *update {
		if err := os.WriteFile(path, []byte(b.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if b.String() != string(want) {
		t.Errorf("%s is not what the commands say; run the test with -update", path)
	}
}

// help is what `kagami help COMMAND` prints.
func help(t *testing.T, c *cobra.Command) string {
	t.Helper()
	r := kagami(t, append([]string{"help"}, strings.Fields(c.CommandPath())[1:]...)...)
	if r.code != 0 || r.err != "" {
		t.Fatalf("help of %s: %+v", c.CommandPath(), r)
	}
	var lines []string
	for l := range strings.Lines(r.out) {
		lines = append(lines, strings.TrimRight(l, " \n"))
	}
	return strings.Join(lines, "\n")
}
