package main

import (
	"errors"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const protectLong = `Protect a running VM: put its disks behind kagami while it runs, copy them to
the other site, and from then on let an fsync in the VM return only when it is
durable at both sites.

Without --disk all writable disks are protected. The VM keeps running; its old
files are kept and locked. If anything fails, or the command is interrupted,
before the VM is moved, everything is taken back and the VM never noticed.
Until the first copy has ended, kagami status says that the VM is unprotected.`

const protectExample = `  kagami protect web --to dr
  kagami protect web --disk vdb --disk vdc --to dr
  kagami protect web --to dr --dry-run     # check everything, change nothing`

func (a *app) protectCmd() *cobra.Command {
	var req control.ProtectRequest
	var json bool
	cmd := &cobra.Command{
		Use: "protect VM --to PEER", Short: "Replicate a running VM's disks to another site",
		Long: protectLong, Example: protectExample,
		Args: oneVM, ValidArgsFunction: cobra.NoFileCompletions,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.VM = args[0]
			if req.To == "" {
				return usageError("--to names no site", "name a peer of the configuration; kagami status lists them")
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			return r.end(struct{}{}, cancelled(c.Protect(cmd.Context(), req, r.event), "what was begun is taken back; kagami status shows when"))
		}),
	}
	cmd.Flags().StringVar(&req.To, "to", "", "the site that keeps the copy, a peer of the configuration (required)")
	cmd.Flags().StringSliceVar(&req.Disks, "disk", nil, "protect this disk only, by its target in the VM (vdb); may be repeated")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "check everything, change nothing")
	cmd.Flags().BoolVar(&json, "json", false, "write events and outcome as JSON, one per line")
	mustBe(cmd.MarkFlagRequired("to"))
	mustBe(cmd.RegisterFlagCompletionFunc("to", a.peerNames))
	mustBe(cmd.RegisterFlagCompletionFunc("disk", cobra.NoFileCompletions))
	return cmd
}

// cancelled adds to the error of an interrupted command what becomes of it.
func cancelled(err error, next string) error {
	var e *control.Error
	if errors.As(err, &e) && e.Code == "interrupted" {
		return &control.Error{Code: e.Code, Message: e.Message, Hint: next, Exit: e.Exit}
	}
	return err
}

// mustBe is for mistakes in the definition of a command, such as a flag that
// does not exist: the tests construct every command.
func mustBe(err error) {
	if err != nil {
		panic(err)
	}
}
