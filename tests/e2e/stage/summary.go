package stage

import (
	"fmt"
	"strings"
	"time"

	"kagami/appliance/control"
	"kagami/tests/guest/workload"
)

// Step is one step of a story and how long it took.
type Step struct {
	Name string
	Took time.Duration
}

// Summary is how a story ended.
type Summary struct {
	Stage   *Stage // only with Keep
	RTT     string // as pinged
	Acked   workload.Acks
	Checked bool // every acknowledged record was looked for
	Found   workload.Report
	Lost    uint64 // records acknowledged at the source and not intact at the replica
	Report  control.FailoverReport
	// Counted over the whole run, by the source daemon just before each kill:
	// what came after the last count is missing.
	GuestBytes     uint64 // written by the guest and the block copy
	ShippedBytes   uint64 // on the data connections
	ReturnBytes    uint64 // shipped until the lost site was the replica; 0: it did not come back
	DiskBytes      uint64
	AckedThere     workload.Acks // at the other site, after the failover
	FSClean        bool          // e2fsck found nothing in the image as the failover left it, before a guest mounted it
	Steps          []Step
	Took           time.Duration
	SourceRestarts int
}

// Table is the summary for people.
func (s Summary) Table() string {
	var b strings.Builder
	row := func(what, format string, a ...any) { fmt.Fprintf(&b, "  %-64s %s\n", what, fmt.Sprintf(format, a...)) }
	row("records acknowledged (append+fsync)", "%d", s.Acked.Append)
	row("records acknowledged (overwrite+fdatasync)", "%d", s.Acked.Blocks)
	row("found intact at the replica", "%d + %d", s.Found.Append.Highest, s.Found.Blocks.Highest)
	row("lost", "%d", s.Lost)
	row("RPO (age of the last epoch at failover)", "%.3f s", s.Report.RPOSeconds)
	row("RTO (failover begun to VM started)", "%.3f s", s.Report.RTOSeconds)
	row("journal transactions replayed", "%d", s.Report.Replayed)
	row("bytes written, first copy included", "%d", s.GuestBytes)
	row("bytes shipped", "%d", s.ShippedBytes)
	if s.ReturnBytes > 0 {
		row("bytes shipped to make the lost site the replica", "%d, of a disk of %d", s.ReturnBytes, s.DiskBytes)
		row("records acknowledged up to the way home", "%d + %d", s.AckedThere.Append, s.AckedThere.Blocks)
	}
	if s.FSClean {
		row("e2fsck of the replayed image", "clean")
	}
	for _, st := range s.Steps {
		row(st.Name, "%.1f s", st.Took.Seconds())
	}
	row("the whole story", "%.1f s", s.Took.Seconds())
	return b.String()
}
