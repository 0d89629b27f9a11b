package ext4

import (
	"bytes"
	"encoding/binary"
	"fmt"

	goext4 "github.com/dsoprea/go-ext4"
)

// fields are the superblock's fields as go-ext4 lays them out. Only its
// structure is used: its own reader refuses many healthy file systems, takes
// a block size of 0 for granted and so on (check.go decides instead).
type fields = goext4.SuperblockData

// decode splits a superblock into its fields; nothing is checked.
func decode(raw *Raw) (*fields, error) {
	f := new(fields)
	if err := binary.Read(bytes.NewReader(raw[:]), binary.LittleEndian, f); err != nil {
		return nil, fmt.Errorf("decode superblock: %w", err)
	}
	return f, nil
}
