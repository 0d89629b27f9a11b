package raw

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Numbers of the NBD protocol (proto.md of the reference implementation).
const (
	magicInit   = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption = 0x49484156454f5054 // "IHAVEOPT"
	magicReply  = 0x3e889045565a9
	magicReq    = 0x25609513
	magicSimple = 0x67446698

	serverFixed, serverNoZeroes = 1, 2

	optGo       = 7
	infoExport  = 0
	infoBlock   = 3
	repAck      = 1
	repInfo     = 3
	repErrorBit = 1 << 31

	cmdRead, cmdWrite, cmdDisc, cmdFlush, cmdTrim, cmdZeroes = 0, 1, 2, 3, 4, 6

	flagFUA, flagNoHole = 1 << 0, 1 << 1

	maxOptionReply = 64 << 10
)

// Transmission flags of an export.
const (
	FlagReadOnly  = 1 << 1
	FlagFlush     = 1 << 2
	FlagFUA       = 1 << 3
	FlagTrim      = 1 << 5
	FlagZeroes    = 1 << 6
	FlagMultiConn = 1 << 8
)

// Info is what the server said about its export.
type Info struct {
	Size     int64
	Flags    uint16
	MinBlock uint32 // 0 when the server did not say
	MaxBlock uint32
}

// Negotiate does fixed newstyle negotiation with NBD_OPT_GO on rw.
func Negotiate(rw io.ReadWriter, export string) (Info, error) {
	var greeting struct {
		Init, Option uint64
		Flags        uint16
	}
	if err := binary.Read(rw, binary.BigEndian, &greeting); err != nil {
		return Info{}, fmt.Errorf("read the greeting: %w", err)
	}
	if greeting.Init != magicInit || greeting.Option != magicOption || greeting.Flags&serverFixed == 0 {
		return Info{}, errors.New("the server does not speak fixed newstyle NBD")
	}
	be := binary.BigEndian
	out := be.AppendUint32(nil, uint32(greeting.Flags&(serverFixed|serverNoZeroes)))
	out = be.AppendUint64(out, magicOption)
	out = be.AppendUint32(out, optGo)
	out = be.AppendUint32(out, uint32(4+len(export)+2+2))
	out = be.AppendUint32(out, uint32(len(export)))
	out = append(out, export...)
	out = be.AppendUint16(out, 1)
	out = be.AppendUint16(out, infoBlock)
	if _, err := rw.Write(out); err != nil {
		return Info{}, fmt.Errorf("ask for export %q: %w", export, err)
	}
	return readGo(rw, export)
}

// readGo reads the replies to NBD_OPT_GO up to the one that ends it.
func readGo(r io.Reader, export string) (info Info, err error) {
	for seen := false; ; {
		var h struct {
			Magic             uint64
			Option, Type, Len uint32
		}
		if err := binary.Read(r, binary.BigEndian, &h); err != nil {
			return info, fmt.Errorf("read the answer for export %q: %w", export, err)
		}
		if h.Magic != magicReply || h.Option != optGo || h.Len > maxOptionReply {
			return info, fmt.Errorf("export %q: malformed answer (option %d, %d bytes)", export, h.Option, h.Len)
		}
		data := make([]byte, h.Len)
		if _, err := io.ReadFull(r, data); err != nil {
			return info, fmt.Errorf("read the answer for export %q: %w", export, err)
		}
		switch {
		case h.Type&repErrorBit != 0:
			return info, fmt.Errorf("export %q: refused with error %d: %s", export, h.Type&^repErrorBit, data)
		case h.Type == repInfo:
			seen = info.take(data) || seen
		case h.Type == repAck && seen:
			return info, nil
		default:
			return info, fmt.Errorf("export %q: unexpected answer of type %d", export, h.Type)
		}
	}
}

// take reads one NBD_REP_INFO; it reports whether it was the export's.
func (i *Info) take(b []byte) bool {
	be := binary.BigEndian
	switch {
	case len(b) == 12 && be.Uint16(b) == infoExport:
		i.Size, i.Flags = int64(be.Uint64(b[2:])), be.Uint16(b[10:])
		return i.Size >= 0
	case len(b) == 14 && be.Uint16(b) == infoBlock:
		i.MinBlock, i.MaxBlock = be.Uint32(b[2:]), be.Uint32(b[10:])
	}
	return false
}
