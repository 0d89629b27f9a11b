package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

func TestClientFlags(t *testing.T) {
	_, path := serve(t, Options{}, Export{Name: "a", Device: newRAM(t, 4096)})
	for _, flags := range []uint32{0, 2, 4, 7, 1 << 31, 0xffffffff} {
		c := connect(t, path)
		c.write(be32(flags))
		c.wantEnd()
	}
	for _, flags := range []uint32{1, 3} {
		c := connect(t, path)
		c.write(be32(flags))
		c.want(c.option(optAbort, nil), repAck)
		c.wantEnd()
	}
}

func TestOptions(t *testing.T) {
	long := strings.Repeat("x", maxNameSize+1)
	for _, c := range []struct {
		name string
		opt  option
		data []byte
		want []optReply
	}{
		{"list", optList, nil, []optReply{repServer, repServer, repServer, repAck}},
		{"list with data", optList, []byte{1}, []optReply{repErrInvalid}},
		{"abort with data", optAbort, []byte("why not"), []optReply{repAck}},
		{"starttls", optStartTLS, nil, []optReply{repErrUnsup}},
		{"extended headers", optExtendedHeader, nil, []optReply{repErrUnsup}},
		{"unknown", 77, []byte("some data"), []optReply{repErrUnsup}},
		{"unknown and large", 77, make([]byte, maxOptionData+1), []optReply{repErrTooBig}},
		{"unknown and very large", 77, make([]byte, maxOptionDrain), []optReply{repErrTooBig}},
		{"structured", optStructured, nil, []optReply{repAck}},
		{"structured with data", optStructured, []byte{0}, []optReply{repErrInvalid}},
		{"info", optInfo, infoData("a"), []optReply{repInfo, repAck}},
		{"info all", optInfo, infoData("a", 0, 1, 2, 3, 9, 3), []optReply{repInfo, repInfo, repInfo, repInfo, repAck}},
		{"info without description", optInfo, infoData("b", 2), []optReply{repInfo, repAck}},
		{"info unknown export", optInfo, infoData("c"), []optReply{repErrUnknown}},
		{"info, no default export", optInfo, infoData(""), []optReply{repErrUnknown}},
		{"info blocks", optInfo, infoData("blocks"), []optReply{repErrBlockSize}},
		{"info blocks asked", optInfo, infoData("blocks", 3), []optReply{repInfo, repInfo, repAck}},
		{"info nothing", optInfo, nil, []optReply{repErrInvalid}},
		{"info short", optInfo, []byte{0, 0, 0}, []optReply{repErrInvalid}},
		{"info name too long", optInfo, infoData(long), []optReply{repErrInvalid}},
		{"info name not UTF-8", optInfo, infoData("\xff"), []optReply{repErrInvalid}},
		{"info name lies", optInfo, cat(be32(1000), []byte("a"), be16(0)), []optReply{repErrInvalid}},
		{"info name lies hugely", optInfo, cat(be32(0xffffffff), []byte("a"), be16(0)), []optReply{repErrInvalid}},
		{"info count lies", optInfo, cat(textData("a"), be16(9), be16(1)), []optReply{repErrInvalid}},
		{"info left over", optInfo, append(infoData("a"), 0), []optReply{repErrInvalid}},
		{"go", optGo, infoData("a", 3), []optReply{repInfo, repInfo, repAck}},
		{"go unknown", optGo, infoData("zzz"), []optReply{repErrUnknown}},
		{"go malformed", optGo, []byte("a"), []optReply{repErrInvalid}},
		{"meta without structured", optSetMeta, metaData("a", baseAllocation), []optReply{repErrInvalid}},
		{"list meta without structured", optListMeta, metaData("a"), []optReply{repErrInvalid}},
	} {
		t.Run(c.name, func(t *testing.T) {
			_, path := serve(t, Options{}, Export{Name: "a", Description: "the first", Device: newRAM(t, 4096)},
				Export{Name: "b", Device: newRAM(t, 0)}, Export{Name: "blocks", Device: newRAM(t, 4096), MinBlock: 512})
			cl := dial(t, path)
			cl.want(cl.option(c.opt, c.data), c.want...)
			if c.opt == optGo && c.want[0] == repInfo {
				cl.ok(read(0, 10))
			} else if c.opt != optAbort { // haggling goes on
				cl.want(cl.option(optInfo, infoData("a")), repInfo, repAck)
			}
		})
	}
}

func TestOptionsThatEnd(t *testing.T) {
	_, path := serve(t, Options{}, Export{Name: "a", Device: newRAM(t, 4096)}, Export{Name: "b", Device: newRAM(t, 1)})
	for name, b := range map[string][]byte{
		"bad magic":            cat(be64(1), be32(uint32(optList)), be32(0)),
		"huge data":            cat(be64(optionMagic), be32(77), be32(0xffffffff)),
		"data over the bound":  cat(be64(optionMagic), be32(77), be32(maxOptionDrain+1)),
		"export name unknown":  optionBytes(optExportName, []byte("zzz")),
		"export name, none":    optionBytes(optExportName, nil),
		"export name too long": optionBytes(optExportName, make([]byte, maxOptionData+1)),
	} {
		t.Run(name, func(t *testing.T) {
			c := dial(t, path)
			c.write(b)
			c.wantEnd()
		})
	}
}

func TestOptionFlood(t *testing.T) {
	_, path := serve(t, Options{}, Export{Name: "a", Device: newRAM(t, 4096)})
	c := dial(t, path)
	for range maxOptions {
		c.want(c.option(optList, nil), repServer, repAck)
	}
	c.wantEnd()
}

func TestListAndInfoContent(t *testing.T) {
	_, path := serve(t, Options{}, Export{Name: "b", Device: newRAM(t, 1), ReadOnly: true},
		Export{Name: "a", Description: "the first", Device: newRAM(t, 12345), PreferredBlock: 65536, FastZero: true})
	c := dial(t, path)
	list := c.option(optList, nil)
	c.want(list, repServer, repServer, repAck)
	if string(list[0].data) != "\x00\x00\x00\x01athe first" || string(list[1].data) != "\x00\x00\x00\x01b" {
		t.Fatalf("%q %q", list[0].data, list[1].data)
	}
	base := txHasFlags | txSendFlush | txMultiConn
	info := c.option(optInfo, infoData("a", infoBlockSize, infoName, infoDescription))
	c.want(info, repInfo, repInfo, repInfo, repInfo, repAck)
	for i, want := range [][]byte{
		cat(be16(infoExport), be64(12345), be16(base|txSendFUA|txSendTrim|txSendZeroes|txSendFastZero)),
		cat(be16(infoName), []byte("a")),
		cat(be16(infoDescription), []byte("the first")),
		cat(be16(infoBlockSize), be32(1), be32(65536), be32(MaxPayload)),
	} {
		if !bytes.Equal(info[i].data, want) {
			t.Errorf("info %d: %x, want %x", i, info[i].data, want)
		}
	}
	c.want(c.option(optStructured, nil), repAck)
	ro := c.option(optInfo, infoData("b"))
	if got := binary.BigEndian.Uint16(ro[0].data[10:]); got != base|txReadOnly|txSendDF {
		t.Errorf("flags %#x", got)
	}
}

func TestExportName(t *testing.T) {
	for _, flags := range []uint32{flagFixedNewstyle, flagFixedNewstyle | flagNoZeroes} {
		_, path := serve(t, Options{}, Export{Name: "a", Device: newRAM(t, 4096)})
		c := connect(t, path)
		c.write(be32(flags))
		c.write(optionBytes(optExportName, nil)) // the default: the only one
		b := c.read(10)
		if binary.BigEndian.Uint64(b) != 4096 || binary.BigEndian.Uint16(b[8:])&txSendFUA == 0 {
			t.Fatalf("%x", b)
		}
		if flags&flagNoZeroes == 0 && !allZero(c.read(zeroesSize)) {
			t.Fatal("no zeros")
		}
		c.ok(write(0, []byte("hello"), 0))
		if got := c.ok(read(0, 5)); string(got.data) != "hello" {
			t.Fatalf("%q", got.data)
		}
	}
}

func TestMetaContexts(t *testing.T) {
	_, path := serve(t, Options{}, Export{Name: "a", Device: newRAM(t, 4096)}, Export{Name: "b", Device: newRAM(t, 4096)})
	all := []optReply{repMeta, repAck}
	none := []optReply{repAck}
	for _, c := range []struct {
		name      string
		opt       option
		data      []byte
		want      []optReply
		allocates bool // block status works on "a" then
	}{
		{"list all", optListMeta, metaData("a"), all, false},
		{"list base", optListMeta, metaData("a", "base:"), all, false},
		{"list the one", optListMeta, metaData("a", baseAllocation), all, false},
		{"list another", optListMeta, metaData("a", "qemu:dirty-bitmap:x"), none, false},
		{"list unknown export", optListMeta, metaData("c"), []optReply{repErrUnknown}, false},
		{"set", optSetMeta, metaData("a", baseAllocation), all, true},
		{"set among others", optSetMeta, metaData("a", "x:y", baseAllocation, baseAllocation), all, true},
		{"set none", optSetMeta, metaData("a"), none, false},
		{"set name space", optSetMeta, metaData("a", "base:"), none, false},
		{"set for another export", optSetMeta, metaData("b", baseAllocation), all, false},
		{"set unknown export", optSetMeta, metaData("c", baseAllocation), []optReply{repErrUnknown}, false},
		{"set, lying count", optSetMeta, cat(textData("a"), be32(0xffffffff), textData(baseAllocation)), []optReply{repErrInvalid}, false},
		{"set, lying query", optSetMeta, cat(textData("a"), be32(1), be32(4000), []byte("x")), []optReply{repErrInvalid}, false},
		{"set, left over", optSetMeta, append(metaData("a", baseAllocation), 1), []optReply{repErrInvalid}, false},
		{"set nothing", optSetMeta, nil, []optReply{repErrInvalid}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			cl := dial(t, path)
			cl.structured = true
			cl.want(cl.option(optStructured, nil), repAck)
			got := cl.option(c.opt, c.data)
			cl.want(got, c.want...)
			if len(c.want) == 2 && string(got[0].data[4:]) != baseAllocation {
				t.Fatalf("%q", got[0].data)
			}
			cl.enter("a")
			r := cl.call(request{cmd: cmdBlockStatus, length: 4096}, nil)
			if (r.errno == 0) != c.allocates {
				t.Fatalf("block status: %d %s", r.errno, r.text)
			}
		})
	}
}

// TestMetaContextReset: each SET replaces the one before, also when it fails.
func TestMetaContextReset(t *testing.T) {
	_, path := serve(t, Options{}, Export{Name: "a", Device: newRAM(t, 4096)})
	for _, second := range [][]byte{metaData("a"), metaData("zzz", baseAllocation), nil} {
		c := dial(t, path)
		c.structured = true
		c.option(optStructured, nil)
		c.want(c.option(optSetMeta, metaData("a", baseAllocation)), repMeta, repAck)
		c.option(optSetMeta, second)
		c.enter("a")
		if r := c.call(request{cmd: cmdBlockStatus, length: 4096}, nil); r.errno != errInval {
			t.Fatalf("%d %s", r.errno, r.text)
		}
	}
}

func TestAddRefusals(t *testing.T) {
	s := NewServer(Options{})
	d := newRAM(t, 1)
	for name, e := range map[string]Export{
		"long name":       {Name: strings.Repeat("n", MaxExportName+1), Device: d},
		"bad name":        {Name: "\xff", Device: d},
		"long text":       {Description: strings.Repeat("n", MaxExportDescription+1), Device: d},
		"no device":       {},
		"odd block":       {Device: d, MinBlock: 3},
		"large block":     {Device: d, MinBlock: 128 << 10},
		"odd preferred":   {Device: d, PreferredBlock: 4097},
		"small preferred": {Device: d, MinBlock: 4096, PreferredBlock: 512},
		"huge preferred":  {Device: d, PreferredBlock: 64 << 20},
	} {
		if err := s.Add(e); !errors.Is(err, errBadExport) {
			t.Errorf("%s: %v", name, err)
		}
	}
	must(t, s.Add(Export{Name: "a", Device: d}))
	if err := s.Add(Export{Name: "a", Device: d}); !errors.Is(err, ErrExists) {
		t.Error(err)
	}
	s.Remove("zzz")
	s.Close()
}

// pipeListener hands out one end of pipes, whose deadlines run on the
// bubble's clock.
type pipeListener struct {
	conns chan net.Conn
	done  chan struct{}
	once  sync.Once
}

func newPipeListener() *pipeListener {
	return &pipeListener{conns: make(chan net.Conn), done: make(chan struct{})}
}

func (l *pipeListener) Accept() (net.Conn, error) {
	select {
	case nc := <-l.conns:
		return nc, nil
	case <-l.done:
		return nil, net.ErrClosed
	}
}

func (l *pipeListener) Close() error {
	l.once.Do(func() { close(l.done) })
	return nil
}

func (l *pipeListener) Addr() net.Addr { return &net.UnixAddr{} }

func (l *pipeListener) dial() net.Conn {
	a, b := net.Pipe()
	l.conns <- b
	return a
}

func TestHandshakeTimeout(t *testing.T) {
	for _, sent := range [][]byte{nil, {0, 0}, be32(3), cat(be32(3), []byte("IHAVE")), cat(be32(3), optionBytes(optList, nil)),
		cat(be32(3), be64(optionMagic), be32(77), be32(1000))} {
		synctest.Test(t, func(t *testing.T) {
			s, l := NewServer(Options{HandshakeTimeout: 5 * time.Second}), newPipeListener()
			must(t, s.Add(Export{Name: "a", Device: newRAM(t, 1)}))
			go func() { _ = s.Serve(context.Background(), l) }()
			nc, start := l.dial(), time.Now()
			go func() { _, _ = nc.Write(sent) }()
			_, _ = io.Copy(io.Discard, nc) // until the server ends it
			if d := time.Since(start); d != 5*time.Second {
				t.Errorf("ended after %v", d)
			}
			s.Close()
		})
	}
}

// TestNoTimeoutInTransmission: an idle client stays.
func TestNoTimeoutInTransmission(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l := NewServer(Options{HandshakeTimeout: 5 * time.Second}), newPipeListener()
		must(t, s.Add(Export{Name: "a", Device: newRAM(t, 4096)}))
		go func() { _ = s.Serve(context.Background(), l) }()
		c := &client{t: t, nc: l.dial()}
		c.read(18)
		c.write(be32(3))
		c.enter("a")
		time.Sleep(240 * time.Hour)
		c.ok(write(0, []byte("x"), 0))
		time.Sleep(240 * time.Hour)
		c.ok(request{cmd: cmdFlush}, nil)
		s.Close()
	})
}

// TestWriteTimeout: a client that does not read its replies is dropped.
func TestWriteTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s, l := NewServer(Options{WriteTimeout: time.Minute}), newPipeListener()
		d := newRAM(t, 4096)
		must(t, s.Add(Export{Name: "a", Device: d}))
		go func() { _ = s.Serve(context.Background(), l) }()
		c := &client{t: t, nc: l.dial()}
		c.read(18)
		c.write(be32(3))
		c.enter("a")
		start := time.Now()
		c.send(request{cmd: cmdRead, length: 4096}, nil)
		eventuallyIdle(t, func() bool { return d.clients() == 0 })
		if took := time.Since(start); took < 30*time.Second || took > time.Minute+time.Second {
			t.Errorf("dropped after %v", took)
		}
		s.Close()
	})
}

// eventuallyIdle is eventually on the bubble's clock.
func eventuallyIdle(t *testing.T, cond func() bool) {
	t.Helper()
	for range 1000 {
		if cond() {
			return
		}
		time.Sleep(time.Second)
	}
	t.Fatal("never")
}
