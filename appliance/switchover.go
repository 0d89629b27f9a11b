package main

import (
	"context"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const switchoverLong = `Move a VM to its replica's site on purpose: shut it down here, ship the last of it,
start it there, and replicate in the other direction from then on. Nothing is lost.
Run it at the site where the VM runs; run at the other site afterwards, it moves the VM back.

What stands in the way at either site is found before the VM is shut down. If the
other site refuses after that, the VM is started here again. It goes on when this
command is interrupted.`

const switchoverExample = `  kagami switchover web --dry-run
  kagami switchover web
  kagami switchover web --shutdown-timeout 10m
  kagami switchover web --no-start        # the disks move, the VM is started by hand`

const failbackLong = `Bring a VM home that was failed over to this site: make the site that it came from
the replica (kagami reprotect), wait until it has everything, and move the VM there
(kagami switchover). Only what differs is shipped. The VM is down for the time of the
switchover alone. It goes on when this command is interrupted, and can be repeated.`

const failbackExample = `  kagami failback web --dry-run
  kagami failback web`

func (a *app) switchoverCmd() *cobra.Command {
	return a.movingCmd("switchover VM", "Move a VM to its replica's site, without loss", switchoverLong, switchoverExample, (*control.Client).Switchover)
}

func (a *app) failbackCmd() *cobra.Command {
	return a.movingCmd("failback VM", "Bring a failed-over VM back to the site it came from", failbackLong, failbackExample, (*control.Client).Failback)
}

// moving is a request that ends with the VM at the other site.
type moving func(*control.Client, context.Context, control.SwitchoverRequest, func(control.Event)) (control.FailoverReport, error)

func (a *app) movingCmd(use, short, long, example string, move moving) *cobra.Command {
	var req control.SwitchoverRequest
	var patience time.Duration
	var json bool
	cmd := &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: oneVM, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.VM, req.ShutdownSeconds = args[0], patience.Seconds()
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			rep, err := move(c, cmd.Context(), req, r.event)
			if err := r.end(rep, cancelled(err, "it goes on; kagami status "+req.VM+" at both sites shows its outcome")); err != nil || json {
				return err
			}
			a.printf("%s", movedText(rep))
			return nil
		}),
	}
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what stands in the way, change nothing")
	cmd.Flags().BoolVar(&req.NoStart, "no-start", false, "move the disks, but define and start no VM")
	cmd.Flags().DurationVar(&patience, "shutdown-timeout", 0, "how long the guest may take to shut down (default 3m)")
	cmd.Flags().BoolVar(&json, "json", false, "write events and report as JSON, one per line")
	return cmd
}

// movedText is the report for people.
func movedText(r control.FailoverReport) string {
	switch {
	case r.DryRun:
		return r.Group + " can be moved\n"
	case r.Domain == "":
		return "the disks of " + r.Group + " are served at the other site, nothing was lost; moved in " + span(seconds(r.RTOSeconds)) + "\n"
	}
	return r.Domain + " runs at the other site, nothing was lost; moved in " + span(seconds(r.RTOSeconds)) + "\n"
}
