package qmp

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/user"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
)

// ErrUnreachable means that QEMU's user cannot use a path.
var ErrUnreachable = errors.New("QEMU's user cannot use it")

// Reachable checks that a user, QEMU's (see QEMUUser), may enter all folders of a
// path and read and write what is at its end. Only mode bits and groups are looked at,
// no access control lists. It sees what is there now: a socket is made by its server.
func Reachable(path string, uid, gid int) error {
	if uid == 0 {
		return nil
	}
	groups := groupsOf(uid, gid)
	at := "/"
	parts := strings.Split(strings.Trim(filepath.Clean(path), "/"), "/")
	for i, p := range parts {
		if !may(at, uid, groups, 1) {
			return advise(ErrUnreachable, "QEMU's user (uid %d, gid %d) may not enter %s, so it cannot use %s: chmod o+x %s, or put it elsewhere", uid, gid, at, path, at)
		}
		at = filepath.Join(at, p)
		_, err := os.Stat(at)
		if errors.Is(err, fs.ErrNotExist) {
			return advise(ErrUnreachable, "%s does not exist", at)
		} else if err != nil {
			return fmt.Errorf("look at %s: %w", at, err)
		}
		if i == len(parts)-1 && !may(at, uid, groups, 6) {
			return advise(ErrUnreachable, "QEMU's user (uid %d, gid %d) may not read and write %s: give it its group (chgrp %d) and mode 0660", uid, gid, at, gid)
		}
	}
	return nil
}

// groupsOf is a user's groups, as libvirt gives them to QEMU.
func groupsOf(uid, gid int) []uint32 {
	groups := []uint32{uint32(gid)}
	u, err := user.LookupId(strconv.Itoa(uid))
	if err != nil {
		return groups // a user without a name has no further groups
	}
	ids, err := u.GroupIds()
	if err != nil {
		return groups
	}
	for _, id := range ids {
		if n, err := strconv.ParseUint(id, 10, 32); err == nil {
			groups = append(groups, uint32(n))
		}
	}
	return groups
}

// may checks the mode bits rwx = 4, 2, 1 that count for a user.
func may(path string, uid int, groups []uint32, want fs.FileMode) bool {
	i, err := os.Stat(path)
	if err != nil {
		return true // the caller finds out
	}
	mode := i.Mode().Perm()
	if s, ok := i.Sys().(*syscall.Stat_t); ok {
		switch {
		case s.Uid == uint32(uid):
			mode >>= 6
		case slices.Contains(groups, s.Gid):
			mode >>= 3
		}
	}
	return mode&want == want
}
