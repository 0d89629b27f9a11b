package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const branchesLong = `List what this site keeps of superseded disks. When a site becomes the replica of
another lineage (kagami reprotect, switchover, failback, survivor), the regions of its
disks that may hold something which that lineage does not have are kept first: in
sparse files of the disks' sizes, everything at its place.

They are kept until they are removed with --delete.`

const branchesExample = `  kagami branches
  kagami branches web -o wide                    # with the files
  kagami branches web --delete main-20261126T101500.000Z`

func (a *app) branchesCmd() *cobra.Command {
	var req control.BranchesRequest
	var asJSON bool
	var output string
	cmd := &cobra.Command{
		Use: "branches [VM]", Short: "List or remove what is kept of superseded disks",
		Long: branchesLong, Example: branchesExample,
		Args: cobra.MaximumNArgs(1), ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			if len(args) > 0 {
				req.Group = args[0]
			}
			if err := branchUsage(req, output); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			bs, err := c.Branches(cmd.Context(), req)
			if err != nil {
				return err
			}
			if asJSON || output == "json" {
				return a.asJSON(bs)
			}
			a.printf("%s", branchesText(bs, output == "wide"))
			return nil
		}),
	}
	cmd.Flags().StringVar(&req.Delete, "delete", "", "name of a branch to remove")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write the list as JSON")
	cmd.Flags().StringVarP(&output, "output", "o", "", "wide or json")
	return cmd
}

func branchUsage(req control.BranchesRequest, output string) error {
	switch {
	case req.Delete != "" && req.Group == "":
		return &control.Error{Code: "usage", Message: "--delete wants the name of the VM, too", Hint: "kagami branches VM --delete " + req.Delete, Exit: control.ExitUsage}
	case output != "" && output != "wide" && output != "json":
		return &control.Error{Code: "usage", Message: fmt.Sprintf("there is no output format %q", output), Hint: "allowed: wide, json", Exit: control.ExitUsage}
	}
	return nil
}

// branchesText is the list for people.
func branchesText(bs []control.Branch, wide bool) string {
	if len(bs) == 0 {
		return "nothing is kept\n"
	}
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	row := func(cells ...string) { _, _ = fmt.Fprintln(w, strings.Join(cells, "\t")) }
	head := []string{"GROUP", "BRANCH", "KEPT", "AT MOST", "DISKS"}
	if wide {
		head = append(head, "LINEAGE", "REPLACED BY", "FILE")
	}
	row(head...)
	for _, x := range bs {
		var names []string
		for _, d := range x.Disks {
			names = append(names, d.Name)
		}
		cells := []string{x.Group, x.Name, x.At.UTC().Format(time.RFC3339), size(x.Bytes), strings.Join(names, ",")}
		if !wide {
			row(cells...)
			continue
		}
		for _, d := range x.Disks {
			row(append(cells, x.Lineage, x.ReplacedBy, d.File)...)
		}
	}
	_ = w.Flush() // a Builder takes everything
	return b.String()
}
