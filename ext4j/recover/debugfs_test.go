package recover

import (
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"kagami/ext4j/jbd2"
)

// TestDebugfsJournals recovers journals that debugfs wrote: it makes
// checksum v2, which the kernel reads but no longer writes.
func TestDebugfsJournals(t *testing.T) {
	needMount(t)
	for _, c := range []struct {
		args string
		open string
		want jbd2.Features
	}{
		{"^metadata_csum,^64bit", "jo", 0},
		{"^metadata_csum,64bit", "jo", jbd2.Bit64},
		{"metadata_csum,^64bit", "jo -c -v 2", jbd2.SumV2},
		{"metadata_csum,64bit", "jo -c -v 2", jbd2.SumV2 | jbd2.Bit64},
		{"metadata_csum,^64bit", "jo -c -v 3", jbd2.SumV3},
		{"metadata_csum,64bit", "jo -c -v 3", jbd2.SumV3 | jbd2.Bit64},
	} {
		t.Run(c.args+" "+c.open, func(t *testing.T) {
			img := format(t, 64, "-t", "ext4", "-b", "1024", "-O", c.args)
			writeWithDebugfs(t, img, c.open)
			_, j, _ := journalOf(t, img)
			if got := j.super.Features &^ (jbd2.Revoke | jbd2.Bit64&^c.want); got != c.want {
				t.Fatalf("the journal has %v, want %v", j.super.Features, c.want)
			}
			ours := copyFile(t, img)
			rep, err := recoverFile(t, ours, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if rep.Transactions != 3 || rep.Written != 350 || rep.Skipped != 70 || rep.Logged != 420 {
				t.Errorf("%+v", rep)
			}
			compareE2fsck(t, img, ours, rep)
			compareKernel(t, img, ours, "", rep)
		})
	}
}

// writeWithDebugfs writes 400 free blocks in one transaction, revokes 70 of them and
// 20 of these are written again later; then comes one without commit.
func writeWithDebugfs(t *testing.T, img, open string) {
	t.Helper()
	dir := t.TempDir()
	rng := rand.New(rand.NewPCG(7, 7))
	data := make([]byte, 400<<10)
	for i := range data {
		data[i] = byte(rng.Uint32())
	}
	for i := 0; i < 400; i += 3 {
		copy(data[i<<10:], "\xc0\x3b\x39\x98")
	}
	if err := os.WriteFile(dir+"/data", data, 0o600); err != nil {
		t.Fatal(err)
	}
	const first = 50000 // free in a file system of 65536 blocks without files
	script := []string{
		open, fmt.Sprintf("jw -b %d-%d %s/data", first, first+399, dir), "jc",
		open, fmt.Sprintf("jw -r %d-%d", first+100, first+169), "jc",
		open, fmt.Sprintf("jw -b %d-%d %s/data", first+150, first+169, dir), "jc",
		open, fmt.Sprintf("jw -c -b %d-%d %s/data", first+10, first+12, dir), "jc",
	}
	if err := os.WriteFile(dir+"/script", []byte(strings.Join(script, "\n")+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	run(t, 0, "debugfs", "-w", "-f", dir+"/script", img)
}
