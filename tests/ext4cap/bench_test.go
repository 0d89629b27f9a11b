package ext4cap

import (
	"os"
	"path/filepath"
	"sync"
	"testing"

	"kagami/ext4j"
	"kagami/ext4j/epoch"
	"kagami/images"
)

// BenchmarkWritePath plays what the kernel's ext4 wrote through a whole group, with
// an image on a RAM disk and a shipper that encodes each record and acknowledges at
// once: all that a write costs here but the line and the disk. The shares of
// off, follow and local are what following costs; compare them in one run, with -count.
func BenchmarkWritePath(b *testing.B) {
	if os.Geteuid() != 0 {
		b.Skip("needs root, to let the kernel write an ext4")
	}
	for _, w := range []Workload{
		{Name: "append 4 KiB and fsync", MiB: 64, Run: func(e *Env) error { return e.Append("a", 4096, 200) }},
		{Name: "sequential", MiB: 128, Run: func(e *Env) error { return e.Append("a", 32<<20, 3) }},
	} {
		s, err := Capture(b.TempDir(), w, 1)
		if err != nil {
			b.Fatal(err)
		}
		for _, m := range []struct {
			name string
			eyes ext4j.Eyes
		}{{"off", ext4j.Eyes{}}, {"follow", ext4j.Eyes{Follow: true}}, {"local", ext4j.Eyes{Follow: true, LocalFlushes: true}}} {
			b.Run(w.Name+"/"+m.name, func(b *testing.B) { s.writePath(b, m.eyes) })
		}
	}
}

func (s Stream) writePath(b *testing.B, eyes ext4j.Eyes) {
	bytes := int64(0)
	for _, r := range s.Log {
		bytes += int64(len(r.Data))
	}
	b.SetBytes(bytes)
	path := filepath.Join("/dev/shm", filepath.Base(b.TempDir())+".kagami-bench")
	defer os.Remove(path)
	for b.Loop() {
		b.StopTimer()
		if err := os.WriteFile(path, s.Base, 0o600); err != nil {
			b.Fatal(err)
		}
		img, err := images.OpenImage(images.OS{}, path, images.Want{})
		if err != nil {
			b.Fatal(err)
		}
		g := ext4j.NewGroup(ext4j.Options{Recorder: noRecord{}, Eyes: eyes, Limits: ext4j.Limits{QueueBytes: 16 << 20, EpochBytes: 8 << 20}})
		d := g.AddDisk(0, img)
		var shipper sync.WaitGroup
		wake := make(chan struct{}, 1)
		g.SetWake(func() {
			select {
			case wake <- struct{}{}:
			default:
			}
		})
		shipper.Go(func() { ship(g, wake) })
		g.Begin(epoch.UUID{1}, 1, 1, false)
		g.OpenGate()
		settle(d)
		b.StartTimer()
		s.replay(b, d)
		b.StopTimer()
		g.Close()
		shipper.Wait()
		img.Close()
		b.StartTimer()
	}
}

// replay plays the stream, one request after the other.
func (s Stream) replay(b *testing.B, d *ext4j.Disk) {
	for _, r := range s.Log {
		var err error
		switch r.Kind {
		case Write:
			err = d.WriteAt(r.Data, r.Off, false)
		case Zero:
			err = d.Trim(r.Off, r.Len, false)
		case Flush:
			err = d.Flush()
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}

// ship takes records, encodes them, and acknowledges what was closed, until the group ends.
func ship(g *ext4j.Group, wake <-chan struct{}) {
	var frame []byte
	for {
		select {
		case <-g.Done():
			return
		case <-wake:
		}
		for rs := g.Take(1<<20, 1024); len(rs) > 0; rs = g.Take(1<<20, 1024) {
			frame = frame[:0]
			closed := epoch.LSN(0)
			for i := range rs {
				frame = rs[i].AppendStored(frame, 0, rs[i].Payload, 0)
				if rs[i].Type == epoch.TypeClose {
					closed = rs[i].LSN
				}
			}
			if closed != 0 && g.Acked(1, closed, closed) != nil {
				return
			}
		}
	}
}
