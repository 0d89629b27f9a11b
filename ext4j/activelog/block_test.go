package activelog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"flag"
	"fmt"
	"hash/crc32"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/tests/fault"
)

var update = flag.Bool("update", false, "write the golden file anew")

var testGroup = epoch.UUID{1, 2, 3}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func keysOf(n ...uint64) []key {
	out := make([]key, len(n))
	for i, x := range n {
		out[i] = key(x)
	}
	return out
}

func seal(p []byte) {
	binary.LittleEndian.PutUint32(p[sumAt:], crc32.Checksum(p[:sumAt], castagnoli))
}

// TestBatch: any batch replays to the same set, and no prefix of it makes the set larger.
func TestBatch(t *testing.T) {
	for _, c := range [][2]int{{0, 0}, {0, 1}, {1, 0}, {blockEntries, 0}, {blockEntries, 1}, {490, 700}, {1200, 1200}, {0, blockEntries}, {0, blockEntries + 1}} {
		old := map[key]bool{}
		var removals, additions []key
		for i := range c[0] {
			removals = append(removals, key(i))
			old[key(i)] = true
		}
		for i := range c[1] {
			additions = append(additions, makeKey(7, uint64(i)))
		}
		p := batch(block{generation: 3, snapshot: 1, group: testGroup, regionBytes: 4096, number: 5, batch: 5}, removals, additions)
		set := maps.Clone(old)
		for i := 0; i < len(p); i += blockBytes {
			b, err := decodeBlock(p[i : i+blockBytes])
			must(t, err)
			if b.number != uint32(5+i/blockBytes) || b.batch != 5 || b.group != testGroup {
				t.Fatalf("%+v", b)
			}
			for _, k := range b.removals {
				delete(set, k)
			}
			for _, k := range b.additions {
				set[k] = true
			}
			if len(set) > max(c[0], c[1]) {
				t.Errorf("%v: set of %d after block %d", c, len(set), i/blockBytes)
			}
		}
		if got := slices.Sorted(maps.Keys(set)); !slices.Equal(got, additions) {
			t.Errorf("%v: %d entries at the end", c, len(got))
		}
	}
}

func TestBlockRefused(t *testing.T) {
	good := (&block{generation: 2, number: 3, snapshot: 1, batch: 2, group: testGroup, regionBytes: 1 << 20, additions: keysOf(1, 2)}).append(nil)
	for _, c := range []struct {
		at   int
		val  uint32
		want string
	}{{8, 2, "version 2"}, {12, 1, "features 0x1"}, {36, 0, "cannot be"}, {40, 4, "cannot be"}, {44, 0x0001_01f2, "cannot be"}} {
		p := bytes.Clone(good)
		binary.LittleEndian.PutUint32(p[c.at:], c.val)
		seal(p)
		if _, err := decodeBlock(p); err == nil || errors.Is(err, errNoBlock) || !strings.Contains(err.Error(), c.want) {
			t.Errorf("byte %d: %v", c.at, err)
		}
	}
	for i := range good {
		good[i] ^= 4
		if _, err := decodeBlock(good); !errors.Is(err, errNoBlock) {
			t.Fatalf("damage at byte %d: %v", i, err)
		}
		good[i] ^= 4
	}
}

// layout makes a file of two halves of four blocks from short descriptions:
// "gen/number/snapshot/batch+add-remove".
func layout(halves [2][4]string) []byte {
	var out []byte
	for _, h := range halves {
		for _, d := range h {
			b := block{half: 4, group: testGroup, regionBytes: 4096}
			var add, remove uint64
			if d == "" {
				out = append(out, make([]byte, blockBytes)...)
				continue
			}
			if _, err := fmt.Sscanf(d, "%d/%d/%d/%d+%d-%d", &b.generation, &b.number, &b.snapshot, &b.batch, &add, &remove); err != nil {
				panic(err)
			}
			b.additions, b.removals = keysOf(add), keysOf(remove)
			out = b.append(out)
		}
	}
	return out
}

func TestReplay(t *testing.T) {
	for name, c := range map[string]struct {
		halves [2][4]string
		want   string // set, or "corrupt"
		half   int
		blocks int
	}{
		"one half":               {[2][4]string{{"1/0/1/0+5-0", "1/1/1/1+6-5"}, {}}, "[6]", 0, 2},
		"newer wins":             {[2][4]string{{"1/0/1/0+5-0"}, {"2/0/1/0+7-0"}}, "[7]", 1, 1},
		"torn snapshot":          {[2][4]string{{"1/0/1/0+5-0"}, {"2/0/2/0+7-0"}}, "[5]", 0, 1},
		"torn snapshot, start":   {[2][4]string{{"1/0/1/0+5-0"}, {"", "2/1/2/0+7-0"}}, "[5]", 0, 1},
		"torn over an older":     {[2][4]string{{"2/0/1/0+5-0"}, {"3/0/2/0+8-0", "1/1/1/1+9-0"}}, "[5]", 0, 1},
		"torn batch":             {[2][4]string{{"1/0/1/0+5-0", "", "1/2/1/1+6-0"}, {}}, "[5]", 0, 1},
		"stale behind":           {[2][4]string{{"3/0/1/0+5-0", "1/1/1/1+6-0"}, {"2/0/1/0+1-0"}}, "[5]", 0, 1},
		"missing block":          {[2][4]string{{"1/0/1/0+5-0", "", "1/2/1/2+6-0"}, {}}, "corrupt", 0, 0},
		"missing snapshot":       {[2][4]string{{"1/0/1/0+5-0"}, {"", "2/1/1/1+6-0"}}, "corrupt", 0, 0},
		"part of the snapshot":   {[2][4]string{{"1/0/1/0+5-0"}, {"2/0/2/0+1-0", "", "2/2/2/2+6-0"}}, "corrupt", 0, 0},
		"damage in the old half": {[2][4]string{{"1/0/1/0+5-0", "", "1/2/1/2+6-0"}, {"2/0/1/0+7-0"}}, "[7]", 1, 1},
		"nothing":                {[2][4]string{}, "corrupt", 0, 0},
		"number wrong":           {[2][4]string{{"1/0/1/0+5-0", "1/3/1/3+6-0"}, {}}, "[5]", 0, 1},
	} {
		s, err := replay(layout(c.halves))
		got := fmt.Sprint(slices.Sorted(maps.Keys(s.set)))
		if errors.Is(err, ErrCorrupt) {
			got = "corrupt"
		} else if err != nil {
			got = err.Error()
		}
		if got != c.want || err == nil && (s.half != c.half || s.blocks != c.blocks) {
			t.Errorf("%s: %s (half %d, %d blocks), want %+v", name, got, s.half, s.blocks, c)
		}
	}
}

// TestGolden pins the bytes of a log.
func TestGolden(t *testing.T) {
	f := fault.NewFS(1)
	l, _, err := Open(f, "/log", Options{Group: testGroup, RegionBytes: 1 << 20, MaxRegions: 1024})
	must(t, err)
	must(t, l.Follow(Follower{Lineage: epoch.UUID{0xaa}, Replica: epoch.UUID{0xbb}}))
	l.Begin(7, 0x100, 0)
	l.Acked(0x123)
	must(t, l.Acquire(t.Context(), 3, 5<<20, 2<<20))
	must(t, l.Close())
	b, err := f.ReadFile("/log")
	must(t, err)
	var s strings.Builder
	fmt.Fprintf(&s, "%d bytes\n", len(b))
	for off := 0; off < len(b); off += 16 {
		if line := b[off : off+16]; bytes.Count(line, []byte{0}) != len(line) {
			fmt.Fprintf(&s, "%08x  %s\n", off, hex.EncodeToString(line))
		}
	}
	if *update {
		must(t, os.WriteFile("testdata/active.hex", []byte(s.String()), 0o644))
	}
	want, err := os.ReadFile("testdata/active.hex")
	must(t, err)
	if s.String() != string(want) {
		t.Errorf("the format changed:\n%s", s.String())
	}
}

// FuzzReplay replays arbitrary entries, and arbitrary bytes with a right sum: no
// panic, and what is accepted is consistent.
func FuzzReplay(f *testing.F) {
	good := layout([2][4]string{{"1/0/1/0+5-0", "1/1/1/1+6-5"}, {"2/0/2/0+7-0"}})
	heads := []byte{}
	for i := 0; i < len(good); i += blockBytes {
		heads = append(heads, good[i:i+entriesAt+16]...)
	}
	f.Add(heads)
	f.Fuzz(func(t *testing.T, heads []byte) {
		p := make([]byte, 8*blockBytes)
		for i := range 8 {
			b := p[i*blockBytes : (i+1)*blockBytes]
			copy(b[:entriesAt+16], heads[min(i*(entriesAt+16), len(heads)):])
			seal(b)
		}
		s, err := replay(p)
		if err != nil {
			return
		}
		if s.generation == 0 || s.blocks < 1 || s.blocks > 4 || len(s.set) > 8*blockEntries {
			t.Fatalf("%+v", s)
		}
	})
}
