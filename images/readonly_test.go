package images

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestReadOnlyLooksAndChangesNothing(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a.raw")
	if err := os.WriteFile(path, make([]byte, 8192), 0o400); err != nil {
		t.Fatal(err)
	}
	img, err := OpenImage(ReadOnly{}, path, Want{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if _, err := img.WriteAt(make([]byte, 512), 0); err == nil {
		t.Error("a write went through")
	}
	if err := img.Trim(0, 4096); err == nil {
		t.Error("a trim went through")
	}

	// It took no lock: others may still open the image for themselves.
	other, err := OpenImage(OS{}, path, Want{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := OpenImage(ReadOnly{}, path, Want{}); !errors.Is(err, ErrLocked) {
		t.Errorf("an image in use: %v", err)
	}
	inUse, err := OpenImage(ReadOnly{InUse: true}, path, Want{})
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(inUse.Close(), other.Close()); err != nil {
		t.Error(err)
	}
}
