package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
	"kagami/appliance/control"
)

const setLong = `Change when the flushes of a group's disks are answered, while its VM runs; at the
site where the VM runs. Without flags: show what counts.

sync: when what they cover is durable at both sites. async: when it is durable at
this one; a loss of this site then costs at most what --async-bytes and --async-age
allow, and the VM waits when the other site is further behind than that.

--on-link-loss says what happens when the other site cannot be reached, or takes nothing.
stall: flushes wait, nothing that was answered can be lost. continue: after a few seconds
the VM goes on without it, unprotected and with an alarm, until the two sites are alike
again. After a restart of this host a VM does not go on without having heard of the other
site, which may have taken over; to say continue again lets it.

What is set counts until it is set again, or taken back with --default; it wins over
the configuration, and outlives restarts of the daemon.`

const setExample = `  kagami set web
  kagami set web --mode async --async-bytes 8MiB --async-age 2s
  kagami set web --mode sync
  kagami set web --on-link-loss continue
  kagami set web --default          # what the configuration says`

func (a *app) setCmd() *cobra.Command {
	var req control.SetRequest
	var bytes string
	var age time.Duration
	var asJSON bool
	cmd := &cobra.Command{
		Use: "set GROUP", Short: "Change when a group's flushes are answered, live",
		Long: setLong, Example: setExample,
		Args: oneGroup, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.Group, req.AsyncSeconds = args[0], age.Seconds()
			if bytes != "" {
				n, err := config.ParseSize(bytes)
				if err != nil {
					return &control.Error{Code: "usage", Message: "--async-bytes: " + err.Error(), Hint: "for instance 8MiB", Exit: control.ExitUsage}
				}
				req.AsyncBytes = n
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			p, err := c.Set(cmd.Context(), req)
			if err != nil {
				return err
			}
			if asJSON {
				return a.asJSON(p)
			}
			a.printf("%s", policyText(p))
			return nil
		}),
	}
	cmd.Flags().StringVar(&req.Mode, "mode", "", "sync or async")
	cmd.Flags().StringVar(&bytes, "async-bytes", "", "what the other site may lack in mode async, for instance 8MiB")
	cmd.Flags().DurationVar(&age, "async-age", 0, "and for how long, for instance 5s")
	cmd.Flags().StringVar(&req.OnLinkLoss, "on-link-loss", "", "stall or continue: whether the VM waits, or goes on unprotected")
	cmd.Flags().BoolVar(&req.Default, "default", false, "go back to what the configuration says")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write what counts as JSON")
	return cmd
}

// policyText is a policy for people.
func policyText(p control.Policy) string {
	from := "the configuration"
	if p.Set {
		from = "kagami set"
	}
	return fmt.Sprintf("%s: %s, on link loss: %s (by %s)\n", p.Group, modeText(p.Mode, p.AsyncBytes, p.AsyncSeconds), p.OnLinkLoss, from)
}

// modeText names a mode and its bound.
func modeText(mode string, bytes int64, age float64) string {
	if mode != config.ModeAsync {
		return mode
	}
	return fmt.Sprintf("%s, at most %s and %s behind", mode, size(bytes), span(seconds(age)))
}
