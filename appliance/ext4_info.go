package main

import (
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"kagami/appliance/offline"
)

const ext4InfoLong = `Show what the superblocks of the file system in an image say: its features and sizes,
whether its journal has to be replayed. Of a file system that needs recovery that is
how it was before.`

func (a *app) ext4InfoCmd() *cobra.Command {
	var at offline.Place
	var inUse, json bool
	cmd := &cobra.Command{
		Use: "info IMAGE", Short: "Show features, sizes and state of a file system in an image",
		Long: ext4InfoLong, Example: "  kagami ext4 info web-vdb.raw\n  kagami ext4 info web-vda.raw --partition 1 --json", Args: oneImage,
		RunE: action(func(_ *cobra.Command, args []string) error {
			i, err := offline.ReadInfo(args[0], at, inUse)
			if err != nil {
				return offlineError(err)
			}
			if json {
				return a.asJSON(i)
			}
			a.printf("%s", superText(i))
			return nil
		}),
	}
	placeFlags(cmd, &at)
	liveFlag(cmd, &inUse)
	cmd.Flags().BoolVar(&json, "json", false, "write JSON")
	return cmd
}

// superText is a file system for people.
func superText(i offline.Info) string {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-10s %s\n", name, fmt.Sprintf(format, args...))
	}
	row("uuid", "%s", i.UUID)
	if i.Label != "" {
		row("label", "%q", i.Label)
	}
	row("size", "%s: %d blocks of %s in %s", size(int64(i.Blocks)*int64(i.BlockSize)), i.Blocks, size(int64(i.BlockSize)), count(int(i.Groups), "group"))
	if i.ClusterSize != i.BlockSize {
		row("clusters", "%s", size(int64(i.ClusterSize)))
	}
	row("free", "%d blocks, %d of %d inodes of %s", i.FreeBlocks, i.FreeInodes, i.Inodes, size(int64(i.InodeSize)))
	row("features", "%s", strings.Join(i.Features, " "))
	row("state", "%s", i.State)
	if !i.ChecksumOK {
		row("checksum", "of the superblock is wrong")
	}
	if i.Recovery {
		row("recovery", "needed: kagami ext4 recover, or a mount")
	}
	if i.Orphans {
		row("orphans", "files that were deleted or cut while open; the next mount ends that")
	}
	if i.Journal == nil {
		row("journal", "%s", i.NoJournal)
		return b.String()
	}
	row("journal", "inode %d, %d blocks; %s", i.Journal.Inode, i.Journal.Blocks, i.Journal.Features)
	if i.Journal.Errno != 0 {
		row("errors", "the journal records error %d", i.Journal.Errno)
	}
	return b.String()
}

const ext4LogLong = `Show the log of a file system's journal, transaction by transaction, from its start to
where a replay would end: what was committed and is, perhaps, not yet written to its
place. Fast commits are recognised and said, and not shown.`

func (a *app) ext4LogCmd() *cobra.Command {
	var at offline.Place
	var inUse, blocks, json bool
	cmd := &cobra.Command{
		Use: "log IMAGE", Short: "Show the transactions in a file system's journal",
		Long: ext4LogLong, Example: "  kagami ext4 log web-vdb.raw\n  kagami ext4 log web-vdb.raw --blocks", Args: oneImage,
		RunE: action(func(_ *cobra.Command, args []string) error {
			l, err := offline.ReadLog(args[0], at, inUse)
			if err != nil {
				return offlineError(err)
			}
			if json {
				return a.asJSON(l)
			}
			a.printf("%s", logText(l, blocks))
			return nil
		}),
	}
	placeFlags(cmd, &at)
	liveFlag(cmd, &inUse)
	cmd.Flags().BoolVar(&blocks, "blocks", false, "name the blocks of each transaction")
	cmd.Flags().BoolVar(&json, "json", false, "write JSON")
	return cmd
}

// logText is a log for people.
func logText(l offline.LogOf, blocks bool) string {
	rows := [][]string{{"TID", "TIME", "AT", "COMMIT", "BLOCKS", "REVOKES", "CHECKSUM"}}
	for _, t := range l.Transactions {
		rows = append(rows, []string{fmt.Sprint(t.TID), t.Time.Format(time.RFC3339), fmt.Sprint(t.First), fmt.Sprint(t.Last), fmt.Sprint(len(t.Blocks)), fmt.Sprint(t.Revokes), t.Sum})
	}
	var b strings.Builder
	b.WriteString(table(rows))
	if blocks {
		for _, t := range l.Transactions {
			fmt.Fprintf(&b, "%d: %s\n", t.TID, strings.Trim(fmt.Sprint(t.Blocks), "[]"))
		}
	}
	fmt.Fprintf(&b, "the log ends before transaction %d: %s\n", l.EndTID, l.End)
	if l.FastCommits {
		b.WriteString("fast commits follow it, which only the kernel can replay\n")
	}
	return b.String()
}
