package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"
)

// TestDeepExtents maps a file whose extent tree has several levels.
func TestDeepExtents(t *testing.T) {
	testFragmented(t, fragmented(t, "^metadata_csum"))
	testFragmented(t, fragmented(t, "metadata_csum"))
}

// fragmented makes a file system of 1 KiB blocks with a file "frag" of which
// thousands of blocks have no neighbour.
func fragmented(t *testing.T, feature string) string {
	need(t, "debugfs")
	path := mkfs(t, 32, "-t", "ext4", "-b", "1024", "-O", feature)
	var script strings.Builder
	for b := 12001; b < 24000; b += 2 {
		fmt.Fprintf(&script, "setb %d\n", b)
	}
	dir := t.TempDir()
	data := make([]byte, 14000<<10)
	for i := range 14000 {
		binary.BigEndian.PutUint32(data[i<<10:], uint32(i+1)) // no zeros: debugfs would leave a hole
	}
	fmt.Fprintf(&script, "write %s/data frag\n", dir)
	if err := errors.Join(os.WriteFile(dir+"/data", data, 0o600),
		os.WriteFile(dir+"/script", []byte(script.String()), 0o600)); err != nil {
		t.Fatal(err)
	}
	run(t, "debugfs", "-w", "-f", dir+"/script", path)
	return path
}

func testFragmented(t *testing.T, path string) {
	t.Helper()
	f, size := open(t, path)
	fs, err := Probe(f, 0, size)
	if err != nil {
		t.Fatal(err)
	}
	var ino uint32
	for _, line := range strings.Split(run(t, "debugfs", "-R", "stat frag", path), "\n") {
		if _, err := fmt.Sscanf(line, "Inode: %d", &ino); err == nil {
			break
		}
	}
	in, err := fs.Inode(ino)
	if err != nil {
		t.Fatal(err)
	}
	n, err := decodeNode(in.Block[:])
	if err != nil || n.depth < 2 {
		t.Fatalf("tree of depth %d, %v: the test needs a deep one", n.depth, err)
	}
	m, err := fs.MapInode(in, in.Size/1024)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Runs()) < 3000 {
		t.Fatalf("%d runs: the test needs many", len(m.Runs()))
	}
	b := make([]byte, 1024)
	for _, l := range []uint64{0, 1, 700, 4999, m.Len() - 1} {
		p, ok := m.Physical(l)
		if err := fs.ReadBlock(p, b); !ok || err != nil || binary.BigEndian.Uint32(b) != uint32(l+1) {
			t.Errorf("block %d at %d: %v", l, p, err)
		}
	}
	if fs.ROCompat&MetadataCsum != 0 {
		damageNode(t, in, path)
	}
}

// damageNode changes one byte of a node below the root.
func damageNode(t *testing.T, in Inode, path string) {
	t.Helper()
	img, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	at := int(binary.LittleEndian.Uint32(in.Block[16:])) * 1024
	img[at+8] ^= 1
	fs, err := Probe(bytes.NewReader(img), 0, int64(len(img)))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := fs.MapInode(in, 10); !errors.Is(err, ErrChecksum) {
		t.Errorf("damaged extent node: %v", err)
	}
}

// tiny is a file system in memory that only serves to map hand-made inodes.
func tiny(blocks uint64) (*FS, []byte) {
	img := make([]byte, blocks*1024)
	return &FS{r: bytes.NewReader(img), BlockSize: 1024, Blocks: blocks, FirstDataBlock: 1}, img
}

// putNode writes an extent node with the given entries (three numbers each:
// logical, length or 0 for an index, place).
func putNode(b []byte, depth uint16, room uint16, entries ...[3]uint32) {
	le := binary.LittleEndian
	le.PutUint16(b, extentMagic)
	le.PutUint16(b[2:], uint16(len(entries)))
	le.PutUint16(b[4:], room)
	le.PutUint16(b[6:], depth)
	for i, e := range entries {
		p := b[12*(i+1):]
		le.PutUint32(p, e[0])
		if depth > 0 {
			le.PutUint32(p[4:], e[2])
			continue
		}
		le.PutUint16(p[4:], uint16(e[1]))
		le.PutUint32(p[8:], e[2])
	}
}

func extentInode(depth uint16, entries ...[3]uint32) Inode {
	i := Inode{Number: 8, Flags: flagExtents}
	putNode(i.Block[:], depth, 4, entries...)
	return i
}

func TestExtentsRefused(t *testing.T) {
	for name, c := range map[string]struct {
		in   Inode
		want uint64
	}{
		"hole at start": {extentInode(0, [3]uint32{1, 5, 20}), 3},
		"hole":          {extentInode(0, [3]uint32{0, 5, 20}, [3]uint32{6, 5, 30}), 10},
		"short":         {extentInode(0, [3]uint32{0, 5, 20}), 6},
		"none":          {extentInode(0), 1},
		"overlap":       {extentInode(0, [3]uint32{0, 5, 20}, [3]uint32{4, 5, 30}), 9},
		"order":         {extentInode(0, [3]uint32{5, 5, 20}, [3]uint32{0, 5, 30}), 9},
		"empty extent":  {extentInode(0, [3]uint32{0, 0, 20}), 1},
		"unwritten":     {extentInode(0, [3]uint32{0, 32769 + 5, 20}), 1},
		"place 0":       {extentInode(0, [3]uint32{0, 5, 0}), 1},
		"superblock":    {extentInode(0, [3]uint32{0, 5, 1}), 1},
		"outside":       {extentInode(0, [3]uint32{0, 5, 98}), 1},
		"twice":         {extentInode(0, [3]uint32{0, 5, 20}, [3]uint32{5, 5, 24}), 10},
		"no child":      {extentInode(1, [3]uint32{0, 0, 50}), 1},
		"child outside": {extentInode(1, [3]uint32{0, 0, 5000}), 1},
		"itself":        {extentInode(2, [3]uint32{0, 0, 61}), 1},
		"empty child":   {extentInode(1, [3]uint32{0, 0, 62}), 1},
		"wrong start":   {extentInode(1, [3]uint32{3, 0, 60}), 1},
		"depth":         {extentInode(6, [3]uint32{0, 0, 60}), 1},
		"magic":         {Inode{Flags: flagExtents}, 1},
		"entries": {func() Inode {
			i := extentInode(0, [3]uint32{0, 5, 20})
			i.Block[2] = 200
			return i
		}(), 1},
		"room": {func() Inode {
			i := extentInode(0, [3]uint32{0, 5, 20})
			i.Block[4] = 5
			return i
		}(), 1},
	} {
		fs, img := tiny(100)
		putNode(img[60<<10:], 0, 84, [3]uint32{0, 5, 20})
		putNode(img[61<<10:], 1, 84, [3]uint32{0, 0, 61})
		putNode(img[62<<10:], 0, 84)
		if _, err := fs.MapInode(c.in, c.want); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
	fs, img := tiny(100)
	putNode(img[60<<10:], 0, 84, [3]uint32{0, 5, 20})
	m, err := fs.MapInode(extentInode(1, [3]uint32{0, 0, 60}), 4)
	if err != nil || m.Len() != 4 || len(m.Runs()) != 1 {
		t.Errorf("%+v, %v", m, err)
	}
}

func TestIndirectRefused(t *testing.T) {
	le := binary.LittleEndian
	fs, img := tiny(600)
	in := Inode{Number: 8}
	for i := range 12 {
		le.PutUint32(in.Block[4*i:], uint32(20+i))
	}
	for i := range 256 {
		le.PutUint32(img[50<<10+4*i:], uint32(100+i))
	}
	le.PutUint32(in.Block[48:], 50)
	le.PutUint32(in.Block[52:], 51)
	le.PutUint32(img[51<<10:], 52)
	le.PutUint32(img[52<<10:], 400)
	m, err := fs.MapInode(in, 269)
	if err != nil || len(m.Runs()) != 3 {
		t.Fatalf("%+v, %v", m, err)
	}
	if p, _ := m.Physical(268); p != 400 {
		t.Errorf("block 268 lies at %d", p)
	}
	for name, change := range map[string]func(){
		"hole":      func() { le.PutUint32(in.Block[8:], 0) },
		"outside":   func() { le.PutUint32(in.Block[8:], 600) },
		"twice":     func() { le.PutUint32(in.Block[8:], 20) },
		"map hole":  func() { le.PutUint32(in.Block[48:], 0) },
		"map":       func() { le.PutUint32(in.Block[48:], 0xffffffff) },
		"deep hole": func() { le.PutUint32(img[52<<10:], 0) },
	} {
		inWas, imgWas := in, bytes.Clone(img)
		change()
		if _, err := fs.MapInode(in, 269); !errors.Is(err, ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
		in = inWas
		copy(img, imgWas)
	}
	if _, err := fs.MapInode(in, 270); !errors.Is(err, ErrCorrupt) {
		t.Errorf("beyond the map: %v", err)
	}
}

// FuzzProbe changes bytes of the metadata of a small file system and reads all of it.
func FuzzProbe(f *testing.F) {
	var imgs [][]byte
	for _, args := range [][]string{{"-t", "ext4", "-b", "1024", "-g", "1024"}, {"-t", "ext3", "-b", "1024"}} {
		img, err := os.ReadFile(mkfs(f, 4, args...))
		if err != nil {
			f.Fatal(err)
		}
		imgs = append(imgs, img)
	}
	f.Add(uint8(0), []byte{})
	f.Add(uint8(1), []byte{0, 4, 0x18, 6, 0, 4, 0x20, 1})
	f.Add(uint8(0), []byte{0, 4, 0x65, 0, 0, 8, 8, 0xff})
	f.Fuzz(func(t *testing.T, kind uint8, edits []byte) {
		img := bytes.Clone(imgs[int(kind)%len(imgs)])
		for ; len(edits) >= 4; edits = edits[4:] {
			img[int(edits[0])<<16&0x30000|int(edits[1])<<8|int(edits[2])] = edits[3]
		}
		fs, err := ProbeUnverified(bytes.NewReader(img), 0, int64(len(img)))
		if err != nil {
			return
		}
		_, _, _ = fs.CountFree()
		fs.ROCompat &^= MetadataCsum | GdtCsum // damage must be survived, not only noticed
		in, err := fs.Inode(8)
		if err != nil {
			return
		}
		m, err := fs.MapInode(in, 1024)
		if err != nil {
			return
		}
		if m.Len() != 1024 {
			t.Fatalf("%d blocks mapped", m.Len())
		}
		for _, r := range m.Runs() {
			if r.Physical+r.Len > fs.Blocks {
				t.Fatalf("run %+v of %d blocks", r, fs.Blocks)
			}
		}
	})
}
