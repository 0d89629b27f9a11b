package main

import (
	"fmt"
	"strings"
	"time"

	"kagami/appliance/control"
)

// groupText is everything about one group.
func groupText(g control.Group, now time.Time) string {
	var b strings.Builder
	row := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, fmt.Sprintf(format, args...))
	}
	row("group", "%s", g.Name)
	if g.VM != "" && g.VM != g.Name {
		row("vm", "%s", g.VM)
	}
	row("role", "%s", g.Role)
	row("state", "%s for %s%s", g.State, since(g.Since, now), because(g.Reason))
	row("protected", "%s", protectedText(g))
	row("mode", "%s, on link loss: %s", modeText(g.Mode, g.AsyncBytes, g.AsyncSeconds), g.OnLinkLoss)
	row("peer", "%s", peerOf(g))
	row("RPO", "%s", rpo(g))
	row("LSN", "assigned %d, received %d, durable %d, applied %d", g.LSN.Assigned, g.LSN.Received, g.LSN.Durable, g.LSN.Applied)
	row("queue", "%s", of(g.QueueBytes, g.QueueLimit))
	if g.BacklogBytes > 0 {
		row("backlog", "%s", of(g.BacklogBytes, g.BacklogLimit))
	}
	row("spool", "%s", of(g.SpoolBytes, g.SpoolLimit))
	if left := g.LSN.Durable - g.LSN.Applied; g.Role == "replica" && left > 0 {
		row("to apply", "%s, about %s", count(int(left), "record"), time.Duration(g.ApplySeconds*float64(time.Second)).Round(time.Millisecond))
	}
	row("regions", "%d active, %s waiting", g.Regions, count(g.Flushes, "flush"))
	row("flushes", "%d, of which %d promised nothing new", g.AllFlushes, g.LocalFlushes)
	row("written", "%s by the guest, %s by resyncs", size(int64(g.Written)), size(int64(g.Resynced)))
	if v := g.Verified; v != nil {
		row("verified", "%s", verifiedText(v, now))
	}
	row("history", "lineage %s, session %d", g.Lineage, g.Session)
	row("id", "%s", g.ID)
	if g.Sync != nil {
		row("sync", "%s %s", g.Sync.What, numbers(syncEvent(g.Sync)))
	}
	b.WriteString(disksText(g.Disks))
	if g.Failover != nil {
		fmt.Fprintf(&b, "\nlast failover, %s\n%s", g.Failover.At.UTC().Format(time.DateTime+" UTC"), indentReport(*g.Failover))
	}
	if len(g.Events) > 0 {
		b.WriteString("\nevents\n")
	}
	for _, e := range g.Events {
		fmt.Fprintf(&b, "  %s  %s\n", e.At.UTC().Format(time.DateTime), e.Text)
	}
	if len(g.Alarms) > 0 {
		b.WriteString("\n")
	}
	for _, al := range g.Alarms {
		fmt.Fprintf(&b, "! %s\n", al)
	}
	return b.String()
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return ": " + reason
}

func protectedText(g control.Group) string {
	switch {
	case g.Protected:
		return "yes"
	case g.Role == "promoted":
		return "NO: it serves without a replica since the failover"
	case g.State == "fenced":
		return "NO: another site has taken over"
	case g.Peer == "":
		return "NO: no other site has a copy"
	case !g.Complete:
		return "NO: the first copy has not ended"
	default:
		return "NO"
	}
}

func disksText(disks []control.Disk) string {
	rows := [][]string{{"DISK", "SLOT", "SIZE", "CLIENTS", "IMAGE", "SOCKET", "OLD FILE"}}
	for _, d := range disks {
		old := d.OldFile
		if old == "" {
			old = "-"
		}
		rows = append(rows, []string{d.Name, fmt.Sprint(d.Slot), size(d.Size), fmt.Sprint(d.Clients), d.Image, d.Socket, old})
	}
	return "\n" + table(rows) + fileSystemsText(disks)
}

// fileSystemsText is what the source knows of the guest's file systems.
func fileSystemsText(disks []control.Disk) string {
	rows := [][]string{{"DISK", "OFFSET", "LIVE", "JOURNAL", "COMMIT", "FILE SYSTEM"}}
	for _, d := range disks {
		for _, f := range d.FileSystems {
			journal, commit := "-", "-"
			if f.JournalBlocks > 0 {
				journal, commit = fmt.Sprintf("%d blocks", f.JournalBlocks), fmt.Sprint(f.TID)
			}
			if f.CommitTime != nil {
				commit += f.CommitTime.UTC().Format(", " + time.DateTime)
			}
			rows = append(rows, []string{d.Name, size(f.Offset), map[bool]string{true: "yes", false: "no"}[f.Live], journal, commit, f.State})
		}
	}
	if len(rows) == 1 {
		return ""
	}
	return "\n" + table(rows)
}

func indentReport(r control.FailoverReport) string {
	_, rows, _ := strings.Cut(failoverText(r, control.FailoverRequest{}), "\n")
	return rows
}

// verifiedText says what the last comparison with the replica found.
func verifiedText(v *control.Verified, now time.Time) string {
	found := "both sites were equal"
	if v.Differ > 0 {
		found = fmt.Sprintf("%s differed, %d shipped", count(int(v.Differ), "piece"), v.Repaired)
	}
	if v.Ended == nil {
		return fmt.Sprintf("%s since %s, %s", of(v.Done, v.Total), v.Began.Format(time.RFC3339), found)
	}
	return fmt.Sprintf("%s ago, %s", since(*v.Ended, now), found)
}
