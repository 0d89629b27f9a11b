package ext4

import (
	"fmt"
	"strings"
)

// Compat, Incompat and ROCompat are the three sets of feature bits: an
// unknown bit of the first may be ignored, one of the second forbids
// everything, one of the third forbids writing.
type (
	Compat   uint32
	Incompat uint32
	ROCompat uint32
)

// Compatible features.
const (
	HasJournal   Compat = 0x4
	SparseSuper2 Compat = 0x200
	CompatFastC  Compat = 0x400  // fast_commit: the kernel may turn it on in the journal
	OrphanFile   Compat = 0x1000 // a file, not only a list, holds orphans
)

// Incompatible features.
const (
	Compression Incompat = 0x1
	Filetype    Incompat = 0x2
	Recover     Incompat = 0x4 // the journal must be replayed
	JournalDev  Incompat = 0x8 // this is an external journal, not a file system
	MetaBg      Incompat = 0x10
	Extents     Incompat = 0x40
	Bit64       Incompat = 0x80
	MMP         Incompat = 0x100
	FlexBg      Incompat = 0x200
	EAInode     Incompat = 0x400
	Dirdata     Incompat = 0x1000
	CsumSeed    Incompat = 0x2000
	LargeDir    Incompat = 0x4000
	InlineData  Incompat = 0x8000
	Encrypt     Incompat = 0x10000
	Casefold    Incompat = 0x20000

	knownIncompat = Filetype | Recover | MetaBg | Extents | Bit64 | MMP | FlexBg | EAInode | CsumSeed |
		LargeDir | InlineData | Encrypt | Casefold
)

// Read-only compatible features.
const (
	SparseSuper   ROCompat = 0x1
	LargeFile     ROCompat = 0x2
	HugeFile      ROCompat = 0x8
	GdtCsum       ROCompat = 0x10
	DirNlink      ROCompat = 0x20
	ExtraIsize    ROCompat = 0x40
	Quota         ROCompat = 0x100
	Bigalloc      ROCompat = 0x200
	MetadataCsum  ROCompat = 0x400
	ReadOnly      ROCompat = 0x1000
	Project       ROCompat = 0x2000
	Verity        ROCompat = 0x8000
	OrphanPresent ROCompat = 0x10000

	knownROCompat = SparseSuper | LargeFile | HugeFile | GdtCsum | DirNlink | ExtraIsize | Quota | Bigalloc |
		MetadataCsum | ReadOnly | Project | Verity | OrphanPresent
)

var (
	compatNames = map[uint32]string{0x1: "dir_prealloc", 0x2: "imagic_inodes", 0x4: "has_journal", 0x8: "ext_attr",
		0x10: "resize_inode", 0x20: "dir_index", 0x40: "lazy_bg", 0x100: "snapshot_bitmap", 0x200: "sparse_super2",
		0x400: "fast_commit", 0x800: "stable_inodes", 0x1000: "orphan_file"}
	incompatNames = map[uint32]string{0x1: "compression", 0x2: "filetype", 0x4: "needs_recovery", 0x8: "journal_dev",
		0x10: "meta_bg", 0x40: "extent", 0x80: "64bit", 0x100: "mmp", 0x200: "flex_bg", 0x400: "ea_inode", 0x1000: "dirdata",
		0x2000: "metadata_csum_seed", 0x4000: "large_dir", 0x8000: "inline_data", 0x10000: "encrypt", 0x20000: "casefold"}
	roCompatNames = map[uint32]string{0x1: "sparse_super", 0x2: "large_file", 0x8: "huge_file", 0x10: "uninit_bg",
		0x20: "dir_nlink", 0x40: "extra_isize", 0x80: "snapshot", 0x100: "quota", 0x200: "bigalloc", 0x400: "metadata_csum",
		0x800: "replica", 0x1000: "read-only", 0x2000: "project", 0x4000: "shared_blocks", 0x8000: "verity",
		0x10000: "orphan_present"}
)

func words(bits uint32, names map[uint32]string, set string) string {
	var s []string
	for i := range 32 {
		bit := uint32(1) << i
		switch name := names[bit]; {
		case bits&bit == 0:
		case name == "":
			s = append(s, fmt.Sprintf("%s 0x%x", set, bit))
		default:
			s = append(s, name)
		}
	}
	return strings.Join(s, " ")
}

// String lists the features by the names dumpe2fs uses.
func (c Compat) String() string { return words(uint32(c), compatNames, "compat") }

// String lists the features by the names dumpe2fs uses.
func (i Incompat) String() string { return words(uint32(i), incompatNames, "incompat") }

// String lists the features by the names dumpe2fs uses.
func (r ROCompat) String() string { return words(uint32(r), roCompatNames, "ro_compat") }

// Unknown gives the bits that are unknown to this package and to Linux 6.18.
func (i Incompat) Unknown() Incompat { return i &^ knownIncompat }

// Unknown gives the bits that are unknown to this package and to Linux 6.18.
func (r ROCompat) Unknown() ROCompat { return r &^ knownROCompat }
