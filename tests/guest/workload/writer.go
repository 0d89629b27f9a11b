package workload

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// Options say what to write.
type Options struct {
	Dir   string
	Seed  uint64
	Slots int           // blocks of blocks.dat, 1 to 65536; 256 when 0
	Every time.Duration // pause between the records of one file
	Count uint64        // records per file after which it is done; 0: until Stop
	Files []File        // both when empty
}

// Event is one acknowledged record, or the error that ended a file's writer.
type Event struct {
	File   File
	Number uint64
	Err    error
}

// Line is the event as it is printed on the guest's console.
func (e Event) Line() string {
	if e.Err != nil {
		return fmt.Sprintf("ERR %c %d %v\n", e.File, e.Number, e.Err)
	}
	return fmt.Sprintf("ACK %c %d\n", e.File, e.Number)
}

// Writer writes until it is stopped, is done or fails.
type Writer struct {
	stop chan struct{}
	once sync.Once
	wg   sync.WaitGroup

	mu   sync.Mutex
	last map[File]uint64
	err  error
}

// Start goes on after what the files hold already. emit is called for one event at
// a time, an acknowledgement only after the record's sync returned.
func Start(o Options, emit func(Event)) (*Writer, error) {
	if o.Slots == 0 {
		o.Slots = 256
	}
	if o.Slots < 1 || o.Slots > maxSlots {
		return nil, fmt.Errorf("slots %d: allowed are 1 to %d", o.Slots, maxSlots)
	}
	if len(o.Files) == 0 {
		o.Files = []File{Append, Blocks}
	}
	w := &Writer{stop: make(chan struct{}), last: map[File]uint64{}}
	found, err := Check(o.Dir, o.Seed)
	if err != nil {
		return nil, err
	}
	for _, f := range o.Files {
		put, highest, err := open(f, o, found)
		if err != nil {
			w.Stop()
			return nil, err
		}
		w.wg.Add(1)
		go w.run(f, o, put, highest, emit)
	}
	return w, nil
}

// putter writes one record durably and closes its file.
type putter struct {
	file *os.File
	put  func(n uint64) error
}

func open(f File, o Options, found Report) (putter, uint64, error) {
	r := found.of(f)
	if len(r.Damage) > 0 {
		return putter{}, 0, fmt.Errorf("%s is damaged: %s", name(f), r.Damage[0])
	}
	if f == Append {
		p, err := openAppend(o, r)
		return p, r.Highest, err
	}
	p, err := openBlocks(o, r)
	return p, r.Highest, err
}

func openAppend(o Options, r Found) (putter, error) {
	h, err := os.OpenFile(filepath.Join(o.Dir, AppendName), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return putter{}, err
	}
	off := r.Bytes
	if err := h.Truncate(off); err != nil {
		return putter{}, errors.Join(err, h.Close())
	}
	return putter{file: h, put: func(n uint64) error {
		b := Record(Append, o.Seed, n)
		if _, err := h.WriteAt(b, off); err != nil {
			return err
		}
		off += int64(len(b))
		return h.Sync()
	}}, nil
}

func openBlocks(o Options, r Found) (putter, error) {
	h, err := os.OpenFile(filepath.Join(o.Dir, BlocksName), os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return putter{}, err
	}
	slots := int64(o.Slots)
	if r.Bytes > 0 {
		slots = r.Bytes / blockSize
	} else if err := prefill(h, slots); err != nil {
		return putter{}, errors.Join(err, h.Close())
	}
	return putter{file: h, put: func(n uint64) error {
		if _, err := h.WriteAt(Record(Blocks, o.Seed, n), int64(n%uint64(slots))*blockSize); err != nil {
			return err
		}
		if err := unix.Fdatasync(int(h.Fd())); err != nil {
			return &fs.PathError{Op: "fdatasync", Path: h.Name(), Err: err}
		}
		return nil
	}}, nil
}

// prefill writes zeros, so that later overwrites change no metadata.
func prefill(h *os.File, slots int64) error {
	if _, err := h.WriteAt(make([]byte, slots*blockSize), 0); err != nil {
		return err
	}
	return h.Sync()
}

func (w *Writer) run(f File, o Options, p putter, n uint64, emit func(Event)) {
	defer w.wg.Done()
	defer p.file.Close()
	for done := uint64(0); o.Count == 0 || done < o.Count; done++ {
		select {
		case <-w.stop:
			return
		case <-time.After(o.Every):
		}
		n++
		e := Event{File: f, Number: n, Err: p.put(n)}
		w.note(e, emit)
		if e.Err != nil {
			return
		}
	}
}

func (w *Writer) note(e Event, emit func(Event)) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if e.Err == nil {
		w.last[e.File] = e.Number
	} else if w.err == nil {
		w.err = fmt.Errorf("record %c %d: %w", e.File, e.Number, e.Err)
	}
	emit(e)
}

// Progress is the highest acknowledged number of each file and the first error.
func (w *Writer) Progress() (appended, blocks uint64, err error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.last[Append], w.last[Blocks], w.err
}

// Wait returns when all files' writers ended.
func (w *Writer) Wait() { w.wg.Wait() }

// Stop ends the writers after the record each is at and waits for them.
func (w *Writer) Stop() {
	w.once.Do(func() { close(w.stop) })
	w.wg.Wait()
}
