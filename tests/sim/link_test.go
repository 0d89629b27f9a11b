package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"kagami/appliance/ship"
	"kagami/ext4j/epoch"
	"kagami/images"
	"kagami/replica"
	"kagami/replica/wire"
	"kagami/tests/fault"
)

// hub is a replica's site with several groups behind one server.
type hub struct {
	t      *testing.T
	net    *Net
	codec  *wire.Codec
	fs     *fault.FS
	groups map[epoch.UUID]*replica.Group
	closes []func()
	server *replica.Server
	peers  sync.WaitGroup // goroutines of a test
	mu     sync.Mutex
	events []string
}

const hubDisk = 1 << 20

func newHub(t *testing.T, n *Net) *hub {
	codec, err := wire.NewCodec()
	if err != nil {
		t.Fatal(err)
	}
	h := &hub{t: t, net: n, codec: codec, fs: fault.NewFS(1), groups: map[epoch.UUID]*replica.Group{}}
	h.server = replica.NewServer(replica.ServerOptions{Backend: h, Codec: codec, Site: "replica", Release: "t", Timeout: 5 * time.Second,
		Event: func(text string) { h.mu.Lock(); h.events = append(h.events, text); h.mu.Unlock() }})
	l := n.Listen()
	done := make(chan struct{})
	go func() {
		defer close(done)
		if err := h.server.Serve(l); err != nil {
			t.Error(err)
		}
	}()
	h.closes = append(h.closes, func() { _ = l.Close(); h.server.Close(); <-done })
	return h
}

// add opens a group with one disk. wrap may put something around its image.
func (h *hub) add(id epoch.UUID, wrap func(replica.Image) replica.Image) *replica.Group {
	h.t.Helper()
	return h.addOn(h.fs, id, wrap)
}

// addOn opens a group whose spool is on a file system of its own.
func (h *hub) addOn(fsys images.FS, id epoch.UUID, wrap func(replica.Image) replica.Image) *replica.Group {
	h.t.Helper()
	dir := "/" + id.String()
	if err := h.fs.MkdirAll(dir, 0o700); err != nil {
		h.t.Fatal(err)
	}
	img, err := images.CreateImage(h.fs, dir+"/0.raw", hubDisk, "")
	if err != nil {
		h.t.Fatal(err)
	}
	var i replica.Image = img
	if wrap != nil {
		i = wrap(img)
	}
	g, err := replica.Open(replica.Options{FS: fsys, Dir: dir, ID: id, Replica: epoch.UUID{3}, Images: map[uint32]replica.Image{0: i}, Codec: h.codec,
		Limits:  replica.Limits{SegmentBytes: 1 << 20, SpoolBytes: 4 << 20, WindowBytes: 32 << 20, ApplyBytes: 1 << 20, ApplyAge: time.Second},
		Lineage: lineage, Session: 1, Persist: func(epoch.UUID, uint64) error { return nil }})
	if err != nil {
		h.t.Fatal(err)
	}
	h.groups[id] = g
	h.closes = append(h.closes, func() { _ = g.Close(); _ = img.Close() })
	return g
}

func (h *hub) close() {
	for _, f := range h.closes {
		f()
	}
}

func (h *hub) Identify(_ context.Context, c net.Conn) (replica.Peer, net.Conn, error) {
	return simPeer{}, c, nil
}

func (h *hub) Attach(_ context.Context, _ replica.Peer, req wire.AttachRequest, ch *replica.Channel) (*replica.Group, wire.AttachResponse, error) {
	g := h.groups[req.Manifest.ID]
	if g == nil {
		return nil, wire.AttachResponse{}, wire.Errorf(wire.CodeNotFound, "no such group")
	}
	resp, err := g.Attach(req.Manifest, false, ch)
	return g, resp, err
}

func (h *hub) Find(_ replica.Peer, id epoch.UUID) (*replica.Group, error) {
	if g := h.groups[id]; g != nil {
		return g, nil
	}
	return nil, wire.Errorf(wire.CodeNotFound, "no such group")
}

func (h *hub) Call(_ context.Context, _ replica.Peer, method string, _ []byte) (any, error) {
	if method == "panic" {
		return nil, errors.New("an error of the daemon")
	}
	return nil, wire.Errorf(wire.CodeVersion, "no such method")
}

// pump is a ship.Source without a disk: it has a fixed number of records, each
// epoch of a few, and remembers what was acknowledged.
type pump struct {
	mu     sync.Mutex
	recs   []epoch.Record // LSN i+1 at i
	next   int
	again  []span
	acked  epoch.LSN
	lied   error
	urgent bool
	wakeup func()
}

type span struct{ first, last epoch.LSN }

func newPump(writes, size int) *pump {
	p := &pump{}
	add := func(r epoch.Record) {
		r.Lineage, r.Session, r.LSN = lineage, 1, epoch.LSN(len(p.recs)+1)
		r.Seal()
		p.recs = append(p.recs, r)
	}
	for i := range writes {
		b := make([]byte, size)
		stamp(b, version(i+1))
		add(epoch.Record{Type: epoch.TypeWrite, Offset: uint64(i*size) % (hubDisk - uint64(size)), Length: uint64(size), Payload: b})
		if i%3 == 2 || i == writes-1 {
			add(epoch.Record{Type: epoch.TypeClose, Disk: epoch.GroupWide, Length: 32, Payload: epoch.CloseInfo{Reason: epoch.ByFlush, First: 1}.Encode()})
		}
	}
	return p
}

func (p *pump) Take(budget, limit int) (out []epoch.Record) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for len(out) < limit {
		i, lost := p.next, len(p.again) > 0
		if lost {
			i = int(p.again[0].first) - 1
		}
		if i >= len(p.recs) {
			break
		}
		r := p.recs[i]
		if budget -= len(r.Payload) + epoch.HeaderSize; len(out) > 0 && (budget < 0 || out[len(out)-1].LSN+1 != r.LSN) {
			break
		}
		out = append(out, r)
		if !lost {
			p.next++
		} else if p.again[0].first++; p.again[0].first > p.again[0].last {
			p.again = p.again[1:]
		}
	}
	return out
}

func (p *pump) Requeue(_ uint64, first, last epoch.LSN) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.again = append(p.again, span{first, last})
}

func (p *pump) Unsent() (bool, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return len(p.again) > 0 || p.next < len(p.recs), p.urgent
}

func (p *pump) Acked(_ uint64, received, durable epoch.LSN) error {
	p.mu.Lock()
	defer p.mu.Unlock()
	if received > epoch.LSN(len(p.recs)) {
		p.lied = fmt.Errorf("acknowledged %d of %d", received, len(p.recs))
		return p.lied
	}
	p.acked = max(p.acked, durable)
	return nil
}

func (p *pump) SetWake(f func()) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.wakeup = f
}

func (p *pump) done() epoch.LSN {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.acked
}

// dialer is the source's side of a hub.
func (h *hub) link(connections int, inflight int64) (*ship.Link, func()) {
	l := ship.NewLink(ship.Options{Dial: h.net.Dial, Peer: "replica", Site: "source", SiteID: epoch.UUID{4}, Release: "t",
		Connections: connections, InflightBytes: inflight, Heartbeat: time.Second, Timeout: 5 * time.Second, Codec: h.codec, Compress: true})
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { l.Run(ctx) })
	return l, func() { cancel(); wg.Wait() }
}

func attachTo(t *testing.T, s *ship.Session, id epoch.UUID) wire.AttachResponse {
	t.Helper()
	var resp wire.AttachResponse
	req := wire.AttachRequest{Manifest: wire.Manifest{Name: groupName, ID: id, Lineage: lineage, Session: 1, Window: 32 << 20}}
	if err := s.Call(context.Background(), wire.MethodAttach, req, &resp); err != nil {
		t.Fatal(err)
	}
	return resp
}

// TestConnectionsDie: with data connections killed again and again everything
// arrives, each record once, within one session.
func TestConnectionsDie(t *testing.T) {
	for seed, connections := range []int{4, 4, 4, 4, 4, 4, 10, 10} {
		synctest.Test(t, func(t *testing.T) {
			n := NewNet(uint64(seed), 5*time.Millisecond, 10*time.Millisecond, 64<<10)
			h := newHub(t, n)
			defer h.close()
			g := h.add(groupID, nil)
			l, stop := h.link(connections, 1<<20)
			defer stop()
			s, err := l.Session(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			resp := attachTo(t, s, groupID)
			for up := 0; up != connections; up = l.Status().Connections {
				if time.Since(n.began) > time.Minute {
					t.Fatalf("seed %d: %d connections, want %d", seed, up, connections)
				}
				time.Sleep(10 * time.Millisecond)
			}
			p := newPump(900, 16<<10)
			var acks []wire.Ack
			b := s.Bind(p, resp.Channel, 1, func(a wire.Ack) { acks = append(acks, a) })
			defer b.Unbind()
			kills := 0
			for p.done() < epoch.LSN(len(p.recs)) {
				if time.Sleep(40 * time.Millisecond); kills < 25 && n.killData() {
					kills++
				}
				if st := l.Status(); st.Inflight > 1<<20+int64(connections)*(512<<10) {
					t.Fatalf("%d bytes are in flight", st.Inflight)
				}
				if time.Since(n.began) > 10*time.Minute {
					t.Fatalf("seed %d: stuck at %d of %d (next %d, lost %v), %+v, %+v", seed, p.done(), len(p.recs), p.next+1, p.again, g.Status(), l.Status())
				}
			}
			synctest.Wait() // the last acknowledgement is dealt with
			st := g.Status()
			if kills < 5 || st.Counters.Records != uint64(len(p.recs)) || st.Session != 1 {
				t.Errorf("seed %d: %d kills, %d records spooled, %d sent, session %d", seed, kills, st.Counters.Records, len(p.recs), st.Session)
			}
			if inflight := l.Status().Inflight; inflight != 0 {
				t.Errorf("seed %d: %d bytes still count as in flight", seed, inflight)
			}
			for i := 1; i < len(acks); i++ {
				if acks[i].Received < acks[i-1].Received || acks[i].Durable < acks[i-1].Durable {
					t.Errorf("seed %d: ack %+v after %+v", seed, acks[i], acks[i-1])
				}
			}
		})
	}
}

// TestLostFrameIsSentPastTheLimit: everything in flight waits behind a small
// frame that was lost. It must be sent again although the limit is reached, or
// nothing would ever move.
func TestLostFrameIsSentPastTheLimit(t *testing.T) {
	for range 100 { // until the small frame has a connection to itself
		if loseSmallFrame(t) {
			return
		}
	}
	t.Error("the small frame never had a connection to itself")
}

func loseSmallFrame(t *testing.T) (done bool) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1, 5*time.Millisecond, 0, 64<<10)
		h := newHub(t, n)
		defer h.close()
		h.add(groupID, nil)
		l, stop := h.link(9, 1<<20)
		defer stop()
		s, err := l.Session(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		resp := attachTo(t, s, groupID)
		time.Sleep(time.Second)
		n.Cut(true)
		p, rng := newPump(1, 512), rand.New(rand.NewPCG(1, 0))
		for _, r := range newPump(20, epoch.MaxPayload).recs {
			for i := range r.Payload {
				r.Payload[i] = byte(rng.Uint32()) // not to be compressed away
			}
			r.LSN += 2
			r.Seal()
			p.recs = append(p.recs, r)
		}
		b := s.Bind(p, resp.Channel, 1, nil)
		defer b.Unbind()
		time.Sleep(time.Second)
		var small *Conn
		for _, c := range n.conns[1:] {
			if size := c.out.held(); size > 0 && size < 2000 {
				small = c
			}
		}
		if small == nil {
			return
		}
		small.Reset()
		n.Cut(false)
		time.Sleep(time.Minute)
		if done = true; p.done() != epoch.LSN(len(p.recs)) {
			t.Errorf("stuck at %d of %d (next %d, lost %v) with %+v", p.done(), len(p.recs), p.next, p.again, l.Status())
		}
	})
	return done
}

// TestNoGroupWaitsForAnother: a group whose spool is full does not hold up the
// others of the peer.
func TestNoGroupWaitsForAnother(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1, 5*time.Millisecond, 0, 1<<20)
		h := newHub(t, n)
		defer h.close()
		stuck, free := epoch.UUID{7}, epoch.UUID{8}
		release := make(chan struct{})
		h.add(stuck, func(i replica.Image) replica.Image { return fullImage{i, release} })
		h.add(free, nil)
		l, stop := h.link(2, 1<<20)
		defer stop()
		s, err := l.Session(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		a, b := newPump(100, 128<<10), newPump(50, 16<<10)
		ba := s.Bind(a, attachTo(t, s, stuck).Channel, 1, nil)
		defer ba.Unbind()
		time.Sleep(30 * time.Second)
		if last, _ := ba.Last(); last.Flags&wire.AckSpoolFull == 0 {
			t.Fatalf("the spool is not full: %+v", last)
		}
		bb := s.Bind(b, attachTo(t, s, free).Channel, 1, nil)
		defer bb.Unbind()
		time.Sleep(30 * time.Second)
		if b.done() != epoch.LSN(len(b.recs)) {
			t.Errorf("the free group is at %d of %d while the other's spool is full", b.done(), len(b.recs))
		}
		close(release)
		time.Sleep(time.Minute)
		if a.done() != epoch.LSN(len(a.recs)) || b.done() != epoch.LSN(len(b.recs)) {
			t.Errorf("at the end: %d of %d, %d of %d", a.done(), len(a.recs), b.done(), len(b.recs))
		}
	})
}

// fullImage has no space until it is released.
type fullImage struct {
	replica.Image
	release chan struct{}
}

func (i fullImage) Allocate(off, n int64) error {
	select {
	case <-i.release:
		return i.Image.Allocate(off, n)
	default:
		return syscall.ENOSPC
	}
}

// TestNoGroupWaitsForASegment: while a group's next spool segment is being
// written full of zeros, which takes long on a slow disk, the others go on, and
// nobody is told that the spool is full.
func TestNoGroupWaitsForASegment(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1, 5*time.Millisecond, 0, 1<<20)
		h := newHub(t, n)
		defer h.close()
		slow, free := epoch.UUID{7}, epoch.UUID{8}
		disk := &slowFill{FS: h.fs}
		h.addOn(disk, slow, nil)
		h.add(free, nil)
		l, stop := h.link(2, 1<<20)
		defer stop()
		s, err := l.Session(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Second) // the first segments are ready
		disk.each.Store(int64(time.Minute))
		a, b := newPump(100, 128<<10), newPump(50, 16<<10)
		ba := s.Bind(a, attachTo(t, s, slow).Channel, 1, func(ack wire.Ack) {
			if ack.Flags&wire.AckSpoolFull != 0 {
				t.Errorf("%+v says that the spool is full", ack)
			}
		})
		defer ba.Unbind()
		time.Sleep(10 * time.Second)
		if got := a.done(); got == 0 || got == epoch.LSN(len(a.recs)) {
			t.Fatalf("the slow group is at %d of %d: it does not wait for a segment", got, len(a.recs))
		}
		bb := s.Bind(b, attachTo(t, s, free).Channel, 1, nil)
		defer bb.Unbind()
		time.Sleep(10 * time.Second)
		if b.done() != epoch.LSN(len(b.recs)) {
			t.Errorf("the free group is at %d of %d while the other waits for a segment", b.done(), len(b.recs))
		}
		time.Sleep(20 * time.Minute)
		if a.done() != epoch.LSN(len(a.recs)) || b.done() != epoch.LSN(len(b.recs)) {
			t.Errorf("at the end: %d of %d, %d of %d", a.done(), len(a.recs), b.done(), len(b.recs))
		}
	})
}

// slowFill is a disk on which filling a megabyte takes a time.
type slowFill struct {
	images.FS
	each atomic.Int64 // ns
}

func (s *slowFill) Create(name string, perm fs.FileMode) (images.File, error) {
	f, err := s.FS.Create(name, perm)
	if err != nil {
		return nil, err
	}
	return slowFile{f, s}, nil
}

type slowFile struct {
	images.File
	s *slowFill
}

func (f slowFile) WriteAt(p []byte, off int64) (int, error) {
	if len(p) >= 1<<20 { // records are smaller
		time.Sleep(time.Duration(f.s.each.Load()))
	}
	return f.File.WriteAt(p, off)
}

// TestUnsupportedRecordEndsOneGroup: a record that the replica's release cannot
// carry out ends the stream of its group, in words, and of no other: the link stays.
func TestUnsupportedRecordEndsOneGroup(t *testing.T) {
	add, err := epoch.DiskInfo{ID: epoch.UUID{8}, Slot: 1, BlockSize: 4096, Bytes: 1 << 30, Name: "vdb"}.Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, rec := range map[string]epoch.Record{
		"of an unknown type": {Type: 99, Payload: []byte("who knows")},
		"that adds a disk":   {Type: epoch.TypeDiskAdd, Disk: epoch.GroupWide, Length: uint64(len(add)), Payload: add},
	} {
		synctest.Test(t, func(t *testing.T) {
			n := NewNet(1, 5*time.Millisecond, 0, 64<<10)
			h := newHub(t, n)
			defer h.close()
			other := epoch.UUID{0xee}
			g := h.add(groupID, nil)
			h.add(other, nil)
			l, stop := h.link(2, 1<<20)
			defer stop()
			s, err := l.Session(context.Background())
			if err != nil {
				t.Fatal(err)
			}
			bad, good := newPump(30, 4096), newPump(300, 4096)
			whole := bad.recs[len(bad.recs)-1].LSN
			rec.Lineage, rec.Session, rec.LSN = lineage, 1, whole+1
			rec.Seal()
			bad.recs = append(bad.recs, rec)
			refused := make(chan struct{}, 100)
			resp := attachTo(t, s, groupID)
			b := s.Bind(bad, resp.Channel, 1, func(a wire.Ack) {
				if a.Flags&wire.AckRefused != 0 {
					refused <- struct{}{}
				}
			})
			<-refused
			b2 := s.Bind(good, attachTo(t, s, other).Channel, 1, nil)
			defer b2.Unbind()
			for good.done() < epoch.LSN(len(good.recs)) {
				if time.Sleep(50 * time.Millisecond); time.Since(n.began) > time.Minute {
					t.Fatalf("a record %s: the other group is stuck at %d: %+v", name, good.done(), l.Status())
				}
			}
			b.Unbind()
			if again, err := l.Session(context.Background()); err != nil || again != s {
				t.Errorf("a record %s: the link is another one: %v", name, err)
			}
			if st := g.Status(); st.Err != nil || st.Attached || st.Durable > whole {
				t.Errorf("a record %s: %+v", name, st)
			}
			m := wire.Manifest{Name: groupName, ID: groupID, Lineage: lineage, Session: 1, Window: 32 << 20}
			var werr *wire.Error
			err = s.Call(context.Background(), wire.MethodAttach, wire.AttachRequest{Manifest: m}, &resp)
			if !errors.As(err, &werr) || werr.Code != wire.CodeVersion || !strings.Contains(err.Error(), "not supported by this release") {
				t.Errorf("a record %s: the same session is answered %v", name, err)
			}
			m.Session = 2
			if err := s.Call(context.Background(), wire.MethodAttach, wire.AttachRequest{Manifest: m}, &resp); err != nil {
				t.Errorf("a record %s: the next session is answered %v", name, err)
			}
		})
	}
}

// TestFlushGoesFirst: a group that has a waiting FLUSH is served before bulk.
func TestFlushGoesFirst(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := NewNet(1, 20*time.Millisecond, 0, 64<<10) // about 3 MB/s
		h := newHub(t, n)
		defer h.close()
		bulk, small := epoch.UUID{7}, epoch.UUID{8}
		h.add(bulk, nil)
		h.add(small, nil)
		l, stop := h.link(1, 1<<20)
		defer stop()
		s, err := l.Session(context.Background())
		if err != nil {
			t.Fatal(err)
		}
		a, b := newPump(80, 128<<10), newPump(3, 4096)
		rng := rand.New(rand.NewPCG(1, 0))
		for i := range a.recs {
			if len(a.recs[i].Payload) > 0 { // not to be compressed away
				for j := range a.recs[i].Payload {
					a.recs[i].Payload[j] = byte(rng.Uint32())
				}
				a.recs[i].Seal()
			}
		}
		b.urgent = true
		ba := s.Bind(a, attachTo(t, s, bulk).Channel, 1, nil)
		defer ba.Unbind()
		time.Sleep(300 * time.Millisecond)
		began := time.Now()
		bb := s.Bind(b, attachTo(t, s, small).Channel, 1, nil)
		defer bb.Unbind()
		for b.done() != epoch.LSN(len(b.recs)) && time.Since(began) < time.Minute {
			time.Sleep(time.Millisecond)
		}
		if d := time.Since(began); d > time.Second || a.done() == epoch.LSN(len(a.recs)) {
			t.Errorf("a flush behind bulk data took %v; bulk is at %d of %d", d, a.done(), len(a.recs))
		}
	})
}
