package offline

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
)

// loopFiles are where the kernel names the file behind each loop device
// (Documentation/ABI/testing/sysfs-block-loop: loop/backing_file).
const loopFiles = "/sys/block/loop*/loop/backing_file"

// loopOf names the loop device that has the file at path, or "". The kernel takes
// no lock for it, so a lock on the file says nothing. A machine without /sys has
// no way to tell.
func loopOf(path string) (string, error) {
	want, err := os.Stat(path)
	if err != nil {
		return "", fmt.Errorf("look for loop devices: %w", err)
	}
	found, err := filepath.Glob(loopFiles)
	if err != nil {
		return "", fmt.Errorf("look for loop devices: %w", err)
	}
	for _, name := range found {
		data, err := os.ReadFile(name)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			continue // detached meanwhile, or of another namespace
		}
		if err != nil {
			return "", fmt.Errorf("look for loop devices: %w", err)
		}
		st, err := os.Stat(strings.TrimSuffix(string(data), "\n"))
		if err == nil && os.SameFile(want, st) {
			return "/dev/" + filepath.Base(filepath.Dir(filepath.Dir(name))), nil
		}
	}
	return "", nil
}
