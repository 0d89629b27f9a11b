package main

import (
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"kagami/appliance/config"
	"kagami/appliance/control"
)

const verifyLong = `Compare every byte of a group's disks with its replica, while the VM runs; at the
site where the VM runs. Each piece is compared as both sites hold it at the same
record of the stream, so a difference is never a write that is on its way.

Ends with 1 if something differs. What differs is written to a file, with the hashes
of both sides. --repair ships it to the other site; an alarm tells of it until then.

verify.every in the configuration does it regularly; kagami status GROUP shows when it
was done last.`

const verifyExample = `  kagami verify web
  kagami verify web --rate 20MiB      # bytes a second
  kagami verify web --resume          # where the last one was broken off
  kagami verify web --repair`

func (a *app) verifyCmd() *cobra.Command {
	var req control.VerifyRequest
	var rate string
	var json bool
	cmd := &cobra.Command{
		Use: "verify GROUP", Short: "Compare a group's disks with its replica, live",
		Long: verifyLong, Example: verifyExample,
		Args: oneGroup, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.Group = args[0]
			if rate != "" {
				n, err := config.ParseSize(rate)
				if err != nil {
					return &control.Error{Code: "usage", Message: "--rate: " + err.Error(), Hint: "for instance 20MiB", Exit: control.ExitUsage}
				}
				req.BytesPerSecond = n
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			rep, err := c.Verify(cmd.Context(), req, r.event)
			if err := r.end(rep, err); err != nil {
				return err
			}
			if !json {
				a.printf("%s", verifyText(rep))
			}
			return differs(rep)
		}),
	}
	cmd.Flags().BoolVar(&req.Repair, "repair", false, "ship what differs")
	cmd.Flags().BoolVar(&req.Resume, "resume", false, "go on where the last comparison was broken off, if it was")
	cmd.Flags().StringVar(&rate, "rate", "", "compare at most so many bytes a second, for instance 20MiB")
	cmd.Flags().BoolVar(&json, "json", false, "write events and report as JSON, one per line")
	return cmd
}

// verifyText is the report for people.
func verifyText(r control.VerifyReport) string {
	var b strings.Builder
	fmt.Fprintf(&b, "%s: %s compared in %s, up to record %d\n", r.Group, size(r.Compared*r.ChunkBytes), span(seconds(r.Seconds)), r.LSN)
	if r.Differ == 0 {
		b.WriteString("  both sites are equal\n")
		return b.String()
	}
	fmt.Fprintf(&b, "  %s of %s differ, %d shipped\n  %s names them\n", count(int(r.Differ), "piece"), size(r.ChunkBytes), r.Repaired, r.Evidence)
	return b.String()
}

// differs is the error of a comparison that found something.
func differs(r control.VerifyReport) error {
	switch {
	case r.Differ == 0:
		return nil
	case r.Repaired == r.Differ:
		return &control.Error{Code: "differed", Exit: control.ExitFailed, Message: fmt.Sprintf("%s of %s differed, and were shipped to the other site", count(int(r.Differ), "piece"), r.Group),
			Hint: "look at the other site's disks: what was there had been written right, or changed outside kagami"}
	}
	return &control.Error{Code: "differs", Exit: control.ExitFailed, Message: fmt.Sprintf("%s of %s differ", count(int(r.Differ-r.Repaired), "piece"), r.Group),
		Hint: "kagami verify " + r.Group + " --repair ships them"}
}
