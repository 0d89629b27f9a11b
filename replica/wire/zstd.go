package wire

import (
	"fmt"

	"github.com/klauspost/compress/zstd"

	"kagami/ext4j/epoch"
)

// Codec compresses and inflates record payloads. It is safe for concurrent use.
type Codec struct {
	enc *zstd.Encoder
	dec *zstd.Decoder
}

// NewCodec makes a codec.
func NewCodec() (*Codec, error) {
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithEncoderConcurrency(2),
		zstd.WithEncoderCRC(false), zstd.WithWindowSize(epoch.MaxPayload))
	if err != nil {
		return nil, fmt.Errorf("set up compression: %w", err)
	}
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(4), zstd.WithDecoderMaxMemory(epoch.MaxPayload),
		zstd.WithDecoderMaxWindow(epoch.MaxPayload))
	if err != nil {
		return nil, fmt.Errorf("set up decompression: %w", err)
	}
	return &Codec{enc: enc, dec: dec}, nil
}

// worthwhile is the share (in 1/16) of a payload that must be saved for the
// compressed form to be kept.
const worthwhile = 2

// Deflate returns the form in which to store a payload: compressed when that
// saves at least 1/8, raw otherwise.
func (c *Codec) Deflate(raw []byte) (codec uint8, stored []byte) {
	if len(raw) < 512 {
		return epoch.CodecRaw, raw
	}
	z := c.enc.EncodeAll(raw, make([]byte, 0, len(raw)/2))
	if len(z)*16 > len(raw)*(16-worthwhile) {
		return epoch.CodecRaw, raw
	}
	return epoch.CodecZstd, z
}

// Inflate is an epoch.Inflate: it never makes more than rawLen bytes.
func (c *Codec) Inflate(codec uint8, stored []byte, rawLen int) ([]byte, error) {
	if codec != epoch.CodecZstd {
		return nil, fmt.Errorf("codec %d is not known to this release", codec)
	}
	if rawLen < 0 || rawLen > epoch.MaxPayload {
		return nil, fmt.Errorf("payload of %d bytes", rawLen)
	}
	p, err := c.dec.DecodeAll(stored, make([]byte, 0, rawLen))
	if err != nil {
		return nil, fmt.Errorf("inflate: %w", err)
	}
	return p, nil
}
