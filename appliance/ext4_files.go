package main

import (
	"encoding/json"
	"fmt"
	"strconv"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"kagami/appliance/control"
	"kagami/appliance/offline"
)

const ext4LsLong = `List files of the file system in an image, as a mount would show them: a journal that has to be
replayed is, in memory; the image is not changed. Names are listed in the order in which they are stored.`

func (a *app) ext4LsCmd() *cobra.Command {
	var at offline.Place
	var o offline.ListOptions
	var long, asJSON bool
	cmd := &cobra.Command{
		Use: "ls IMAGE [PATH]", Short: "List files in an image", Long: ext4LsLong,
		Example: "  kagami ext4 ls web-vdb.raw /var/lib -l\n  kagami ext4 ls web-vda.raw --partition 1 -R --json", Args: imageAnd(0, 1),
		RunE: action(func(_ *cobra.Command, args []string) error {
			err := offline.List(args[0], at, append(args, "/")[1], o, func(f offline.FileInfo) error {
				switch {
				case asJSON:
					data, err := json.Marshal(f)
					if err != nil {
						return err
					}
					a.printf("%s\n", data)
				case f.Error != "" && f.Mode == "":
					a.printf("%s: %s\n", printable(f.Path), f.Error)
				case long:
					a.printf("%s\n", longLine(f))
				default:
					a.printf("%s\n", printable(f.Path))
				}
				return nil
			})
			return offlineError(err)
		}),
	}
	placeFlags(cmd, &at)
	liveFlag(cmd, &o.InUse)
	cmd.Flags().BoolVarP(&long, "long", "l", false, "with mode, links, owner, size and time")
	cmd.Flags().BoolVarP(&o.Recursive, "recursive", "R", false, "with all that is in the folders")
	cmd.Flags().BoolVarP(&o.Directory, "directory", "d", false, "a folder itself, not what is in it")
	cmd.Flags().BoolVar(&asJSON, "json", false, "write JSON, one file per line")
	return cmd
}

// longLine is a file as ls -l shows it.
func longLine(f offline.FileInfo) string {
	size := strconv.FormatUint(f.Size, 10)
	if f.Device != "" {
		size = f.Device
	}
	name := printable(f.Path)
	if f.Target != "" {
		name += " -> " + printable(f.Target)
	}
	if f.Error != "" {
		name += "  (" + f.Error + ")"
	}
	more := " "
	if len(f.Xattrs) > 0 {
		more = "+"
	}
	return fmt.Sprintf("%s%s %4d %7d %7d %12s %s %s", f.Mode, more, f.Links, f.UID, f.GID, size, f.ModTime.Format(time.DateTime), name)
}

// printable is a name that a guest chose, fit for a terminal.
func printable(name string) string {
	if !utf8.ValidString(name) || strings.ContainsFunc(name, func(r rune) bool { return !strconv.IsPrint(r) }) {
		return strconv.Quote(name)
	}
	return name
}

func (a *app) ext4CatCmd() *cobra.Command {
	var at offline.Place
	var inUse bool
	cmd := &cobra.Command{
		Use: "cat IMAGE PATH", Short: "Write a file in an image to standard output",
		Long:    "Write the content of a regular file in an image to standard output. Symbolic links are followed, within\nthe image; holes are written as zeros.",
		Example: "  kagami ext4 cat web-vdb.raw /etc/fstab", Args: imageAnd(1, 1),
		RunE: action(func(cmd *cobra.Command, args []string) error {
			return offlineError(offline.Cat(cmd.Context(), args[0], at, args[1], inUse, a.out))
		}),
	}
	placeFlags(cmd, &at)
	liveFlag(cmd, &inUse)
	return cmd
}

const ext4RestoreLong = `Copy a file or a folder with all that is in it out of an image: content, holes, hard links, devices,
owners, modes, times, extended attributes and access control lists. The destination must
not exist. What you have no right to set (owners, devices, some attributes, unless you are root) is left
out and told; the exit code is 1 then. Nothing outside the destination is written, whatever the
image says; but a restored file can be set-user-ID, and a restored link lead anywhere: look before you use it.`

func (a *app) ext4RestoreCmd() *cobra.Command {
	var at offline.Place
	var o offline.RestoreOptions
	var json bool
	cmd := &cobra.Command{
		Use: "restore IMAGE PATH DESTINATION", Short: "Copy files out of an image", Long: ext4RestoreLong,
		Example: "  kagami ext4 restore web-vdb.raw /var/lib/postgresql /srv/restored\n  kagami ext4 restore web-vda.raw --partition 1 /etc/fstab fstab", Args: imageAnd(2, 2),
		RunE: action(func(cmd *cobra.Command, args []string) error {
			r := &reporter{a: a, json: json}
			last := a.now()
			o.Progress = func(bytes int64, files int) {
				if now := a.now(); now.Sub(last) >= time.Second {
					last = now
					r.event(control.Event{Step: "restore", Message: fmt.Sprintf("%s, %s", count(files, "file"), size(bytes))})
				}
			}
			done, err := offline.Restore(cmd.Context(), args[0], at, args[1], args[2], o)
			if err != nil {
				return r.end(done, offlineError(err))
			}
			if !json {
				r.clear()
				a.printf("%s restored, %s of content\n", count(done.Files, "file"), size(done.Bytes))
				for _, l := range done.Left {
					a.printf("! %s: %s\n", printable(l.Path), l.Why)
				}
				if done.More > 0 {
					a.printf("! and %d more\n", done.More)
				}
			}
			return r.end(done, leftOut(len(done.Left)+done.More))
		}),
	}
	placeFlags(cmd, &at)
	liveFlag(cmd, &o.InUse)
	cmd.Flags().BoolVar(&json, "json", false, "write events and report as JSON, one per line")
	return cmd
}

// leftOut complains of files that are not as in the image.
func leftOut(n int) error {
	if n == 0 {
		return nil
	}
	return &control.Error{Code: "incomplete", Exit: control.ExitFailed, Message: fmt.Sprintf("%s not as in the image", count(n, "file")),
		Hint: "as root owners, devices and all attributes are restored; kagami ext4 check tells whether the image is damaged"}
}

const ext4CheckLong = `Look whether the file system in an image contradicts itself: superblock and its copies, group
descriptors, bitmaps, inodes, block maps, directories, link counts, and all checksums of metadata. A
journal that has to be replayed is, in memory; the image is not changed. Exit code 0: nothing was found;
1: something was. kagami repairs nothing: that is e2fsck's business, on a copy.`

func (a *app) ext4CheckCmd() *cobra.Command {
	var at offline.Place
	var inUse, json bool
	cmd := &cobra.Command{
		Use: "check IMAGE", Short: "Look for damage in a file system in an image, changing nothing", Long: ext4CheckLong,
		Example: "  kagami ext4 check web-vdb.raw\n  kagami ext4 check web-vda.raw --partition 1 --json", Args: oneImage,
		RunE: action(func(cmd *cobra.Command, args []string) error {
			r := &reporter{a: a, json: json}
			c, err := offline.Check(cmd.Context(), args[0], at, inUse, func(done, total int64) {
				r.event(control.Event{Step: "check", Done: done, Total: total})
			})
			if err != nil {
				return r.end(c, offlineError(err))
			}
			if !json {
				r.clear()
				a.printf("%s", checkText(c))
			}
			if n := len(c.Problems) + c.More; n > 0 {
				err = &control.Error{Code: "damaged", Exit: control.ExitFailed, Message: count(n, "problem") + " found", Hint: "e2fsck -f repairs; try it on a copy first"}
			}
			return r.end(c, err)
		}),
	}
	placeFlags(cmd, &at)
	liveFlag(cmd, &inUse)
	cmd.Flags().BoolVar(&json, "json", false, "write events and report as JSON, one per line")
	return cmd
}

func checkText(c offline.Checked) string {
	var b strings.Builder
	for _, p := range c.Problems {
		fmt.Fprintf(&b, "! %s: %s\n", p.Where, printable(p.What))
	}
	if c.More > 0 {
		fmt.Fprintf(&b, "! and %d more\n", c.More)
	}
	fmt.Fprintf(&b, "%s in use, %s, %d blocks used\n", count(int(c.Inodes), "inode"), directories(c.Directories), c.UsedBlocks)
	if c.Orphans > 0 {
		fmt.Fprintf(&b, "%s without a name, which the next mount takes away\n", count(int(c.Orphans), "file"))
	}
	if c.Clean() {
		b.WriteString("no damage found\n")
	}
	return b.String()
}

func directories(n uint32) string {
	if n == 1 {
		return "1 directory"
	}
	return fmt.Sprintf("%d directories", n)
}

// imageAnd wants the path of an image and so many more arguments.
func imageAnd(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) < 1+least || len(args) > 1+most || args[0] == "" {
			return fmt.Errorf("%s was given %s; usage: %s", cmd.CommandPath(), count(len(args), "argument"), cmd.UseLine())
		}
		return nil
	}
}
