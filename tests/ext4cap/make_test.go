package ext4cap

import (
	"bytes"
	"compress/gzip"
	"errors"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the images that other packages' tests use")

// TestCorpus writes disks that lost their power to the folder EXT4_CORPUS: what
// make ext4-corpus makes for other programs to try.
func TestCorpus(t *testing.T) {
	dir := os.Getenv("EXT4_CORPUS")
	if dir == "" {
		t.Skip("only with EXT4_CORPUS set: make ext4-corpus")
	}
	n, seed := soak(t)
	all := streams(t)
	for i, name := range slices.Sorted(maps.Keys(all)) {
		for k, c := range all[name].Cuts(rand.New(rand.NewPCG(seed, uint64(i))), max(1, n)) {
			path := filepath.Join(dir, fmt.Sprintf("%s.%d.img", strings.ReplaceAll(name, " ", "_"), k))
			if err := writeSparse(path, c.State); err != nil {
				t.Fatal(err)
			}
			t.Logf("%s: %s", path, c.Name)
		}
	}
}

// writeSparse writes a file with holes where there are zeros.
func writeSparse(path string, img []byte) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	const step = 4096
	err = f.Truncate(int64(len(img)))
	for o := 0; o < len(img) && err == nil; o += step {
		if p := img[o:min(o+step, len(img))]; !bytes.Equal(p, make([]byte, len(p))) {
			_, err = f.WriteAt(p, int64(o))
		}
	}
	return errors.Join(err, f.Close())
}

// TestMakeDirty makes the image of tests/dirty.
func TestMakeDirty(t *testing.T) {
	if !*update {
		t.Skip("only with -update")
	}
	need(t)
	s, err := Capture(tempShm(t), Workload{MiB: 8, Dirty: true, Run: func(e *Env) error {
		return errors.Join(e.Append("a", 300, 5), e.Create("c", 100, 3), os.Remove(e.Path("c1")), e.Append("b", 5000, 2))
	}}, 1)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range s.Log {
		apply(s.Base, r)
	}
	var b bytes.Buffer
	z, _ := gzip.NewWriterLevel(&b, gzip.BestCompression)
	if _, err := z.Write(s.Base); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(z.Close(), os.WriteFile("../dirty/dirty.img.gz", b.Bytes(), 0o600)); err != nil {
		t.Fatal(err)
	}
}
