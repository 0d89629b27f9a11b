//go:build ext4images

package recover

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestWriteGolden makes the golden files of package jbd2 anew, in EXT4_GOLDEN: the
// journal's superblock and one transaction, as the kernel wrote them (1 KiB blocks), and
// what debugfs says of it, against which the .txt beside it was read.
func TestWriteGolden(t *testing.T) {
	needMount(t)
	dir := os.Getenv("EXT4_GOLDEN")
	if dir == "" {
		t.Skip("EXT4_GOLDEN names no folder")
	}
	for name, c := range map[string]combo{
		"v3-64bit": {mkfs: []string{"-t", "ext4", "-b", "1024", "-O", "metadata_csum,64bit"}},
		"v1":       {mkfs: []string{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum,64bit"}, mount: "journal_checksum"},
		"none":     {mkfs: []string{"-t", "ext4", "-b", "1024", "-O", "^metadata_csum,^64bit"}},
	} {
		m := mountImage(t, format(t, 16, c.mkfs...), 0, c.mount)
		w := newWorker(t, m.dir, 1)
		if err := os.Mkdir(m.dir+"/d", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.Symlink(strings.Repeat("t", 100), m.dir+"/d/s"); err != nil {
			t.Fatal(err)
		}
		w.commit()
		if err := os.RemoveAll(m.dir + "/d"); err != nil {
			t.Fatal(err)
		}
		w.commit()
		img := m.snapshot()
		m.unmount()
		writeGolden(t, img, filepath.Join(dir, name))
	}
}

func writeGolden(t *testing.T, img, to string) {
	t.Helper()
	_, j, _ := journalOf(t, img)
	out := append([]byte(nil), j.raw[:]...)
	trs := logOf(t, img).Transactions
	tr := trs[len(trs)-1]
	b := make([]byte, 1024)
	for n := tr.First; n <= tr.Last; n++ {
		if err := j.read(n, b); err != nil {
			t.Fatal(err)
		}
		out = append(out, b...)
	}
	if err := os.WriteFile(to+".blocks", out, 0o644); err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %+v\n%s", to, tr, run(t, 0, "debugfs", "-R", "logdump -a", img))
}
