package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
	"kagami/appliance/control"
	"kagami/appliance/pki"
)

var defaultPKI = filepath.Dir(config.DefaultCA)

const pkiLong = `Sites trust each other through one certificate authority. It is made at one site,
with that site's own certificate; every other site gets a bundle issued there.
Pairing two sites takes two commands:

  kagami pki init --site primary      at site primary
  kagami pki issue dr                 at site primary; carry dr.tar to site dr and
                                      unpack it there into /etc/kagami/pki

The bundle holds a private key: carry it over a channel you trust, then delete it.`

func (a *app) pkiCmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "pki", Short: "Make the certificates sites trust each other by", Long: pkiLong,
		Example: "  kagami pki init --site primary\n  kagami pki issue dr --group web --group db\n  kagami pki show",
	}
	cmd.AddCommand(a.pkiInitCmd(), a.pkiIssueCmd(), a.pkiShowCmd())
	return parentOnly(cmd)
}

func (a *app) pkiInitCmd() *cobra.Command {
	var dir, site string
	var force bool
	cmd := &cobra.Command{
		Use: "init --site NAME", Short: "Make the certificate authority and this site's certificate",
		Long: `Make the certificate authority and this site's certificate: ca.crt, ca.key,
site.crt and site.key. Files that exist are left alone; with --force they are
replaced, and every certificate issued before becomes worthless.`,
		Example: "  kagami pki init --site primary",
		Args:    cobra.NoArgs,
		RunE: action(func(*cobra.Command, []string) error {
			if err := pki.Init(dir, site, pki.Options{Force: force, Now: a.now()}); err != nil {
				return pkiError(err, "put that right, then run kagami pki init again")
			}
			a.printf("CA and certificate of site %s are in %s\nnext: kagami pki issue OTHER-SITE\n", site, dir)
			return nil
		}),
	}
	cmd.Flags().StringVar(&site, "site", "", "this site's name, as in its configuration (required)")
	cmd.Flags().StringVar(&dir, "dir", defaultPKI, "folder of the files")
	cmd.Flags().BoolVar(&force, "force", false, "replace files that exist")
	mustBe(cmd.MarkFlagRequired("site"))
	return cmd
}

func (a *app) pkiIssueCmd() *cobra.Command {
	var dir, out string
	var groups []string
	var days int
	var force bool
	cmd := &cobra.Command{
		Use: "issue SITE", Short: "Make the certificate of another site",
		Long: `Make a bundle for another site: ca.crt, site.crt and site.key, as a tar archive if
the name ends in .tar, else as a folder. That site may ship every group to others,
or only those named with --group; what others ship to it, their own certificates
say. Run for this site's own name it renews its
certificate.`,
		Example: "  kagami pki issue dr\n  kagami pki issue dr --group web --group db --out /root/dr.tar",
		Args:    cobra.ExactArgs(1), ValidArgsFunction: a.peerNames,
		RunE: action(func(_ *cobra.Command, args []string) error {
			site := args[0]
			if out == "" {
				out = site + ".tar"
			}
			if days < 1 || days > 36500 {
				return usageError(fmt.Sprintf("--days %d is impossible", days), "use 1 to 36500")
			}
			o := pki.Options{Force: force, Now: a.now(), Lifetime: time.Duration(days) * 24 * time.Hour}
			if err := pki.Issue(dir, site, groups, out, o); err != nil {
				return pkiError(err, "certificates are issued at the site where kagami pki init was run, from the folder --dir")
			}
			a.printf("bundle of site %s: %s\nnext: carry it there and put its files into %s; it holds a private key\n", site, out, defaultPKI)
			return nil
		}),
	}
	cmd.Flags().StringVar(&dir, "dir", defaultPKI, "folder with the CA")
	cmd.Flags().StringVar(&out, "out", "", "archive (.tar) or folder to write (default SITE.tar)")
	cmd.Flags().StringSliceVar(&groups, "group", []string{pki.AllGroups}, "group the site may ship; may be repeated; * for all")
	cmd.Flags().IntVar(&days, "days", int(pki.SiteLifetime/(24*time.Hour)), "days until the certificate ends")
	cmd.Flags().BoolVar(&force, "force", false, "replace a bundle that exists")
	return cmd
}

func (a *app) pkiShowCmd() *cobra.Command {
	var dir string
	var json bool
	cmd := &cobra.Command{
		Use: "show [FILE]...", Short: "Describe certificates",
		Long:    "Describe certificate files: whose they are, which groups they allow, when they end. Without FILE: the CA's and this site's.",
		Example: "  kagami pki show\n  kagami pki show ./site.crt --json",
		RunE: action(func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				args = []string{filepath.Join(dir, pki.CAName), filepath.Join(dir, pki.CertName)}
			}
			infos := make([]pki.Info, 0, len(args))
			for _, path := range args {
				info, err := pki.Describe(path)
				if err != nil {
					return pkiError(fmt.Errorf("read certificate: %w", err), "name a certificate's file, or the folder with --dir")
				}
				infos = append(infos, info)
			}
			if json {
				return a.printJSON(infos)
			}
			for i, info := range infos {
				a.printf("%s", infoText(args[i], info))
			}
			return nil
		}),
	}
	cmd.Flags().StringVar(&dir, "dir", defaultPKI, "folder of the files")
	cmd.Flags().BoolVar(&json, "json", false, "write JSON")
	return cmd
}

func infoText(path string, i pki.Info) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", path)
	row := func(name, value string) { fmt.Fprintf(&b, "  %-8s %s\n", name, value) }
	row("for", i.Subject)
	if !i.CA {
		row("groups", strings.Join(i.Groups, ", "))
		row("by", i.Issuer)
	}
	row("from", i.NotBefore.UTC().Format(time.DateOnly))
	row("until", i.NotAfter.UTC().Format(time.DateOnly))
	row("sha256", i.Fingerprint)
	return b.String()
}

// pkiError gives an error of package pki its exit code and what to do next;
// otherwise is that of errors which bring nothing better.
func pkiError(err error, otherwise string) error {
	switch {
	case errors.Is(err, fs.ErrExist):
		return &control.Error{Code: "exists", Message: err.Error(), Hint: "kagami pki show describes what is there; keep it, or write elsewhere", Exit: control.ExitRefused}
	case errors.Is(err, pki.ErrName):
		return usageError(err.Error(), "name sites and groups as the configuration does; see kagami pki --help")
	case errors.Is(err, pki.ErrKeyMode):
		otherwise = "chmod 600 the key; if others may have read it, begin anew with kagami pki init --force"
	}
	return &control.Error{Code: "failed", Message: err.Error(), Hint: otherwise, Exit: control.ExitFailed}
}
