package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// serve starts a server with the exports on a unix socket, and checks at the
// end that it stops and has closed every device as often as opened.
func serve(t testing.TB, opts Options, exports ...Export) (*Server, string) {
	t.Helper()
	s := NewServer(opts)
	for _, e := range exports {
		must(t, s.Add(e))
	}
	path := filepath.Join(t.TempDir(), "s")
	l, err := ListenUnix(path, -1, 0o600)
	must(t, err)
	served := make(chan error, 1)
	go func() { served <- s.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
		for _, e := range exports {
			if d, ok := e.Device.(*ramDevice); ok && d.clients() != 0 {
				t.Errorf("opened %d times, closed %d times", d.opened, d.closed)
			}
		}
	})
	return s, path
}

// client speaks the protocol byte by byte.
type client struct {
	t          testing.TB
	nc         net.Conn
	structured bool
	size       uint64
	flags      uint16
	lastCookie uint64
}

const testTimeout = 20 * time.Second

// connect dials and reads the greeting.
func connect(t testing.TB, path string) *client {
	t.Helper()
	nc, err := net.Dial("unix", path)
	must(t, err)
	t.Cleanup(func() { _ = nc.Close() })
	must(t, nc.SetDeadline(time.Now().Add(testTimeout)))
	c := &client{t: t, nc: nc}
	g := c.read(18)
	if string(g[:16]) != "NBDMAGICIHAVEOPT" || binary.BigEndian.Uint16(g[16:]) != 3 {
		t.Fatalf("greeting %x", g)
	}
	return c
}

// dial connects and sends the client flags.
func dial(t testing.TB, path string) *client {
	t.Helper()
	c := connect(t, path)
	c.write(be32(3))
	return c
}

// attach enters transmission with structured replies and base:allocation, or
// with neither.
func attach(t testing.TB, path, name string, structured bool) *client {
	t.Helper()
	c := dial(t, path)
	if structured {
		c.structured = true
		c.want(c.option(optStructured, nil), repAck)
		c.want(c.option(optSetMeta, metaData(name, baseAllocation)), repMeta, repAck)
	}
	c.enter(name)
	return c
}

func (c *client) enter(name string) {
	c.t.Helper()
	r := c.option(optGo, infoData(name))
	c.want(r, repInfo, repAck)
	c.size, c.flags = binary.BigEndian.Uint64(r[0].data[2:]), binary.BigEndian.Uint16(r[0].data[10:])
}

func be16(v uint16) []byte { return binary.BigEndian.AppendUint16(nil, v) }
func be32(v uint32) []byte { return binary.BigEndian.AppendUint32(nil, v) }
func be64(v uint64) []byte { return binary.BigEndian.AppendUint64(nil, v) }

func cat(parts ...[]byte) (b []byte) {
	for _, p := range parts {
		b = append(b, p...)
	}
	return b
}

func textData(s string) []byte { return append(be32(uint32(len(s))), s...) }

func infoData(name string, kinds ...uint16) []byte {
	b := append(textData(name), be16(uint16(len(kinds)))...)
	for _, k := range kinds {
		b = append(b, be16(k)...)
	}
	return b
}

func metaData(name string, queries ...string) []byte {
	b := append(textData(name), be32(uint32(len(queries)))...)
	for _, q := range queries {
		b = append(b, textData(q)...)
	}
	return b
}

func (c *client) write(b []byte) {
	c.t.Helper()
	if _, err := c.nc.Write(b); err != nil {
		c.t.Fatal(err)
	}
}

func (c *client) read(n int) []byte {
	c.t.Helper()
	b := make([]byte, n)
	if _, err := io.ReadFull(c.nc, b); err != nil {
		c.t.Fatalf("read %d bytes: %v", n, err)
	}
	return b
}

// wantEnd expects that the server ends the connection without another byte.
func (c *client) wantEnd() {
	c.t.Helper()
	n, err := c.nc.Read(make([]byte, 1))
	var timeout net.Error
	if n != 0 || err == nil || errors.As(err, &timeout) && timeout.Timeout() {
		c.t.Fatalf("%d bytes, %v, want the end", n, err)
	}
}

type optAnswer struct {
	code optReply
	data []byte
}

// option sends an option and reads the answers up to the last one.
func (c *client) option(opt option, data []byte) (list []optAnswer) {
	c.t.Helper()
	c.write(optionBytes(opt, data))
	return c.answers(opt)
}

func optionBytes(opt option, data []byte) []byte {
	return cat(be64(optionMagic), be32(uint32(opt)), be32(uint32(len(data))), data)
}

func (c *client) answers(opt option) (list []optAnswer) {
	c.t.Helper()
	for {
		h := c.read(optReplySize)
		if binary.BigEndian.Uint64(h) != optReplyMagic || binary.BigEndian.Uint32(h[8:]) != uint32(opt) {
			c.t.Fatalf("answer %x to option %d", h, opt)
		}
		a := optAnswer{optReply(binary.BigEndian.Uint32(h[12:])), c.read(int(binary.BigEndian.Uint32(h[16:])))}
		list = append(list, a)
		if a.code == repAck || a.code >= 1<<31 {
			return list
		}
	}
}

func (c *client) want(got []optAnswer, codes ...optReply) {
	c.t.Helper()
	var have []optReply
	for _, a := range got {
		have = append(have, a.code)
	}
	if fmt.Sprint(have) != fmt.Sprint(codes) {
		c.t.Fatalf("answers %x, want %x (%q)", have, codes, got[len(got)-1].data)
	}
}

func requestBytes(r request, payload []byte) []byte {
	return cat(be32(requestMagic), be16(r.flags), be16(uint16(r.cmd)), be64(r.cookie), be64(r.offset), be32(r.length), payload)
}

// send sends a request under a new cookie and returns that.
func (c *client) send(r request, payload []byte) uint64 {
	c.t.Helper()
	c.lastCookie++
	r.cookie = c.lastCookie
	c.write(requestBytes(r, nil))
	if len(payload) > 0 {
		c.write(payload)
	}
	return r.cookie
}

// reply is one simple reply or one chunk.
type reply struct {
	cookie uint64
	errno  uint32
	text   string
	kind   uint16 // of the chunk
	offset uint64
	data   []byte
	done   bool
}

// receive reads one reply or chunk; n is the data a simple reply would bring.
func (c *client) receive(n int) (r reply) {
	c.t.Helper()
	be := binary.BigEndian
	switch magic := be.Uint32(c.read(4)); magic {
	case simpleMagic:
		r.errno, r.cookie, r.done = be.Uint32(c.read(4)), be.Uint64(c.read(8)), true
		if r.errno == 0 {
			r.data = c.read(n)
		}
	case structuredMagic:
		h := c.read(16)
		r.done, r.kind, r.cookie = be.Uint16(h)&chunkDone != 0, be.Uint16(h[2:]), be.Uint64(h[4:])
		r.data = c.read(int(be.Uint32(h[12:])))
		switch r.kind {
		case chunkData:
			r.offset, r.data = be.Uint64(r.data), r.data[8:]
		case chunkError:
			r.errno, r.text = be.Uint32(r.data), string(r.data[6:])
			if int(be.Uint16(r.data[4:])) != len(r.text) {
				c.t.Fatalf("error chunk %x", r.data)
			}
		}
	default:
		c.t.Fatalf("reply with magic %08x", magic)
	}
	return r
}

// call sends a request and expects its reply to be the next one.
func (c *client) call(r request, payload []byte) reply {
	c.t.Helper()
	cookie := c.send(r, payload)
	n := 0
	if r.cmd == cmdRead && !c.structured {
		n = int(r.length)
	}
	got := c.receive(n)
	if got.cookie != cookie {
		c.t.Fatalf("reply to %d, want %d", got.cookie, cookie)
	}
	return got
}

// ok is call for a request that must succeed in one reply.
func (c *client) ok(r request, payload []byte) reply {
	c.t.Helper()
	got := c.call(r, payload)
	if got.errno != 0 || !got.done {
		c.t.Fatalf("%s: error %d %s, done %v", r.cmd, got.errno, got.text, got.done)
	}
	return got
}

func write(off uint64, p []byte, flags uint16) (request, []byte) {
	return request{cmd: cmdWrite, offset: off, length: uint32(len(p)), flags: flags}, p
}

func read(off uint64, n uint32) (request, []byte) {
	return request{cmd: cmdRead, offset: off, length: n}, nil
}

// eventually waits for something that other goroutines bring about.
func eventually(t testing.TB, what string, cond func() bool) {
	t.Helper()
	for end := time.Now().Add(testTimeout); !cond(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("never: %s", what)
		}
	}
}

// opener returns what closes the gate a device's calls wait at, and sees to it
// at the end of the test. Called after serve, so that the server can end.
func opener(t testing.TB, gate chan struct{}) func() {
	open := sync.OnceFunc(func() { close(gate) })
	t.Cleanup(open)
	return open
}
