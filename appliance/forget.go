package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const forgetLong = `Give up what this site has of a group, so that its name is free: a group that the
configuration declares no more, the old source after a failover, a replica that
nobody wants. Nothing is deleted: images that kagami made and the group's state
get other names, which are printed; declared images stay as they are. If the group
is a source here, its replica ends too, and the other site keeps its images.

A group that is in use is refused. --force is needed for a source whose replica is
still there, and for what may be the only copy: a replica, a promoted group, an old
source whose new site is not connected. It goes on when this command is interrupted.`

const forgetExample = `  kagami forget scratch --dry-run    # what would be renamed, and is --force needed
  kagami forget scratch
  kagami forget web --force`

func (a *app) forgetCmd() *cobra.Command {
	var req control.ForgetRequest
	var json bool
	cmd := &cobra.Command{
		Use: "forget GROUP", Short: "Give up what this site has of a group",
		Long: forgetLong, Example: forgetExample,
		Args: oneGroup, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.Group = args[0]
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			return r.end(struct{}{}, cancelled(c.Forget(cmd.Context(), req, r.event), "it goes on; kagami status shows when the group is gone"))
		}),
	}
	cmd.Flags().BoolVar(&req.Force, "force", false, "give up what may be the only copy, or has a replica")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what would be done, change nothing")
	cmd.Flags().BoolVar(&json, "json", false, "write events and outcome as JSON, one per line")
	return cmd
}

// oneGroup wants the name of one group.
func oneGroup(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return fmt.Errorf("%s wants the name of one group, not %s", cmd.CommandPath(), count(len(args), "argument"))
	}
	return nil
}
