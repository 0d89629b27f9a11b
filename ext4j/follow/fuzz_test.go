package follow_test

import (
	"bytes"
	"encoding/binary"
	"testing"

	"kagami/ext4j/epoch"
	"kagami/ext4j/follow"
	"kagami/tests/dirty"
)

// image is a small file system with a dirty journal, written by the kernel.
func image(t testing.TB) []byte {
	t.Helper()
	img, err := dirty.Image()
	if err != nil {
		t.Fatal(err)
	}
	return img
}

func load(f *follow.Follower, img []byte) (n int) {
	for range 1000 {
		ws := f.Wants(16)
		if len(ws) == 0 {
			return n
		}
		for _, w := range ws {
			n += int(w.Len)
			if w.Off < 0 || w.Len <= 0 || w.Off+w.Len > int64(len(img)) {
				panic("wants what is not there")
			}
			f.Loaded(w, img[w.Off:w.Off+w.Len])
		}
	}
	panic("wants without end")
}

// FuzzFollower lets a guest write what it likes: each step of the input is an offset, a
// length, and what to do: write the input's bytes, zeros, or a mutation of what is there.
func FuzzFollower(f *testing.F) {
	base := image(f)
	f.Add([]byte{0, 4, 0, 4, 0, 1, 0, 0})
	f.Add(bytes.Repeat([]byte{1, 0, 3, 1, 2, 9, 7, 200}, 40))
	f.Fuzz(func(t *testing.T, in []byte) {
		img := bytes.Clone(base)
		fo := follow.New(follow.Options{Size: int64(len(img)), CacheBytes: 64 << 10, PendBytes: 256 << 10})
		load(fo, img)
		for lsn := epoch.LSN(1); len(in) >= 8 && lsn < 200; lsn++ {
			off := int64(binary.LittleEndian.Uint32(in)) % int64(len(img))
			n := min((1+int64(in[4]))*512, int64(len(img))-off)
			if in[5]&1 == 0 {
				off -= off % 1024
			}
			w := follow.Write{LSN: lsn, Range: follow.Range{Off: off, Len: n}}
			switch in[6] % 4 {
			case 0:
				w.Kind = follow.Zeroes
			case 1:
				w.Data = bytes.Repeat(in[:8], int(n)/8+1)[:n]
			case 2: // the same again
				w.Data = bytes.Clone(img[off : off+n])
			case 3: // one bit
				w.Data = bytes.Clone(img[off : off+n])
				w.Data[int(in[7])%len(w.Data)] ^= 1 << (in[5] % 8)
			}
			if fo.NeedsBefore(off, n) {
				w.Before = bytes.Clone(img[off : off+n])
			}
			if w.Kind == follow.Zeroes {
				clear(img[off : off+n])
			} else {
				copy(img[off:], w.Data)
			}
			fo.Observe(w)
			load(fo, img)
			in = in[8:]
		}
		fo.Status()
		fo.Local(1)
	})
}

// BenchmarkObserve is what a follower costs for each write.
func BenchmarkObserve(b *testing.B) {
	img := image(b)
	for name, n := range map[string]int64{"4KiB": 4096, "256KiB": 256 << 10} {
		b.Run(name, func(b *testing.B) {
			fo := follow.New(follow.Options{Size: int64(len(img))})
			load(fo, img)
			if st := fo.Status().Parts[0]; st.Blocks == 0 {
				b.Fatalf("not followed: %s", st.State)
			}
			data := make([]byte, n)
			at := int64(len(img)) - n // data of a file, or nothing
			b.SetBytes(n)
			b.ReportAllocs()
			for i := 0; b.Loop(); i++ {
				fo.Observe(follow.Write{LSN: epoch.LSN(i + 1), Range: follow.Range{Off: at, Len: n}, Data: data})
			}
		})
	}
}
