package main

import (
	"encoding/json"
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
	"kagami/appliance/offline"
)

const ext4Long = `Work on the file systems in images that no daemon and no VM uses at the moment:
without mounting them, without root, without the daemon. An image is a raw file
with a file system in all of it, or in a partition (--partition), or from some
byte on (--offset). ext4 and ext3 are known, and ext2 as far as it has no journal.`

func (a *app) ext4Cmd() *cobra.Command {
	cmd := &cobra.Command{
		Use: "ext4", Short: "Work on the ext4 file systems in images, without mounting them", Long: ext4Long,
		Example: "  kagami ext4 info web-vdb.raw\n  kagami ext4 ls web-vdb.raw /var/lib -l\n  kagami ext4 restore web-vdb.raw /srv/data restored\n  kagami ext4 recover web-vdb.raw --dry-run\n  kagami ext4 recover web-vda.raw --partition 1 --out clean.raw",
	}
	cmd.AddCommand(a.ext4InfoCmd(), a.ext4CheckCmd(), a.ext4LogCmd(), a.ext4LsCmd(), a.ext4CatCmd(), a.ext4RestoreCmd(), a.ext4RecoverCmd())
	return parentOnly(cmd)
}

// placeFlags adds the flags that say where in an image the file system is.
func placeFlags(cmd *cobra.Command, at *offline.Place) {
	cmd.Flags().Int64Var(&at.Offset, "offset", 0, "first byte of the file system in the image")
	cmd.Flags().IntVar(&at.Partition, "partition", 0, "number of the partition that holds the file system")
	cmd.MarkFlagsMutuallyExclusive("offset", "partition")
}

// liveFlag adds the flag for images that somebody else uses.
func liveFlag(cmd *cobra.Command, inUse *bool) {
	cmd.Flags().BoolVar(inUse, "live", false, "look at an image that is in use; what is read may be of different moments")
}

// asJSON prints a value as one JSON document.
func (a *app) asJSON(v any) error {
	data, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	a.printf("%s\n", data)
	return nil
}

// oneImage wants the path of one image.
func oneImage(cmd *cobra.Command, args []string) error {
	if len(args) != 1 || args[0] == "" {
		return fmt.Errorf("%s wants the path of one image, not %s", cmd.CommandPath(), count(len(args), "argument"))
	}
	return nil
}

// offlineError makes an error of package offline fit for people.
func offlineError(err error) error {
	if err == nil {
		return nil
	}
	e := &control.Error{Code: "failed", Message: err.Error(), Exit: control.ExitFailed}
	switch {
	case errors.Is(err, offline.ErrNotThere):
		e.Code, e.Exit = "not-found", control.ExitNotFound
		e.Hint = "check the path, and --partition or --offset"
	case errors.Is(err, offline.ErrInUse):
		e.Code, e.Exit = "in-use", control.ExitRefused
		e.Hint = "end what uses the image (a VM, kagami, a mount), then run this again"
	case errors.Is(err, offline.ErrRefused):
		e.Code, e.Exit = "refused", control.ExitRefused
		e.Message += "; nothing was changed"
	}
	return e
}
