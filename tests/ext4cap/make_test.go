package ext4cap

import (
	"bytes"
	"compress/gzip"
	"errors"
	"flag"
	"os"
	"testing"
)

var update = flag.Bool("update", false, "write the images that other packages' tests use")

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
