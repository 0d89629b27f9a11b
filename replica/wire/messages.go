package wire

import (
	"encoding/json"
	"fmt"

	"kagami/ext4j/epoch"
)

// Hello opens every connection; the dialler sends it.
type Hello struct {
	MinVersion int        `json:"min_version"`
	MaxVersion int        `json:"max_version"`
	Required   uint64     `json:"required_features"`
	Optional   uint64     `json:"optional_features"`
	Site       string     `json:"site"`
	SiteID     epoch.UUID `json:"site_id"`
	Link       epoch.UUID `json:"link"` // random, one for all connections of a link
	Data       bool       `json:"data"` // a data connection; otherwise the control connection
	Release    string     `json:"release"`
}

// Welcome answers Hello. Error is set when the connection is refused. Each side
// says what the other must understand (Required) and what it may use (Optional);
// on the link holds what both know.
type Welcome struct {
	Version  int        `json:"version"`
	Required uint64     `json:"required_features"`
	Optional uint64     `json:"optional_features"`
	Site     string     `json:"site"`
	SiteID   epoch.UUID `json:"site_id"`
	Seed     uint32     `json:"seed"` // of every checksum that follows on this link
	Error    *Error     `json:"error,omitempty"`
	Release  string     `json:"release"`
}

// KnownFeatures are the feature bits this release understands: none yet.
const KnownFeatures uint64 = 0

// Negotiate picks the version to speak with a peer that said h.
func Negotiate(h Hello) (int, *Error) {
	if err := checkFeatures(h.Site, h.Release, h.Required); err != nil {
		return 0, err
	}
	v := min(h.MaxVersion, Version)
	if v < MinVersion || v < h.MinVersion {
		return 0, Errorf(CodeVersion, "peer %s (%s) speaks protocol %d to %d, this release %d to %d: upgrade the older site",
			h.Site, h.Release, h.MinVersion, h.MaxVersion, MinVersion, Version)
	}
	return v, nil
}

// Check tells the dialler whether it can speak with a peer that answered w. A
// refusal by the peer is returned as it is.
func (w Welcome) Check() *Error {
	if w.Error != nil {
		return w.Error
	}
	if w.Version < MinVersion || w.Version > Version {
		return Errorf(CodeVersion, "peer %s (%s) chose protocol version %d, this release speaks %d to %d: upgrade the older site",
			w.Site, w.Release, w.Version, MinVersion, Version)
	}
	return checkFeatures(w.Site, w.Release, w.Required)
}

func checkFeatures(site, release string, required uint64) *Error {
	if unknown := required &^ KnownFeatures; unknown != 0 {
		return Errorf(CodeVersion, "peer %s (%s) requires features %#x that this release does not have: upgrade this site", site, release, unknown)
	}
	return nil
}

// Code classes an error so that the other end can act on it.
type Code string

// Codes of version 1. A code that is not known counts as CodeFailed.
const (
	CodeFailed   Code = "failed"
	CodeVersion  Code = "version"
	CodeDenied   Code = "denied"    // the certificate does not allow it
	CodeNotFound Code = "not-found" // no such group here
	CodeFenced   Code = "fenced"    // this source was superseded by a promotion
	CodeStale    Code = "stale"     // session or channel is an old one
	CodeNoSpace  Code = "no-space"
	CodeConflict Code = "conflict" // the group exists here in another shape
	CodeBusy     Code = "busy"
)

// Error is an error that crosses the wire.
type Error struct {
	Code    Code   `json:"code"`
	Message string `json:"message"`
	// Session is the newest that the replica has seen, with CodeStale.
	Session uint64 `json:"session,omitempty"`
}

func (e *Error) Error() string { return e.Message }

// Errorf makes an Error.
func Errorf(c Code, format string, a ...any) *Error {
	return &Error{Code: c, Message: fmt.Sprintf(format, a...)}
}

// Request asks the replica's site for something; responses may come in any order.
type Request struct {
	ID     uint64          `json:"id"`
	Method string          `json:"method"`
	Params json.RawMessage `json:"params,omitempty"`
}

// Response answers the request of the same ID.
type Response struct {
	ID     uint64          `json:"id"`
	Error  *Error          `json:"error,omitempty"`
	Result json.RawMessage `json:"result,omitempty"`
}

// Methods of version 1.
const (
	MethodAttach = "attach" // AttachRequest → AttachResponse
	MethodHash   = "hash"   // HashRequest → HashResponse
	MethodRemove = "remove" // RemoveRequest → nothing
	MethodCheck  = "check"  // CheckRequest → CheckResponse
	MethodDomain = "domain" // DomainRequest → nothing
	MethodStop   = "stop"   // StopRequest → nothing
	// MethodReturn asks the site that a group left to take it back as a replica:
	// ReturnRequest → ReturnResponse.
	MethodReturn = "return"
	// MethodTakeover asks a replica's site to serve from now on: TakeoverRequest → TakeoverResponse.
	MethodTakeover = "takeover"
	// MethodLineage asks what the site has of a group: LineageRequest → LineageResponse.
	MethodLineage = "lineage"
)

// MaxCalls is how many requests of one link run at a time. Who asks waits with
// one more, which would be refused with CodeBusy.
const MaxCalls = 8

// Disk describes one disk of a group. Slots are never reused within a group.
type Disk struct {
	Slot      uint32     `json:"slot"`
	ID        epoch.UUID `json:"id"`
	Name      string     `json:"name"`
	Size      int64      `json:"size"`       // bytes
	BlockSize int        `json:"block_size"` // logical, bytes
}

// Manifest describes a group as its source has it.
type Manifest struct {
	Name    string      `json:"name"`
	ID      epoch.UUID  `json:"id"`
	Lineage epoch.UUID  `json:"lineage"`
	Past    []epoch.Pos `json:"past,omitempty"` // where earlier lineages were left, oldest first
	Session uint64      `json:"session"`
	Disks   []Disk      `json:"disks"`
	VM      string      `json:"vm,omitempty"`
	Window  int64       `json:"window"` // most bytes the source has unacknowledged
	// Discards are lineages that an operator decided against in favour of this one.
	Discards []epoch.UUID `json:"discards,omitempty"`
}

// AttachRequest ties a group's stream to this link; the records that follow
// carry the channel that the response names. A session higher than the last
// one makes the replica drop its partial epoch.
type AttachRequest struct {
	Manifest Manifest `json:"manifest"`
	// Create allows the replica to make the group if it has none.
	Create bool `json:"create"`
	// Resync announces that everything up to the next SyncDone comes as one
	// epoch and that guest I/O waits for it.
	Resync bool `json:"resync"`
}

// AttachResponse says where the replica stands.
type AttachResponse struct {
	Channel  uint32     `json:"channel"`
	Replica  epoch.UUID `json:"replica"` // of this replica of the group, made with it; not the site's, which Welcome has
	Pos      epoch.Pos  `json:"pos"`     // last durable epoch
	Applied  epoch.LSN  `json:"applied"`
	Complete bool       `json:"complete"` // the first sync has ended
	Fresh    bool       `json:"fresh"`    // its images are new and read as zeros
	// SpoolBytes is the most the spool may hold: an epoch must fit in it.
	SpoolBytes int64 `json:"spool_bytes"`
	// Damaged: the spool lost durable epochs after Pos, or an image was changed by someone else: compare everything.
	Damaged string `json:"damaged,omitempty"`
	// Torn: and its images are no epoch's, so that no point is lost by writing to them.
	Torn bool `json:"torn,omitempty"`
	// Returned: the images were a source's before, and the first sync has not ended.
	Returned *Returned `json:"returned,omitempty"`
}

// Returned says what a site that was the source may hold beyond the record where the
// lineage that it follows now was forked.
type Returned struct {
	Lineage epoch.UUID `json:"lineage"` // that it follows now
	// Whole says why all of it may differ; "": only Runs do, and what was changed at the other site since the fork.
	Whole       string `json:"whole,omitempty"`
	RegionBytes int64  `json:"region_bytes"`
	Runs        []Run  `json:"runs,omitempty"` // at most MaxRuns
}

// Run is a number of consecutive regions of a disk.
type Run struct {
	Disk  uint32 `json:"d"` // slot
	First uint64 `json:"f"`
	Count uint64 `json:"n"`
}

// MaxRuns bounds the runs of one message; more are joined, with what lies between them.
const MaxRuns = 4096

// Valid tells whether the runs are inside the disks that a manifest names.
func (r *Returned) Valid(m Manifest) bool {
	if len(r.Runs) > MaxRuns || r.RegionBytes <= 0 || r.RegionBytes > 1<<40 {
		return false
	}
	regions := map[uint32]uint64{}
	for _, d := range m.Disks {
		regions[d.Slot] = uint64((d.Size-1)/r.RegionBytes + 1)
	}
	for _, run := range r.Runs {
		if n := regions[run.Disk]; run.Count == 0 || run.First >= n || run.Count > n-run.First {
			return false
		}
	}
	return true
}

// ReturnRequest asks the site that was a group's source to become its replica:
// what it has beyond the fork is kept there under a name first.
type ReturnRequest struct {
	Manifest Manifest `json:"manifest"`
	DryRun   bool     `json:"dry_run,omitempty"`
}

// ReturnResponse says what that comes to.
type ReturnResponse struct {
	Branch  string `json:"branch,omitempty"` // the name under which is kept what may differ; "": nothing may
	Bytes   int64  `json:"bytes"`            // that may differ there
	Whole   string `json:"whole,omitempty"`  // why all of it may; "" otherwise
	Already bool   `json:"already,omitempty"`
}

// TakeoverRequest asks a replica's site to promote it. The source has stopped at
// Pos and serves nothing until it is answered or attached again.
type TakeoverRequest struct {
	Group   epoch.UUID `json:"group"`
	Pos     epoch.Pos  `json:"pos"`
	DryRun  bool       `json:"dry_run,omitempty"`
	NoStart bool       `json:"no_start,omitempty"`
}

// TakeoverResponse says that the replica was promoted, in words what went wrong
// after that, and how long it took.
type TakeoverResponse struct {
	Lineage  epoch.UUID `json:"lineage"`
	Problem  string     `json:"problem,omitempty"`
	Domain   string     `json:"domain,omitempty"`
	RTOMs    int64      `json:"rto_ms"`
	Notes    []string   `json:"notes,omitempty"`
	Replayed int        `json:"replayed"`
}

// LineageRequest asks what the site has of a group.
type LineageRequest struct {
	Group epoch.UUID `json:"group"`
}

// LineageResponse says what the site has of a group.
type LineageResponse struct {
	Role    string      `json:"role"`
	State   string      `json:"state"`
	Lineage epoch.UUID  `json:"lineage"`
	Past    []epoch.Pos `json:"past,omitempty"`
	SinceNs int64       `json:"since_ns,omitempty"` // when it was promoted there; 0: it was not
	Clients int         `json:"clients"`
	Changed int64       `json:"changed"` // bytes in regions that were written to since
}

// HashRequest asks for SHA-256 of chunks of a disk, image and spool together.
type HashRequest struct {
	Group   epoch.UUID `json:"group"`
	Session uint64     `json:"session"`
	Disk    uint32     `json:"disk"`
	Chunk   int64      `json:"chunk"`   // bytes per chunk, 4 KiB to 1 MiB
	Offsets []int64    `json:"offsets"` // at most MaxHashes
}

// MaxHashes bounds the chunks of one HashRequest.
const MaxHashes = 1024

// HashResponse has one hash per offset; the last chunk of a disk may be short.
type HashResponse struct {
	Sums [][]byte `json:"sums"`
}

// RemoveRequest ends a group at the replica. Its images are kept, under their names, unless Purge.
type RemoveRequest struct {
	Group epoch.UUID `json:"group"`
	Purge bool       `json:"purge"`
}

// DomainRequest ships the VM's definition.
type DomainRequest struct {
	Group epoch.UUID `json:"group"`
	XML   string     `json:"xml"`
}

// StopRequest tells that the source stops, and that Pos is the last record of
// its clients: who has that lacks nothing.
type StopRequest struct {
	Group epoch.UUID `json:"group"`
	Pos   epoch.Pos  `json:"pos"`
}

// CheckRequest asks whether the site could take a group and boot its VM.
type CheckRequest struct {
	Manifest Manifest `json:"manifest"`
	XML      string   `json:"xml,omitempty"`
}

// CheckResponse lists what stands in the way, in words; none means ready.
type CheckResponse struct {
	Problems []string `json:"problems"`
	Warnings []string `json:"warnings"`
}
