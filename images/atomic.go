package images

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
)

// TempSuffix ends the name of a file that is being written. A file of such a
// name is what a crash left behind; it holds nothing anyone relies on.
const TempSuffix = ".tmp"

// ErrTooLarge is returned by ReadFile for a file above the caller's limit.
var ErrTooLarge = errors.New("file is too large")

// WriteFileAtomic replaces the file name by data, or leaves it as it was. It
// is durable when it returns nil: name+TempSuffix was written and fdatasynced,
// renamed over name, and the folder fsynced. After an error of the last step
// either content may survive a crash. What a crash left under the temporary
// name is removed first. Calls for one name must not overlap.
func WriteFileAtomic(fsys FS, name string, data []byte, perm fs.FileMode) error {
	temp := name + TempSuffix
	if err := writeTemp(fsys, temp, data, perm); err != nil {
		return err
	}
	if err := fsys.Rename(temp, name); err != nil {
		return removeAfter(fsys, temp, fmt.Errorf("rename %s to %s: %w", temp, name, err))
	}
	if err := fsys.SyncDir(filepath.Dir(name)); err != nil {
		return fmt.Errorf("fsync folder of %s: %w", name, err)
	}
	return nil
}

// writeTemp makes the temporary file and its content durable.
func writeTemp(fsys FS, temp string, data []byte, perm fs.FileMode) error {
	f, err := createFresh(fsys, temp, perm)
	if err != nil {
		return err
	}
	if _, err = f.WriteAt(data, 0); err != nil {
		err = fmt.Errorf("write %s: %w", temp, err)
	} else if err = f.Datasync(); err != nil {
		err = fmt.Errorf("fsync %s: %w", temp, err)
	}
	if cerr := f.Close(); err == nil && cerr != nil {
		err = fmt.Errorf("close %s: %w", temp, cerr)
	}
	if err != nil {
		return removeAfter(fsys, temp, err)
	}
	return nil
}

// createFresh creates temp anew, in place of what a crash left there.
func createFresh(fsys FS, temp string, perm fs.FileMode) (File, error) {
	f, err := fsys.Create(temp, perm)
	if errors.Is(err, fs.ErrExist) {
		if err := fsys.Remove(temp); err != nil {
			return nil, fmt.Errorf("remove leftover %s: %w", temp, err)
		}
		f, err = fsys.Create(temp, perm)
	}
	return f, err
}

// removeAfter removes temp because of err. That it could not be removed is
// said as well, but does no harm.
func removeAfter(fsys FS, temp string, err error) error {
	if rerr := fsys.Remove(temp); rerr != nil {
		return errors.Join(err, fmt.Errorf("remove %s: %w", temp, rerr))
	}
	return err
}

// ReadFile reads a whole file of at most limit bytes.
func ReadFile(fsys FS, name string, limit int64) (data []byte, err error) {
	f, err := fsys.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > limit {
		return nil, fmt.Errorf("%s: %w: %d bytes, at most %d expected", name, ErrTooLarge, size, limit)
	}
	data = make([]byte, size)
	n, err := f.ReadAt(data, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return data[:n], nil
}
