package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// MaxPayload is the most a read or write may carry, bytes. It is announced as
// the maximum block size.
const MaxPayload = 32 << 20

// Bounds of an Export's texts, bytes.
const (
	MaxExportName        = 255
	MaxExportDescription = 1024
)

// Export is a device under a name.
type Export struct {
	Name        string // UTF-8, at most MaxExportName bytes
	Description string // for people, at most MaxExportDescription bytes
	Device      Device
	ReadOnly    bool
	// FastZero says that Device.WriteZeroes never takes longer than writing
	// zeros would, and mostly is much faster.
	FastZero bool
	// MinBlock is the unit of offsets and lengths, a power of two up to 64 KiB;
	// 0 means 1, any byte.
	MinBlock uint32
	// PreferredBlock is what clients should align to, a power of two from 512 to
	// 32 MiB, at least MinBlock; 0 means 4096.
	PreferredBlock uint32
}

var errBadExport = errors.New("impossible export")

// normalized fills in the defaults and checks.
func (e Export) normalized() (Export, error) {
	if e.MinBlock == 0 {
		e.MinBlock = 1
	}
	if e.PreferredBlock == 0 {
		e.PreferredBlock = max(4096, e.MinBlock)
	}
	bad := func(what string, v any) (Export, error) {
		return e, fmt.Errorf("%w %q: %s %v", errBadExport, e.Name, what, v)
	}
	switch {
	case len(e.Name) > MaxExportName || !utf8.ValidString(e.Name):
		return bad("name of bytes", len(e.Name))
	case len(e.Description) > MaxExportDescription || !utf8.ValidString(e.Description):
		return bad("description of bytes", len(e.Description))
	case e.Device == nil:
		return bad("device", nil)
	case !powerOfTwo(e.MinBlock) || e.MinBlock > 64<<10:
		return bad("smallest block", e.MinBlock)
	case !powerOfTwo(e.PreferredBlock) || e.PreferredBlock < max(512, e.MinBlock) || e.PreferredBlock > MaxPayload:
		return bad("preferred block", e.PreferredBlock)
	}
	return e, nil
}

func powerOfTwo(n uint32) bool { return n != 0 && n&(n-1) == 0 }

// flags are the transmission flags. Nothing is announced that is not true.
func (e Export) flags(structured bool) uint16 {
	// Flush and FUA of a Device cover all connections.
	f := txHasFlags | txSendFlush | txMultiConn
	if structured {
		f |= txSendDF
	}
	if e.ReadOnly {
		return f | txReadOnly
	}
	f |= txSendFUA | txSendTrim | txSendZeroes
	if e.FastZero {
		f |= txSendFastZero
	}
	return f
}

// appendInfo appends the payload of one NBD_REP_INFO; false when there is
// nothing to say.
func (e Export) appendInfo(b []byte, kind uint16, size int64, structured bool) ([]byte, bool) {
	be := binary.BigEndian
	b = be.AppendUint16(b, kind)
	switch kind {
	case infoExport:
		b = be.AppendUint64(b, uint64(size))
		return be.AppendUint16(b, e.flags(structured)), true
	case infoName:
		return append(b, e.Name...), true
	case infoDescription:
		return append(b, e.Description...), e.Description != ""
	case infoBlockSize:
		b = be.AppendUint32(b, e.MinBlock)
		b = be.AppendUint32(b, e.PreferredBlock)
		return be.AppendUint32(b, MaxPayload), true
	}
	return b, false
}

// export is a registered Export and its clients.
type export struct {
	Export
	removed bool           // guarded by Server.mu
	conns   map[*conn]bool // guarded by Server.mu; those that entered and have not ended
}
