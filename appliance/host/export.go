package host

import (
	"context"
	"errors"
	"fmt"
	"os/user"
	"strconv"
	"sync"

	"kagami/appliance/nbd"
	"kagami/ext4j"
	"kagami/images"
)

// export is one disk behind its own NBD server and unix socket.
type export struct {
	server *nbd.Server
	wg     sync.WaitGroup
}

// Memory of NBD requests, bytes: of all exports of a daemon, and of those of one
// group. A group that is stalled keeps its part for as long as it is; what it
// cannot take is there for the others.
const (
	nbdMemory      = 256 << 20
	nbdGroupMemory = 64 << 20
)

// newExport begins to listen; requests wait for the group's gate. memory is the
// group's part.
func newExport(d *Daemon, memory *nbd.Budget, group string, f diskFile, disk *ext4j.Disk, img *images.Image) (*export, error) {
	gid, err := socketGroup(d.cfg.Libvirt.SocketGroup)
	if err != nil {
		return nil, err
	}
	l, err := nbd.ListenUnix(f.Socket, gid, 0o660)
	if err != nil {
		return nil, fmt.Errorf("listen on %s: %w", f.Socket, err)
	}
	x := &export{server: nbd.NewServer(nbd.Options{Budget: memory})}
	err = x.server.Add(nbd.Export{Name: f.Name, Description: fmt.Sprintf("kagami %s/%s", group, f.Name), Device: &device{disk, img}})
	if err != nil {
		return nil, errors.Join(fmt.Errorf("add export: %w", err), l.Close())
	}
	x.wg.Go(func() {
		if err := x.server.Serve(context.Background(), l); err != nil {
			d.log.Error("nbd server", "group", group, "disk", f.Name, "error", err)
		}
	})
	return x, nil
}

// close drops every client without an answer and waits for the server.
func (x *export) close() {
	x.server.Close()
	x.wg.Wait()
}

// socketGroup is the numeric group of NBD sockets; -1 leaves the daemon's own.
func socketGroup(name string) (int, error) {
	if name == "" {
		return -1, nil
	}
	g, err := user.LookupGroup(name)
	if err != nil {
		return 0, fmt.Errorf("group %q of NBD sockets (libvirt.socket_group): %w", name, err)
	}
	return strconv.Atoi(g.Gid)
}

// device serves an ext4j.Disk as an nbd.Device.
type device struct {
	disk *ext4j.Disk
	img  *images.Image
}

func (v *device) Size() int64      { return v.disk.Size() }
func (v *device) Opened()          { v.disk.Opened() }
func (v *device) Closed()          { v.disk.Closed() }
func (v *device) WouldBlock() bool { return v.disk.WouldBlock() }

func (v *device) ReadAt(p []byte, off int64) error { return gone(v.disk.ReadAt(p, off)) }

func (v *device) WriteAt(p []byte, off int64, fua bool) error {
	return gone(v.disk.WriteAt(p, off, fua))
}

func (v *device) WriteZeroes(off, n int64, noHole, fua bool) error {
	return gone(v.disk.WriteZeroes(off, n, noHole, fua))
}

func (v *device) Trim(off, n int64, fua bool) error { return gone(v.disk.Trim(off, n, fua)) }
func (v *device) Flush() error                      { return gone(v.disk.Flush()) }

// maxExtents bounds one block-status answer.
const maxExtents = 1024

func (v *device) Extents(off, n int64) ([]nbd.Extent, error) {
	if err := v.disk.Ready(); err != nil {
		return nil, gone(err)
	}
	runs, err := v.img.Extents(off, n, maxExtents)
	if err != nil {
		return nil, err
	}
	out := make([]nbd.Extent, 0, len(runs))
	for _, r := range runs {
		out = append(out, nbd.Extent{Length: r.Length, Hole: r.Hole, Zero: r.Hole})
	}
	return out, nil
}

// gone turns the end of a group into the end of the connection: the client
// sends the request again to the next daemon.
func gone(err error) error {
	if errors.Is(err, ext4j.ErrGone) {
		return nbd.ErrGone
	}
	return err
}
