package pki

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"
)

type file struct {
	name string
	data []byte
	mode fs.FileMode
}

// absent fails when one of the names exists in dir.
func absent(dir string, names ...string) error {
	for _, n := range names {
		path := filepath.Join(dir, n)
		if _, err := os.Lstat(path); err == nil {
			return fmt.Errorf("%s: %w; nothing was changed (--force replaces it)", path, fs.ErrExist)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// writeFiles writes all files to dir, which it makes (0700) when missing.
// Each appears whole or not at all and is durable when this returns.
func writeFiles(dir string, force bool, files []file) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("make folder for certificates: %w", err)
	}
	if !force {
		names := make([]string, 0, len(files))
		for _, f := range files {
			names = append(names, f.name)
		}
		if err := absent(dir, names...); err != nil {
			return fmt.Errorf("write certificates: %w", err)
		}
	}
	for _, f := range files {
		if err := writeFile(dir, f, force); err != nil {
			return fmt.Errorf("write %s: %w", filepath.Join(dir, f.name), err)
		}
	}
	return syncDir(dir)
}

// writeFile puts one file in place: temporary file, fsync, then link (which
// fails when the name exists) or, with force, rename.
func writeFile(dir string, f file, force bool) error {
	tmp, err := os.CreateTemp(dir, "."+f.name+".*") // mode 0600
	if err != nil {
		return err
	}
	defer func() { _ = os.Remove(tmp.Name()) }() // gone already after a rename
	_, err = tmp.Write(f.data)
	if err == nil {
		err = tmp.Chmod(f.mode)
	}
	if err == nil {
		err = tmp.Sync()
	}
	if cerr := tmp.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return err
	}
	path := filepath.Join(dir, f.name)
	if force {
		return os.Rename(tmp.Name(), path)
	}
	if err := os.Link(tmp.Name(), path); err != nil {
		return err
	}
	return nil
}

// writeTar writes the files as an archive, mode 0600: it holds a private key.
func writeTar(path string, force bool, now time.Time, files []file) error {
	dir, name := filepath.Split(path)
	if dir == "" {
		dir = "."
	}
	if !force {
		if err := absent(dir, name); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Size: int64(len(f.data)), Mode: int64(f.mode), ModTime: now.Truncate(time.Second), Format: tar.FormatUSTAR}
		if err := w.WriteHeader(h); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
		if _, err := w.Write(f.data); err != nil {
			return fmt.Errorf("write bundle: %w", err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("write bundle: %w", err)
	}
	if err := writeFile(dir, file{name, b.Bytes(), 0o600}, force); err != nil {
		return fmt.Errorf("write bundle %s: %w", path, err)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	err = d.Sync()
	if cerr := d.Close(); err == nil {
		err = cerr
	}
	if err != nil {
		return fmt.Errorf("fsync folder %s: %w", dir, err)
	}
	return nil
}
