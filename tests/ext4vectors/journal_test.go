package ext4vectors

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"kagami/ext4j/recover"
	"kagami/images"
)

// always are the fields that differ after every replay: e2fsck writes down when
// and how much it wrote, the kernel does not before it mounts for writing; and
// the checksum over them.
var always = []string{"s_checksum", "s_kbytes_written", "s_wtime", "s_wtime_hi"}

// head: the kernel (since 6.2, jbd2_mark_journal_empty), and kagami with it, notes
// where the next transaction goes; e2fsck 1.47.0 does not know the field.
var head = []string{"j_head", "j_checksum"}

// verdict is what is expected of an image: a refusal, or a replay that agrees with
// e2fsck's in all but some fields.
type verdict struct {
	refused string   // part of the reason; "" : replayed
	differ  []string // beside always; for a refusal e2fsck goes its own way
	damaged int      // blocks of the log with a wrong checksum
	clean   bool     // nothing to replay
}

var (
	replayed = verdict{differ: head}
	external = verdict{refused: "the journal is on another device"}
)

// verdicts has all journal tests of e2fsprogs 1.47.0. What is refused there e2fsck
// repairs by guessing, by leaving things out, or not at all.
var verdicts = map[string]verdict{
	// The corrupted commit ends the log. What lies behind it may be whole: kagami begins
	// anew with a sequence that nothing in the log can bear.
	"j_corrupt_commit_csum": {differ: []string{"j_head", "j_sequence", "j_checksum"}},
	// A commit block of another transaction ends the log as a stale block would.
	"j_corrupt_commit_tid": replayed,
	// The kernel does not mount these (EFSBADCRC); e2fsck drops the whole log.
	"j_corrupt_descr_csum": {refused: "wrong checksum of a descriptor or revoke block"},
	"j_corrupt_descr_tid":  replayed,
	// A block with a wrong checksum is left out, and the file system marked. The tids go
	// on behind the last one; e2fsck's stay where the log began.
	"j_corrupt_journal_block": {differ: []string{"j_head", "j_sequence", "j_checksum"}, damaged: 1},
	"j_corrupt_revoke_block":  replayed,
	"j_corrupt_revoke_csum":   replayed,
	// A count beyond the block: e2fsck drops the log.
	"j_corrupt_revoke_rcount": {refused: "revoke block with 65535 bytes in use of 4096"},
	// e2fsck makes a new journal.
	"j_corrupt_sb_csum":  {refused: "wrong checksum of the journal's superblock"},
	"j_corrupt_sb_magic": {refused: "no journal superblock"},

	"j_corrupt_ext_jnl_sb_block": external,
	"j_corrupt_ext_jnl_sb_csum":  external,
	"j_ext_long_revoke_trans":    external,
	"j_ext_long_trans":           external,
	"j_ext_dumpe2fs":             {refused: "this is an external journal"},

	"j_long_revoke_trans":             replayed,
	"j_long_revoke_trans_mcsum_32bit": replayed,
	"j_long_revoke_trans_mcsum_64bit": replayed,
	// The log overwrites the journal's own inode; e2fsck makes a new journal.
	"j_long_trans":             {refused: "block map of inode 8"},
	"j_long_trans_mcsum_32bit": {refused: "wrong checksum of inode 8"},
	"j_long_trans_mcsum_64bit": {refused: "wrong checksum of inode 8"},

	"j_recover_csum2_32bit": replayed,
	"j_recover_csum2_64bit": replayed,
	// The kernel, and kagami with it, counts what is free from the group descriptors.
	"j_recover_csum3_64bit": {differ: []string{"j_head", "j_checksum", "s_free_blocks_count", "s_free_inodes_count"}},
	// e2fsck 1.47.0 replays fast commits wrongly.
	"j_recover_fast_commit": {refused: "fast commits"},

	"j_short_revoke_trans":                  replayed,
	"j_short_revoke_trans_mcsum_64bit":      replayed,
	"j_short_trans":                         replayed,
	"j_short_trans_64bit":                   replayed,
	"j_short_trans_mcsum_64bit":             replayed,
	"j_short_trans_old_csum":                replayed,
	"j_short_trans_open_recover":            replayed,
	"j_short_trans_recover":                 replayed,
	"j_short_trans_recover_mcsum_64bit":     replayed,
	"j_short_uncommitted_trans":             {clean: true},
	"j_short_uncommitted_trans_mcsum_64bit": {clean: true},
}

func fetched(t *testing.T) string {
	t.Helper()
	dir, err := Fetch()
	if err != nil {
		if os.Getenv("CI") == "true" {
			t.Fatal(err)
		}
		t.Skip(err)
	}
	return dir
}

func command(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	return string(out), err
}

// copyOf makes a sparse copy of an image and opens it.
func copyOf(t *testing.T, path string) *images.Image {
	t.Helper()
	to := filepath.Join(t.TempDir(), "image")
	if out, err := command(t, "cp", "--sparse=always", path, to); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return open(t, to)
}

func open(t *testing.T, path string) *images.Image {
	t.Helper()
	img, err := images.OpenImage(images.OS{}, path, images.Want{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { img.Close() })
	return img
}

func differences(t *testing.T, a, b *images.Image) []string {
	t.Helper()
	l, err := layoutOf(a)
	if err != nil {
		t.Fatal(err)
	}
	diffs, err := differ(a, b, 1e5)
	if err != nil {
		t.Fatal(err)
	}
	return l.places(diffs)
}

func TestJournals(t *testing.T) {
	dir := filepath.Join(fetched(t), "j")
	all, err := names(dir, ".img")
	if err != nil {
		t.Fatal(err)
	}
	for name := range verdicts {
		if !slices.Contains(all, name) {
			t.Errorf("no image of %s", name)
		}
	}
	for _, name := range all {
		t.Run(name, func(t *testing.T) {
			want, ok := verdicts[name]
			if !ok {
				t.Fatal("a test that is not listed")
			}
			path := filepath.Join(dir, name+".img")
			img := copyOf(t, path)
			rep, err := recover.Run(img, 0, img.Size(), recover.Options{})
			if want.refused != "" {
				if !errors.Is(err, recover.ErrRefused) || !strings.Contains(err.Error(), want.refused) {
					t.Errorf("%v; expected a refusal: %s", err, want.refused)
				}
				same(t, img, path)
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if rep.Needed == want.clean || rep.Damaged != want.damaged {
				t.Errorf("needed %v, %d damaged blocks", rep.Needed, rep.Damaged)
			}
			agrees(t, img, path, want.differ)
		})
	}
}

// agrees compares what became of an image with what e2fsck makes of it.
func agrees(t *testing.T, ours *images.Image, path string, may []string) {
	t.Helper()
	theirs := filepath.Join(t.TempDir(), "theirs")
	if out, err := command(t, "cp", "--sparse=always", path, theirs); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if out, err := command(t, "e2fsck", "-y", "-E", "journal_only", theirs); err != nil {
		t.Fatalf("e2fsck: %v\n%s", err, out)
	}
	other := open(t, theirs)
	got := differences(t, ours, other)
	for _, place := range got {
		if !slices.Contains(always, place) && !slices.Contains(may, place) {
			t.Errorf("differs from e2fsck's in %s", place)
		}
	}
	for _, place := range may {
		if place != "j_checksum" && !slices.Contains(got, place) {
			t.Errorf("agrees in %s: take that off the list", place)
		}
	}
	if t.Failed() {
		b := make([]byte, 1024)
		l, _ := layoutOf(ours)
		for _, img := range []*images.Image{ours, other} {
			_, _ = img.ReadAt(b, l.journal)
			t.Log("journal superblock:\n" + hex.Dump(b[:0x100]))
		}
	}
}

// same tells whether an image is still what it was made from.
func same(t *testing.T, img *images.Image, path string) {
	t.Helper()
	if diffs, err := differ(img, open(t, path), 10); err != nil || len(diffs) > 0 {
		t.Errorf("refused, but changed: %v, %v", diffs, err)
	}
}

// TestDifferTells keeps the comparison from seeing nothing.
func TestDifferTells(t *testing.T) {
	dir := t.TempDir()
	var all []*images.Image
	for i, name := range []string{"a", "b"} {
		img, err := images.CreateImage(images.OS{}, filepath.Join(dir, name), 1<<20, "")
		if err != nil {
			t.Fatal(err)
		}
		defer img.Close()
		if _, err := img.WriteAt(bytes.Repeat([]byte{byte(i)}, 3), 300<<10); err != nil {
			t.Fatal(err)
		}
		all = append(all, img)
	}
	diffs, err := differ(all[0], all[1], 100)
	if err != nil || len(diffs) != 3 || diffs[0] != (Diff{300 << 10, 0, 1}) {
		t.Errorf("got %v, %v", diffs, err)
	}
}
