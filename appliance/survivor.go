package main

import (
	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const survivorLong = `Decide a split brain: both sites serve a VM's disks, or the wrong one was promoted,
and neither's data comes from the other's. The data of the site where this is run
survives; what the other site has beyond is kept there (kagami branches), and it
becomes the replica. A source that was superseded serves again, in a lineage of its own.

Nothing is decided without --yes; without it, and with --dry-run, the command says what
both sites have. Refused while a VM still runs from the other site's disks.`

const survivorExample = `  kagami survivor web --dry-run    # what does each site have?
  kagami survivor web --yes`

func (a *app) survivorCmd() *cobra.Command {
	var req control.SurvivorRequest
	var json bool
	cmd := &cobra.Command{
		Use: "survivor VM", Short: "Decide a split brain in favour of this site's data",
		Long: survivorLong, Example: survivorExample,
		Args: oneVM, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.Group = args[0]
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			return r.end(struct{}{}, cancelled(c.Survivor(cmd.Context(), req, r.event), "it goes on; kagami status "+req.Group+" shows its outcome"))
		}),
	}
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what both sites have, change nothing")
	cmd.Flags().BoolVar(&req.Yes, "yes", false, "give up what the other site has beyond")
	cmd.Flags().BoolVar(&json, "json", false, "write events and outcome as JSON, one per line")
	return cmd
}
