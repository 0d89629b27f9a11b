package host

import (
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"maps"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica/wire"
)

// Role of a group at this site.
type Role string

// Roles.
const (
	RoleSource   Role = "source"
	RoleReplica  Role = "replica"
	RolePromoted Role = "promoted" // a source without a replica, after a failover
)

var roles = []Role{RoleSource, RoleReplica, RolePromoted}

// Phase is an operation on a group that was begun and not ended.
type Phase string

// Phases.
const (
	Protecting   Phase = "protecting"   // source: the VM does not run from all exports yet, or the first sync has not ended
	Unprotecting Phase = "unprotecting" // source, promoted: disks go back to files; none of it is protected any more
	Ending       Phase = "ending"       // source: no VM uses the group; the replica's site has to be told
	Recovering   Phase = "promoting"    // promoted: the journals are not replayed yet
	Booting      Phase = "booting"      // promoted: the journals are replayed, the VM is not known to run
)

// groupFile is the durable description of a group, STATE/groups/NAME/group.json.
// Every change goes through save: temp file, fsync, rename, fsync of the folder.
//
// A later release may add to it: what must be understood is named by a required
// feature bit, which this release refuses; fields of an optional feature lie at the top
// level and are kept as they are.
type groupFile struct {
	Version  int    `json:"version"`
	Required uint64 `json:"required_features"`
	Optional uint64 `json:"optional_features"`

	Name    string     `json:"name"`
	ID      epoch.UUID `json:"id"`
	Role    Role       `json:"role"`
	Peer    string     `json:"peer"` // site of the replica, or of the source
	VM      string     `json:"vm,omitempty"`
	Lineage epoch.UUID `json:"lineage"`
	// Replica is this replica's own UUID, made with it; at a source that of the
	// replica it follows, zero before the first attach.
	Replica epoch.UUID  `json:"replica"`
	Past    []epoch.Pos `json:"past,omitempty"` // where earlier lineages were left, oldest first
	Session uint64      `json:"session"`
	// Begun is the newest session of a source that records may have been sent in.
	Begun uint64     `json:"begun,omitempty"`
	Disks []diskFile `json:"disks"`
	// Complete: the first sync has ended.
	Complete bool `json:"complete"`
	// Phase is an operation that was begun and not ended; "" when none is.
	Phase Phase `json:"phase,omitempty"`
	// Purge: the images at the replica go with the group; only while Ending.
	Purge bool `json:"purge,omitempty"`
	// Clean is set while a source is stopped with nothing to resync.
	Clean *cleanMark `json:"clean,omitempty"`
	// Compare says why everything must be compared before the replica counts;
	// it stays until that is done. "": nothing speaks against the replica.
	Compare string `json:"compare,omitempty"`
	// Changes: promoted; the record of changes of every disk exists. One that is
	// missing was lost; ChangesLost tells of those that were, in words.
	Changes     bool   `json:"changes,omitempty"`
	ChangesLost string `json:"changes_lost,omitempty"`
	// Fenced says why this source must not serve any more.
	Fenced   string          `json:"fenced,omitempty"`
	Failover *failoverRecord `json:"failover,omitempty"`
	// Returned: a replica whose images were a source's; what they may hold that
	// the lineage it follows now does not.
	Returned *wire.Returned `json:"returned,omitempty"`
	// Delta: a source whose first sync has to cover the records of changes, and
	// what a returned replica names, and no more.
	Delta bool `json:"delta,omitempty"`
	// TakeBack: promoted; the other site becomes the replica as soon as it can.
	TakeBack bool `json:"take_back,omitempty"`
	// Discards are lineages that an operator decided against.
	Discards []epoch.UUID `json:"discards,omitempty"`
	// Apart: a source that goes on without its replica; what the maps name may differ, too.
	// With it goes featureApart.
	Apart *apartFile `json:"apart,omitempty"`
	// Boot is the start of this host in which the replica was last attached, or an operator
	// let this source go on without it; "": in none.
	Boot string `json:"boot,omitempty"`
	// Policy is what kagami set has set; nil: the config file's counts.
	Policy *policyFile `json:"policy,omitempty"`
	// Sum is the sumOf the file: a role or a position that rotted is not acted on.
	Sum uint32 `json:"sum"`

	extra map[string]json.RawMessage // fields that this release does not know
}

// diskFile describes one disk. Slots are never reused.
type diskFile struct {
	Slot      uint32     `json:"slot"`
	ID        epoch.UUID `json:"id"`
	Name      string     `json:"name"` // libvirt target, or the declared name
	Image     string     `json:"image"`
	Size      int64      `json:"size"`       // bytes
	BlockSize int        `json:"block_size"` // logical, bytes; blockSize in this release
	Socket    string     `json:"socket"`
	Declared  bool       `json:"declared"`           // by the config file; belongs to no VM
	Kept      string     `json:"kept,omitempty"`     // the VM's old file, left as it was
	KeptXML   string     `json:"kept_xml,omitempty"` // the disk element it replaced
	Pivoted   bool       `json:"pivoted,omitempty"`  // the VM may run, or have run, from the image; durable before it can
}

// cleanMark binds a clean stop to the images as they were then.
type cleanMark struct {
	Pos   epoch.Pos        `json:"pos"`
	Mtime map[uint32]int64 `json:"mtime"` // by slot, ns since 1970
}

// failoverRecord is what a failover found and did.
type failoverRecord struct {
	AtNs     int64     `json:"at_ns"`
	From     epoch.Pos `json:"from"`
	CloseNs  int64     `json:"close_ns"`
	Lost     string    `json:"lost,omitempty"`
	Notes    []string  `json:"notes,omitempty"`
	Domain   string    `json:"domain,omitempty"`
	RTOMs    int64     `json:"rto_ms"`
	RPOMs    int64     `json:"rpo_ms"`
	Replayed int       `json:"replayed"` // journal transactions
}

const (
	groupFileVersion = 1
	groupFileMax     = 1 << 20
	maxDisks         = 64
	maxDiskBytes     = 1 << 50
	blockSize        = 512 // bytes of a logical block of every disk
	// groupFeatures are the required feature bits that this release understands.
	groupFeatures uint64 = featureApart
)

// validName is what groups, disks and sites may be called: it becomes part of paths.
var validName = regexp.MustCompile(`^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$`)

func (f *groupFile) save(fsys images.FS, dir string) error {
	b, err := f.encode()
	if err != nil {
		return fmt.Errorf("encode group file: %w", err)
	}
	if err := images.WriteFileAtomic(fsys, filepath.Join(dir, "group.json"), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("save state of group %s: %w", f.Name, err)
	}
	return nil
}

// encode is the file's content, with what a later release has added to it.
func (f *groupFile) encode() ([]byte, error) {
	b, err := json.Marshal(f)
	if err != nil {
		return nil, err
	}
	all := map[string]json.RawMessage{}
	if err := json.Unmarshal(b, &all); err != nil {
		return nil, err
	}
	maps.Copy(all, f.extra)
	sum, err := sumOf(all)
	if err != nil {
		return nil, err
	}
	if len(f.extra) == 0 {
		summed := *f
		summed.Sum = sum
		return json.MarshalIndent(&summed, "", "  ")
	}
	all["sum"] = json.RawMessage(strconv.FormatUint(uint64(sum), 10))
	return json.MarshalIndent(all, "", "  ")
}

// sumOf is the CRC32C of a group file's fields but `sum`, known or not, in compact
// JSON and in the order of their names.
func sumOf(fields map[string]json.RawMessage) (uint32, error) {
	rest := maps.Clone(fields)
	delete(rest, "sum")
	b, err := json.Marshal(rest)
	return crc32.Checksum(b, crc32.MakeTable(crc32.Castagnoli)), err
}

func loadGroupFile(fsys images.FS, dir string) (*groupFile, error) {
	b, err := images.ReadFile(fsys, filepath.Join(dir, "group.json"), groupFileMax)
	if err != nil {
		return nil, fmt.Errorf("read group file: %w", err)
	}
	f, err := decodeGroupFile(b)
	if err != nil {
		return nil, fmt.Errorf("group file %s: %w", dir, err)
	}
	return f, nil
}

func decodeGroupFile(b []byte) (*groupFile, error) {
	f := &groupFile{}
	if err := json.Unmarshal(b, f); err != nil {
		return nil, err
	}
	if f.Version != groupFileVersion {
		return nil, fmt.Errorf("it has version %d, this release reads %d", f.Version, groupFileVersion)
	}
	if unknown := f.Required &^ groupFeatures; unknown != 0 {
		return nil, fmt.Errorf("it requires features %#x that this release does not have: a later release wrote it", unknown)
	}
	if err := json.Unmarshal(b, &f.extra); err != nil {
		return nil, err
	}
	if sum, err := sumOf(f.extra); err != nil || sum != f.Sum {
		return nil, errors.Join(err, fmt.Errorf("it has checksum %d, want %d: it was damaged, or changed by somebody else", f.Sum, sum))
	}
	if !validName.MatchString(f.Name) || !slices.Contains(roles, f.Role) || len(f.Disks) > maxDisks || f.Role == RoleReplica && f.Replica.IsZero() || !f.Policy.valid() ||
		f.Role == RolePromoted && len(f.Past) == 0 || (f.Apart != nil) != (f.Required&featureApart != 0) {
		return nil, fmt.Errorf("it is not plausible")
	}
	for _, d := range f.Disks {
		if d.BlockSize != blockSize {
			return nil, fmt.Errorf("disk %s has blocks of %d bytes, this release serves %d", d.Name, d.BlockSize, blockSize)
		}
	}
	for field := range reflect.TypeFor[groupFile]().Fields() {
		name, _, _ := strings.Cut(field.Tag.Get("json"), ",")
		delete(f.extra, name)
	}
	return f, nil
}

func (f *groupFile) manifest(window int64) wire.Manifest {
	m := wire.Manifest{Name: f.Name, ID: f.ID, Lineage: f.Lineage, Past: f.Past, Session: f.Session, VM: f.VM, Window: window, Discards: f.Discards}
	for _, d := range f.Disks {
		m.Disks = append(m.Disks, wire.Disk{Slot: d.Slot, ID: d.ID, Name: d.Name, Size: d.Size, BlockSize: d.BlockSize})
	}
	return m
}
