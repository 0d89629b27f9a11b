package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"syscall"
)

// refusal is an answer that the protocol prescribes.
type refusal struct {
	errno uint32
	text  string
}

func (e *refusal) Error() string { return e.text }

func refuse(errno uint32, format string, args ...any) error {
	return &refusal{errno, fmt.Sprintf(format, args...)}
}

// errnoOf is the number sent for an error of a Device or a refusal.
func errnoOf(err error) uint32 {
	var r *refusal
	if errors.As(err, &r) {
		return r.errno
	}
	var e syscall.Errno
	if !errors.As(err, &e) {
		return errIO
	}
	switch e {
	case syscall.EPERM, syscall.EACCES, syscall.EROFS:
		return errPerm
	case syscall.ENOSPC, syscall.EDQUOT, syscall.EFBIG:
		return errNoSpace
	case syscall.ENOMEM, syscall.EINVAL, syscall.EOVERFLOW, syscall.ENOTSUP:
		return uint32(e)
	}
	return errIO // also ESHUTDOWN: see ErrGone
}

// errorText is what is sent to explain err. Replacing a run of invalid bytes
// by one never makes it longer.
func errorText(err error) string {
	s := err.Error()
	return strings.ToValidUTF8(s[:min(len(s), maxErrorText)], "?")
}

func appendSimple(b []byte, cookie uint64, errno uint32) []byte {
	b = binary.BigEndian.AppendUint32(b, simpleMagic)
	b = binary.BigEndian.AppendUint32(b, errno)
	return binary.BigEndian.AppendUint64(b, cookie)
}

func appendChunk(b []byte, flags, kind uint16, cookie uint64, length int) []byte {
	b = binary.BigEndian.AppendUint32(b, structuredMagic)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, kind)
	b = binary.BigEndian.AppendUint64(b, cookie)
	return binary.BigEndian.AppendUint32(b, uint32(length))
}

// appendAnswer appends the reply without data to r: success, or err, with its
// text where the client can take it. A read that succeeded is answered here
// only if it was empty.
func appendAnswer(b []byte, structured bool, r request, err error) []byte {
	switch {
	case err == nil && structured && r.cmd == cmdRead:
		return appendChunk(b, chunkDone, chunkNone, r.cookie, 0)
	case err == nil:
		return appendSimple(b, r.cookie, errSuccess)
	case !structured:
		return appendSimple(b, r.cookie, errnoOf(err))
	}
	text := errorText(err)
	b = appendChunk(b, chunkDone, chunkError, r.cookie, 6+len(text))
	b = binary.BigEndian.AppendUint32(b, errnoOf(err))
	b = binary.BigEndian.AppendUint16(b, uint16(len(text)))
	return append(b, text...)
}

// dataHead is the size of what leads the data of a read.
func dataHead(structured bool) int {
	if structured {
		return dataChunkSize
	}
	return simpleSize
}

// putDataHead fills head, of dataHead bytes, for n bytes of data read at off.
func putDataHead(head []byte, structured bool, r request, off int64, n int, last bool) {
	if !structured {
		appendSimple(head[:0], r.cookie, errSuccess)
		return
	}
	var flags uint16
	if last {
		flags = chunkDone
	}
	b := appendChunk(head[:0], flags, chunkData, r.cookie, n+8)
	binary.BigEndian.AppendUint64(b, uint64(off))
}
