package qmp

import (
	"errors"
	"os"
	"path/filepath"
	"testing"
)

func TestReachable(t *testing.T) {
	if os.Geteuid() != 0 {
		if os.Getenv("CI") == "true" {
			t.Fatal("needs root")
		}
		t.Skip("needs root")
	}
	dir, err := os.MkdirTemp("", "reach")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	file := filepath.Join(dir, "sub", "f")
	if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), os.WriteFile(file, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	const uid, gid = 54321, 54322
	for _, c := range []struct {
		dirMode, fileMode os.FileMode
		owner, group      int
		want              bool
	}{
		{0o700, 0o666, 0, 0, false}, {0o711, 0o666, 0, 0, true}, {0o711, 0o660, 0, 0, false},
		{0o711, 0o660, 0, gid, true}, {0o711, 0o606, 0, gid, false}, {0o711, 0o600, uid, 0, true}, {0o711, 0o066, uid, gid, false},
		{0o711, 0o640, 0, gid, false},
	} {
		if err := errors.Join(os.Chmod(dir, c.dirMode), os.Chown(file, c.owner, c.group), os.Chmod(file, c.fileMode)); err != nil {
			t.Fatal(err)
		}
		if err := Reachable(file, uid, gid); (err == nil) != c.want || err != nil && !errors.Is(err, ErrUnreachable) {
			t.Errorf("%+v: %v", c, err)
		}
		if err := Reachable(file, 0, 0); err != nil {
			t.Error(err)
		}
	}
	if err := Reachable(file+"x", uid, gid); !errors.Is(err, ErrUnreachable) {
		t.Error(err)
	}
}
