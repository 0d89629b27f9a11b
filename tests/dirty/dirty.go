// Package dirty has a small ext4 file system as the kernel left it while mounted,
// for tests that need a journal to replay and no root. README says how it is made.
package dirty

import (
	"bytes"
	"compress/gzip"
	_ "embed" // for the image
	"io"
)

//go:embed dirty.img.gz
var packed []byte

// Image returns a fresh copy of the image, 8 MiB.
func Image() ([]byte, error) {
	z, err := gzip.NewReader(bytes.NewReader(packed))
	if err != nil {
		return nil, err
	}
	return io.ReadAll(z)
}
