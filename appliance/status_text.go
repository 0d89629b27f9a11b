package main

import (
	"fmt"
	"strings"
	"text/tabwriter"
	"time"

	"kagami/appliance/control"
)

// statusText is the table of a site's groups.
func statusText(st control.Status, wide bool, now time.Time) string {
	var b strings.Builder
	fmt.Fprintf(&b, "site %s  kagami %s  up %s\n", st.Site, st.Version, since(st.Since, now))
	for _, p := range st.Peers {
		b.WriteString(peerLine(p, now) + "\n")
	}
	if len(st.Peers) == 0 {
		b.WriteString("no peers\n")
	}
	for _, al := range st.Alarms {
		fmt.Fprintf(&b, "! %s\n", al)
	}
	b.WriteString("\n")
	if len(st.Groups) == 0 {
		b.WriteString("no groups; kagami protect VM --to PEER makes one\n")
		return b.String()
	}
	head, row := narrowColumns, narrowRow
	if wide {
		head, row = wideColumns, wideRow
	}
	lines := [][]string{head}
	for _, g := range st.Groups {
		lines = append(lines, row(g))
	}
	b.WriteString(table(lines))
	for _, g := range st.Groups {
		b.WriteString(footnotes(g))
	}
	return b.String()
}

// table aligns columns, without blanks at the ends of lines.
func table(rows [][]string) string {
	var b strings.Builder
	w := tabwriter.NewWriter(&b, 0, 0, 2, ' ', 0)
	for _, r := range rows {
		_, _ = fmt.Fprintln(w, strings.Join(r, "\t"))
	}
	_ = w.Flush() // into memory
	lines := strings.Split(b.String(), "\n")
	for i := range lines {
		lines[i] = strings.TrimRight(lines[i], " ")
	}
	return strings.Join(lines, "\n")
}

var narrowColumns = []string{"GROUP", "ROLE", "STATE", "PROTECTED", "PEER", "RPO", "ALARMS"}

func narrowRow(g control.Group) []string {
	return []string{g.Name, g.Role, g.State, yes(g.Protected), peerOf(g), rpo(g), number(len(g.Alarms))}
}

var wideColumns = []string{
	"GROUP", "ROLE", "STATE", "PROTECTED", "PEER", "RPO", "ALARMS",
	"DISKS", "SIZE", "ASSIGNED", "DURABLE", "APPLIED", "QUEUE", "SPOOL", "REGIONS", "FLUSHES", "SESSION", "LINEAGE",
}

func wideRow(g control.Group) []string {
	return append(narrowRow(g),
		fmt.Sprint(len(g.Disks)), size(totalSize(g)),
		fmt.Sprint(g.LSN.Assigned), fmt.Sprint(g.LSN.Durable), fmt.Sprint(g.LSN.Applied),
		of(g.QueueBytes, g.QueueLimit), of(g.SpoolBytes, g.SpoolLimit),
		number(g.Regions), number(g.Flushes), fmt.Sprint(g.Session), short(g.Lineage))
}

func totalSize(g control.Group) (n int64) {
	for _, d := range g.Disks {
		n += d.Size
	}
	return n
}

// rpo is - where there is no copy to go back to.
func rpo(g control.Group) string {
	if !g.Complete || g.Peer == "" {
		return "-"
	}
	return span(seconds(g.RPOSeconds))
}

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "NO"
}

// peerOf names the peer, and says when it is away.
func peerOf(g control.Group) string {
	switch {
	case g.Peer == "":
		return "-"
	case g.PeerUp:
		return g.Peer
	}
	return g.Peer + " (away)"
}

// number writes a count, - for none.
func number(n int) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

// of writes how much of a limit is used, - where there is no limit.
func of(n, limit int64) string {
	if limit == 0 {
		return "-"
	}
	return size(n) + " of " + size(limit)
}

// short is the first part of a UUID.
func short(uuid string) string {
	head, _, _ := strings.Cut(uuid, "-")
	return head
}

func since(t, now time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return span(now.Sub(t).Truncate(time.Second))
}

func peerLine(p control.Peer, now time.Time) string {
	s := fmt.Sprintf("peer %s  %s  ", p.Name, p.Address)
	if !p.Connected {
		s += "away"
		if !p.Since.IsZero() {
			s += " for " + since(p.Since, now)
		}
		if p.Error != "" {
			s += ": " + p.Error
		}
		return s
	}
	s += fmt.Sprintf("connected for %s  %s  RTT %.1f ms", since(p.Since, now), count(p.Connections, "connection"), p.RTTMs)
	if p.Version != "" {
		s += "  kagami " + p.Version
	}
	return s
}

// footnotes are the lines under the table: what runs, and what is wrong.
func footnotes(g control.Group) string {
	var b strings.Builder
	if g.Sync != nil {
		fmt.Fprintf(&b, "  %s: %s %s\n", g.Name, g.Sync.What, numbers(syncEvent(g.Sync)))
	}
	if g.Reason != "" {
		fmt.Fprintf(&b, "  %s: %s: %s\n", g.Name, g.State, g.Reason)
	}
	for _, al := range g.Alarms {
		fmt.Fprintf(&b, "! %s: %s\n", g.Name, al)
	}
	return b.String()
}

// syncEvent turns a sync's state into the event its progress is drawn from.
func syncEvent(s *control.Sync) control.Event {
	return control.Event{Step: s.What, Done: s.Done, Total: s.Total, Rate: s.Rate, ETASeconds: s.ETASeconds}
}
