package epoch

import (
	"encoding/binary"
	"fmt"
)

// Reason says why an epoch was closed.
type Reason uint8

// Reasons of closing an epoch.
const (
	ByFlush  Reason = 1 // FLUSH or FUA
	BySize   Reason = 2 // nobody flushed: size limit
	ByTime   Reason = 3 // nobody flushed: age limit
	ByResync Reason = 4 // end of a first sync or resync
	ByStop   Reason = 5 // clean shutdown, detach
)

// CloseInfo is the payload of a Close record, 32 bytes:
//
//	 0  i64 close time at the source, ns since 1970
//	 8  u8  reason
//	 9  7 B zero
//	16  u64 first LSN of the epoch
//	24  u64 bytes of payload in the epoch
type CloseInfo struct {
	TimeNs int64
	Reason Reason
	First  LSN
	Bytes  uint64
}

// Encode makes the payload.
func (c CloseInfo) Encode() []byte {
	b := make([]byte, 32)
	binary.LittleEndian.PutUint64(b, uint64(c.TimeNs))
	b[8] = byte(c.Reason)
	binary.LittleEndian.PutUint64(b[16:], uint64(c.First))
	binary.LittleEndian.PutUint64(b[24:], c.Bytes)
	return b
}

// DecodeClose reads the payload of a Close record.
func DecodeClose(b []byte) (CloseInfo, error) {
	if len(b) != 32 {
		return CloseInfo{}, fmt.Errorf("%w: close marker of %d bytes", ErrCorrupt, len(b))
	}
	return CloseInfo{
		TimeNs: int64(binary.LittleEndian.Uint64(b)), Reason: Reason(b[8]),
		First: LSN(binary.LittleEndian.Uint64(b[16:])), Bytes: binary.LittleEndian.Uint64(b[24:]),
	}, nil
}
