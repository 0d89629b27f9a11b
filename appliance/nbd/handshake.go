package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"time"
)

var errAborted = errors.New("client aborted the handshake")

// handshake runs the connection up to transmission (c.exp is set then) or to
// its orderly end (nil, c.exp is nil).
func (c *conn) handshake() error {
	if err := c.nc.SetDeadline(time.Now().Add(c.srv.opts.HandshakeTimeout)); err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	err := c.greet()
	for n := 0; err == nil && c.exp == nil; n++ {
		if n == maxOptions {
			return fmt.Errorf("handshake: more than %d options", maxOptions)
		}
		err = c.haggle()
	}
	if errors.Is(err, errAborted) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("handshake: %w", err)
	}
	c.in.large = true
	return c.nc.SetDeadline(time.Time{})
}

// greet exchanges the greetings. Clients that do not know fixed newstyle
// cannot be told errors and are refused.
func (c *conn) greet() error {
	b := binary.BigEndian.AppendUint64(nil, greetingMagic)
	b = binary.BigEndian.AppendUint64(b, optionMagic)
	b = binary.BigEndian.AppendUint16(b, flagFixedNewstyle|flagNoZeroes)
	if err := c.say(b); err != nil {
		return err
	}
	p, err := c.in.peek(4)
	if err != nil {
		return fmt.Errorf("read client flags: %w", noEOF(err))
	}
	flags := binary.BigEndian.Uint32(p)
	c.in.consume(4)
	if flags&^(flagFixedNewstyle|flagNoZeroes) != 0 || flags&flagFixedNewstyle == 0 {
		return fmt.Errorf("client flags %#x", flags)
	}
	c.noZeroes = flags&flagNoZeroes != 0
	return nil
}

func (c *conn) say(b []byte) error {
	if _, err := c.nc.Write(b); err != nil {
		return fmt.Errorf("send: %w", err)
	}
	return nil
}

// haggle reads one option and answers it.
func (c *conn) haggle() error {
	p, err := c.in.peek(optHeaderSize)
	if err != nil {
		return fmt.Errorf("read option: %w", noEOF(err))
	}
	h, err := decodeOptHeader(p)
	if err != nil {
		return err
	}
	c.in.consume(optHeaderSize)
	if h.length > maxOptionData {
		return c.refuseLarge(h)
	}
	data, err := c.in.peek(int(h.length))
	if err != nil {
		return fmt.Errorf("read data of option %d: %w", h.opt, noEOF(err))
	}
	c.in.consume(int(h.length)) // data stays valid until the next peek
	return c.answerOption(h.opt, data)
}

// answerOption sends the reply to an option. An error other than a refusal
// ends the connection; so does one of EXPORT_NAME, which has no error reply.
func (c *conn) answerOption(opt option, data []byte) error {
	reply, err := c.option(opt, data)
	if opt != optExportName {
		var refused bool
		if reply, refused = appendRefusal(reply, opt, err); refused {
			err = nil
		}
	}
	if len(reply) > 0 {
		if serr := c.say(reply); serr != nil {
			err = errors.Join(err, fmt.Errorf("answer option %d: %w", opt, serr))
		}
	}
	return err
}

// refuseLarge skips the data of an option that is larger than any we know.
func (c *conn) refuseLarge(h optHeader) error {
	if h.length > maxOptionDrain || h.opt == optExportName {
		return fmt.Errorf("option %d with %d bytes", h.opt, h.length)
	}
	if err := c.in.skip(int64(h.length)); err != nil {
		return fmt.Errorf("skip data of option %d: %w", h.opt, noEOF(err))
	}
	reply, _ := appendRefusal(nil, h.opt, refuseOpt(repErrTooBig, "%d bytes are too many", h.length))
	return c.say(reply)
}

// option makes the reply to one option. It is sent in any case, and the error
// reply behind it if err is an *optRefusal.
func (c *conn) option(opt option, data []byte) (reply []byte, err error) {
	switch opt {
	case optExportName:
		return c.optExportName(data)
	case optAbort:
		return appendOptReply(nil, opt, repAck, nil), errAborted
	case optList:
		return c.optList(data)
	case optInfo, optGo:
		return c.optInfo(opt, data)
	case optStructured:
		if len(data) != 0 {
			return nil, errMalformed
		}
		c.limits.structured = true
		return appendOptReply(nil, opt, repAck, nil), nil
	case optListMeta, optSetMeta:
		return c.optMeta(opt, data)
	}
	return nil, refuseOpt(repErrUnsup, "option %d is not supported", opt)
}

// optExportName enters transmission the old way: there is no error reply, the
// connection just ends.
func (c *conn) optExportName(data []byte) ([]byte, error) {
	exp, err := c.find(string(data))
	if err != nil {
		return nil, err
	}
	if err := c.enter(exp); err != nil {
		return nil, err
	}
	b := binary.BigEndian.AppendUint64(nil, uint64(c.limits.size))
	b = binary.BigEndian.AppendUint16(b, exp.flags(c.limits.structured))
	if !c.noZeroes {
		b = append(b, make([]byte, zeroesSize)...)
	}
	return b, nil
}

func (c *conn) optList(data []byte) (reply []byte, err error) {
	if len(data) != 0 {
		return nil, errMalformed
	}
	for _, e := range c.srv.exports() {
		d := binary.BigEndian.AppendUint32(nil, uint32(len(e.Name)))
		d = append(append(d, e.Name...), e.Description...)
		reply = appendOptReply(reply, optList, repServer, d)
	}
	return appendOptReply(reply, optList, repAck, nil), nil
}

// optInfo answers INFO and GO, which differ in what follows the last reply.
func (c *conn) optInfo(opt option, data []byte) ([]byte, error) {
	req, err := decodeInfo(data)
	if err != nil {
		return nil, err
	}
	exp, err := c.find(req.name)
	if err != nil {
		return nil, err
	}
	if exp.MinBlock > 1 && !req.asks(infoBlockSize) {
		return nil, refuseOpt(repErrBlockSize, "export %q has blocks of %d bytes", exp.Name, exp.MinBlock)
	}
	size := exp.Device.Size()
	if opt == optGo {
		if err := c.enter(exp); err != nil {
			return nil, err
		}
		size = c.limits.size
	}
	var reply, info []byte
	for _, kind := range []uint16{infoExport, infoName, infoDescription, infoBlockSize} {
		if kind != infoExport && !req.asks(kind) {
			continue
		}
		var some bool
		if info, some = exp.appendInfo(info[:0], kind, size, c.limits.structured); some {
			reply = appendOptReply(reply, opt, repInfo, info)
		}
	}
	return appendOptReply(reply, opt, repAck, nil), nil
}

// optMeta answers LIST_META_CONTEXT and SET_META_CONTEXT. Each SET replaces
// what was set before, also when it fails.
func (c *conn) optMeta(opt option, data []byte) (reply []byte, err error) {
	if opt == optSetMeta {
		c.metaFor = nil
	}
	if !c.limits.structured {
		return nil, refuseOpt(repErrInvalid, "structured replies were not negotiated")
	}
	req, err := decodeMeta(data)
	if err != nil {
		return nil, err
	}
	exp, err := c.find(req.name)
	if err != nil {
		return nil, err
	}
	if req.selects(opt) {
		reply = appendMetaContext(reply, opt)
		if opt == optSetMeta {
			c.metaFor = exp
		}
	}
	return appendOptReply(reply, opt, repAck, nil), nil
}

func (c *conn) find(name string) (*export, error) {
	if e := c.srv.find(name); e != nil {
		return e, nil
	}
	return nil, refuseOpt(repErrUnknown, "no export %.64q", name)
}

// enter makes the connection one of exp's clients.
func (c *conn) enter(exp *export) error {
	size := exp.Device.Size()
	if size < 0 {
		return fmt.Errorf("export %q has %d bytes", exp.Name, size)
	}
	if err := c.srv.enter(c, exp); err != nil {
		return err
	}
	c.exp = exp
	c.limits = limits{
		size: size, readOnly: exp.ReadOnly, minBlock: exp.MinBlock, fastZero: exp.FastZero,
		structured: c.limits.structured, allocation: c.metaFor == exp,
	}
	return nil
}

// noEOF is for places where the input must not end.
func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}
