package ext4

import "errors"

// The kinds of error, besides errors of reading.
var (
	// ErrNotExt4 means that there is no ext2/3/4 superblock at all.
	ErrNotExt4 = errors.New("not an ext4 file system")
	// ErrUnsupported means that the file system has something this package does not know.
	ErrUnsupported = errors.New("unsupported ext4 file system")
	// ErrCorrupt means that the file system contradicts itself.
	ErrCorrupt = errors.New("corrupt ext4 file system")
	// ErrChecksum is the ErrCorrupt of a wrong metadata checksum.
	ErrChecksum = errors.New("wrong checksum")
)
