package nbd

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"testing"
)

// TestErrors is the table of what a request is answered with.
func TestErrors(t *testing.T) {
	const size = 1 << 20
	fua, nohole, fast := cmdFUA, cmdNoHole, cmdFastZero
	for _, c := range []struct {
		name     string
		r        request
		readOnly bool
		want     uint32
	}{
		{"read", request{cmd: cmdRead, length: 512}, false, 0},
		{"read of nothing", request{cmd: cmdRead}, false, 0},
		{"read of nothing at the end", request{cmd: cmdRead, offset: size}, false, 0},
		{"read with fua", request{cmd: cmdRead, length: 1, flags: fua}, false, 0},
		{"read past the end", request{cmd: cmdRead, offset: size - 511, length: 512}, false, errInval},
		{"read far past the end", request{cmd: cmdRead, offset: 1 << 63, length: 512}, false, errInval},
		{"read, overflow", request{cmd: cmdRead, offset: 1<<64 - 1, length: 2}, false, errInval},
		{"read too much", request{cmd: cmdRead, length: MaxPayload + 1}, false, errInval},
		{"read 4 GiB", request{cmd: cmdRead, length: 1<<32 - 1}, false, errInval},
		{"read with nohole", request{cmd: cmdRead, length: 512, flags: nohole}, false, errInval},
		{"write", request{cmd: cmdWrite, length: 512}, false, 0},
		{"write of nothing", request{cmd: cmdWrite}, false, 0},
		{"write fua", request{cmd: cmdWrite, length: 512, flags: fua}, false, 0},
		{"write past the end", request{cmd: cmdWrite, offset: size - 511, length: 512}, false, errNoSpace},
		{"write, overflow", request{cmd: cmdWrite, offset: 1<<64 - 1, length: 2}, false, errNoSpace},
		{"write too much", request{cmd: cmdWrite, length: MaxPayload + 1}, false, errInval},
		{"write with df", request{cmd: cmdWrite, length: 512, flags: cmdDF}, false, errInval},
		{"write, read-only", request{cmd: cmdWrite, length: 512}, true, errPerm},
		{"write past the end, read-only", request{cmd: cmdWrite, offset: size, length: 512}, true, errPerm},
		{"flush", request{cmd: cmdFlush}, false, 0},
		{"flush fua", request{cmd: cmdFlush, flags: fua}, false, 0},
		{"flush, read-only", request{cmd: cmdFlush}, true, 0},
		{"flush of a range", request{cmd: cmdFlush, length: 512}, false, errInval},
		{"flush at an offset", request{cmd: cmdFlush, offset: 512}, false, errInval},
		{"trim", request{cmd: cmdTrim, length: size}, false, 0},
		{"trim of nothing", request{cmd: cmdTrim}, false, 0},
		{"trim fua", request{cmd: cmdTrim, length: 512, flags: fua}, false, 0},
		{"trim past the end", request{cmd: cmdTrim, offset: 1, length: size}, false, errInval},
		{"trim 4 GiB", request{cmd: cmdTrim, length: 1<<32 - 1}, false, errInval},
		{"trim, read-only", request{cmd: cmdTrim, length: 512}, true, errPerm},
		{"zero", request{cmd: cmdZeroes, length: size}, false, 0},
		{"zero fua nohole", request{cmd: cmdZeroes, length: 512, flags: fua | nohole}, false, 0},
		{"zero fast", request{cmd: cmdZeroes, length: 512, flags: fast}, false, errNotSup},
		{"zero past the end", request{cmd: cmdZeroes, offset: 1, length: size}, false, errNoSpace},
		{"zero, read-only", request{cmd: cmdZeroes, length: 512}, true, errPerm},
		{"zero with df", request{cmd: cmdZeroes, length: 512, flags: cmdDF}, false, errInval},
		{"cache", request{cmd: cmdCache, length: 512}, false, errInval},
		{"resize", request{cmd: 8, length: 512}, false, errInval},
		{"unknown", request{cmd: 0xffff}, false, errInval},
		{"unknown flag", request{cmd: cmdRead, length: 512, flags: 1 << 15}, false, errInval},
	} {
		t.Run(c.name, func(t *testing.T) {
			eachMode(t, func(t *testing.T, structured, stall bool) {
				d := newRAM(t, size)
				d.stall.Store(stall)
				_, path := serve(t, Options{}, Export{Device: d, ReadOnly: c.readOnly})
				cl := attach(t, path, "", structured)
				var payload []byte
				if c.r.cmd == cmdWrite {
					payload = make([]byte, c.r.length)
				}
				got := cl.call(c.r, payload)
				if got.errno != c.want || !got.done {
					t.Fatalf("error %d %q, want %d", got.errno, got.text, c.want)
				}
				if structured && c.want != 0 && got.text == "" {
					t.Error("error without a text")
				}
				if calls := d.take(); c.want != 0 && len(calls) != 0 {
					t.Errorf("a refused request reached the device: %v", calls)
				}
				cl.ok(read(0, 4096)) // the stream is still in step
			})
		})
	}
}

func TestModeErrors(t *testing.T) {
	d := newRAM(t, 1<<20)
	_, path := serve(t, Options{}, Export{Name: "a", Device: d}, Export{Name: "fast", Device: d, FastZero: true},
		Export{Name: "blocks", Device: d, MinBlock: 512})
	simple := attach(t, path, "a", false)
	for name, r := range map[string]request{
		"df":           {cmd: cmdRead, length: 512, flags: cmdDF},
		"block status": {cmd: cmdBlockStatus, length: 512},
	} {
		if got := simple.call(r, nil); got.errno != errInval {
			t.Errorf("%s without structured replies: %d", name, got.errno)
		}
	}
	a := attach(t, path, "a", true)
	for name, r := range map[string]request{
		"nothing":      {cmd: cmdBlockStatus},
		"past the end": {cmd: cmdBlockStatus, offset: 1 << 20, length: 1},
		"nohole":       {cmd: cmdBlockStatus, length: 1, flags: cmdNoHole},
	} {
		if got := a.call(r, nil); got.errno != errInval {
			t.Errorf("block status %s: %d", name, got.errno)
		}
	}
	attach(t, path, "fast", true).ok(request{cmd: cmdZeroes, length: 512, flags: cmdFastZero}, nil)
	blocks := dial(t, path)
	blocks.want(blocks.option(optGo, infoData("blocks", infoBlockSize)), repInfo, repInfo, repAck)
	blocks.ok(read(512, 1024))
	for _, r := range []request{{cmd: cmdRead, offset: 1, length: 512}, {cmd: cmdTrim, length: 513}} {
		if got := blocks.call(r, nil); got.errno != errInval {
			t.Errorf("%+v: %d", r, got.errno)
		}
	}
}

func TestErrno(t *testing.T) {
	for _, c := range []struct {
		err  error
		want uint32
	}{
		{errors.New("whatever"), errIO},
		{syscall.EIO, errIO},
		{fmt.Errorf("pwrite: %w", syscall.ENOSPC), errNoSpace},
		{syscall.EDQUOT, errNoSpace},
		{syscall.EFBIG, errNoSpace},
		{syscall.EROFS, errPerm},
		{syscall.EACCES, errPerm},
		{syscall.EPERM, errPerm},
		{syscall.ENOMEM, errNoMem},
		{syscall.EINVAL, errInval},
		{syscall.EOVERFLOW, errOverflow},
		{syscall.EOPNOTSUPP, errNotSup},
		{syscall.ESHUTDOWN, errIO},
		{syscall.EBADF, errIO},
		{refuse(errPerm, "no"), errPerm},
		{fmt.Errorf("x: %w", refuse(errNotSup, "no")), errNotSup},
	} {
		if got := errnoOf(c.err); got != c.want {
			t.Errorf("%v: %d, want %d", c.err, got, c.want)
		}
	}
}

// TestDeviceErrors: every kind of request passes the device's error on.
func TestDeviceErrors(t *testing.T) {
	for _, c := range []struct {
		err  error
		want uint32
	}{
		{fmt.Errorf("pwrite: %w", syscall.ENOSPC), errNoSpace},
		{fmt.Errorf("%s\xff", strings.Repeat("é", 500)), errIO},
	} {
		eachMode(t, func(t *testing.T, structured, stall bool) {
			d := newRAM(t, 4<<20)
			d.stall.Store(stall)
			d.hook = func(string, int64, int64) error { return c.err }
			_, path := serve(t, Options{}, Export{Device: d})
			cl := attach(t, path, "", structured)
			for _, r := range []request{
				{cmd: cmdRead, length: 512}, {cmd: cmdRead, length: 1 << 20}, {cmd: cmdRead, length: 1 << 20, flags: cmdDF},
				{cmd: cmdWrite, length: 512}, {cmd: cmdWrite, length: 1, flags: cmdFUA}, {cmd: cmdWrite, length: 2 << 20},
				{cmd: cmdWrite, length: 2 << 20, flags: cmdFUA}, {cmd: cmdFlush}, {cmd: cmdTrim, length: 1}, {cmd: cmdTrim, length: 4 << 20},
				{cmd: cmdZeroes, length: 4 << 20, flags: cmdFUA}, {cmd: cmdBlockStatus, length: 4 << 20}, {cmd: cmdBlockStatus, length: 512},
			} {
				if !structured && (r.df() || r.cmd == cmdBlockStatus) {
					continue
				}
				got := cl.call(r, payloadFor(r))
				if got.errno != c.want || len(got.text) > maxErrorText || strings.ToValidUTF8(got.text, "") != got.text {
					t.Fatalf("%+v: error %d %q, want %d", r, got.errno, got.text, c.want)
				}
			}
		})
	}
}
