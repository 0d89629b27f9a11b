// Package ext4vectors holds journal replay, the follower and the commands for
// images against the images of e2fsprogs' own tests, which a script fetches from
// Debian's archive: nothing of them is in this repository.
package ext4vectors

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// Fetch makes the images, if they are not there, and returns their folder.
func Fetch() (string, error) {
	root, err := filepath.Abs("../..")
	if err != nil {
		return "", err
	}
	if out, err := exec.Command(filepath.Join(root, "scripts/ext4-vectors.sh")).CombinedOutput(); err != nil {
		return "", fmt.Errorf("make the images of e2fsprogs' tests: %w\n%s", err, out)
	}
	return filepath.Join(root, "build/e2fsprogs"), nil
}

// names lists the tests that have an image in a folder.
func names(dir, suffix string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var all []string
	for _, e := range entries {
		if name, ok := strings.CutSuffix(e.Name(), suffix); ok {
			all = append(all, name)
		}
	}
	return all, nil
}
