package fault

import (
	"io/fs"
	"math/rand/v2"
	"path"
	"sort"
	"sync"
	"syscall"
)

// inode is one file: what reads see, what is durable, and the changes between.
type inode struct {
	cur, durable *content
	pending      []change
	mtime        int64
	durableMtime int64
	locker       *File
}

func newInode() *inode { return &inode{cur: newContent(), durable: newContent()} }

// change makes a change visible and remembers that it is not durable.
func (i *inode) change(c change) {
	c.applyAll(i.cur)
	i.pending = append(i.pending, c)
}

// sync makes everything pending durable.
func (i *inode) sync() {
	loseNothing(nil, i.durable, i.pending)
	i.pending = nil
}

// lose makes a random part of the pending changes durable and forgets the rest.
func (i *inode) lose(rng *rand.Rand) {
	losses[rng.IntN(len(losses))](rng, i.durable, i.pending)
	i.pending = nil
}

type nameOp struct {
	from string // "" in a create
	to   string // "" in a remove
	ino  *inode // of a create
}

func (o nameOp) dirs() []string {
	var d []string
	for _, n := range []string{o.from, o.to} {
		if n != "" {
			d = append(d, path.Dir(n))
		}
	}
	return d
}

func (o nameOp) apply(names map[string]*inode) {
	ino := o.ino
	if o.from != "" {
		ino = names[o.from]
		delete(names, o.from)
	}
	if o.to != "" && ino != nil {
		names[o.to] = ino
	}
}

// disk is the machine's disk and page cache; the FS of each boot shares it.
type disk struct {
	mu       sync.Mutex
	rng      *rand.Rand
	boot     *FS // the only FS that may use the disk now
	dirs     map[string]bool
	names    map[string]*inode // what a lookup sees
	durable  map[string]*inode
	nameOps  []nameOp // not durable yet, in order
	capacity int64    // bytes, 0: no bound
	clock    func() int64
	ticks    int64
}

func newDisk(seed int64) *disk {
	return &disk{rng: rand.New(rand.NewPCG(uint64(seed), 0x6b6167616d69)), dirs: map[string]bool{"/": true, ".": true},
		names: map[string]*inode{}, durable: map[string]*inode{}}
}

// now is the time of a change: the clock a test gave, or a count of milliseconds.
func (d *disk) now() int64 {
	if d.clock != nil {
		return d.clock()
	}
	d.ticks++
	return 1_700_000_000_000_000_000 + d.ticks*1_000_000
}

// inodes lists the files that have a name or, when durable is set, had or could have one.
func (d *disk) inodes(durable bool) []*inode {
	seen := map[*inode]bool{}
	var all []*inode
	add := func(m map[string]*inode) {
		keys := make([]string, 0, len(m))
		for k := range m {
			keys = append(keys, k)
		}
		sort.Strings(keys)
		for _, k := range keys {
			if !seen[m[k]] {
				seen[m[k]] = true
				all = append(all, m[k])
			}
		}
	}
	add(d.names)
	if durable {
		add(d.durable)
		for _, o := range d.nameOps {
			if o.ino != nil && !seen[o.ino] {
				seen[o.ino] = true
				all = append(all, o.ino)
			}
		}
	}
	return all
}

// used is the space taken by files that have a name or are open, in bytes.
func (d *disk) used() int64 {
	var n int64
	seen := map[*inode]bool{}
	for _, i := range d.names {
		if !seen[i] {
			seen[i] = true
			n += i.cur.count * pageBytes
		}
	}
	if d.boot != nil {
		for i := range d.boot.open {
			if !seen[i] {
				seen[i] = true
				n += i.cur.count * pageBytes
			}
		}
	}
	return n
}

// room checks that the pages of [off, off+n) can be allocated.
func (d *disk) room(i *inode, off, n int64) error {
	if d.capacity == 0 {
		return nil
	}
	left := (d.capacity - d.used()) / pageBytes
	if i.cur.missing(off, n, left+1) > left {
		return syscall.ENOSPC
	}
	return nil
}

func (d *disk) nameOp(o nameOp) {
	o.apply(d.names)
	d.nameOps = append(d.nameOps, o)
}

func (d *disk) lookup(name string) (*inode, error) {
	if i := d.names[name]; i != nil {
		return i, nil
	}
	if d.dirs[name] {
		return nil, syscall.EISDIR
	}
	return nil, fs.ErrNotExist
}

// syncDir makes the names of dir durable, and what they depend on: the
// renames between dir and other folders, with all that came before them there.
func (d *disk) syncDir(dir string) {
	want := map[string]bool{dir: true}
	need := make([]bool, len(d.nameOps))
	for i := len(d.nameOps) - 1; i >= 0; i-- {
		for _, f := range d.nameOps[i].dirs() {
			need[i] = need[i] || want[f]
		}
		if need[i] {
			for _, f := range d.nameOps[i].dirs() {
				want[f] = true
			}
		}
	}
	var rest []nameOp
	for i, o := range d.nameOps {
		if need[i] {
			o.apply(d.durable)
		} else {
			rest = append(rest, o)
		}
	}
	d.nameOps = rest
}

// loseNames keeps a prefix of each folder's pending operations.
func (d *disk) loseNames() {
	stop := []float64{0, 1, 0.5, 0.2}[d.rng.IntN(4)]
	stopped := map[string]bool{}
	for _, o := range d.nameOps {
		lost := d.rng.Float64() < stop
		for _, f := range o.dirs() {
			lost = lost || stopped[f]
		}
		if !lost {
			o.apply(d.durable)
			continue
		}
		for _, f := range o.dirs() {
			stopped[f] = true
		}
	}
	d.nameOps = nil
}

// powerLoss leaves what a power loss leaves.
func (d *disk) powerLoss() {
	all := d.inodes(true)
	d.loseNames()
	for _, i := range all {
		if len(i.pending) > 0 || i.mtime != i.durableMtime {
			if d.rng.IntN(2) == 0 {
				i.durableMtime = i.mtime
			}
		}
		i.lose(d.rng)
		i.cur, i.mtime = i.durable.clone(), i.durableMtime
	}
	d.names = map[string]*inode{}
	for n, i := range d.durable {
		d.names[n] = i
	}
}
