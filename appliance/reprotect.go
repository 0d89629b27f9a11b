package main

import (
	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const reprotectLong = `Give a VM that was failed over to this site a replica again: the site that it came
from. What that site holds beyond the failover is kept there first (kagami branches),
then it is overwritten where the two sites differ: what was written here since the
failover, and what was under way there at its end. The VM runs on meanwhile; its disks
pause for a moment at the beginning. It is protected when the command ends.

Refused while the VM still runs at the other site. The command can be repeated: what
was broken off is taken up where it stopped.`

const reprotectExample = `  kagami reprotect web --dry-run    # how much may differ, and is anything in the way
  kagami reprotect web`

func (a *app) reprotectCmd() *cobra.Command {
	var req control.ReprotectRequest
	var json bool
	cmd := &cobra.Command{
		Use: "reprotect VM", Short: "Replicate a failed-over VM back to the site it came from",
		Long: reprotectLong, Example: reprotectExample,
		Args: oneVM, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.Group = args[0]
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			return r.end(struct{}{}, cancelled(c.Reprotect(cmd.Context(), req, r.event), "what was begun goes on; kagami status "+req.Group+" shows how far it is"))
		}),
	}
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what would be done, change nothing")
	cmd.Flags().BoolVar(&req.NoWait, "no-wait", false, "do not wait until the VM is protected")
	cmd.Flags().BoolVar(&json, "json", false, "write events and outcome as JSON, one per line")
	return cmd
}
