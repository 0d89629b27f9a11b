package offline

import (
	"context"
	"errors"

	"kagami/ext4j/check"
)

// Checked is what Check found.
type Checked struct {
	Image string `json:"image"`
	check.Report
}

// Check looks for contradictions in a file system, as it is after a replay of its journal, and changes nothing.
// progress, if not nil, is told how far it is, in bytes of the file system.
func Check(ctx context.Context, path string, at Place, inUse bool, progress func(done, total int64)) (Checked, error) {
	t, err := openTree(path, at, inUse)
	if err != nil {
		return Checked{}, err
	}
	group := int64(t.fs.BlocksPerGroup) * int64(t.fs.BlockSize)
	rep, err := check.Run(ctx, t.fs, func(done, total int) {
		if progress != nil {
			progress(int64(done)*group, int64(total)*group)
		}
	})
	return Checked{path, rep}, errors.Join(err, t.close())
}
