package nbd

import (
	"encoding/binary"
	"strings"
)

// baseAllocation is the one metadata context there is. Its id is chosen by us.
const (
	baseAllocation   = "base:allocation"
	baseAllocationID = 1
)

// maxDescriptors bounds one reply to block status; a client asks on from where it ends.
const maxDescriptors = 4096

// metaRequest is the data of LIST_META_CONTEXT and SET_META_CONTEXT.
type metaRequest struct {
	name    string
	queries []string
}

func decodeMeta(data []byte) (metaRequest, error) {
	f := fields{b: data}
	r := metaRequest{name: f.text()}
	for n := f.u32(); n > 0 && !f.bad; n-- { // each takes 4 bytes of data at least
		r.queries = append(r.queries, f.text())
	}
	return r, f.end()
}

// selects says whether base:allocation is meant. A list without queries asks
// for all contexts, and one for "base:" for all of that name space; to set
// one it must be named.
func (r metaRequest) selects(opt option) bool {
	if opt == optListMeta && len(r.queries) == 0 {
		return true
	}
	for _, q := range r.queries {
		if q == baseAllocation || opt == optListMeta && strings.TrimSpace(q) == "base:" {
			return true
		}
	}
	return false
}

func appendMetaContext(b []byte, opt option) []byte {
	id := uint32(baseAllocationID)
	if opt == optListMeta { // ids exist once a context is set
		id = 0
	}
	data := binary.BigEndian.AppendUint32(nil, id)
	return appendOptReply(b, opt, repMeta, append(data, baseAllocation...))
}

// merge joins neighbours of the same kind, cuts the list at n bytes, and
// drops what a device must not return.
func merge(runs []Extent, n int64) []Extent {
	out := make([]Extent, 0, len(runs))
	for _, r := range runs {
		if r.Length <= 0 || n <= 0 {
			break
		}
		r.Length = min(r.Length, n)
		n -= r.Length
		if k := len(out); k > 0 && out[k-1].Hole == r.Hole && out[k-1].Zero == r.Zero {
			out[k-1].Length += r.Length
			continue
		}
		out = append(out, r)
	}
	return out
}

// appendBlockStatus appends the reply to r that describes runs, as merged. At
// least one is there.
func appendBlockStatus(b []byte, r request, runs []Extent) []byte {
	limit := maxDescriptors
	if r.flags&cmdReqOne != 0 {
		limit = 1
	}
	runs = runs[:min(len(runs), limit)]
	b = appendChunk(b, chunkDone, chunkBlockStatus, r.cookie, 4+len(runs)*descriptorSize)
	b = binary.BigEndian.AppendUint32(b, baseAllocationID)
	for _, x := range runs {
		b = binary.BigEndian.AppendUint32(b, uint32(x.Length))
		b = binary.BigEndian.AppendUint32(b, x.state())
	}
	return b
}

func (x Extent) state() (s uint32) {
	if x.Hole {
		s |= stateHole
	}
	if x.Zero {
		s |= stateZero
	}
	return s
}
