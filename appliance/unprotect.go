package main

import (
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
)

const unprotectLong = `Move a protected VM back to plain files while it runs, and end its replication.
Nothing the VM wrote is lost. Each disk goes to the file named with --file, which
must not exist yet, or to where it came from; the old file that lies there is
renamed, not overwritten. The replica's images stay at the other site. A command
that was interrupted can be repeated: disks that were moved stay moved, the
others stay protected.`

const unprotectExample = `  kagami unprotect web
  kagami unprotect web --file vdb=/srv/images/web-data.raw`

func (a *app) unprotectCmd() *cobra.Command {
	var req control.UnprotectRequest
	var files []string
	var json bool
	cmd := &cobra.Command{
		Use: "unprotect VM", Short: "Move a VM back to plain files and end its replication",
		Long: unprotectLong, Example: unprotectExample,
		Args: oneVM, ValidArgsFunction: a.vmNames,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			req.VM = args[0]
			var err error
			if req.Files, err = fileFlags(files); err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			r := &reporter{a: a, json: json}
			return r.end(struct{}{}, cancelled(c.Unprotect(cmd.Context(), req, r.event), "disks that were moved stay moved; kagami unprotect "+req.VM+" goes on with the others"))
		}),
	}
	cmd.Flags().StringArrayVar(&files, "file", nil, "DISK=PATH: the new file of a disk (vdb=/srv/web.raw); may be repeated")
	cmd.Flags().BoolVar(&req.DryRun, "dry-run", false, "check everything, change nothing")
	cmd.Flags().BoolVar(&json, "json", false, "write events and outcome as JSON, one per line")
	return cmd
}

// fileFlags reads DISK=PATH pairs.
func fileFlags(in []string) (map[string]string, error) {
	out := map[string]string{}
	for _, s := range in {
		disk, path, ok := strings.Cut(s, "=")
		if !ok || disk == "" || !filepath.IsAbs(path) {
			return nil, usageError("--file "+s+" is not DISK=PATH with an absolute path", "write it like --file vdb=/srv/images/web.raw")
		}
		if _, twice := out[disk]; twice {
			return nil, usageError("--file names disk "+disk+" twice", "name each disk once")
		}
		out[disk] = path
	}
	return out, nil
}

func usageError(message, hint string) error {
	return &control.Error{Code: "usage", Message: message, Hint: hint, Exit: control.ExitUsage}
}
