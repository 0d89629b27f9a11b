package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
	"kagami/appliance/offline"
)

const ext4RecoverLong = `Replay the journal of the ext4 or ext3 file system in an image, as the kernel does
when it mounts one that was not unmounted. Afterwards superblock and journal are as
the kernel leaves them, and the file system can be mounted read-only. It can be
broken off and repeated at any moment.

What cannot be replayed exactly is refused with exit code 3, and the image stays as
it is: fast commits that are pending, a journal on another device, unknown features,
a log that the kernel and e2fsck would read differently. Files that were deleted
while open are left to the next mount, which takes them away.`

const ext4RecoverExample = `  kagami ext4 recover web-vdb.raw --dry-run       # what would be replayed
  kagami ext4 recover web-vdb.raw                 # in place
  kagami ext4 recover web-vda.raw --partition 1 --out clean.raw`

func (a *app) ext4RecoverCmd() *cobra.Command {
	var at offline.Place
	var opts offline.RecoverOptions
	var json bool
	cmd := &cobra.Command{
		Use: "recover IMAGE", Short: "Replay the journal of a file system in an image",
		Long: ext4RecoverLong, Example: ext4RecoverExample, Args: oneImage,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			r := &reporter{a: a, json: json}
			began := a.now()
			opts.Copied = func(done, total int64) { r.event(copied(done, total, a.now().Sub(began))) }
			rec, err := offline.Recover(cmd.Context(), args[0], at, opts)
			if err == nil {
				err = damagedLog(rec)
			} else {
				err = offlineError(err)
			}
			if !json && (err == nil || rec.Damaged > 0) {
				r.clear()
				a.printf("%s", recoveryText(rec))
			}
			return r.end(rec, err)
		}),
	}
	placeFlags(cmd, &at)
	cmd.Flags().BoolVar(&opts.DryRun, "dry-run", false, "say what would be replayed, change nothing")
	cmd.Flags().StringVar(&opts.Out, "out", "", "make a recovered copy there, and leave the image as it is")
	cmd.Flags().BoolVar(&json, "json", false, "write events and report as JSON, one per line")
	return cmd
}

// copied is the progress of a copy.
func copied(done, total int64, took time.Duration) control.Event {
	e := control.Event{Step: "copy", Done: done, Total: total}
	if s := took.Seconds(); s > 0 {
		e.Rate = int64(float64(done) / s)
	}
	return e
}

// damagedLog complains of blocks of the log that could not be replayed. The kernel
// goes on then, and so does recover, and marks the file system.
func damagedLog(r offline.Recovery) error {
	if r.Damaged == 0 {
		return nil
	}
	return &control.Error{
		Code: "damaged", Exit: control.ExitFailed,
		Message: fmt.Sprintf("the journal holds %s with a wrong checksum, which were left out; the file system is marked as having errors", count(r.Damaged, "block")),
		Hint:    "e2fsck -f finds what that means",
	}
}

// recoveryText is the report for people.
func recoveryText(r offline.Recovery) string {
	var b strings.Builder
	name := r.UUID.String()
	if r.Label != "" {
		name = fmt.Sprintf("%q, %s", r.Label, name)
	}
	where := r.Image
	if r.Out != "" {
		where = r.Out
	}
	if r.Offset > 0 {
		where += fmt.Sprintf(" from byte %d on", r.Offset)
	}
	fmt.Fprintf(&b, "%s: %s\n", where, name)
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "  %-10s %s\n", name, fmt.Sprintf(format, args...))
	}
	did := "wrote"
	if r.DryRun {
		did = "would write"
	}
	switch {
	case !r.Needed:
		row("journal", "empty: nothing to do")
	case r.Transactions == 0:
		row("journal", "no complete transaction; %s the superblocks", did)
	default:
		row("journal", "%s (%d to %d, the last of %s), %s", count(r.Transactions, "transaction"), r.FirstTID, r.LastTID,
			r.LastCommit.UTC().Format(time.RFC3339), count(r.Logged, "block"))
		row("replay", "%s %s; %d void by %s", did, count(r.Written, "block"), r.Skipped, count(int(r.Revokes), "revoke"))
	}
	row("free", "%s, %s", count(int(r.FreeBlocks), "block"), count(int(r.FreeInodes), "inode"))
	if r.Orphans {
		row("orphans", "files that were deleted or cut while open; the next mount ends that")
	}
	if r.MarkedErrors {
		row("errors", "the file system is marked as having errors: e2fsck -f")
	}
	return b.String()
}
