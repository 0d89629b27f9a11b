package acked

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"path/filepath"
)

// appender adds records to a file. Operation n appends record n, a line:
//
//	WRITER NUMBER CRC32C PAYLOAD
type appender struct {
	common
	file *os.File
}

func (a *appender) name() string { return fmt.Sprintf("append-%d.log", a.number) }

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// record makes record n. Most are short; some span several pages.
func (a *appender) record(n uint64) []byte {
	rng := a.rand(n)
	size := rng.IntN(200)
	if rng.IntN(8) == 0 {
		size = rng.IntN(12000)
	}
	payload := make([]byte, size)
	for i := range payload {
		payload[i] = byte(rng.Uint32())
	}
	body := fmt.Appendf(nil, "%d %d ", a.number, n)
	sum := crc32.Update(crc32.Checksum(body, castagnoli), castagnoli, payload)
	body = fmt.Appendf(body, "%08x ", sum^uint32(a.seed))
	return append(base64.StdEncoding.AppendEncode(body, payload), '\n')
}

func (a *appender) prepare(dir string) (err error) {
	flags := os.O_CREATE | os.O_EXCL | os.O_WRONLY | os.O_APPEND | a.spec.Sync.openFlags()
	if a.file, err = os.OpenFile(filepath.Join(dir, a.name()), flags, 0o600); err != nil {
		return err
	}
	return a.file.Sync()
}

func (a *appender) perform(n uint64) error {
	if _, err := a.file.Write(a.record(n)); err != nil {
		return err
	}
	return a.spec.Sync.apply(a.file)
}

func (a *appender) close() error { return a.file.Close() }

// check reads the file record by record. A record that is not as written is
// lost; those after it are looked for at their own places.
func (a *appender) check(dir string, acked, issued uint64, f *findings) {
	f.allowed[a.name()] = true
	file, err := os.Open(filepath.Join(dir, a.name()))
	if err != nil {
		f.lostf(0, "%s, durable before the first operation: %v", a.name(), err)
		a.lostFrom(1, acked, f, err)
		return
	}
	defer file.Close()
	for n := uint64(1); n <= acked; n++ {
		want := a.record(n)
		got := make([]byte, len(want))
		if _, err := io.ReadFull(file, got); err != nil {
			a.lostFrom(n, acked, f, err)
			return
		}
		if !bytes.Equal(got, want) {
			f.lostf(n, "record of %s is damaged: %q…, want %q…", a.name(), head(got), head(want))
		}
	}
	a.checkTail(file, issued > acked, issued, f)
}

func (a *appender) lostFrom(n, acked uint64, f *findings, err error) {
	for ; n <= acked; n++ {
		f.lostf(n, "record of %s cannot be read: %v", a.name(), err)
	}
}

// checkTail looks at what follows the last acknowledged record: nothing, or
// (a part of) the one that was under way.
func (a *appender) checkTail(file io.Reader, underWay bool, issued uint64, f *findings) {
	var want []byte
	if underWay {
		want = a.record(issued)
	}
	got, err := io.ReadAll(io.LimitReader(file, int64(len(want))+1))
	if err != nil {
		f.inventedf("%s cannot be read after its last acknowledged record: %v", a.name(), err)
		return
	}
	if at := partial(got, want); at >= 0 {
		f.inventedf("%s holds bytes that were never written, %d bytes after its last acknowledged record", a.name(), at)
	}
}

func head(b []byte) []byte { return b[:min(len(b), 24)] }
