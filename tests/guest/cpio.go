package guest

import (
	"bytes"
	"cmp"
	"compress/gzip"
	"fmt"
	"io"
	"path"
	"slices"
)

// entry is one file, folder or link of a file tree to be made.
type entry struct {
	name string // without a leading slash
	mode uint32 // type and permissions, as in st_mode
	data []byte // content, or a link's target
}

const (
	modeDir  = 0o040755
	modeFile = 0o100644
	modeExec = 0o100755
)

// withParents adds the folders the entries need, sorts parents first and
// refuses two entries of one name.
func withParents(es []entry) ([]entry, error) {
	have := map[string]bool{}
	for _, e := range es {
		if have[e.name] {
			return nil, fmt.Errorf("two files %q in one tree", e.name)
		}
		have[e.name] = true
	}
	for _, e := range es {
		for d := path.Dir(e.name); d != "."; d = path.Dir(d) {
			if !have[d] {
				have[d] = true
				es = append(es, entry{name: d, mode: modeDir})
			}
		}
	}
	slices.SortFunc(es, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
	return es, nil
}

// writeCPIO writes the "newc" form of cpio, which the kernel unpacks as an
// initramfs (Documentation/driver-api/early-userspace/buffer-format.rst). The
// same entries give the same bytes.
func writeCPIO(w io.Writer, es []entry) error {
	es, err := withParents(slices.Clone(es))
	if err != nil {
		return err
	}
	var b bytes.Buffer
	for i, e := range append(es, entry{name: "TRAILER!!!"}) {
		nlink := 1
		if e.mode == modeDir {
			nlink = 2
		}
		fmt.Fprintf(&b, "070701%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%08X%s\x00",
			i+1, e.mode, 0, 0, nlink, 0, len(e.data), 0, 0, 0, 0, len(e.name)+1, 0, e.name)
		pad4(&b)
		b.Write(e.data)
		pad4(&b)
	}
	_, err = w.Write(b.Bytes())
	return err
}

func pad4(b *bytes.Buffer) {
	b.Write(make([]byte, -b.Len()&3))
}

// gzipCPIO is writeCPIO, compressed for speed.
func gzipCPIO(es []entry) ([]byte, error) {
	var b bytes.Buffer
	z, err := gzip.NewWriterLevel(&b, gzip.BestSpeed)
	if err != nil {
		return nil, err
	}
	if err := writeCPIO(z, es); err != nil {
		return nil, err
	}
	err = z.Close()
	return b.Bytes(), err
}
