package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"unicode/utf8"
)

// Bounds of the haggling.
const (
	maxOptions     = 256     // options of one client
	maxOptionData  = 8 << 10 // bytes of one option that are looked at
	maxOptionDrain = 1 << 20 // bytes of one option that are read at all
)

// optRefusal is an error reply to an option; haggling goes on.
type optRefusal struct {
	code optReply
	text string
}

func (e *optRefusal) Error() string { return e.text }

func refuseOpt(code optReply, format string, args ...any) error {
	return &optRefusal{code, fmt.Sprintf(format, args...)}
}

var errMalformed = refuseOpt(repErrInvalid, "malformed option")

// optHeader is the header of an option.
type optHeader struct {
	opt    option
	length uint32
}

func decodeOptHeader(b []byte) (optHeader, error) {
	if m := binary.BigEndian.Uint64(b); m != optionMagic {
		return optHeader{}, fmt.Errorf("option with magic %016x, want %016x", m, optionMagic)
	}
	return optHeader{option(binary.BigEndian.Uint32(b[8:])), binary.BigEndian.Uint32(b[12:])}, nil
}

// fields cuts an option's data into fields. The first one that does not fit
// makes bad true, and all later ones zero.
type fields struct {
	b   []byte
	bad bool
}

func (f *fields) bytes(n uint32) []byte {
	if f.bad || uint64(n) > uint64(len(f.b)) {
		f.bad = true
		return nil
	}
	p := f.b[:n]
	f.b = f.b[n:]
	return p
}

func (f *fields) u16() uint16 {
	if p := f.bytes(2); p != nil {
		return binary.BigEndian.Uint16(p)
	}
	return 0
}

func (f *fields) u32() uint32 {
	if p := f.bytes(4); p != nil {
		return binary.BigEndian.Uint32(p)
	}
	return 0
}

// text is a string led by its length, as the protocol has them: UTF-8, at
// most maxNameSize bytes.
func (f *fields) text() string {
	n := f.u32()
	if n > maxNameSize {
		f.bad = true
	}
	s := string(f.bytes(n))
	if !utf8.ValidString(s) {
		f.bad = true
	}
	return s
}

// end says whether everything fitted and nothing is left over.
func (f *fields) end() error {
	if f.bad || len(f.b) != 0 {
		return errMalformed
	}
	return nil
}

// infoRequest is the data of INFO and GO.
type infoRequest struct {
	name  string
	kinds []uint16
}

func decodeInfo(data []byte) (infoRequest, error) {
	f := fields{b: data}
	r := infoRequest{name: f.text()}
	for n := f.u16(); n > 0 && !f.bad; n-- {
		r.kinds = append(r.kinds, f.u16())
	}
	return r, f.end()
}

func (r infoRequest) asks(kind uint16) bool {
	for _, k := range r.kinds {
		if k == kind {
			return true
		}
	}
	return false
}

func appendOptReply(b []byte, opt option, code optReply, data []byte) []byte {
	be := binary.BigEndian
	b = be.AppendUint64(b, optReplyMagic)
	b = be.AppendUint32(b, uint32(opt))
	b = be.AppendUint32(b, uint32(code))
	b = be.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

// appendRefusal appends the error reply to opt, and tells whether err has one.
func appendRefusal(b []byte, opt option, err error) ([]byte, bool) {
	var r *optRefusal
	if !errors.As(err, &r) {
		return b, false
	}
	return appendOptReply(b, opt, r.code, []byte(r.text)), true
}
