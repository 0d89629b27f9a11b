package offline

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"kagami/images"
)

// TestInfoSaysWhatDumpe2fsSays compares with dumpe2fs for file systems of many kinds.
func TestInfoSaysWhatDumpe2fsSays(t *testing.T) {
	for _, args := range []string{"", "-b 1024", "-b 2048 -I 128", "-O ^has_journal", "-O bigalloc -C 16384", "-O ^64bit,^metadata_csum", "-t ext3", "-t ext2",
		"-O meta_bg,^resize_inode -b 1024 -g 1024", "-O inline_data,quota,project,casefold,encrypt,verity,ea_inode,large_dir,orphan_file,metadata_csum_seed -L name", "-O sparse_super2,fast_commit", "-b 65536"} {
		t.Run(args, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "fs")
			if !strings.Contains(args, "-t ") {
				args = "-t ext4 " + args
			}
			tool(t, "mke2fs", append(strings.Fields("-q -F "+args), path, "48M")...)
			out := tool(t, "dumpe2fs", "-h", path)
			i, err := ReadInfo(path, Place{}, false)
			if err != nil {
				t.Fatal(err)
			}
			field := func(name string) string {
				m := regexp.MustCompile(`(?m)^` + name + `:\s+(.*)$`).FindStringSubmatch(out)
				if m == nil {
					return "missing: " + name
				}
				return m[1]
			}
			for name, got := range map[string]string{"Filesystem UUID": i.UUID, "Block count": fmt.Sprint(i.Blocks), "Free blocks": fmt.Sprint(i.FreeBlocks), "Inode count": fmt.Sprint(i.Inodes),
				"Free inodes": fmt.Sprint(i.FreeInodes), "Block size": fmt.Sprint(i.BlockSize), "Inode size": fmt.Sprint(i.InodeSize), "Filesystem state": i.State} {
				if want := strings.TrimSpace(field(name)); got != want {
					t.Errorf("%s: %q, dumpe2fs says %q", name, got, want)
				}
			}
			want, got := strings.Fields(field("Filesystem features")), slices.Clone(i.Features)
			slices.Sort(want)
			slices.Sort(got)
			if !slices.Equal(got, want) {
				t.Errorf("features %v, dumpe2fs says %v", got, want)
			}
			if has := strings.Contains(out, "has_journal"); has != (i.Journal != nil) {
				t.Errorf("journal %+v (%s)", i.Journal, i.NoJournal)
			} else if has && fmt.Sprint(i.Journal.Blocks) != field("Total journal blocks") && fmt.Sprint(i.Journal.Blocks) != field("Journal length") {
				t.Errorf("journal of %d blocks, dumpe2fs says %s of %s", i.Journal.Blocks, field("Journal length"), field("Total journal blocks"))
			}
		})
	}
}

func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// TestLogSaysWhatDebugfsSays compares every block of every transaction with debugfs's logdump.
func TestLogSaysWhatDebugfsSays(t *testing.T) {
	path, content := dirtyImage(t, 0)
	l, err := ReadLog(path, Place{}, false)
	if err != nil || len(l.Transactions) == 0 {
		t.Fatalf("%+v, %v", l, err)
	}
	var got []string
	for _, tr := range l.Transactions {
		for _, b := range tr.Blocks {
			got = append(got, fmt.Sprintf("%d:%d", tr.TID, b))
		}
	}
	var want []string
	tid := 0
	for line := range strings.Lines(tool(t, "debugfs", "-R", "logdump -a", path)) {
		if m := regexp.MustCompile(`descriptor block, sequence (\d+)|expected sequence (\d+), type 1`).FindStringSubmatch(line); m != nil {
			tid, _ = strconv.Atoi(m[1] + m[2])
		}
		if m := regexp.MustCompile(`FS block (\d+) logged at`).FindStringSubmatch(line); m != nil {
			want = append(want, fmt.Sprintf("%d:%s", tid, m[1]))
		}
	}
	if !slices.Equal(got, want) {
		t.Errorf("got  %v\nwant %v", got, want)
	}
	same(t, path, content)
}

// TestLookAtImagesInUse: they are refused, unless they are asked for.
func TestLookAtImagesInUse(t *testing.T) {
	path, _ := dirtyImage(t, 0)
	img, err := images.OpenImage(images.OS{}, path, images.Want{})
	if err != nil {
		t.Fatal(err)
	}
	defer img.Close()
	if _, err := ReadInfo(path, Place{}, false); err == nil {
		t.Error("an image in use was looked at")
	}
	if _, err := ReadInfo(path, Place{}, true); err != nil {
		t.Error(err)
	}
	if _, err := ReadLog(path, Place{}, true); err != nil {
		t.Error(err)
	}
}
