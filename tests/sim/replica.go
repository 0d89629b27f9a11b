package sim

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
	"kagami/replica/wire"
	"kagami/tests/fault"
)

// replicaState is what the replica's daemon keeps durably about the group.
type replicaState struct {
	Lineage epoch.UUID
	Session uint64
	Used    bool // a source was attached: the images are no longer fresh
	// Promoted is the lineage that the group was promoted to, if it was.
	Promoted epoch.UUID
}

// replicaSite is one life of the replica's daemon.
type replicaSite struct {
	w      *World
	fs     images.FS
	mu     sync.Mutex // state
	state  replicaState
	imgs   []*images.Image
	group  *replica.Group
	server *replica.Server
	lis    net.Listener
	wg     sync.WaitGroup
}

const replicaDir = "/replica"

func replicaImage(slot int) string { return fmt.Sprintf("%s/%d.raw", replicaDir, slot) }

// openReplica opens the group, without a server.
func openReplica(w *World, fsys *fault.FS) (*replicaSite, error) {
	r := &replicaSite{w: w, fs: mutateFS(w.mutant, fsys)}
	if err := loadJSON(r.fs, replicaDir+"/group.json", &r.state); err != nil {
		return nil, fmt.Errorf("load state: %w", err)
	}
	imgs := map[uint32]replica.Image{}
	for slot := range w.c.Disks {
		img, err := images.OpenImage(r.fs, replicaImage(slot), images.Want{Size: w.c.DiskBytes})
		if err != nil {
			r.shut()
			return nil, err
		}
		r.imgs = append(r.imgs, img)
		imgs[uint32(slot)] = mutateImage(w.mutant, img)
	}
	applyBytes, applyAge := w.c.ApplyBytes, w.c.ApplyAge
	if w.hoard {
		applyBytes, applyAge = 1<<30, time.Hour
	}
	g, err := replica.Open(replica.Options{FS: r.fs, Dir: replicaDir, ID: groupID, Replica: epoch.UUID{12}, Images: imgs, Codec: w.codec,
		Limits:  replica.Limits{SegmentBytes: 1 << 20, SpoolBytes: w.c.SpoolBytes, WindowBytes: w.c.QueueBytes, ApplyBytes: applyBytes, ApplyAge: applyAge},
		Lineage: r.state.Lineage, Session: r.state.Session, Fresh: !r.state.Used,
		Persist: func(l epoch.UUID, n uint64) error {
			r.mu.Lock()
			defer r.mu.Unlock()
			next := replicaState{l, n, true, r.state.Promoted}
			if err := saveJSON(r.fs, replicaDir+"/group.json", next); err != nil {
				return err
			}
			r.state = next
			return nil
		},
		Event: func(text string) { w.note("replica: %s", text) }})
	if err != nil {
		r.shut()
		return nil, err
	}
	r.group = g
	return r, nil
}

// startReplica is a start of the daemon.
func startReplica(w *World, fsys *fault.FS) (*replicaSite, error) {
	r, err := openReplica(w, fsys)
	if err != nil {
		return nil, err
	}
	r.server = replica.NewServer(replica.ServerOptions{Backend: r, Codec: w.codec, Site: "replica", SiteID: epoch.UUID{12}, Release: "sim",
		Timeout: 5 * time.Second, Event: func(text string) { w.note("replica: %s", text) }})
	r.lis = w.net.Listen()
	r.wg.Go(func() {
		if err := r.server.Serve(r.lis); err != nil {
			w.fail(fmt.Errorf("replica's server: %w", err))
		}
	})
	return r, nil
}

func (r *replicaSite) shut() {
	if r.lis != nil {
		_ = r.lis.Close()
	}
	if r.server != nil {
		r.server.Close()
	}
	r.wg.Wait()
	if r.group != nil {
		_ = r.group.Close()
	}
	for _, img := range r.imgs {
		_ = img.Close()
	}
}

type simPeer struct{}

func (simPeer) Site() string      { return "source" }
func (simPeer) May(g string) bool { return g == groupName }

// Identify stands for the TLS handshake.
func (r *replicaSite) Identify(_ context.Context, c net.Conn) (replica.Peer, net.Conn, error) {
	return simPeer{}, c, nil
}

// Attach attaches the group.
func (r *replicaSite) Attach(_ context.Context, p replica.Peer, req wire.AttachRequest, ch *replica.Channel) (*replica.Group, wire.AttachResponse, error) {
	if !p.May(req.Manifest.Name) {
		return nil, wire.AttachResponse{}, wire.Errorf(wire.CodeDenied, "no")
	}
	if err := r.superseded(); err != nil {
		return nil, wire.AttachResponse{}, err
	}
	resp, err := r.group.Attach(req.Manifest, req.Resync, ch)
	return r.group, resp, err
}

// Find finds the group.
func (r *replicaSite) Find(_ replica.Peer, id epoch.UUID) (*replica.Group, error) {
	if id != groupID {
		return nil, wire.Errorf(wire.CodeNotFound, "no such group")
	}
	return r.group, nil
}

// Call knows no methods.
func (r *replicaSite) Call(context.Context, replica.Peer, string, []byte) (any, error) {
	return nil, wire.Errorf(wire.CodeVersion, "no such method")
}

// content reads a site's images.
func content(imgs []*images.Image) ([][]byte, error) {
	var out [][]byte
	for _, img := range imgs {
		p := make([]byte, img.Size())
		if _, err := img.ReadAt(p, 0); err != nil {
			return nil, err
		}
		out = append(out, p)
	}
	return out, nil
}

var errIncomplete = errors.New("the replica is not a complete copy")
