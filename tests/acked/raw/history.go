package raw

import (
	"encoding/json"
	"fmt"
	"io"
	"sync"

	"kagami/tests/acked/stamp"
)

// Kind is what an operation does.
type Kind uint8

// The operations of a history.
const (
	Write Kind = 1
	Zero  Kind = 2
	Trim  Kind = 3
	Flush Kind = 4
)

func (k Kind) String() string {
	names := [...]string{Write: "write", Zero: "zero", Trim: "trim", Flush: "flush"}
	if int(k) < len(names) && names[k] != "" {
		return names[k]
	}
	return fmt.Sprintf("kind%d", uint8(k))
}

// Op is one request. Issue and Done are times of the history's own clock,
// which counts events: Issue was read before the request was sent, Done after
// its reply came; Done is 0 while (or because) none did.
type Op struct {
	Seq    uint64 `json:"seq"` // 1, 2, … in the order of Issue
	Kind   Kind   `json:"kind"`
	Disk   int    `json:"disk"`
	Off    int64  `json:"off"` // bytes, a multiple of stamp.Size
	Len    int64  `json:"len"`
	FUA    bool   `json:"fua,omitempty"`
	Issue  int64  `json:"issue"`
	Done   int64  `json:"done,omitempty"`
	Failed bool   `json:"failed,omitempty"` // no promise was made: an error reply, or none before Settle

	Refused bool `json:"refused,omitempty"` // an error reply: part of it may have taken effect
}

// Disk is the part of one disk that a history is about. It must be zeros when
// the history begins, and nothing else may write there.
type Disk struct {
	Off int64 `json:"off"` // bytes, multiples of stamp.Size
	Len int64 `json:"len"`
}

// History records what was asked of one or several disks of a group, and what
// was promised. It is safe for concurrent use.
type History struct {
	mu   sync.Mutex
	data historyData
}

type historyData struct {
	Seed  uint64 `json:"seed"`
	Disks []Disk `json:"disks"`
	Clock int64  `json:"clock"`
	// Losses are the times of PowerLoss.
	Losses []int64 `json:"losses,omitempty"`
	Ops    []Op    `json:"ops"`
}

// NewHistory begins a history. The seed tells the stamps of different runs apart.
func NewHistory(seed uint64, disks ...Disk) *History {
	for i, d := range disks {
		if d.Off < 0 || d.Len <= 0 || d.Off%stamp.Size != 0 || d.Len%stamp.Size != 0 {
			panic(fmt.Sprintf("raw: disk %d is not made of sectors: %+v", i, d))
		}
	}
	return &History{data: historyData{Seed: seed, Disks: disks}}
}

// Begin records that a request is about to be sent and returns its number.
// For a write, Fill gives the bytes to send.
func (h *History) Begin(op Op) uint64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.data.Clock++
	op.Seq, op.Issue, op.Done, op.Failed, op.Refused = uint64(len(h.data.Ops))+1, h.data.Clock, 0, false, false
	h.data.Ops = append(h.data.Ops, op)
	return op.Seq
}

// Fill makes the content of write seq.
func (h *History) Fill(p []byte, seq uint64, disk int, off int64) {
	stamp.Fill(p, stamp.Stamp{Seed: h.data.Seed, Seq: seq, Place: uint32(disk), Offset: off})
}

// End records the reply of request seq: err is nil, or the server's error.
// A request that never got a reply has no End.
func (h *History) End(seq uint64, err error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.data.Clock++
	op := &h.data.Ops[seq-1]
	op.Done, op.Failed, op.Refused = h.data.Clock, err != nil, err != nil
}

// Settle says that requests without a reply can no longer take effect: the
// server's process is dead.
func (h *History) Settle() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settle()
}

func (h *History) settle() {
	h.data.Clock++
	for i := range h.data.Ops {
		if op := &h.data.Ops[i]; op.Done == 0 {
			op.Done, op.Failed = h.data.Clock, true
		}
	}
}

// PowerLoss is Settle, and also says that what was answered but not covered by
// a flush may be gone: later flushes do not cover it. After a crash that a
// client must not notice (a daemon restart under a running VM) call Settle.
func (h *History) PowerLoss() {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.settle()
	h.data.Losses = append(h.data.Losses, h.data.Clock)
}

// Ops is a copy of the operations so far.
func (h *History) Ops() []Op {
	h.mu.Lock()
	defer h.mu.Unlock()
	return append([]Op(nil), h.data.Ops...)
}

func (h *History) snapshot() historyData {
	h.mu.Lock()
	defer h.mu.Unlock()
	d := h.data
	d.Ops = append([]Op(nil), d.Ops...)
	d.Losses = append([]int64(nil), d.Losses...)
	return d
}

// Save writes the history as JSON, for the post-mortem of a failed run.
func (h *History) Save(w io.Writer) error {
	if err := json.NewEncoder(w).Encode(h.snapshot()); err != nil {
		return fmt.Errorf("save the history: %w", err)
	}
	return nil
}

// LoadHistory reads what Save wrote.
func LoadHistory(r io.Reader) (*History, error) {
	h := new(History)
	if err := json.NewDecoder(r).Decode(&h.data); err != nil {
		return nil, fmt.Errorf("load a history: %w", err)
	}
	for i, op := range h.data.Ops {
		if op.Seq != uint64(i)+1 || op.Disk < 0 || op.Disk >= len(h.data.Disks) || op.Off < 0 || op.Len < 0 {
			return nil, fmt.Errorf("load a history: operation %d is malformed", i+1)
		}
	}
	return h, nil
}
