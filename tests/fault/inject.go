package fault

import (
	"path"
)

// Op names a kind of step.
type Op string

// The kinds of steps.
const (
	OpCreate   Op = "create"
	OpRename   Op = "rename"
	OpRemove   Op = "remove"
	OpMkdir    Op = "mkdir"
	OpSyncDir  Op = "syncdir"
	OpWrite    Op = "write"
	OpSync     Op = "datasync"
	OpTruncate Op = "truncate"
	OpPunch    Op = "punch"
	OpZero     Op = "zero"
	OpAllocate Op = "allocate"
	OpXattr    Op = "setxattr"
	OpRead     Op = "read" // no step: for Inject and hooks only
)

// Fault makes one operation fail.
type Fault struct {
	Op   Op     // "" is any step
	Name string // pattern of path.Match for the base name; "" is any
	Nth  int    // the Nth match from now on; 0 and 1 are the next
	Err  error  // what it returns
	// Short lets a write do a random part of its work first. A datasync that
	// fails drops a random part of what was pending in any case.
	Short bool
	// Sticky repeats the failure at every later match.
	Sticky bool
}

// Inject adds a fault.
func (f *FS) Inject(x Fault) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.faults = append(f.faults, &x)
}

// Forgive takes back every fault whose turn has not come.
func (f *FS) Forgive() {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.faults = nil
}

// SetHook calls h before every step and read, without any lock held, in the
// goroutine of the operation. An error it returns becomes the operation's,
// which then has no effect. nil takes the hook away.
func (f *FS) SetHook(h func(op Op, name string) error) {
	if h == nil {
		f.hook.Store(nil)
		return
	}
	f.hook.Store(&h)
}

// StopAfter makes the n-th step from now (1 is the next) and everything after
// it fail with ErrStopped. Whether the n-th step has an effect is random.
func (f *FS) StopAfter(n int64) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.stopAt = f.steps + n
}

// Steps is the number of steps so far.
func (f *FS) Steps() int64 {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.steps
}

// Stopped reports that the machine has stopped.
func (f *FS) Stopped() bool {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.stopped
}

// SetCapacity bounds the space of all files, in bytes; 0 is no bound.
func (f *FS) SetCapacity(n int64) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.capacity = n
}

// SetClock sets the clock of modification times, ns since 1970. The default
// counts a millisecond per change.
func (f *FS) SetClock(now func() int64) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	f.d.clock = now
}

// FlipBit flips a random bit of a file within [off, off+n), on the disk and in
// the page cache, and returns its byte's offset.
func (f *FS) FlipBit(name string, off, n int64) (int64, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	i, err := f.d.lookup(path.Clean(name))
	if err != nil {
		return 0, pathError("flip", name, err)
	}
	at, bit := off+f.d.rng.Int64N(n), byte(1)<<f.d.rng.IntN(8)
	for _, c := range []*content{i.cur, i.durable} {
		var b [1]byte
		c.read(b[:], at)
		b[0] ^= bit
		size := c.size
		c.write(b[:], at, 1)
		c.size = size
	}
	return at, nil
}

// WriteFile puts a durable file in place, whatever was there. It is no step.
func (f *FS) WriteFile(name string, data []byte) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	name = path.Clean(name)
	f.d.syncDir(path.Dir(name))
	i := newInode()
	i.change(writeChange(data, 0))
	i.sync()
	i.mtime = f.d.now()
	i.durableMtime = i.mtime
	f.d.names[name], f.d.durable[name] = i, i
}

// ReadFile returns what reads of the file see. It is no step.
func (f *FS) ReadFile(name string) ([]byte, error) {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	i, err := f.d.lookup(path.Clean(name))
	if err != nil {
		return nil, pathError("read", name, err)
	}
	b := make([]byte, i.cur.size)
	i.cur.read(b, 0)
	return b, nil
}

// match finds the fault for an operation, if its turn has come.
func (f *FS) match(op Op, name string) *Fault {
	for k, x := range f.faults {
		if x.Op != op && (x.Op != "" || op == OpRead) {
			continue
		}
		if ok, err := path.Match(x.Name, path.Base(name)); x.Name != "" && (err != nil || !ok) {
			continue
		}
		if x.Nth--; x.Nth > 0 {
			continue
		}
		if !x.Sticky {
			f.faults = append(f.faults[:k:k], f.faults[k+1:]...)
		}
		return x
	}
	return nil
}

// verdict is what becomes of a step.
type verdict struct {
	err   error // what it returns; nil: it is done as asked
	apply bool  // it has its whole effect even though it fails
	part  bool  // a write has a part of its effect
}

// begin decides about a step. The caller holds disk.mu.
func (f *FS) begin(op Op, name string) verdict {
	if f.stopped {
		return verdict{err: ErrStopped}
	}
	f.steps++
	if f.stopAt != 0 && f.steps >= f.stopAt {
		f.stopped = true
		r := f.d.rng.IntN(3)
		return verdict{err: ErrStopped, apply: r == 0, part: r == 1}
	}
	if x := f.match(op, name); x != nil {
		f.fired++
		return verdict{err: x.Err, part: x.Short}
	}
	return verdict{}
}

// Fired counts the injected faults that have come true since the last start.
func (f *FS) Fired() int {
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	return f.fired
}

// do runs a step that either happens or does not.
func (f *FS) do(op Op, name string, step func() error) error {
	if h := f.hook.Load(); h != nil {
		if err := (*h)(op, name); err != nil {
			return pathError(string(op), name, err)
		}
	}
	f.d.mu.Lock()
	defer f.d.mu.Unlock()
	v := f.begin(op, name)
	if v.err != nil && !v.apply {
		return pathError(string(op), name, v.err)
	}
	if err := step(); err != nil && v.err == nil {
		return pathError(string(op), name, err)
	}
	return pathError(string(op), name, v.err)
}
