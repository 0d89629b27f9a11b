package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const failoverLong = `Take a VM over at this site: seal its stream at the last whole epoch, apply all
of it, replay the file systems' journals, define the VM here as the configuration
maps it, and start it. Everything that was acknowledged to the VM at the other
site is there.

While the other site is connected this is refused, because its VM may be
running, and so is a replica that lost something it had acknowledged or was changed
outside kagami; --force overrides both. The command can be repeated: a failover that was
broken off is taken up where it stopped. It goes on when this command is interrupted.`

const failoverExample = `  kagami failover web --dry-run    # what would be recovered, and is anything in the way
  kagami failover web
  kagami failover web --no-start   # make the disks ready, start nothing`

func (a *app) failoverCmd() *cobra.Command {
	var req control.FailoverRequest
	var json bool
	cmd := &cobra.Command{
		Use: "failover VM", Short: "Start the replica of a VM at this site",
		Long: failoverLong, Example: failoverExample,
		Args: oneVM, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.VM = args[0]
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			rep, err := c.Failover(cmd.Context(), req, r.event)
			if err := r.end(rep, cancelled(err, "the failover goes on; kagami status "+req.VM+" shows its outcome")); err != nil || json {
				return err
			}
			a.printf("%s", failoverText(rep, req))
			return nil
		}),
	}
	cmd.Flags().BoolVar(&req.Force, "force", false, "fail over although the other site is connected, or the replica damaged")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "say what would be recovered, change nothing")
	cmd.Flags().BoolVar(&req.NoStart, "no-start", false, "make the disks ready, but define and start no VM")
	cmd.Flags().BoolVar(&json, "json", false, "write events and report as JSON, one per line")
	return cmd
}

// failoverText is the report for people.
func failoverText(r control.FailoverReport, req control.FailoverRequest) string {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-10s %s\n", name, fmt.Sprintf(format, args...))
	}
	switch {
	case r.DryRun:
		fmt.Fprintf(&b, "%s can be failed over\n", r.Group)
	case req.NoStart || r.Domain == "":
		fmt.Fprintf(&b, "the disks of %s are ready\n", r.Group)
	default:
		fmt.Fprintf(&b, "%s runs here as %s\n", r.Group, r.Domain)
	}
	row("up to", "LSN %d", r.LSN)
	row("RPO", "%s", span(seconds(r.RPOSeconds)))
	if !r.DryRun {
		row("RTO", "%s", span(seconds(r.RTOSeconds)))
		row("lineage", "%s", r.Lineage)
		row("journal", "%s replayed", count(r.Replayed, "transaction"))
	}
	if r.Lost != "" {
		row("lost", "%s", r.Lost)
	}
	for _, n := range r.Notes {
		row("note", "%s", n)
	}
	return b.String()
}
