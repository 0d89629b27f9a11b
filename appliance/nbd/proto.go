package nbd

import (
	"encoding/binary"
	"fmt"
)

// Numbers of the protocol, all big-endian on the wire (doc/proto.md, "Values").
const (
	greetingMagic   uint64 = 0x4e42444d41474943 // "NBDMAGIC"
	optionMagic     uint64 = 0x49484156454f5054 // "IHAVEOPT"
	optReplyMagic   uint64 = 0x0003e889045565a9
	requestMagic    uint32 = 0x25609513
	simpleMagic     uint32 = 0x67446698
	structuredMagic uint32 = 0x668e33ef
)

// Handshake flags, the same bits in both directions.
const (
	flagFixedNewstyle = 1 << 0
	flagNoZeroes      = 1 << 1
)

type option uint32

// Options.
const (
	optExportName     option = 1
	optAbort          option = 2
	optList           option = 3
	optStartTLS       option = 5
	optInfo           option = 6
	optGo             option = 7
	optStructured     option = 8
	optListMeta       option = 9
	optSetMeta        option = 10
	optExtendedHeader option = 11
)

type optReply uint32

// Replies to options; those with the top bit are errors.
const (
	repAck    optReply = 1
	repServer optReply = 2
	repInfo   optReply = 3
	repMeta   optReply = 4

	repErrUnsup     optReply = 1<<31 + 1
	repErrPolicy    optReply = 1<<31 + 2
	repErrInvalid   optReply = 1<<31 + 3
	repErrUnknown   optReply = 1<<31 + 6
	repErrBlockSize optReply = 1<<31 + 8
	repErrTooBig    optReply = 1<<31 + 9
)

// Kinds of NBD_REP_INFO.
const (
	infoExport      uint16 = 0
	infoName        uint16 = 1
	infoDescription uint16 = 2
	infoBlockSize   uint16 = 3
)

// Transmission flags.
const (
	txHasFlags     uint16 = 1 << 0
	txReadOnly     uint16 = 1 << 1
	txSendFlush    uint16 = 1 << 2
	txSendFUA      uint16 = 1 << 3
	txSendTrim     uint16 = 1 << 5
	txSendZeroes   uint16 = 1 << 6
	txSendDF       uint16 = 1 << 7
	txMultiConn    uint16 = 1 << 8
	txSendFastZero uint16 = 1 << 11
)

type command uint16

// Commands.
const (
	cmdRead        command = 0
	cmdWrite       command = 1
	cmdDisc        command = 2
	cmdFlush       command = 3
	cmdTrim        command = 4
	cmdCache       command = 5
	cmdZeroes      command = 6
	cmdBlockStatus command = 7
)

var commandNames = map[command]string{cmdRead: "read", cmdWrite: "write", cmdDisc: "disconnect", cmdFlush: "flush",
	cmdTrim: "trim", cmdCache: "cache", cmdZeroes: "write-zeroes", cmdBlockStatus: "block-status"}

func (c command) String() string {
	if s, ok := commandNames[c]; ok {
		return s
	}
	return fmt.Sprintf("command %d", uint16(c))
}

// Command flags.
const (
	cmdFUA      uint16 = 1 << 0
	cmdNoHole   uint16 = 1 << 1
	cmdDF       uint16 = 1 << 2
	cmdReqOne   uint16 = 1 << 3
	cmdFastZero uint16 = 1 << 4
)

// allowedFlags says which flags a command may carry. FUA is allowed on all of
// them and means nothing where nothing is written.
var allowedFlags = map[command]uint16{
	cmdRead: cmdFUA | cmdDF, cmdWrite: cmdFUA, cmdFlush: cmdFUA, cmdTrim: cmdFUA,
	cmdZeroes: cmdFUA | cmdNoHole | cmdFastZero, cmdBlockStatus: cmdFUA | cmdReqOne,
}

// Chunk types and flags of structured replies.
const (
	chunkNone        uint16 = 0
	chunkData        uint16 = 1
	chunkBlockStatus uint16 = 5
	chunkError       uint16 = 1<<15 + 1

	chunkDone uint16 = 1 << 0
)

// States of base:allocation.
const (
	stateHole uint32 = 1 << 0
	stateZero uint32 = 1 << 1
)

// Errors a client knows. They are Linux's numbers, but only these are defined.
const (
	errPerm      uint32 = 1
	errIO        uint32 = 5
	errNoMem     uint32 = 12
	errInval     uint32 = 22
	errNoSpace   uint32 = 28
	errOverflow  uint32 = 75
	errNotSup    uint32 = 95
	errSuccess   uint32 = 0
	maxErrorText        = 256 // bytes of explanation sent with an error
)

// Sizes on the wire, bytes.
const (
	requestSize    = 28
	simpleSize     = 16
	chunkSize      = 20
	dataChunkSize  = chunkSize + 8 // with the offset that leads the data
	optHeaderSize  = 16
	optReplySize   = 20
	zeroesSize     = 124 // after the reply to EXPORT_NAME, unless NO_ZEROES
	maxNameSize    = 4096
	maxAnswerSize  = chunkSize + 6 + maxErrorText
	descriptorSize = 8
)

// request is one request header.
type request struct {
	flags  uint16
	cmd    command
	cookie uint64
	offset uint64
	length uint32
}

func (r request) fua() bool { return r.flags&cmdFUA != 0 }
func (r request) df() bool  { return r.flags&cmdDF != 0 }

// mutates says whether the request changes the device.
func (r request) mutates() bool { return r.cmd == cmdWrite || r.cmd == cmdTrim || r.cmd == cmdZeroes }

// decodeRequest reads a header of requestSize bytes. Only the magic can be
// wrong here; then the place in the stream is lost.
func decodeRequest(b []byte) (request, error) {
	be := binary.BigEndian
	if m := be.Uint32(b); m != requestMagic {
		return request{}, fmt.Errorf("request with magic %08x, want %08x", m, requestMagic)
	}
	return request{be.Uint16(b[4:]), command(be.Uint16(b[6:])), be.Uint64(b[8:]), be.Uint64(b[16:]), be.Uint32(b[24:])}, nil
}
