package ext4

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"unsafe"
)

// need skips a test when a program is missing, and fails it in CI.
func need(t testing.TB, tools ...string) {
	t.Helper()
	for _, tool := range tools {
		if _, err := exec.LookPath(tool); err == nil {
			continue
		}
		if os.Getenv("CI") == "true" {
			t.Fatalf("%s is not installed", tool)
		}
		t.Skipf("%s is not installed", tool)
	}
}

func run(t testing.TB, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Env = append(os.Environ(), "LC_ALL=C", "TZ=UTC", "PATH="+os.Getenv("PATH")+":/usr/sbin:/sbin")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// mkfs makes a file system of the given size in MiB and returns its path.
func mkfs(t testing.TB, mib int64, args ...string) string {
	t.Helper()
	need(t, "mke2fs")
	path := filepath.Join(t.TempDir(), "fs")
	f, err := os.Create(path)
	if err == nil {
		err = errors.Join(f.Truncate(mib<<20), f.Close())
	}
	if err != nil {
		t.Fatal(err)
	}
	run(t, "mke2fs", append([]string{"-q", "-F", "-U", "11223344-5566-7788-99aa-bbccddeeff00", "-L", "probe me"}, append(args, path)...)...)
	return path
}

func open(t testing.TB, path string) (*os.File, int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	st, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	return f, st.Size()
}

// kinds are file systems of every layout this package must read.
var kinds = map[string]struct {
	mib  int64
	args []string
}{
	"default":            {64, []string{"-t", "ext4", "-b", "4096"}},
	"1k":                 {64, []string{"-t", "ext4", "-b", "1024"}},
	"2k":                 {64, []string{"-t", "ext4", "-b", "2048"}},
	"64k":                {1024, []string{"-t", "ext4", "-b", "65536"}},
	"32bit":              {64, []string{"-t", "ext4", "-b", "4096", "-O", "^64bit"}},
	"no checksums":       {64, []string{"-t", "ext4", "-O", "^metadata_csum"}},
	"uninit_bg":          {64, []string{"-t", "ext4", "-O", "^metadata_csum,uninit_bg"}},
	"uninit_bg 32bit":    {64, []string{"-t", "ext4", "-O", "^metadata_csum,^64bit,uninit_bg"}},
	"csum seed":          {64, []string{"-t", "ext4", "-O", "metadata_csum_seed"}},
	"meta_bg":            {256, []string{"-t", "ext4", "-b", "1024", "-O", "meta_bg,^resize_inode"}},
	"meta_bg 4k":         {256, []string{"-t", "ext4", "-b", "4096", "-O", "meta_bg,^resize_inode", "-g", "256", "-N", "4096"}},
	"sparse_super2":      {256, []string{"-t", "ext4", "-b", "1024", "-O", "sparse_super2,meta_bg,^resize_inode"}},
	"no sparse_super":    {64, []string{"-t", "ext4", "-b", "1024", "-O", "^sparse_super,meta_bg,^resize_inode"}},
	"bigalloc":           {256, []string{"-t", "ext4", "-O", "bigalloc", "-C", "65536"}},
	"bigalloc 1k":        {256, []string{"-t", "ext4", "-O", "bigalloc", "-b", "1024", "-C", "16384"}},
	"indirect":           {64, []string{"-t", "ext4", "-O", "^extent,^64bit,^metadata_csum"}},
	"indirect 1k":        {256, []string{"-t", "ext3", "-b", "1024", "-J", "size=80"}},
	"inode 128":          {64, []string{"-t", "ext4", "-b", "4096", "-I", "128"}},
	"inode 1024":         {64, []string{"-t", "ext4", "-b", "4096", "-I", "1024"}},
	"many features":      {64, []string{"-t", "ext4", "-O", "inline_data,quota,project,encrypt,ea_inode,mmp,orphan_file,fast_commit,casefold,verity,large_dir"}},
	"no flex_bg":         {256, []string{"-t", "ext4", "-O", "^flex_bg"}},
	"no journal":         {64, []string{"-t", "ext2"}},
	"small groups":       {64, []string{"-t", "ext4", "-g", "1024"}},
	"huge":               {1 << 20, []string{"-t", "ext4", "-E", "lazy_itable_init=1,nodiscard", "-N", "65536"}},
	"journal at the end": {2048, []string{"-t", "ext4", "-b", "1024", "-E", "packed_meta_blocks=1"}},
}

// dump is dumpe2fs -h as a map.
func dump(t testing.TB, path string) map[string]string {
	m := map[string]string{}
	for _, line := range strings.Split(run(t, "dumpe2fs", "-h", path), "\n") {
		if k, v, ok := strings.Cut(line, ":"); ok {
			m[k] = strings.TrimSpace(v)
		}
	}
	return m
}

// TestProbe holds every field and the journal's block map against dumpe2fs
// and debugfs.
func TestProbe(t *testing.T) {
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			need(t, "dumpe2fs", "debugfs")
			path := mkfs(t, k.mib, k.args...)
			f, size := open(t, path)
			fs, err := Probe(f, 0, size)
			if err != nil {
				t.Fatal(err)
			}
			d := dump(t, path)
			for key, got := range map[string]any{
				"Filesystem volume name": fs.Label, "Block size": fs.BlockSize, "Block count": fs.Blocks, "Free blocks": fs.FreeBlocks,
				"Inode count": fs.Inodes, "Free inodes": fs.FreeInodes, "First block": fs.FirstDataBlock,
				"Blocks per group": fs.BlocksPerGroup, "Inodes per group": fs.InodesPerGroup, "Inode size": fs.InodeSize,
			} {
				if fmt.Sprint(got) != d[key] {
					t.Errorf("%s: %v, dumpe2fs says %q", key, got, d[key])
				}
			}
			feats := strings.Fields(fs.Compat.String() + " " + fs.Incompat.String() + " " + fs.ROCompat.String())
			if got := strings.Join(feats, " "); got != d["Filesystem features"] {
				t.Errorf("features %q, dumpe2fs says %q", got, d["Filesystem features"])
			}
			checkFree(t, fs)
			checkJournal(t, fs, path)
		})
	}
}

func checkFree(t *testing.T, fs *FS) {
	t.Helper()
	blocks, inodes, err := fs.CountFree()
	if err != nil || blocks != fs.FreeBlocks || inodes != fs.FreeInodes {
		t.Errorf("%d blocks, %d inodes free (%v), the superblock says %d and %d", blocks, inodes, err, fs.FreeBlocks, fs.FreeInodes)
	}
	for g := range fs.Groups {
		if _, err := fs.Group(g); err != nil {
			t.Fatal(err)
		}
	}
}

func checkJournal(t *testing.T, fs *FS, path string) {
	t.Helper()
	if fs.JournalInum == 0 {
		if fs.Compat&HasJournal != 0 {
			t.Error("no journal inode")
		}
		return
	}
	in, err := fs.Inode(fs.JournalInum)
	if err != nil || !in.Regular() {
		t.Fatalf("%+v, %v", in, err)
	}
	n := in.Size / uint64(fs.BlockSize)
	m, err := fs.MapInode(in, n)
	if err != nil {
		t.Fatal(err)
	}
	if m.Len() != n {
		t.Fatalf("%d blocks of %d mapped", m.Len(), n)
	}
	// debugfs lists indirect and extent blocks too; the data blocks are those bmap gives.
	for _, l := range []uint64{0, 1, 11, 12, 13, n / 2, n - 2, n - 1} {
		got, ok := m.Physical(l)
		want := strings.TrimSpace(run(t, "debugfs", "-R", fmt.Sprintf("bmap <%d> %d", fs.JournalInum, l), path))
		want = want[strings.LastIndexByte(want, '\n')+1:]
		if !ok || strconv.FormatUint(got, 10) != want {
			t.Errorf("block %d of the journal lies at %d, debugfs says %s", l, got, want)
		}
		if !m.Contains(got) {
			t.Errorf("the map does not contain its block %d", got)
		}
	}
	if _, ok := m.Physical(n); ok || m.Contains(0) || m.Contains(fs.Blocks) {
		t.Error("the map contains blocks it must not")
	}
	if _, err := fs.MapInode(in, n+1); !errors.Is(err, ErrCorrupt) {
		t.Errorf("mapping one block more: %v", err)
	}
}

// TestProbeOffset: a file system inside a larger image, with other bytes around it.
func TestProbeOffset(t *testing.T) {
	img, err := os.ReadFile(mkfs(t, 16, "-t", "ext4", "-b", "4096"))
	if err != nil {
		t.Fatal(err)
	}
	const off = 3<<20 + 512
	big := append(bytes.Repeat([]byte{0xaa}, off), img...)
	fs, err := Probe(bytes.NewReader(big), off, int64(len(img)))
	if err != nil {
		t.Fatal(err)
	}
	checkFree(t, fs)
	if _, err := Probe(bytes.NewReader(big), off, int64(len(img))-1024); !errors.Is(err, ErrCorrupt) {
		t.Errorf("device one KiB too short: %v", err)
	}
	for _, c := range []struct{ off, size int64 }{{-1, 4096}, {0, 2047}, {1 << 62, 4096}, {0, -1}} {
		if _, err := Probe(bytes.NewReader(big), c.off, c.size); !errors.Is(err, ErrNotExt4) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestProbeRefuses(t *testing.T) {
	img, err := os.ReadFile(mkfs(t, 16, "-t", "ext4", "-b", "4096"))
	if err != nil {
		t.Fatal(err)
	}
	le := binary.LittleEndian
	put32 := func(off int, v uint32) func([]byte) { return func(b []byte) { le.PutUint32(b[off:], v) } }
	put16 := func(off int, v uint16) func([]byte) { return func(b []byte) { le.PutUint16(b[off:], v) } }
	or32 := func(off int, v uint32) func([]byte) {
		return func(b []byte) { le.PutUint32(b[off:], le.Uint32(b[off:])|v) }
	}
	for name, c := range map[string]struct {
		change func([]byte)
		is     error
	}{
		"magic":           {put16(0x38, 0), ErrNotExt4},
		"revision":        {put32(0x4c, 2), ErrUnsupported},
		"incompat":        {or32(0x60, 1<<30), ErrUnsupported},
		"compression":     {or32(0x60, 1), ErrUnsupported},
		"dirdata":         {or32(0x60, 0x1000), ErrUnsupported},
		"external":        {or32(0x60, 8), ErrUnsupported},
		"checksum type":   {func(b []byte) { b[0x175] = 2 }, ErrUnsupported},
		"block size":      {put32(0x18, 7), ErrCorrupt},
		"huge block size": {put32(0x18, 0xffffffff), ErrCorrupt},
		"blocks":          {put32(0x04, 16<<10/4+1<<20), ErrCorrupt},
		"blocks hi":       {put32(0x150, 1), ErrCorrupt},
		"no blocks":       {put32(0x04, 0), ErrCorrupt},
		"first block":     {put32(0x14, 1), ErrCorrupt},
		"group 0":         {put32(0x20, 0), ErrCorrupt},
		"tiny groups":     {put32(0x20, 255), ErrCorrupt},
		"few inodes":      {func(b []byte) { put32(0x28, 15)(b); put32(0x00, 15)(b) }, ErrCorrupt},
		"group":           {put32(0x20, 40000), ErrCorrupt},
		"inodes in group": {put32(0x28, 0), ErrCorrupt},
		"inodes":          {put32(0x00, 17), ErrCorrupt},
		"inode size":      {put16(0x58, 129), ErrCorrupt},
		"inode size big":  {put16(0x58, 8192), ErrCorrupt},
		"inode size 0":    {put16(0x58, 0), ErrCorrupt},
		"desc size":       {put16(0xfe, 48), ErrCorrupt},
		"desc size big":   {put16(0xfe, 2048), ErrCorrupt},
		"checksum":        {func(b []byte) { b[0x3fc] ^= 1 }, ErrChecksum},
		"label":           {func(b []byte) { b[0x78] ^= 1 }, ErrChecksum},
		"cluster":         {func(b []byte) { or32(0x64, 0x200)(b); put32(0x1c, 1)(b) }, ErrCorrupt},
		"cluster big":     {func(b []byte) { or32(0x64, 0x200)(b); put32(0x1c, 0xffffffff)(b) }, ErrCorrupt},
		"clusters":        {func(b []byte) { or32(0x64, 0x200)(b); put32(0x24, 17)(b) }, ErrCorrupt},
	} {
		bad := bytes.Clone(img[:64<<10])
		c.change(bad[Offset:])
		if _, err := Probe(bytes.NewReader(bad), 0, int64(len(img))); !errors.Is(err, c.is) {
			t.Errorf("%s: %v, want %v", name, err, c.is)
		}
	}
	if _, err := Probe(bytes.NewReader(img[:1500]), 0, int64(len(img))); err == nil || errors.Is(err, ErrNotExt4) {
		t.Errorf("a read that ends early: %v", err)
	}
}

func TestSizes(t *testing.T) {
	if n := binary.Size(fields{}); n != Size {
		t.Errorf("superblock structure of %d bytes", n)
	}
	if n := unsafe.Sizeof(Raw{}); n != Size {
		t.Errorf("raw superblock of %d bytes", n)
	}
}

// TestChecksumsCaught: damage anywhere in what is checksummed is noticed.
func TestChecksumsCaught(t *testing.T) {
	path := mkfs(t, 64, "-t", "ext4", "-b", "4096")
	img, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	fs, err := Probe(bytes.NewReader(img), 0, int64(len(img)))
	if err != nil {
		t.Fatal(err)
	}
	g, err := fs.Group(0)
	if err != nil {
		t.Fatal(err)
	}
	inode := int(g.InodeTable)*int(fs.BlockSize) + 7*int(fs.InodeSize)
	for _, at := range []int{4096 + 8, 4096 + 0x1e, 4096 + 63, inode, inode + 0x28, inode + 0x64, inode + 0x7c, inode + 0x82, inode + 255} {
		img[at] ^= 0x20
		if _, err := fs.Inode(8); !errors.Is(err, ErrChecksum) {
			t.Errorf("damage at %d: %v", at, err)
		}
		img[at] ^= 0x20
	}
	if _, err := fs.Inode(8); err != nil {
		t.Error(err)
	}
	for _, n := range []uint32{0, fs.Inodes + 1, 0xffffffff} {
		if _, err := fs.Inode(n); !errors.Is(err, ErrCorrupt) {
			t.Errorf("inode %d: %v", n, err)
		}
	}
	if _, err := fs.Group(fs.Groups); !errors.Is(err, ErrCorrupt) {
		t.Error(err)
	}
}

func TestRawEdits(t *testing.T) {
	img, err := os.ReadFile(mkfs(t, 16, "-t", "ext4", "-b", "4096"))
	if err != nil {
		t.Fatal(err)
	}
	var r, old Raw
	copy(r[:], img[Offset:])
	old = r
	if !r.ChecksumOK() || r.State() != StateValid {
		t.Fatal("fresh superblock is bad")
	}
	r.SetState(StateErrors)
	r.SetIncompat(r.Incompat() | Recover)
	r.SetFree(1<<32|5, 77, true)
	for i := offErrors; i < endErrors; i++ {
		old[i] = byte(i)
	}
	r.KeepErrors(&old)
	if r.ChecksumOK() {
		t.Error("stale checksum accepted")
	}
	r.SetChecksum()
	if !r.ChecksumOK() {
		t.Error("new checksum refused")
	}
	f, err := decode(&r)
	if err != nil || f.SState != 2 || f.SFeatureIncompat&4 == 0 || f.SFreeBlocksCountLo != 5 || f.SFreeBlocksCountHi != 1 ||
		f.SFreeInodesCount != 77 || f.SErrorCount != 0x97969594 || f.SLastErrorFunc[31] != 0xff {
		t.Errorf("%+v, %v", f, err)
	}
	old.SetChecksum()
	r.SetFree(9, 1, false)
	if f, _ = decode(&r); f.SFreeBlocksCountHi != 1 {
		t.Error("high half changed without 64bit")
	}
}

func TestCRC16(t *testing.T) {
	// CRC-16/ARC of "123456789" with seed 0 is 0xbb3d.
	if got := crc16(0, []byte("123456789")); got != 0xbb3d {
		t.Errorf("0x%x", got)
	}
	if got := ^crc32c(^uint32(0), []byte("123456789")); got != 0xe3069283 {
		t.Errorf("0x%x", got)
	}
}

func TestFeatureWords(t *testing.T) {
	if got := (Recover | Extents | 1<<30).String(); got != "needs_recovery extent incompat 0x40000000" {
		t.Error(got)
	}
	if (Recover|1<<30).Unknown() != 1<<30 || (MetadataCsum|0x4000).Unknown() != 0x4000 {
		t.Error("unknown bits")
	}
}
