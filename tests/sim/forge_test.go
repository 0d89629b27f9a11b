package sim

import (
	"hash/crc32"
	"testing"
	"time"

	"kagami/ext4j"
)

// forgery is what two writes' numbers differ by so that whole chunks of them have the same CRC32C.
// It is there for the asking: a CRC is linear, and maps the 63 bits of a number to 32.
func forgery() version {
	sum := func(v version) uint32 {
		p := make([]byte, ext4j.Chunk)
		stamp(p, v)
		return crc32.Checksum(p, crc32.MakeTable(crc32.Castagnoli))
	}
	base := sum(0)
	type row struct {
		sum  uint32
		bits version
	}
	var rows []row // echelon form
	for i := range 63 {
		r := row{sum(1<<i) ^ base, 1 << i}
		for _, o := range rows {
			if r.sum^o.sum < r.sum {
				r.sum, r.bits = r.sum^o.sum, r.bits^o.bits
			}
		}
		if r.sum == 0 {
			return r.bits
		}
		rows = append(rows, r)
	}
	return 0
}

func TestForgery(t *testing.T) {
	p, q := make([]byte, ext4j.Chunk), make([]byte, ext4j.Chunk)
	stamp(p, 1234)
	stamp(q, 1234^forgery())
	table := crc32.MakeTable(crc32.Castagnoli)
	if string(p) == string(q) || crc32.Checksum(p, table) != crc32.Checksum(q, table) {
		t.Error("it is none")
	}
}

// forges: what a guest writes has the CRC of what was there, and the source dies before the
// replica has it.
func forges(w *World) error {
	if err := w.await("the first sync ends", w.protected.Load); err != nil {
		return err
	}
	write := func(v version) {
		p := make([]byte, ext4j.Chunk)
		stamp(p, v)
		w.g.change(1, 0, ext4j.Chunk, v, false, func(a *attachment) error { return w.write(a, 1, p, 0, false) })
	}
	first, other := w.history.Op(), forgery()
	write(first)
	w.g.flush(1)
	w.net.Cut(true)
	write(first ^ other)
	time.Sleep(time.Second)
	w.sourceDown(false)
	w.net.Cut(false)
	if err := w.sourceUp(true); err != nil {
		return err
	}
	time.Sleep(20 * time.Second)
	return w.Disaster()
}

// alone leaves no other guest, nor anything else that could hold it up.
func alone(c *Config) {
	c.Workers, c.Script, c.Continue, c.Failover, c.AsyncAge, c.QueueBytes = 0, -1, false, false, 0, 1<<20
}
