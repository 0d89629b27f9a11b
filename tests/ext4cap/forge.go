package ext4cap

import (
	"encoding/binary"
	"errors"
	"fmt"

	"kagami/ext4j/ext4"
	"kagami/ext4j/jbd2"
	"kagami/ext4j/jbd2/jtest"
)

// Forge goes on writing to a captured disk where the kernel stopped, with things
// that no kernel does, or does too seldom to be captured.
type Forge struct {
	Stream
	img  memory
	bs   int64
	fs   *ext4.FS
	bmap *ext4.BlockMap
	b    *jtest.Builder
	sec  uint64
}

// NewForge goes on from a stream that ends with a mounted file system.
func NewForge(s Stream) (*Forge, error) {
	f := &Forge{Stream: Stream{Base: s.Base, Log: append([]Record(nil), s.Log...)}, img: append(memory(nil), s.Base...)}
	for _, r := range s.Log {
		apply(f.img, r)
	}
	fs, err := ext4.Probe(f.img, 0, int64(len(f.img)))
	if err != nil {
		return nil, err
	}
	in, err := fs.Inode(fs.JournalInum)
	if err != nil {
		return nil, err
	}
	f.fs, f.bs = fs, int64(fs.BlockSize)
	if f.bmap, err = fs.MapInode(in, in.Size/uint64(fs.BlockSize)); err != nil {
		return nil, err
	}
	return f, f.open()
}

func (f *Forge) open() error {
	buf := make([]byte, int64(f.bmap.Len())*f.bs)
	for l := range f.bmap.Len() {
		if err := f.read(uint32(l), buf[int64(l)*f.bs:][:f.bs]); err != nil {
			return err
		}
	}
	super, err := jbd2.DecodeSuperblock(buf)
	if err != nil {
		return err
	}
	log, err := jbd2.Scan(super.Journal(), f.read)
	if err != nil {
		return err
	}
	if len(log.Transactions) == 0 {
		return errors.New("the log is empty")
	}
	f.sec = log.Transactions[len(log.Transactions)-1].Commit.Sec
	f.b = &jtest.Builder{Super: super, Buf: buf, Head: log.Head, TID: log.EndTID}
	return nil
}

func (f *Forge) place(l uint32) int64 {
	at, _ := f.bmap.Physical(uint64(l))
	return int64(at) * f.bs
}

func (f *Forge) read(l uint32, p []byte) error {
	copy(p, f.img[f.place(l):])
	return nil
}

// Flush adds a FLUSH.
func (f *Forge) Flush() { f.Log = append(f.Log, Record{Kind: Flush}) }

// Write adds a write.
func (f *Forge) Write(off int64, p []byte) {
	r := Record{Kind: Write, Off: off, Len: int64(len(p)), Data: append([]byte(nil), p...)}
	apply(f.img, r)
	f.Log = append(f.Log, r)
}

// Commit adds a transaction.
func (f *Forge) Commit(blocks []jtest.Block, revokes ...uint64) {
	from := f.b.Head
	f.b.Transaction(f.sec, blocks, revokes...)
	for l := from; l != f.b.Head; {
		f.Write(f.place(l), f.b.At(l))
		if l++; l >= f.b.Super.Last() {
			l = f.b.Super.First
		}
	}
}

// MoveTail moves the log's tail to its head.
func (f *Forge) MoveTail() {
	f.b.Super.Start, f.b.Super.Sequence = f.b.Head, f.b.TID
	p := f.b.At(0)
	binary.BigEndian.PutUint32(p[0x18:], uint32(f.b.TID))
	binary.BigEndian.PutUint32(p[0x1c:], f.b.Head)
	f.b.Super.ClearErrno(p) // and sets the checksum
	f.Write(f.place(0), p)
}

// Copies are the newest committed copies in the log, by block.
func (f *Forge) Copies() (map[uint64][]byte, error) {
	log, err := jbd2.Scan(f.b.Super.Journal(), f.read)
	if err != nil {
		return nil, err
	}
	out := map[uint64][]byte{}
	for _, tr := range log.Transactions {
		for _, at := range tr.Revokes {
			r, _, err := f.b.Super.Journal().DecodeRevoke(f.b.At(at))
			if err != nil {
				return nil, err
			}
			for b := range r.All() {
				delete(out, b)
			}
		}
		for _, e := range tr.Blocks {
			p := make([]byte, f.bs)
			if err := f.read(e.Logical, p); err != nil {
				return nil, err
			}
			if e.Escaped() {
				copy(p, []byte{0xc0, 0x3b, 0x39, 0x98})
			}
			out[e.Block] = p
		}
	}
	return out, nil
}

// FileBlock finds the committed copy of a block that holds content, a page of a file.
func (f *Forge) FileBlock(content []byte) (uint64, error) {
	copies, err := f.Copies()
	if err != nil {
		return 0, err
	}
	for b, p := range copies {
		if string(p) == string(content[:f.bs]) {
			return b, nil
		}
	}
	return 0, fmt.Errorf("the log holds no copy of it (%d copies)", len(copies))
}

// Forged are streams that go on where the kernel stopped.
func Forged(dir string, seed uint64) (map[string]Stream, error) {
	var page []byte
	base, err := Capture(dir, Workload{Mkfs: []string{"-b", "4096"}, Mount: "data=journal", MiB: 24, Dirty: true, Run: func(e *Env) error {
		page = e.Bytes(4096)
		return errors.Join(e.Append("a", 4096, 3), e.write("f", page), e.Append("b", 500, 3))
	}}, seed)
	if err != nil {
		return nil, err
	}
	out := map[string]Stream{}
	for name, forge := range map[string]func(*Forge, uint64, []byte) error{
		"tail moved too early": func(f *Forge, _ uint64, _ []byte) error { f.MoveTail(); f.Flush(); return nil },
		"log overwritten": func(f *Forge, _ uint64, _ []byte) error {
			f.Write(f.place(f.b.Super.Start), make([]byte, f.bs))
			f.Flush()
			return nil
		},
		"revoked copy written as data": func(f *Forge, b uint64, page []byte) error {
			f.Commit(nil, b) // what is shown from now on is what lies in its place
			f.Flush()
			f.rewrite(b, page)
			return nil
		},
		"journaled data written as ordered data": func(f *Forge, b uint64, page []byte) error {
			copies, err := f.Copies()
			if err != nil {
				return err
			}
			for b, p := range copies {
				f.Write(int64(b)*f.bs, p)
			}
			f.Flush()
			f.MoveTail()
			f.Flush()
			f.rewrite(b, page)
			return nil
		},
	} {
		f, err := NewForge(base)
		if err != nil {
			return nil, err
		}
		b, err := f.FileBlock(page)
		if err == nil {
			err = forge(f, b, page)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		out[name] = f.Stream
	}
	return out, nil
}

// rewrite writes something else to a block, then what a copy of it once held.
func (f *Forge) rewrite(b uint64, old []byte) {
	f.Write(int64(b)*f.bs, make([]byte, f.bs))
	f.Flush()
	f.Write(int64(b)*f.bs, old)
	f.Flush()
}
