package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/appliance/pki"
)

// expirySoon is when config check begins to warn of a certificate's end.
const expirySoon = 60 * 24 * time.Hour

func (a *app) configCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "config", Short: "Check, write and show the configuration file",
		Long: `The configuration is one YAML file, ` + defaultConfig + ` unless --config or
$KAGAMI_CONFIG names another. See kagami help environment for overrides.`,
		Example: "  kagami config init\n  kagami config check\n  kagami config show",
	}
	cmd.AddCommand(a.configCheckCmd(), a.configInitCmd(), a.configShowCmd())
	return parentOnly(cmd)
}

func (a *app) configCheckCmd() *cobra.Command {
	var fileOnly bool
	cmd := &cobra.Command{
		Use: "check [FILE]", Short: "Say everything that is wrong with the configuration",
		Long: `Read the configuration as the daemon would and say everything that is wrong with
it: unknown keys, wrong types, impossible values; and whether certificates, keys
and groups it names are there and belong together. Ends with 2 if anything is.`,
		Example: "  kagami config check\n  kagami config check ./kagami.yaml --file-only",
		Args:    cobra.MaximumNArgs(1),
		RunE: action(func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				a.config = args[0]
			}
			c, err := a.load()
			if err != nil {
				return err
			}
			if !fileOnly {
				if err := a.checkHost(c); err != nil {
					return err
				}
			}
			a.printf("%s: ok\n", a.configPath())
			return nil
		}),
	}
	cmd.Flags().BoolVar(&fileOnly, "file-only", false, "do not look at certificates, keys and groups of this machine")
	return cmd
}

// checkHost looks for what the configuration needs of this machine.
func (a *app) checkHost(c *config.Config) error {
	var problems []error
	hint := "the file itself is good; kagami pki --help tells how to make certificates"
	groups := map[string]string{"control.group": c.Control.Group, "libvirt.socket_group": c.Libvirt.SocketGroup}
	for _, key := range []string{"control.group", "libvirt.socket_group"} {
		if g := groups[key]; g != "" {
			if _, err := user.LookupGroup(g); err != nil {
				problems = append(problems, fmt.Errorf("%s: %q: no such group on this machine", key, g))
				hint = "name a group of this machine (getent group lists them), or make this one; kagami pki --help tells how to make certificates"
			}
		}
	}
	id, end, err := pki.Own(pki.Files{CA: c.TLS.CA, Cert: c.TLS.Cert, Key: c.TLS.Key})
	switch {
	case err != nil:
		problems = append(problems, fmt.Errorf("tls: %w", err))
	case id.Site != c.Site:
		problems = append(problems, fmt.Errorf("tls.cert: %s is the certificate of site %s, and this is site %s", c.TLS.Cert, id.Site, c.Site))
	default:
		a.expiry(end)
	}
	if len(problems) == 0 {
		return nil
	}
	return &control.Error{
		Code: "config", Message: "configuration: " + errors.Join(problems...).Error(),
		Hint: hint, Exit: control.ExitUsage,
	}
}

// expiry notes a certificate that has ended or ends soon.
func (a *app) expiry(end time.Time) {
	switch left := end.Sub(a.now()); {
	case left <= 0:
		a.printf("note: this site's certificate ended on %s: peers refuse it\n", end.UTC().Format(time.DateOnly))
	case left < expirySoon:
		a.printf("note: this site's certificate ends on %s: issue a new one\n", end.UTC().Format(time.DateOnly))
	}
}

func (a *app) configInitCmd() *cobra.Command {
	return &cobra.Command{
		Use: "init [FILE]", Short: "Write a commented example to fill in",
		Long: `Write a complete, commented example configuration to FILE (` + defaultConfig + `
by default, - for standard output). A file that exists is not replaced.`,
		Example: "  kagami config init\n  kagami config init - | less",
		Args:    cobra.MaximumNArgs(1),
		RunE: action(func(_ *cobra.Command, args []string) error {
			path := a.configPath()
			if len(args) == 1 {
				path = args[0]
			}
			if path == "-" {
				a.printf("%s", config.Example())
				return nil
			}
			if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
				return cannotWrite(fmt.Errorf("make folder for configuration: %w", err))
			}
			err := config.WriteExample(path)
			if errors.Is(err, fs.ErrExist) {
				return &control.Error{Code: "exists", Message: path + " exists and is left as it is", Hint: "move it away first, or write to another file", Exit: control.ExitRefused}
			}
			if err != nil {
				return cannotWrite(err)
			}
			a.printf("%s written: fill in site and peers, then run kagami config check\n", path)
			return nil
		}),
	}
}

func cannotWrite(err error) error {
	return &control.Error{Code: "failed", Message: err.Error(), Hint: "run it as a user who may write there, or name another file", Exit: control.ExitFailed}
}

func (a *app) configShowCmd() *cobra.Command {
	return &cobra.Command{
		Use: "show [FILE]", Short: "Print the configuration with all defaults filled in",
		Long:    "Print the configuration that is in force: the file, overridden by the environment, with every default filled in.",
		Example: "  kagami config show",
		Args:    cobra.MaximumNArgs(1),
		RunE: action(func(_ *cobra.Command, args []string) error {
			if len(args) == 1 {
				a.config = args[0]
			}
			c, err := a.load()
			if err != nil {
				return err
			}
			data, err := c.YAML()
			if err != nil {
				return err
			}
			a.printf("%s", data)
			return nil
		}),
	}
}
