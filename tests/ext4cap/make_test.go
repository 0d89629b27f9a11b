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

	"kagami/ext4j/epoch"
	"kagami/tests/ext4cap/script"
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
	all := maps.Clone(streams(t))
	maps.Copy(all, kindStreams(t))
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

// scripts are the recordings of tests/ext4cap/script: small, and each with other rules at work.
func scripts() []Workload {
	return []Workload{
		{Name: "appends", MiB: 4, Mkfs: []string{"-b", "1024"}, Run: func(e *Env) error {
			return errors.Join(e.Append("a", 4096, 12), e.Append("b", 200, 12), e.Create("c", 3000, 8), e.Append("a", 700, 6))
		}},
		{Name: "overwrites", MiB: 4, Mkfs: []string{"-b", "1024"}, Run: func(e *Env) error {
			return errors.Join(e.Prepare("o", 1<<16), e.Overwrite("o", 16, 10, true), e.Overwrite("o", 16, 10, false), e.partial("o", 10), e.Append("p", 5000, 8))
		}},
		{Name: "reuse", MiB: 4, Mkfs: []string{"-b", "1024", "-J", "size=1"}, Run: func(e *Env) error {
			return errors.Join(reuse(e), e.Append("a", 3000, 10), e.Append("b", 200, 3), e.links())
		}},
		{Name: "data=journal, then ordered", Mount: "data=journal", MiB: 4, Mkfs: []string{"-b", "1024"}, Run: func(e *Env) error {
			return errors.Join(e.Append("a", 3000, 8), e.Unmount(), e.Mount(""), e.Overwrite("a", 4, 10, true), e.Append("a", 300, 10))
		}},
	}
}

// TestMakeScripts makes the recordings of tests/ext4cap/script.
func TestMakeScripts(t *testing.T) {
	if !*update {
		t.Skip("only with -update")
	}
	need(t)
	for _, w := range scripts() {
		s, err := Capture(tempShm(t), w, 1)
		if err != nil {
			t.Fatal(err)
		}
		out, err := s.script(w.Name, judge(t, s))
		if err != nil {
			t.Fatal(err)
		}
		b, err := out.Pack()
		if err == nil {
			err = os.WriteFile("script/"+strings.NewReplacer(" ", "_", ",", "").Replace(w.Name)+".gob.gz", b, 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("%s: %d steps, %d classes, %d KiB", w.Name, len(out.Steps), slices.Max(out.Class)+1, len(b)>>10)
	}
}

// script turns a stream into a recording, with writes cut where ext4j cuts them.
func (s Stream) script(name string, j *Judge) (script.Script, error) {
	out := script.Script{Name: name, Base: s.Base}
	for _, r := range s.Log {
		switch r.Kind {
		case Write:
			const limit = epoch.MaxPayload
			for off, p := r.Off, r.Data; len(p) > 0; {
				n := min(int64(len(p)), limit-off%limit)
				out.Steps = append(out.Steps, script.Step{Off: off, Data: p[:n]})
				off, p = off+n, p[n:]
			}
		case Flush:
			out.Steps = append(out.Steps, script.Step{})
		case Zero:
			return out, errors.New("zeroing is not recorded")
		}
	}
	img, classes := append([]byte(nil), s.Base...), map[string]uint32{}
	for i := range len(out.Steps) + 1 {
		look, err := j.Look(img)
		if err != nil {
			return out, err
		}
		if _, ok := classes[look]; !ok {
			classes[look] = uint32(len(classes))
		}
		out.Class = append(out.Class, classes[look])
		if i < len(out.Steps) {
			copy(img[out.Steps[i].Off:], out.Steps[i].Data)
		}
	}
	return out, nil
}
