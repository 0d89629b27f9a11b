package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"net"
	"sync"
	"testing"
	"time"
)

// scriptConn is a connection whose input is given and whose output is kept.
type scriptConn struct {
	net.Conn // no other method is used
	in       io.Reader
	mu       sync.Mutex
	out      bytes.Buffer
	closed   bool
	ended    chan struct{} // closed by the first Close
}

func (c *scriptConn) Read(p []byte) (int, error) { return c.in.Read(p) }

func (c *scriptConn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, net.ErrClosed
	}
	return c.out.Write(p)
}

func (c *scriptConn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.closed = true
		close(c.ended)
	}
	return nil
}

func (c *scriptConn) SetDeadline(time.Time) error      { return nil }
func (c *scriptConn) SetWriteDeadline(time.Time) error { return nil }

type oneListener struct {
	nc   net.Conn
	done chan struct{}
	once sync.Once
}

func (l *oneListener) Accept() (net.Conn, error) {
	if nc := l.nc; nc != nil {
		l.nc = nil
		return nc, nil
	}
	<-l.done
	return nil, net.ErrClosed
}

func (l *oneListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *oneListener) Addr() net.Addr { return &net.UnixAddr{} }

// FuzzServer feeds a whole connection to the server. It must end by itself, have called
// the device only as its contract says (ramDevice checks), closed it as often as
// opened, given its memory back, and said something that parses.
func FuzzServer(f *testing.F) {
	open := cat(be32(3), optionBytes(optStructured, nil), optionBytes(optSetMeta, metaData("a", baseAllocation)), optionBytes(optGo, infoData("a", 3)))
	var all []byte
	for i, cmd := range []command{cmdWrite, cmdRead, cmdTrim, cmdZeroes, cmdBlockStatus, cmdFlush, cmdCache, cmdWrite} {
		r := request{cmd: cmd, cookie: uint64(i), offset: uint64(i * 100), length: 600, flags: uint16(i & 1)}
		if cmd == cmdFlush {
			r.offset, r.length = 0, 0
		}
		all = append(all, requestBytes(r, payloadFor(r))...)
	}
	disc := requestBytes(request{cmd: cmdDisc}, nil)
	f.Add(cat(open, all, disc), false)
	f.Add(cat(open, all), true)
	f.Add(cat(be32(1), optionBytes(optList, nil), optionBytes(optInfo, infoData("")), optionBytes(optListMeta, metaData("a")), optionBytes(99, []byte("x")), optionBytes(optExportName, []byte("a")), all, disc), false)
	f.Add(cat(be32(3), optionBytes(optAbort, nil)), false)
	f.Add([]byte{}, false)
	large := request{cmd: cmdWrite, length: maxPiece + 100, flags: cmdFUA}
	f.Add(cat(open, requestBytes(large, payloadFor(large)), requestBytes(request{cmd: cmdRead, length: maxPiece + 4096, flags: cmdDF}, nil), disc), true)
	f.Fuzz(func(t *testing.T, input []byte, stall bool) {
		d := newRAM(t, maxPiece+64<<10)
		d.history, d.calls = nil, nil
		d.stall.Store(stall)
		s := NewServer(Options{MaxInFlight: 3, MaxMemory: 1})
		must(t, s.Add(Export{Name: "a", Device: d}))
		must(t, s.Add(Export{Name: "b", Device: d, ReadOnly: true, MinBlock: 512}))
		nc := &scriptConn{in: bytes.NewReader(input), ended: make(chan struct{})}
		l := &oneListener{nc: nc, done: make(chan struct{})}
		served := make(chan error, 1)
		go func() { served <- s.Serve(context.Background(), l) }()
		<-nc.ended
		s.Close()
		must(t, <-served)
		if d.clients() != 0 {
			t.Error("Opened and Closed do not match")
		}
		if n := int64(MaxPayload); !s.memory.try(n) {
			t.Error("memory was not given back")
		}
		parseOutput(t, nc.out.Bytes())
	})
}

// parseOutput checks what the server said, as far as it can be told without
// knowing the requests: greeting, then replies to options.
func parseOutput(t *testing.T, b []byte) {
	if len(b) < 18 || string(b[:16]) != "NBDMAGICIHAVEOPT" {
		t.Fatalf("greeting %x", b)
	}
	for b = b[18:]; len(b) >= optReplySize && binary.BigEndian.Uint64(b) == optReplyMagic; {
		n := int(binary.BigEndian.Uint32(b[16:]))
		if n > len(b)-optReplySize {
			t.Fatalf("reply of %d bytes, %d are there", n, len(b)-optReplySize)
		}
		b = b[optReplySize+n:]
	}
}
