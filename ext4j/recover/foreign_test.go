//go:build ext4images

package recover

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
)

// refusedImages are the images of e2fsprogs' tests that are refused, and the words of it.
var refusedImages = map[string]string{
	"j_corrupt_descr_csum":       "wrong checksum of a descriptor",
	"j_corrupt_ext_jnl_sb_block": "on another device",
	"j_corrupt_ext_jnl_sb_csum":  "on another device",
	"j_corrupt_revoke_rcount":    "revoke block with 65535 bytes in use",
	"j_corrupt_sb_csum":          "wrong checksum of the journal's superblock",
	"j_corrupt_sb_magic":         "no journal superblock",
	"j_ext_dumpe2fs":             "external journal, not a file system",
	"j_ext_long_revoke_trans":    "on another device",
	"j_ext_long_trans":           "on another device",
	"j_recover_fast_commit":      "fast commits",
	// These journals overwrite the journal's own inode with zeros: a recovery
	// that is interrupted would not find the journal again.
	"j_long_trans":             "checksum of inode 8",
	"j_long_trans_mcsum_32bit": "checksum of inode 8",
	"j_long_trans_mcsum_64bit": "checksum of inode 8",
}

// TestForeignImages recovers the images *.img of the folder EXT4_IMAGES: those that the
// j_* tests of e2fsprogs ship (image.gz, image.bz2) or leave in
// JOURNAL_DUMP_DIR. Each is refused if it is listed above, else it
// becomes what e2fsck -y -E journal_only makes of it.
func TestForeignImages(t *testing.T) {
	needTools(t, "e2fsck")
	imgs, err := filepath.Glob(filepath.Join(os.Getenv("EXT4_IMAGES"), "*.img"))
	if err != nil || len(imgs) == 0 {
		t.Fatalf("EXT4_IMAGES=%q has no images (%v)", os.Getenv("EXT4_IMAGES"), err)
	}
	for _, img := range imgs {
		name := strings.TrimSuffix(filepath.Base(img), ".img")
		t.Run(name, func(t *testing.T) {
			ours := copyFile(t, img)
			rep, err := recoverFile(t, ours, Options{})
			if words, refused := refusedImages[name]; refused {
				if !errors.Is(err, ErrRefused) || !strings.Contains(err.Error(), words) {
					t.Errorf("%v, want a refusal with %q", err, words)
				}
				if d := differing(t, ours, img, 512); len(d) > 0 {
					t.Errorf("sectors %v written", d)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			compareForeign(t, img, ours, rep)
		})
	}
}

func compareForeign(t *testing.T, img, ours string, rep Report) {
	t.Helper()
	t.Setenv("E2FSCK_TIME", "1800000000")
	theirs := copyFile(t, img)
	out := run(t, 15, "e2fsck", "-y", "-E", "journal_only", theirs)
	fs, _, at := journalOf(t, ours)
	if d := differing(t, ours, theirs, int64(fs.BlockSize), area{ext4.Offset, ext4.Size}, area{at, jbd2.SuperblockSize}); len(d) > 0 {
		t.Errorf("blocks %v differ from e2fsck's\n%s", d, out)
	}
	if d := without(superFields(t, ours, theirs), "wtime", "wtime hi", "kbytes written", "checksum", "free blocks", "free inodes"); len(d) > 0 {
		t.Errorf("superblock differs from e2fsck's in %v", d)
	}
	t.Logf("needed %v, %d transactions, %d of %d blocks written, %d damaged, %s", rep.Needed, rep.Transactions, rep.Written, rep.Logged, rep.Damaged, rep.EndReason)
}
