package rounds

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"
	"time"

	"kagami/tests/acked"
	"kagami/tests/acked/raw"
	"kagami/tests/e2e/stage"
)

// Raw is a load of raw requests on all disks of a group, and what was promised
// to it. Start and the functions that end it alternate.
type Raw struct {
	History *raw.History
	// Shape is the load on each disk; seed and disk are set by Start.
	Shape raw.Load

	r       *Rig
	group   Group
	seed    uint64
	life    uint64
	clients []*raw.Client
	wg      sync.WaitGroup
	mu      sync.Mutex
	errs    []error
}

// NewRaw prepares a load on a group of disks that hold zeros.
func (r *Rig) NewRaw(group string, seed uint64) *Raw {
	w := &Raw{r: r, seed: seed, group: Group{group, r.Disks(group)}, Shape: raw.Load{Workers: 4, Zeroes: 0.05, Trims: 0.05, FUA: 0.05}}
	var disks []raw.Disk
	for _, d := range w.group.Disks {
		disks = append(disks, raw.Disk{Len: d.Size})
	}
	w.History = raw.NewHistory(seed, disks...)
	return w
}

// Start connects to every disk at the main site and lets the load go, until
// ctx ends or a request fails.
func (w *Raw) Start(ctx context.Context) error {
	w.life++
	w.errs, w.clients = nil, nil
	for i, d := range w.group.Disks {
		c, err := Dial(ctx, w.r.Main, w.group.Name, d.Name)
		if err != nil {
			return err
		}
		w.clients = append(w.clients, c)
		l := w.Shape
		l.Disk, l.Seed = i, w.seed+w.life<<32+uint64(i)
		w.wg.Go(func() {
			err := l.Run(ctx, w.History, c)
			w.mu.Lock()
			w.errs = append(w.errs, err)
			w.mu.Unlock()
		})
	}
	return nil
}

// Dial connects to a disk's export. A daemon that has just been started may
// not have opened its sockets yet.
func Dial(ctx context.Context, site *stage.Site, group, disk string) (*raw.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		c, err := raw.Dial(ctx, "unix", site.Socket(group, disk), disk)
		if err == nil {
			return c, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("connect to disk %s of group %s at site %s: %w", disk, group, site.Name, err)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Crashed waits for the end of a load whose server was killed, and settles
// what was under way. Any error but a lost connection is returned.
func (w *Raw) Crashed() error {
	err := w.end((*raw.Client).Kill)
	w.History.Settle()
	return err
}

// Lost is Crashed for a server that also lost its host's memory.
func (w *Raw) Lost() error {
	err := w.end((*raw.Client).Kill)
	w.History.PowerLoss()
	return err
}

func (w *Raw) end(how func(*raw.Client)) error {
	for _, c := range w.clients {
		how(c)
	}
	w.wg.Wait()
	var errs []error
	for _, err := range w.errs {
		if err != nil && !onlyLost(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// onlyLost reports that every error joined in err is a lost connection.
func onlyLost(err error) bool {
	if j, ok := err.(interface{ Unwrap() []error }); ok {
		for _, e := range j.Unwrap() {
			if !onlyLost(e) {
				return false
			}
		}
		return true
	}
	return errors.Is(err, raw.ErrDisconnected)
}

// Answered is the number of requests answered so far.
func (w *Raw) Answered() int {
	n := 0
	for _, op := range w.History.Ops() {
		if op.Done != 0 {
			n++
		}
	}
	return n
}

// Check compares the disks, as the site's exports show them, with the history.
func (w *Raw) Check(ctx context.Context, site *stage.Site, o raw.Options) (raw.Report, error) {
	var images []io.ReaderAt
	for _, d := range w.group.Disks {
		c, err := Dial(ctx, site, w.group.Name, d.Name)
		if err != nil {
			return raw.Report{}, err
		}
		defer c.Kill()
		images = append(images, c)
	}
	rep, err := raw.Check(w.History, o, images...)
	if err != nil {
		return rep, err
	}
	if err := rep.Err(); err != nil {
		return rep, fmt.Errorf("group %s at site %s: %w", w.group.Name, site.Name, err)
	}
	return rep, nil
}

// Files is an acknowledged-record workload on an ext4 that lies on a disk of
// the main site, reached the way a VM reaches it: through a client that waits
// for a daemon that is away.
type Files struct {
	// Shape says how the file system is made and mounted, and where on the
	// disk it is; socket, export, bridge and mkfs are set by Start and Check.
	Shape acked.NBDOptions

	r      *Rig
	group  string
	disk   string
	seed   uint64
	life   uint64
	mount  *acked.Mount
	load   *acked.Workload
	ledger []*acked.Ledger
}

// NewFiles prepares a workload.
func (r *Rig) NewFiles(group, disk string, seed uint64) *Files {
	f := &Files{r: r, group: group, disk: disk, seed: seed}
	r.files = append(r.files, f)
	return f
}

// patience is how long a client waits for a daemon that is away.
const patience = 60 * time.Second

// Start mounts the disk, with mkfs after making an ext4 on it, and lets a new
// workload go, in a folder of its own.
func (f *Files) Start(ctx context.Context, mkfs bool) error {
	c, err := Dial(ctx, f.r.Main, f.group, f.disk) // QEMU tries once
	if err != nil {
		return err
	}
	c.Kill()
	o := f.Shape
	o.Socket, o.Export, o.Bridge, o.Reconnect, o.Mkfs = f.r.Main.Socket(f.group, f.disk), f.disk, acked.StorageDaemon, patience, mkfs
	m, err := acked.MountNBD(ctx, o)
	if err != nil {
		return err
	}
	f.mount = m
	context.AfterFunc(ctx, m.Kill) // what waits for a daemon that does not answer ends too
	return f.begin()
}

func (f *Files) begin() error {
	f.life++
	l, err := acked.NewLedger(acked.Config{Seed: f.seed + f.life}, "")
	if err != nil {
		return err
	}
	f.load = nil
	load, err := acked.Start(f.dir(f.mount, f.life), l)
	if err != nil {
		return err
	}
	f.load = load
	f.ledger = append(f.ledger, l)
	return nil
}

func (f *Files) dir(m *acked.Mount, life uint64) string { return fmt.Sprintf("%s/life%d", m.Dir, life) }

// Acked is the number of operations acknowledged so far.
func (f *Files) Acked() int {
	n := 0
	for _, l := range f.ledger {
		n += l.Acked()
	}
	return n
}

// AwaitProgress waits until the workload got on by some operations.
func (f *Files) AwaitProgress(ctx context.Context) error {
	for before := f.Acked(); f.Acked() < before+20; {
		select {
		case <-ctx.Done():
			return fmt.Errorf("the workload stands still after %d operations; status at site %s: %s", f.Acked(), f.r.Main.Name, f.status())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return nil
}

func (f *Files) status() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	out, err := f.r.Main.Kagami(ctx, "status", f.group)
	if err != nil {
		return err.Error()
	}
	return out
}

// Kill pulls the cord of the machine that the workload runs on.
func (f *Files) Kill() error {
	m := f.mount
	f.mount = nil
	if len(f.ledger) > 0 {
		f.ledger[len(f.ledger)-1].Freeze()
	}
	m.Kill()
	if f.load != nil {
		_ = f.load.Wait() // every writer ends by an error
	}
	return m.Close()
}

// Stop ends the workload and unmounts in good order.
func (f *Files) Stop() error {
	if err := errors.Join(f.load.Stop(), f.mount.Unmount()); err != nil {
		return err
	}
	m := f.mount
	f.mount = nil
	return m.Close()
}

// Check mounts the disk at a site and looks for everything acknowledged.
func (f *Files) Check(ctx context.Context, site *stage.Site) error {
	c, err := Dial(ctx, site, f.group, f.disk)
	if err != nil {
		return err
	}
	c.Kill()
	o := f.Shape
	o.Socket, o.Export, o.Bridge = site.Socket(f.group, f.disk), f.disk, acked.NBDFuse
	m, err := acked.MountNBD(ctx, o)
	if err != nil {
		return err
	}
	return errors.Join(f.CheckMount(m), m.Close())
}

// CheckMount looks for everything acknowledged in a mounted file system.
func (f *Files) CheckMount(m *acked.Mount) error {
	for i, l := range f.ledger {
		rep, err := acked.Check(f.dir(m, uint64(i)+1), l)
		if err != nil {
			return err
		}
		if err := rep.Err(); err != nil {
			return fmt.Errorf("workload %d (seed %d): %w: %s", i+1, f.seed+uint64(i)+1, err, rep)
		}
	}
	return nil
}
