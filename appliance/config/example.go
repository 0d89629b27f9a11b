package config

import (
	_ "embed"
	"fmt"
	"os"
	"slices"
)

//go:embed example.yaml
var example []byte

// Example is a complete, commented configuration that Load accepts.
func Example() []byte { return slices.Clone(example) }

// WriteExample writes the example to a new file, mode 0640. It refuses to
// replace a file.
func WriteExample(path string) error {
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o640)
	if err != nil {
		return fmt.Errorf("write example configuration: %w", err)
	}
	if _, err = f.Write(example); err == nil {
		err = f.Sync()
	}
	if cerr := f.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("write example configuration %s: %w", path, err)
	}
	return nil
}
