package images

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"hash/crc32"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
)

// sfdiskDisk partitions a fresh image with sfdisk and returns its content and
// sfdisk's own idea of the table.
func sfdiskDisk(t testing.TB, size int64, sector int, script string) ([]byte, []Partition) {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk.raw")
	if err := os.WriteFile(name, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(name, size); err != nil {
		t.Fatal(err)
	}
	dev := name
	if sector != 512 { // sfdisk takes the sector size from the device
		dev = loopDevice(t, name, sector)
	}
	cmd := exec.Command("sfdisk", "--no-reread", "--no-tell-kernel", dev)
	cmd.Stdin = strings.NewReader(script)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("sfdisk: %v\n%s", err, out)
	}
	out, err := exec.Command("sfdisk", "--json", dev).Output()
	if err != nil {
		t.Fatalf("sfdisk --json: %v", err)
	}
	var table struct {
		PartitionTable struct {
			Partitions []struct {
				Node, Type, Name string
				Start, Size      int64
			}
		}
	}
	if err := json.Unmarshal(out, &table); err != nil {
		t.Fatal(err)
	}
	var want []Partition
	for _, p := range table.PartitionTable.Partitions {
		n, err := strconv.Atoi(strings.TrimPrefix(strings.TrimPrefix(p.Node, dev), "p"))
		if err != nil {
			t.Fatal(err)
		}
		want = append(want, Partition{n, p.Start * int64(sector), p.Size * int64(sector), p.Type, p.Name})
	}
	disk, err := os.ReadFile(dev)
	if err != nil {
		t.Fatal(err)
	}
	return disk, want
}

func loopDevice(t testing.TB, name string, sector int) string {
	t.Helper()
	out, err := exec.Command("losetup", "-f", "--show", "-b", strconv.Itoa(sector), name).CombinedOutput()
	if err != nil {
		t.Fatalf("losetup: %v\n%s", err, out)
	}
	dev := strings.TrimSpace(string(out))
	t.Cleanup(func() {
		if out, err := exec.Command("losetup", "-d", dev).CombinedOutput(); err != nil {
			t.Errorf("losetup -d: %v\n%s", err, out)
		}
	})
	return dev
}

const gptScript = "label: gpt\nsize=4M, name=\"boot – ü\"\nsize=8M, type=U\n5: size=3M, name=five\n"

func wantParts(t *testing.T, disk []byte, scheme Scheme, want []Partition) {
	t.Helper()
	got, s, err := Partitions(bytes.NewReader(disk), int64(len(disk)))
	if err != nil || s != scheme {
		t.Fatal(s, err)
	}
	if len(got) != len(want) || len(want) == 0 {
		t.Fatalf("%+v, want %+v", got, want)
	}
	for i := range want {
		if got[i] != want[i] {
			t.Errorf("%+v, want %+v", got[i], want[i])
		}
	}
}

func TestPartitionsAgainstSfdisk(t *testing.T) {
	needTool(t, "sfdisk")
	for _, c := range []struct {
		name   string
		scheme Scheme
		script string
	}{
		{"mbr", SchemeMBR, "label: dos\nsize=4M, bootable\nsize=8M, type=82\n"},
		{"mbr gap", SchemeMBR, "label: dos\n3: size=4M\n"},
		{"mbr logical", SchemeMBR, "label: dos\nsize=4M\nsize=40M, type=5\n3: size=2M\n5: size=3M\n6: size=3M, type=82\n7: size=3M\n8: size=1M\n"},
		{"mbr lba extended", SchemeMBR, "label: dos\nsize=40M, type=f\n5: size=3M\n"},
		{"gpt", SchemeGPT, gptScript},
		{"gpt small array", SchemeGPT, "label: gpt\ntable-length: 4\nsize=4M\n"},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk, want := sfdiskDisk(t, 64<<20, 512, c.script)
			wantParts(t, disk, c.scheme, want)
		})
	}
}

func TestPartitionsGPTBackup(t *testing.T) {
	needTool(t, "sfdisk")
	for _, sector := range []int{512, 4096} {
		disk, want := sfdiskDisk(t, 24<<20, sector, gptScript)
		wantParts(t, disk, SchemeGPT, want)
		for name, at := range map[string]int{"header": sector + 40, "array": 2*sector + 60} {
			broken := bytes.Clone(disk)
			broken[at] ^= 1
			t.Run(name, func(t *testing.T) { wantParts(t, broken, SchemeGPTBackup, want) })
			broken[len(broken)-sector+40] ^= 1
			if _, s, err := Partitions(bytes.NewReader(broken), int64(len(broken))); s != SchemeGPT || !errors.Is(err, ErrTable) {
				t.Fatal(s, err)
			}
		}
	}
}

func TestPartitionsNone(t *testing.T) {
	fat := make([]byte, 4096)
	fat[510], fat[511] = 0x55, 0xaa
	copy(fat[446:], "some boot code's message text here")
	for name, disk := range map[string][]byte{"empty": {}, "short": make([]byte, 511), "zeros": make([]byte, 4096), "boot sector": fat} {
		got, s, err := Partitions(bytes.NewReader(disk), int64(len(disk)))
		if got != nil || s != SchemeNone || err != nil {
			t.Errorf("%s: %v %v %v", name, got, s, err)
		}
	}
}

// mbr makes a sector with the given entries: kind, start, count.
func mbr(entries ...[3]uint32) []byte {
	b := make([]byte, 512)
	for i, e := range entries {
		at := b[446+16*i:]
		at[4] = byte(e[0])
		binary.LittleEndian.PutUint32(at[8:], e[1])
		binary.LittleEndian.PutUint32(at[12:], e[2])
	}
	b[510], b[511] = 0x55, 0xaa
	return b
}

func TestPartitionsHostileMBR(t *testing.T) {
	const sectors = 1000
	ebr := func(entries ...[3]uint32) func([]byte) { return func(d []byte) { copy(d[100*512:], mbr(entries...)) } }
	for _, c := range []struct {
		name    string
		table   [][3]uint32
		more    func([]byte)
		bad     bool
		numbers []int
	}{
		{"empty", nil, nil, false, nil},
		{"past the end", [][3]uint32{{0x83, 1, 10}, {0x83, 990, 11}}, nil, true, []int{1}},
		{"huge", [][3]uint32{{0x83, 0xffffffff, 0xffffffff}}, nil, true, nil},
		{"extended without a chain", [][3]uint32{{5, 100, 10}}, nil, false, []int{1}},
		{"chain to itself", [][3]uint32{{5, 100, 100}, {0x83, 1, 1}}, ebr([3]uint32{0x83, 1, 1}, [3]uint32{5, 0, 10}), true, nil},
		{"chain off the disk", [][3]uint32{{5, 100, 100}}, ebr([3]uint32{0x83, 1, 1}, [3]uint32{5, 0xffffffff, 10}), false, []int{1, 5}},
		{"logical off the disk", [][3]uint32{{5, 100, 100}}, ebr([3]uint32{0x83, 950, 1}), true, []int{1}},
		{"logical then primary", [][3]uint32{{5, 100, 100}, {0x83, 1, 1}}, ebr([3]uint32{0x83, 1, 1}), false, []int{1, 2, 5}},
	} {
		t.Run(c.name, func(t *testing.T) {
			disk := make([]byte, sectors*512)
			copy(disk, mbr(c.table...))
			if c.more != nil {
				c.more(disk)
			}
			parts, s, err := Partitions(bytes.NewReader(disk), int64(len(disk)))
			if s != SchemeMBR || errors.Is(err, ErrTable) != c.bad || err != nil && !c.bad {
				t.Fatal(s, err)
			}
			if c.name == "chain to itself" {
				if len(parts) != 2+maxLogical {
					t.Fatal(len(parts))
				}
				return
			}
			if len(parts) != len(c.numbers) {
				t.Fatalf("%+v", parts)
			}
			for i, p := range parts {
				if p.Number != c.numbers[i] {
					t.Fatalf("%+v", parts)
				}
			}
		})
	}
}

// gptDisk makes a GPT disk of 100 sectors with one partition; change may edit
// header and entry before the checksums are made.
func gptDisk(change func(header, entry []byte)) []byte {
	le := binary.LittleEndian
	disk := make([]byte, 100*512)
	copy(disk, mbr([3]uint32{0xee, 1, 99}))
	h, e := disk[512:1024], disk[1024:1024+128*4]
	copy(h, "EFI PART")
	le.PutUint32(h[8:], 0x10000)
	le.PutUint32(h[12:], 92)
	le.PutUint64(h[24:], 1)
	le.PutUint64(h[72:], 2)
	le.PutUint32(h[80:], 4)
	le.PutUint32(h[84:], 128)
	copy(e, "0123456789abcdef")
	le.PutUint64(e[32:], 50)
	le.PutUint64(e[40:], 59)
	copy(e[56:], "a\x00\x1b\x00b\x00")
	change(h, e)
	le.PutUint32(h[88:], crc32.ChecksumIEEE(e))
	le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:92]))
	return disk
}

func TestPartitionsGPTFields(t *testing.T) {
	disk := gptDisk(func(_, _ []byte) {})
	wantParts(t, disk, SchemeGPT, []Partition{{1, 50 * 512, 10 * 512, "33323130-3534-3736-3839-616263646566", "a\ufffdb"}})
}

func TestPartitionsHostileGPT(t *testing.T) {
	le := binary.LittleEndian
	for name, change := range map[string]func(h, e []byte){
		"signature":         func(h, _ []byte) { h[0] = 'X' },
		"header too short":  func(h, _ []byte) { le.PutUint32(h[12:], 91) },
		"header too long":   func(h, _ []byte) { le.PutUint32(h[12:], 513) },
		"header huge":       func(h, _ []byte) { le.PutUint32(h[12:], 0xffffffff) },
		"wrong place":       func(h, _ []byte) { le.PutUint64(h[24:], 2) },
		"entries far away":  func(h, _ []byte) { le.PutUint64(h[72:], 1<<63) },
		"entries cut off":   func(h, _ []byte) { le.PutUint64(h[72:], 100) },
		"many entries":      func(h, _ []byte) { le.PutUint32(h[80:], 0xffffffff) },
		"entry too small":   func(h, _ []byte) { le.PutUint32(h[84:], 64) },
		"entry of no bytes": func(h, _ []byte) { le.PutUint32(h[84:], 0) },
		"entry huge":        func(h, _ []byte) { le.PutUint32(h[84:], 1<<31) },
		"entry odd":         func(h, _ []byte) { le.PutUint32(h[84:], 129) },
		"past the end":      func(_, e []byte) { le.PutUint64(e[40:], 100) },
		"last before first": func(_, e []byte) { le.PutUint64(e[40:], 49) },
		"overflow":          func(_, e []byte) { le.PutUint64(e[32:], 1<<63); le.PutUint64(e[40:], 1<<64-1) },
	} {
		t.Run(name, func(t *testing.T) {
			disk := gptDisk(change)
			parts, s, err := Partitions(bytes.NewReader(disk), int64(len(disk)))
			if len(parts) != 0 || s != SchemeGPT || !errors.Is(err, ErrTable) {
				t.Fatal(parts, s, err)
			}
		})
	}
}

type failingReader struct{ after int64 }

var errRead = errors.New("read failed")

func (f failingReader) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.after {
		return 0, errRead
	}
	return bytes.NewReader(gptDisk(func(_, _ []byte) {})).ReadAt(p, off)
}

func TestPartitionsReadErrors(t *testing.T) {
	for _, after := range []int64{0, 512, 1024} {
		if _, _, err := Partitions(failingReader{after}, 100*512); !errors.Is(err, errRead) {
			t.Error(after, err)
		}
	}
	if _, _, err := Partitions(bytes.NewReader(nil), 1<<20); err == nil || errors.Is(err, ErrTable) {
		t.Error(err)
	}
}

func FuzzPartitions(f *testing.F) {
	f.Add(gptDisk(func(_, _ []byte) {}), uint16(0))
	f.Add(mbr([3]uint32{5, 1, 100}, [3]uint32{0x83, 1, 1}), uint16(100))
	disk := append(mbr([3]uint32{5, 1, 100}), mbr([3]uint32{0x83, 1, 1}, [3]uint32{5, 0, 10})...)
	f.Add(disk, uint16(200))
	f.Fuzz(func(t *testing.T, head []byte, sectors uint16) {
		disk := append(bytes.Clone(head), make([]byte, int(sectors)*512)...)
		fixSums(disk)
		size := int64(len(disk))
		parts, scheme, err := Partitions(bytes.NewReader(disk), size)
		if err != nil && !errors.Is(err, ErrTable) {
			t.Fatal(err)
		}
		if scheme == SchemeNone && (len(parts) > 0 || err != nil) {
			t.Fatal("partitions without a table")
		}
		for _, p := range parts {
			if p.Start < 0 || p.Length <= 0 || p.Start+p.Length > size || p.Number < 1 || p.Type == "" {
				t.Fatalf("%+v on a disk of %d bytes", p, size)
			}
		}
	})
}

// fixSums makes the checksums of a GPT right where that is possible, so that
// fuzzing reaches what lies behind them.
func fixSums(disk []byte) {
	le := binary.LittleEndian
	if len(disk) < 1024 || string(disk[512:520]) != "EFI PART" {
		return
	}
	h := disk[512:1024]
	first, n := le.Uint64(h[72:]), uint64(le.Uint32(h[80:]))*uint64(le.Uint32(h[84:]))
	if first < 1<<32 && n < 1<<20 && first*512+n <= uint64(len(disk)) {
		le.PutUint32(h[88:], crc32.ChecksumIEEE(disk[first*512:first*512+n]))
	}
	if size := le.Uint32(h[12:]); size >= 92 && size <= 512 {
		le.PutUint32(h[16:], 0)
		le.PutUint32(h[16:], crc32.ChecksumIEEE(h[:size]))
	}
}
