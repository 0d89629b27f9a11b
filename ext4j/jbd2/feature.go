package jbd2

import (
	"fmt"
	"strings"
)

// Features is the set of a journal's features: compat bits in the low half,
// incompat bits in the high half.
type Features uint64

// The features known to Linux 6.18.
const (
	SumV1       Features = 1 << 0  // compat: CRC-32 of descriptors and data in the commit block
	Revoke      Features = 1 << 32 // incompat: there may be revoke blocks
	Bit64       Features = 2 << 32 // incompat: 64-bit block numbers
	AsyncCommit Features = 4 << 32 // incompat: the commit block is written along with the data
	SumV2       Features = 8 << 32 // incompat: CRC-32C in all blocks and, 16 bits of it, in tags
	SumV3       Features = 0x10 << 32
	FastCommit  Features = 0x20 << 32 // incompat: there may be fast commits in the journal's last blocks

	known = SumV1 | Revoke | Bit64 | AsyncCommit | SumV2 | SumV3 | FastCommit
)

func makeFeatures(compat, incompat uint32) Features {
	return Features(compat) | Features(incompat)<<32
}

// Has reports whether all features of g are set.
func (f Features) Has(g Features) bool { return f&g == g }

// SumV2or3 reports whether blocks carry CRC-32C checksums.
func (f Features) SumV2or3() bool { return f&(SumV2|SumV3) != 0 }

// UnknownIncompat gives the incompat bits this package does not understand.
// A journal with any of them must not be touched.
func (f Features) UnknownIncompat() uint32 { return uint32(f &^ known >> 32) }

// String lists the features by the names dumpe2fs uses.
func (f Features) String() string {
	names := []struct {
		bit  Features
		name string
	}{{SumV1, "journal_checksum"}, {Revoke, "journal_incompat_revoke"}, {Bit64, "journal_64bit"},
		{AsyncCommit, "journal_async_commit"}, {SumV2, "journal_checksum_v2"}, {SumV3, "journal_checksum_v3"},
		{FastCommit, "fast_commit"}}
	var s []string
	for _, n := range names {
		if f.Has(n.bit) {
			s = append(s, n.name)
		}
	}
	if u := uint32(f &^ known); u != 0 {
		s = append(s, fmt.Sprintf("compat 0x%x", u))
	}
	if u := f.UnknownIncompat(); u != 0 {
		s = append(s, fmt.Sprintf("incompat 0x%x", u))
	}
	return strings.Join(s, " ")
}
