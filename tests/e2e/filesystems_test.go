package e2e

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"kagami/tests/acked"
	"kagami/tests/e2e/soak/rounds"
)

// The two partitions of TestFileSystems' third disk, in sectors of 512 bytes.
const (
	firstPart, secondPart = 2048, 2048 + partSectors
	partSectors           = 96 << 10 // 48 MiB
)

// TestFileSystems: the kernel's ext4 in shapes that are not mkfs's default, and
// two of them on a disk with a partition table. The site is lost while they are
// written; each journal is replayed before anybody mounts, e2fsck finds nothing,
// and all that was acknowledged is there.
func TestFileSystems(t *testing.T) {
	t.Parallel()
	n := seed(t)
	disk := func(size int64) []rounds.Disk { return []rounds.Disk{{Name: "d", Size: size}} }
	r, ctx := newRig(t, 90*time.Second, rounds.Options{RTT: 5 * time.Millisecond, Limits: rounds.QuickLink(), Groups: []rounds.Group{
		{Name: "small", Disks: disk(64 << 20)}, {Name: "journal", Disks: disk(64 << 20)}, {Name: "parts", Disks: disk(98 << 20)}}})
	partition(t, r.Image("parts", "d"), 98<<20)
	must(t, r.StartBoth(ctx))
	must(t, r.AwaitProtected(ctx))
	part := func(sector int64) acked.NBDOptions {
		return acked.NBDOptions{Offset: sector * 512, Size: partSectors * 512}
	}
	small, journal := acked.NBDOptions{MkfsArgs: []string{"-b", "1024"}}, acked.NBDOptions{Data: "data=journal"}
	var loads []*rounds.Files
	fsck := map[string][]int64{} // offsets of file systems, by group
	for i, l := range []struct {
		group string
		shape acked.NBDOptions
	}{{"small", small}, {"journal", journal}, {"parts", part(firstPart)}, {"parts", part(secondPart)}} {
		f := r.NewFiles(l.group, "d", n+uint64(i)<<32)
		f.Shape = l.shape
		must(t, f.Start(ctx, true))
		loads, fsck[l.group] = append(loads, f), append(fsck[l.group], l.shape.Offset)
	}
	for _, f := range loads {
		must(t, f.AwaitProgress(ctx))
	}
	time.Sleep(time.Second)
	must(t, r.Main.Kill())
	r.Link.Cut()
	var errs []error
	for _, f := range loads {
		errs = append(errs, f.Kill())
	}
	must(t, errors.Join(errs...))
	for group, offsets := range fsck {
		out, err := r.Failover(ctx, group)
		must(t, err)
		if replayed := strings.Count(out, "journal transactions replayed"); replayed != len(offsets) || strings.Contains(out, "warning") {
			t.Errorf("%d file systems of group %s were written, %d journals replayed:\n%s", len(offsets), group, replayed, out)
		}
		for _, off := range offsets {
			must(t, rounds.Fsck(ctx, fmt.Sprintf("%s?offset=%d", r.Replica(group, "d"), off)))
		}
	}
	for _, f := range loads {
		must(t, f.Check(ctx, r.DR))
		t.Logf("%d operations acknowledged", f.Acked())
	}
}

// partition makes a disk with a GPT and two partitions at the place of a
// declared image.
func partition(t *testing.T, path string, size int64) {
	t.Helper()
	must(t, os.WriteFile(path, nil, 0o600))
	must(t, os.Truncate(path, size))
	cmd := exec.Command("sfdisk", "-q", "--no-reread", "--no-tell-kernel", path)
	cmd.Stdin = strings.NewReader(fmt.Sprintf("label: gpt\nstart=%d,size=%d,type=L\nstart=%d,size=%d,type=L\n",
		firstPart, partSectors, secondPart, partSectors))
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v: %s", err, out)
	}
}
