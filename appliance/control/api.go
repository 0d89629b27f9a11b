package control

import (
	"context"
	"time"
)

// Backend is the daemon behind the API; package host implements it. Errors
// that are *Error reach the client as they are.
type Backend interface {
	Status(ctx context.Context) (Status, error)
	Protect(ctx context.Context, req ProtectRequest, emit func(Event)) error
	Unprotect(ctx context.Context, req UnprotectRequest, emit func(Event)) error
	Failover(ctx context.Context, req FailoverRequest, emit func(Event)) (FailoverReport, error)
	Forget(ctx context.Context, req ForgetRequest, emit func(Event)) error
	Set(ctx context.Context, req SetRequest) (Policy, error)
	Verify(ctx context.Context, req VerifyRequest, emit func(Event)) (VerifyReport, error)
	Reprotect(ctx context.Context, req ReprotectRequest, emit func(Event)) error
	Switchover(ctx context.Context, req SwitchoverRequest, emit func(Event)) (FailoverReport, error)
	Failback(ctx context.Context, req SwitchoverRequest, emit func(Event)) (FailoverReport, error)
	Survivor(ctx context.Context, req SurvivorRequest, emit func(Event)) error
	Branches(ctx context.Context, req BranchesRequest) ([]Branch, error)
}

// Exit codes of the command line, also carried by Error.
const (
	ExitOK          = 0
	ExitFailed      = 1 // something went wrong on the way
	ExitUsage       = 2 // the command line or the config file is wrong
	ExitRefused     = 3 // a precondition does not hold; nothing was changed
	ExitUnreachable = 4 // the daemon does not answer
	ExitNotFound    = 5 // no such VM, disk, group or peer
)

// Error is an error for people: one sentence, and what to do next.
type Error struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Hint    string `json:"hint,omitempty"`
	Exit    int    `json:"exit"`
}

func (e *Error) Error() string {
	if e.Hint == "" {
		return e.Message
	}
	return e.Message + ": " + e.Hint
}

// Event is one step of a long operation. Sizes are bytes, Rate bytes per second.
type Event struct {
	Step       string  `json:"step"`
	Message    string  `json:"message,omitempty"`
	Done       int64   `json:"done,omitempty"`
	Total      int64   `json:"total,omitempty"`
	Rate       int64   `json:"rate,omitempty"`
	ETASeconds float64 `json:"eta_s,omitempty"`
}

// ProtectRequest asks to protect a VM's disks; no Disks means all writable ones.
type ProtectRequest struct {
	VM     string   `json:"vm"`
	Disks  []string `json:"disks,omitempty"`
	To     string   `json:"to"`
	DryRun bool     `json:"dry_run,omitempty"`
}

// UnprotectRequest asks to move a VM back to plain files. Files names new
// files by disk; a disk without one goes back to where it came from.
type UnprotectRequest struct {
	VM     string            `json:"vm"`
	Files  map[string]string `json:"files,omitempty"`
	DryRun bool              `json:"dry_run,omitempty"`
}

// FailoverRequest asks this site to take a group over.
type FailoverRequest struct {
	VM      string `json:"vm"` // or the name of a declared group
	Force   bool   `json:"force,omitempty"`
	DryRun  bool   `json:"dry_run,omitempty"`
	NoStart bool   `json:"no_start,omitempty"`
}

// FailoverReport is what a failover did, or, with DryRun, would do.
type FailoverReport struct {
	Group      string    `json:"group"`
	DryRun     bool      `json:"dry_run,omitempty"`
	At         time.Time `json:"at,omitzero"`
	LSN        uint64    `json:"lsn"`
	Lineage    string    `json:"lineage,omitempty"`
	RPOSeconds float64   `json:"rpo_s"` // age of the last epoch when the failover began
	RTOSeconds float64   `json:"rto_s"`
	Lost       string    `json:"lost,omitempty"`
	Notes      []string  `json:"notes,omitempty"`
	Domain     string    `json:"domain,omitempty"`
	Replayed   int       `json:"replayed_transactions"`
}

// ReprotectRequest asks this site, to which a group was failed over, to make the
// other site its replica.
type ReprotectRequest struct {
	Group  string `json:"group"`
	DryRun bool   `json:"dry_run,omitempty"`
	NoWait bool   `json:"no_wait,omitempty"` // do not wait until all of it is there
}

// SwitchoverRequest asks this site to hand a group over to its replica's site.
type SwitchoverRequest struct {
	VM              string  `json:"vm"` // or the name of a declared group
	DryRun          bool    `json:"dry_run,omitempty"`
	NoStart         bool    `json:"no_start,omitempty"`
	ShutdownSeconds float64 `json:"shutdown_s,omitempty"` // how long the guest may take; 0: the default
}

// SurvivorRequest decides a split brain: the data of this site is kept.
type SurvivorRequest struct {
	Group  string `json:"group"`
	DryRun bool   `json:"dry_run,omitempty"`
	Yes    bool   `json:"yes,omitempty"` // what the other site has beyond is given up
}

// BranchesRequest lists what is kept of superseded disks; of all groups without one.
type BranchesRequest struct {
	Group  string `json:"group,omitempty"`
	Delete string `json:"delete,omitempty"` // name of a branch to remove
}

// Branch is what a site's disks held that the lineage served now does not have.
type Branch struct {
	Group      string       `json:"group"`
	Name       string       `json:"name"`
	Site       string       `json:"site"`
	At         time.Time    `json:"at"`
	Lineage    string       `json:"lineage"`
	ReplacedBy string       `json:"replaced_by"`
	Whole      string       `json:"whole,omitempty"` // why all of the disks is kept
	Bytes      int64        `json:"bytes"`           // in regions that may differ
	Disks      []BranchDisk `json:"disks"`
}

// BranchDisk is one disk of a branch.
type BranchDisk struct {
	Name  string `json:"name"`
	File  string `json:"file"` // sparse; the regions are in their places
	Bytes int64  `json:"bytes"`
}

// ForgetRequest asks this site to give up what it has of a group.
type ForgetRequest struct {
	Group  string `json:"group"`
	Force  bool   `json:"force,omitempty"`
	DryRun bool   `json:"dry_run,omitempty"`
}

// SetRequest changes when a group's flushes are answered. What is zero stays as it is;
// a request that changes nothing asks for what counts.
type SetRequest struct {
	Group        string  `json:"group"`
	Mode         string  `json:"mode,omitempty"`          // sync, async
	AsyncBytes   int64   `json:"async_bytes,omitempty"`   // what the replica may lack
	AsyncSeconds float64 `json:"async_seconds,omitempty"` // and for how long
	OnLinkLoss   string  `json:"on_link_loss,omitempty"`  // stall, continue
	Default      bool    `json:"default,omitempty"`       // back to the configuration's
}

// Policy says when a group's flushes are answered.
type Policy struct {
	Group        string  `json:"group"`
	Mode         string  `json:"mode"`
	OnLinkLoss   string  `json:"on_link_loss"`
	AsyncBytes   int64   `json:"async_bytes,omitempty"` // 0 in mode sync
	AsyncSeconds float64 `json:"async_seconds,omitempty"`
	Set          bool    `json:"set"` // by kagami set; else it is the configuration's
}

// VerifyRequest asks to compare a group with its replica.
type VerifyRequest struct {
	Group          string `json:"group"`
	Repair         bool   `json:"repair,omitempty"`           // ship what differs
	BytesPerSecond int64  `json:"bytes_per_second,omitempty"` // 0: as fast as it goes
	Resume         bool   `json:"resume,omitempty"`           // go on where the last comparison was broken off
}

// VerifyReport is what was found, in chunks.
type VerifyReport struct {
	Group      string  `json:"group"`
	LSN        uint64  `json:"lsn"` // the replica has everything up to there
	ChunkBytes int64   `json:"chunk_bytes"`
	Compared   int64   `json:"compared"`
	Differ     int64   `json:"differ"`
	Repaired   int64   `json:"repaired"`
	Again      int64   `json:"again"` // comparisons that the guest's writes spoiled, and that were made again
	Seconds    float64 `json:"seconds"`
	Evidence   string  `json:"evidence,omitempty"` // file that names what differs
	// Began is when the comparison began that this one went on with; what it found counts here.
	Began time.Time `json:"began"`
}

// Verified is how far the last comparison of a group with its replica came, and what it found.
type Verified struct {
	Began    time.Time  `json:"began"`
	Ended    *time.Time `json:"ended,omitempty"` // not when it was broken off, or runs
	Done     int64      `json:"done_bytes"`
	Total    int64      `json:"total_bytes"`
	Differ   int64      `json:"differ"`   // chunks
	Repaired int64      `json:"repaired"` // of these
}

// Status is everything this site knows.
type Status struct {
	Site    string    `json:"site"`
	Version string    `json:"version"`
	Since   time.Time `json:"since"`
	Peers   []Peer    `json:"peers"`
	Alarms  []string  `json:"alarms,omitempty"` // of the site as a whole
	Groups  []Group   `json:"groups"`
}

// Peer is the link to another site.
type Peer struct {
	Name        string    `json:"name"`
	Address     string    `json:"address"`
	Connected   bool      `json:"connected"`
	Since       time.Time `json:"since"`
	Connections int       `json:"connections"`
	RTTMs       float64   `json:"rtt_ms"`
	Inflight    int64     `json:"inflight_bytes"`
	SentBytes   uint64    `json:"sent_bytes"` // since the link came up
	Error       string    `json:"error,omitempty"`
	Version     string    `json:"version,omitempty"`
}

// Group is one group at this site. Sizes are bytes.
type Group struct {
	Name      string    `json:"name"`
	ID        string    `json:"id"`
	VM        string    `json:"vm,omitempty"`
	Role      string    `json:"role"` // source, replica, promoted
	State     string    `json:"state"`
	Since     time.Time `json:"since"`
	Reason    string    `json:"reason,omitempty"`
	Protected bool      `json:"protected"` // every returned fsync survives the loss of the source's site, but for what mode async allows
	Complete  bool      `json:"complete"`  // the first sync has ended
	Mode      string    `json:"mode"`
	// AsyncBytes and AsyncSeconds are what the replica may lack in mode async.
	AsyncBytes   int64   `json:"async_bytes,omitempty"`
	AsyncSeconds float64 `json:"async_seconds,omitempty"`
	OnLinkLoss   string  `json:"on_link_loss"`
	Peer         string  `json:"peer"`
	PeerUp       bool    `json:"peer_connected"`
	Lineage      string  `json:"lineage"`
	Session      uint64  `json:"session"`
	LSN          LSN     `json:"lsn"`
	RPOSeconds   float64 `json:"rpo_s"`
	QueueBytes   int64   `json:"queue_bytes"`
	QueueLimit   int64   `json:"queue_limit"`
	BacklogBytes int64   `json:"backlog_bytes"` // kept on disk while the replica is away
	BacklogLimit int64   `json:"backlog_limit"`
	ApplySeconds float64 `json:"apply_s"` // a replica: what applying all that is durable may take
	SpoolBytes   int64   `json:"spool_bytes"`
	SpoolLimit   int64   `json:"spool_limit"`
	Regions      int     `json:"active_regions"`
	Flushes      int     `json:"unacked_flushes"`
	// Flushes that clients asked for since the daemon started, and of them those that
	// promised nothing that the replica did not have (see FileSystem).
	AllFlushes   uint64          `json:"flushes"`
	LocalFlushes uint64          `json:"local_flushes"`
	Written      uint64          `json:"written_bytes"` // by the guest, since the daemon started
	Resynced     uint64          `json:"resynced_bytes"`
	Sync         *Sync           `json:"sync,omitempty"`
	Verified     *Verified       `json:"verified,omitempty"` // the last comparison with the replica
	Disks        []Disk          `json:"disks"`
	Alarms       []string        `json:"alarms,omitempty"`
	Events       []LoggedEvent   `json:"events,omitempty"`
	Failover     *FailoverReport `json:"last_failover,omitempty"`
}

// LSN are a group's positions; those of the other site are what it last told.
type LSN struct {
	Assigned uint64 `json:"assigned"`
	Received uint64 `json:"received"`
	Durable  uint64 `json:"durable"`
	Applied  uint64 `json:"applied"`
}

// Sync is how far a first sync or resync is.
type Sync struct {
	What       string  `json:"what"`
	Done       int64   `json:"done"`
	Total      int64   `json:"total"`
	Rate       int64   `json:"rate"`
	ETASeconds float64 `json:"eta_s"`
}

// Disk is one disk of a group.
type Disk struct {
	Name    string `json:"name"`
	Slot    uint32 `json:"slot"`
	ID      string `json:"id"`
	Size    int64  `json:"size"`
	Image   string `json:"image"`
	Socket  string `json:"socket"`
	Clients int    `json:"clients"`
	OldFile string `json:"old_file,omitempty"` // what the VM ran from before; kept and locked
	// FileSystems are those that the source follows in what the guest writes.
	FileSystems []FileSystem `json:"file_systems,omitempty"`
}

// FileSystem is what the source knows of a file system from its writes.
type FileSystem struct {
	Offset        int64  `json:"offset"` // on the disk, bytes
	State         string `json:"state"`  // in words
	Live          bool   `json:"live"`   // flushes that promise nothing are recognised
	UUID          string `json:"uuid,omitempty"`
	JournalBlocks uint32 `json:"journal_blocks,omitempty"`
	// The newest transaction seen to commit, and when, by the guest's clock.
	TID        uint32     `json:"tid,omitempty"`
	CommitTime *time.Time `json:"commit_time,omitempty"`
}

// LoggedEvent is one entry of a group's history.
type LoggedEvent struct {
	At   time.Time `json:"at"`
	Text string    `json:"text"`
}
