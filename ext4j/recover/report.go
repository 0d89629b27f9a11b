package recover

import (
	"time"

	"kagami/ext4j/epoch"
	"kagami/ext4j/jbd2"
)

// Report says what was found and done; after a dry run, what would be done.
// It is complete even for an error that wraps ErrRefused, as far as Run got.
type Report struct {
	// UUID and Label name the file system.
	UUID  epoch.UUID `json:"uuid"`
	Label string     `json:"label"`
	// Needed reports that needs_recovery was set; without it nothing is done.
	Needed bool `json:"needed"`

	Transactions int         `json:"transactions"`
	FirstTID     jbd2.TID    `json:"first_tid"` // of the log; meaningless without transactions
	LastTID      jbd2.TID    `json:"last_tid"`
	LastCommit   time.Time   `json:"last_commit"`
	End          jbd2.Reason `json:"-"`
	EndReason    string      `json:"end"`     // End in words
	PartialTail  int         `json:"partial"` // commit blocks accepted though their tail was lost

	Logged  int    `json:"logged"`  // blocks in the log
	Skipped int    `json:"skipped"` // of these, voided by a revoke
	Written int    `json:"written"` // blocks written home
	Revokes uint64 `json:"revokes"` // revoke records in the log

	// Damaged counts blocks of the log with a wrong checksum; they were not
	// written. BadBlocks names the first ones.
	Damaged   int        `json:"damaged"`
	BadBlocks []BadBlock `json:"bad_blocks,omitempty"`
	// MarkedErrors reports that the file system was marked as having errors:
	// the journal recorded one, or a commit block is damaged.
	MarkedErrors bool `json:"marked_errors"`
	// Resumed reports that an earlier recovery had been interrupted while it wrote the superblock.
	Resumed bool `json:"resumed"`

	FreeBlocks uint64 `json:"free_blocks"` // after recovery
	FreeInodes uint32 `json:"free_inodes"`
	// Orphans reports files that the kernel will delete or truncate when it mounts.
	Orphans bool `json:"orphans"`
}

// BadBlock is a block of the log whose checksum is wrong.
type BadBlock struct {
	TID     jbd2.TID `json:"tid"`
	Block   uint64   `json:"block"`   // of the file system
	Logical uint32   `json:"logical"` // of the journal
}

// maxBadBlocks bounds Report.BadBlocks.
const maxBadBlocks = 100
