package sim

import (
	"bytes"
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"kagami/appliance/ship"
	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// rude is a peer that speaks the protocol byte by byte.
type rude struct {
	t    *testing.T
	c    net.Conn
	seed uint32
}

func (h *hub) dial() *rude {
	h.t.Helper()
	c, err := h.net.Dial(context.Background())
	if err != nil {
		h.t.Fatal(err)
	}
	return &rude{t: h.t, c: c}
}

func goodHello(link epoch.UUID, data bool) wire.Hello {
	return wire.Hello{MinVersion: 1, MaxVersion: 1, Site: "source", SiteID: epoch.UUID{4}, Link: link, Data: data}
}

// hello says hello and returns the answer.
func (r *rude) hello(h wire.Hello) (wire.Welcome, error) {
	var w wire.Welcome
	b, err := wire.AppendJSON(nil, wire.TypeHello, h, 0)
	if err != nil {
		return w, err
	}
	if _, err := r.c.Write(b); err != nil {
		return w, err
	}
	_, body, _, err := wire.ReadFrame(r.c, nil, wire.MaxHello, 0)
	if err != nil {
		return w, err
	}
	err = wire.DecodeJSON(body, &w)
	r.seed = w.Seed
	return w, err
}

func (r *rude) send(t wire.Type, body []byte) error {
	_, err := r.c.Write(wire.AppendFrame(nil, t, body, r.seed))
	return err
}

// cutOff waits until the server has closed the connection, at most d.
func (r *rude) cutOff(d time.Duration) bool {
	_ = r.c.SetReadDeadline(time.Now().Add(d))
	_, err := io.Copy(io.Discard, r.c)
	var ne net.Error
	return !(errors.As(err, &ne) && ne.Timeout())
}

// stillServes ships a whole epoch over a proper link.
func (h *hub) stillServes(id epoch.UUID) {
	h.t.Helper()
	l, stop := h.link(2, 1<<20)
	defer stop()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	s, err := l.Session(ctx)
	if err != nil {
		h.t.Fatalf("the server does not serve any more: %v", err)
	}
	resp := attachTo(h.t, s, id)
	p := newPump(3, 4096)
	for i := range p.recs { // continue where the group is
		p.recs[i].LSN += resp.Pos.LSN
		p.recs[i].Seal()
	}
	b := s.Bind(p, resp.Channel, 1, nil)
	defer b.Unbind()
	time.Sleep(5 * time.Second)
	if want := resp.Pos.LSN + epoch.LSN(len(p.recs)); h.groups[id].Status().Durable != want {
		h.t.Errorf("an epoch is not acknowledged: %+v, want %d", h.groups[id].Status(), want)
	}
}

// inHub runs f beside a hub with one group, checks that the hub still works,
// and closes it; the bubble's end proves that every goroutine has ended.
func inHub(t *testing.T, f func(t *testing.T, h *hub)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t, NewNet(1, time.Millisecond, 0, 1<<20))
		h.add(groupID, nil)
		f(t, h)
		h.stillServes(groupID)
		h.close()
		h.net.DropAll(false)
		h.peers.Wait()
	})
}

func TestHelloRefused(t *testing.T) {
	id := epoch.NewUUID()
	inHub(t, func(t *testing.T, h *hub) {
		first := h.dial()
		if w, err := first.hello(goodHello(id, false)); err != nil || w.Error != nil {
			t.Fatal(err, w.Error)
		}
		for name, c := range map[string]struct {
			change func(*wire.Hello)
			want   wire.Code
		}{
			"old version":      {func(m *wire.Hello) { m.MinVersion, m.MaxVersion = 0, 0 }, wire.CodeVersion},
			"new version":      {func(m *wire.Hello) { m.MinVersion, m.MaxVersion = 2, 9 }, wire.CodeVersion},
			"unknown feature":  {func(m *wire.Hello) { m.Required = 4 }, wire.CodeVersion},
			"other site":       {func(m *wire.Hello) { m.Site = "elsewhere" }, wire.CodeDenied},
			"no site":          {func(m *wire.Hello) { m.Site = "" }, wire.CodeDenied},
			"no link":          {func(m *wire.Hello) { m.Link = epoch.UUID{} }, wire.CodeConflict},
			"link in use":      {func(m *wire.Hello) { m.Link = id }, wire.CodeConflict},
			"data, no link":    {func(m *wire.Hello) { m.Data = true }, wire.CodeStale},
			"data, null link":  {func(m *wire.Hello) { m.Data, m.Link = true, epoch.UUID{} }, wire.CodeStale},
			"a very long name": {func(m *wire.Hello) { m.Site = strings.Repeat("x", 8000) }, wire.CodeDenied},
		} {
			r := h.dial()
			m := goodHello(epoch.NewUUID(), false)
			c.change(&m)
			w, err := r.hello(m)
			if err != nil || w.Error == nil || w.Error.Code != c.want {
				t.Errorf("%s: %+v, %v", name, w, err)
			}
			if !r.cutOff(time.Second) {
				t.Errorf("%s: the connection stays", name)
			}
		}
		_ = first.c.Close()
	})
}

// TestBadBeginnings: whatever comes instead of a hello, the connection ends,
// within the server's patience.
func TestBadBeginnings(t *testing.T) {
	giant := wire.BeginFrame(nil, wire.TypeHello)
	binary.LittleEndian.PutUint32(giant[8:], wire.MaxHello+1)
	huge := wire.BeginFrame(nil, wire.TypeHello)
	binary.LittleEndian.PutUint32(huge[8:], 1<<31)
	for name, b := range map[string][]byte{
		"nothing":        {},
		"half a header":  giant[:7],
		"garbage":        bytes.Repeat([]byte("GET / HTTP/1.1\r\n"), 10),
		"giant hello":    append(giant, make([]byte, wire.MaxHello+1)...),
		"claimed huge":   huge,
		"other frame":    wire.AppendFrame(nil, wire.TypePing, make([]byte, 8), 0),
		"no JSON":        wire.AppendFrame(nil, wire.TypeHello, []byte("{"), 0),
		"deep JSON":      wire.AppendFrame(nil, wire.TypeHello, bytes.Repeat([]byte("["), 16000), 0),
		"JSON of others": wire.AppendFrame(nil, wire.TypeHello, []byte(`{"link":5,"site":["x"],"min_version":"a"}`), 0),
		"wrong seed":     wire.AppendFrame(nil, wire.TypeHello, []byte("{}"), 7),
	} {
		inHub(t, func(t *testing.T, h *hub) {
			r := h.dial()
			if _, err := r.c.Write(b); err != nil {
				t.Error(err)
			}
			if !r.cutOff(6 * time.Second) {
				t.Errorf("%s: the connection stays", name)
			}
		})
	}
}

// TestSlowLoris: a byte at a time, on more connections than there are places
// for handshakes, delays others by the server's patience at most.
func TestSlowLoris(t *testing.T) {
	inHub(t, func(t *testing.T, h *hub) {
		b, err := wire.AppendJSON(nil, wire.TypeHello, goodHello(epoch.NewUUID(), false), 0)
		if err != nil {
			t.Fatal(err)
		}
		for range 200 {
			r := h.dial()
			h.peers.Go(func() {
				for i := range b {
					if _, err := r.c.Write(b[i : i+1]); err != nil {
						return
					}
					time.Sleep(time.Second)
				}
				_ = r.c.Close()
			})
		}
	})
}

// after runs f for a rude peer past its hello, with a channel for the group.
func after(t *testing.T, f func(t *testing.T, h *hub, control, data *rude, channel uint32)) {
	t.Helper()
	inHub(t, func(t *testing.T, h *hub) {
		id := epoch.NewUUID()
		control, data := h.dial(), h.dial()
		if w, err := control.hello(goodHello(id, false)); err != nil || w.Error != nil {
			t.Fatal(w.Error, err)
		}
		if w, err := data.hello(goodHello(id, true)); err != nil || w.Error != nil {
			t.Fatal(w.Error, err)
		}
		var resp wire.AttachResponse
		control.call(wire.MethodAttach, wire.AttachRequest{Manifest: wire.Manifest{ID: groupID, Lineage: lineage, Session: 1, Window: 1 << 20}}, &resp)
		f(t, h, control, data, resp.Channel)
		_ = control.c.Close()
		_ = data.c.Close()
	})
}

func (r *rude) call(method string, params, result any) {
	r.t.Helper()
	p, err := json.Marshal(params)
	if err != nil {
		r.t.Fatal(err)
	}
	q, err := json.Marshal(wire.Request{ID: 1, Method: method, Params: p})
	if err != nil {
		r.t.Fatal(err)
	}
	if err := r.send(wire.TypeRequest, q); err != nil {
		r.t.Fatal(err)
	}
	for {
		typ, body, _, err := wire.ReadFrame(r.c, nil, wire.MaxBody, r.seed)
		if err != nil {
			r.t.Fatal(err)
		}
		var resp wire.Response
		if typ != wire.TypeResponse {
			continue
		}
		if err := wire.DecodeJSON(body, &resp); err != nil || resp.Error != nil {
			r.t.Fatal(resp.Error, err)
		}
		if err := json.Unmarshal(resp.Result, result); err != nil {
			r.t.Fatal(err)
		}
		return
	}
}

func recordFrame(channel uint32, session uint64, recs []epoch.Record, seed uint32) []byte {
	b := wire.RecordsHead{Channel: channel, Count: uint32(len(recs)), Session: session}.Append(nil)
	for i := range recs {
		b = recs[i].AppendStored(b, epoch.CodecRaw, recs[i].Payload, seed)
	}
	return b
}

// TestRudeFrames: frames that do not belong where they come end the link.
func TestRudeFrames(t *testing.T) {
	good := newPump(3, 512).recs
	other := func(change func(*epoch.Record)) []epoch.Record {
		r := good[0]
		change(&r)
		r.Seal()
		return []epoch.Record{r}
	}
	for name, f := range map[string]func(data *rude, ch uint32) error{
		"channel of the future": func(d *rude, ch uint32) error { return d.send(wire.TypeRecords, recordFrame(ch+1, 1, good, d.seed)) },
		"other seed inside":     func(d *rude, ch uint32) error { return d.send(wire.TypeRecords, recordFrame(ch, 1, good, d.seed+1)) },
		"ping on data":          func(d *rude, _ uint32) error { return d.send(wire.TypePing, make([]byte, 8)) },
		"ack on data":           func(d *rude, ch uint32) error { return d.send(wire.TypeAck, wire.Ack{Channel: ch}.Append(nil)) },
		"garbage":               func(d *rude, _ uint32) error { _, err := d.c.Write(bytes.Repeat([]byte{1}, 5000)); return err },
		"unknown disk": func(d *rude, ch uint32) error {
			return d.send(wire.TypeRecords, recordFrame(ch, 1, other(func(r *epoch.Record) { r.Disk = 3 }), d.seed))
		},
		"past the end": func(d *rude, ch uint32) error {
			return d.send(wire.TypeRecords, recordFrame(ch, 1, other(func(r *epoch.Record) { r.Offset = hubDisk }), d.seed))
		},
		"other lineage": func(d *rude, ch uint32) error {
			return d.send(wire.TypeRecords, recordFrame(ch, 1, other(func(r *epoch.Record) { r.Lineage[0]++ }), d.seed))
		},
		"more than the window": func(d *rude, ch uint32) error {
			big := newPump(40, epoch.MaxPayload).recs
			taken := func(i int) bool {
				return d.send(wire.TypeRecords, recordFrame(ch, 1, big[i:i+1], d.seed)) == nil
			}
			for i := 1; i < len(big) && taken(i); i++ { // it is cut off half-way
				continue
			}
			return nil
		},
	} {
		after(t, func(t *testing.T, _ *hub, control, data *rude, ch uint32) {
			if err := f(data, ch); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			if !data.cutOff(3*time.Second) || !control.cutOff(3*time.Second) {
				t.Errorf("%s: the link stays", name)
			}
		})
	}
}

// TestStaleFrames: frames of an earlier attach or another session are no
// violation, and change nothing.
func TestStaleFrames(t *testing.T) {
	after(t, func(t *testing.T, h *hub, control, data *rude, ch uint32) {
		var again wire.AttachResponse
		control.call(wire.MethodAttach, wire.AttachRequest{Manifest: wire.Manifest{ID: groupID, Lineage: lineage, Session: 1, Window: 1 << 20}}, &again)
		recs := newPump(3, 512).recs
		if err := data.send(wire.TypeRecords, recordFrame(ch, 1, recs, data.seed)); err != nil {
			t.Error(err)
		}
		stale := newPump(3, 512).recs
		for i := range stale {
			stale[i].Session = 9
			stale[i].Seal()
		}
		if err := data.send(wire.TypeRecords, recordFrame(again.Channel, 9, stale, data.seed)); err != nil {
			t.Error(err)
		}
		time.Sleep(time.Second)
		if st := h.groups[groupID].Status(); st.Received != 0 || !st.Attached {
			t.Errorf("stale frames were taken, or ended the link: %+v", st)
		}
	})
}

// TestRudeRequests: requests of any kind, in any number, are answered or end
// the link; the server's memory for answers is bounded.
func TestRudeRequests(t *testing.T) {
	req := func(id uint64, method, params string) []byte {
		return fmt.Appendf(nil, `{"id":%d,"method":%q,"params":%s}`, id, method, params)
	}
	for name, c := range map[string]struct {
		body []byte
		dies bool
	}{
		"no JSON":          {[]byte("{"), true},
		"unknown method":   {req(1, "format-everything", "{}"), false},
		"an error":         {req(1, "panic", "{}"), false},
		"bad attach":       {req(1, wire.MethodAttach, `{"manifest":7}`), false},
		"null attach":      {req(1, wire.MethodAttach, "null"), false},
		"other group":      {req(1, wire.MethodAttach, `{"manifest":{"id":"09000000-0000-0000-0000-000000000000"}}`), false},
		"hash of no group": {req(1, wire.MethodHash, `{"chunk":65536}`), false},
		"hash too much":    {req(1, wire.MethodHash, `{"group":"01000000-0000-0000-0000-000000000000","chunk":9223372036854775807,"offsets":[0]}`), false},
		"hash behind":      {req(1, wire.MethodHash, `{"group":"01000000-0000-0000-0000-000000000000","chunk":65536,"offsets":[9223372036854775807]}`), false},
	} {
		after(t, func(t *testing.T, _ *hub, control, _ *rude, _ uint32) {
			if err := control.send(wire.TypeRequest, c.body); err != nil {
				t.Error(err)
			}
			if c.dies {
				if !control.cutOff(3 * time.Second) {
					t.Errorf("%s: the link stays", name)
				}
				return
			}
			_ = control.c.SetReadDeadline(time.Now().Add(3 * time.Second))
			typ, body, _, err := wire.ReadFrame(control.c, nil, wire.MaxBody, control.seed)
			var resp wire.Response
			if err != nil || typ != wire.TypeResponse || wire.DecodeJSON(body, &resp) != nil || resp.Error == nil {
				t.Errorf("%s: answered %d %s, %v", name, typ, body, err)
			}
		})
	}
}

// TestRequestFlood: a peer that asks and never reads is cut off.
func TestRequestFlood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := newHub(t, NewNet(1, time.Millisecond, 0, 4<<10))
		h.add(groupID, nil)
		r := h.dial()
		if w, err := r.hello(goodHello(epoch.NewUUID(), false)); err != nil || w.Error != nil {
			t.Fatal(err)
		}
		cut := false
		for i := range 5000 {
			_ = r.c.SetWriteDeadline(time.Now().Add(20 * time.Second))
			if err := r.send(wire.TypeRequest, fmt.Appendf(nil, `{"id":%d,"method":"x"}`, i)); err != nil {
				var ne net.Error
				cut = !(errors.As(err, &ne) && ne.Timeout())
				break
			}
		}
		if !cut {
			t.Error("the server goes on answering into a full connection")
		}
		h.stillServes(groupID)
		h.close()
		h.net.DropAll(false)
	})
}

// TestTooManyConnections: links and connections of one peer are bounded.
func TestTooManyConnections(t *testing.T) {
	inHub(t, func(t *testing.T, h *hub) {
		id := epoch.NewUUID()
		var all []*rude
		refused := func(m wire.Hello, n int) (at int) {
			for i := range n {
				r := h.dial()
				all = append(all, r)
				if w, err := r.hello(m); err == nil && w.Error != nil && w.Error.Code == wire.CodeBusy {
					return i
				}
				if !m.Data {
					m.Link = epoch.NewUUID()
				}
			}
			return -1
		}
		if at := refused(goodHello(id, false), 10); at != 4 {
			t.Errorf("a peer has %d links", at)
		}
		if at := refused(goodHello(id, true), 50); at != 33 {
			t.Errorf("a link has %d data connections", at)
		}
		for _, r := range all {
			_ = r.c.Close()
		}
		time.Sleep(time.Second)
	})
}

// TestDataConnectionOfADyingLink: a data connection that comes while its link
// ends does not stay behind.
func TestDataConnectionOfADyingLink(t *testing.T) {
	for i := range 50 {
		inHub(t, func(t *testing.T, h *hub) {
			id := epoch.NewUUID()
			control, data := h.dial(), h.dial()
			if _, err := control.hello(goodHello(id, false)); err != nil {
				t.Fatal(err)
			}
			go func() {
				time.Sleep(time.Duration(i) * 100 * time.Microsecond)
				control.c.(*Conn).Reset()
			}()
			_, _ = data.hello(goodHello(id, true))
			if !data.cutOff(10 * time.Second) {
				t.Errorf("after %d00 µs: the data connection outlives its link", i)
			}
		})
	}
}

// TestRandomPeer sends random frames, some right, at each step.
func TestRandomPeer(t *testing.T) {
	for seed := range uint64(20) {
		inHub(t, func(t *testing.T, h *hub) {
			rng := rand.New(rand.NewPCG(seed, 0))
			for range 5 {
				id := epoch.NewUUID()
				control, data := h.dial(), h.dial()
				_, _ = control.hello(goodHello(id, false))
				_, _ = data.hello(goodHello(id, true))
				recs := newPump(1+rng.IntN(30), 512).recs
				for range 30 {
					r, typ := control, wire.Type(rng.IntN(11))
					body := make([]byte, rng.IntN(300))
					for i := range body {
						body[i] = byte(rng.Uint32())
					}
					switch rng.IntN(5) {
					case 0:
						typ, body = wire.TypeRequest, fmt.Appendf(nil, `{"id":1,"method":"attach","params":{"manifest":{"id":%q,"lineage":%q,"session":1,"window":%d}}}`, groupID, lineage, rng.IntN(1<<20))
					case 1:
						r, typ, body = data, wire.TypeRecords, recordFrame(rng.Uint32N(3), 1, recs[rng.IntN(len(recs)):], data.seed)
					case 2:
						r = data
					case 3:
						typ, body = wire.TypePing, make([]byte, 8)
					}
					if r.send(typ, body) != nil {
						break
					}
					time.Sleep(time.Duration(rng.IntN(3)) * time.Millisecond)
				}
				_ = control.c.Close()
				_ = data.c.Close()
			}
			time.Sleep(10 * time.Second)
			if err := h.groups[groupID].Status().Err; err != nil {
				t.Errorf("seed %d: a peer ended the group: %v", seed, err)
			}
		})
	}
}

// liar is a replica's site that answers as a function says.
func liar(t *testing.T, f func(c net.Conn)) (*ship.Link, *Net, func()) {
	n := NewNet(1, time.Millisecond, 0, 1<<20)
	lis := n.Listen()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := lis.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				f(c)
				_ = c.Close()
			})
		}
	})
	codec, err := wire.NewCodec()
	if err != nil {
		t.Fatal(err)
	}
	l := ship.NewLink(ship.Options{Dial: n.Dial, Peer: "replica", Site: "source", Release: "t", Connections: 3, InflightBytes: 1 << 20,
		Heartbeat: time.Second, Timeout: 5 * time.Second, Codec: codec})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		l.Run(ctx)
	}()
	return l, n, func() {
		cancel()
		<-done
		_ = lis.Close()
		n.DropAll(false)
		wg.Wait()
	}
}

// welcome answers a hello and returns it.
func welcome(c net.Conn, w wire.Welcome) (wire.Hello, error) {
	var h wire.Hello
	_, body, _, err := wire.ReadFrame(c, nil, wire.MaxHello, 0)
	if err != nil {
		return h, err
	}
	if err := wire.DecodeJSON(body, &h); err != nil {
		return h, err
	}
	b, err := wire.AppendJSON(nil, wire.TypeWelcome, w, 0)
	if err != nil {
		return h, err
	}
	_, err = c.Write(b)
	return h, err
}

// TestLyingReplica: whatever the other site answers, the link ends and is
// dialled again, nothing crashes, and Run's end leaves nothing behind.
func TestLyingReplica(t *testing.T) {
	ok := wire.Welcome{Version: 1, Site: "replica", Seed: 5}
	control := func(f func(c net.Conn)) func(net.Conn) {
		return func(c net.Conn) {
			if h, err := welcome(c, ok); err != nil || h.Data {
				_, _ = io.Copy(io.Discard, c)
				return
			}
			f(c)
			_, _ = io.Copy(io.Discard, c)
		}
	}
	send := func(typ wire.Type, body []byte) func(net.Conn) {
		return control(func(c net.Conn) { _, _ = c.Write(wire.AppendFrame(nil, typ, body, 5)) })
	}
	for name, f := range map[string]func(net.Conn){
		"closes at once":  func(net.Conn) {},
		"says nothing":    func(c net.Conn) { _, _ = io.Copy(io.Discard, c) },
		"garbage":         func(c net.Conn) { _, _ = c.Write(bytes.Repeat([]byte("x"), 1000)); _, _ = io.Copy(io.Discard, c) },
		"refuses":         func(c net.Conn) { _, _ = welcome(c, wire.Welcome{Error: wire.Errorf(wire.CodeDenied, "no")}) },
		"other site":      func(c net.Conn) { _, _ = welcome(c, wire.Welcome{Version: 1, Site: "elsewhere"}) },
		"other version":   func(c net.Conn) { _, _ = welcome(c, wire.Welcome{Version: 7, Site: "replica"}) },
		"silent control":  control(func(net.Conn) {}),
		"lying ack":       send(wire.TypeAck, wire.Ack{Channel: 1, Session: 1, Received: 1 << 60, Durable: 1 << 60}.Append(nil)),
		"crooked ack":     send(wire.TypeAck, wire.Ack{Channel: 1, Session: 1, Received: 1, Durable: 2}.Append(nil)),
		"short ack":       send(wire.TypeAck, []byte{1}),
		"short pong":      send(wire.TypePong, nil),
		"records":         send(wire.TypeRecords, make([]byte, 100)),
		"goodbye":         send(wire.TypeGoodbye, nil),
		"bad response":    send(wire.TypeResponse, []byte("{")),
		"other response":  send(wire.TypeResponse, []byte(`{"id":99}`)),
		"empty response":  send(wire.TypeResponse, []byte(`{"id":1}`)),
		"null response":   send(wire.TypeResponse, []byte(`null`)),
		"error, no words": send(wire.TypeResponse, []byte(`{"id":1,"error":{}}`)),
	} {
		synctest.Test(t, func(t *testing.T) {
			l, n, stop := liar(t, f)
			ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
			if s, err := l.Session(ctx); err == nil {
				p := newPump(30, 4096)
				b := s.Bind(p, 1, 1, nil)
				var resp wire.AttachResponse
				if err := s.Call(ctx, wire.MethodAttach, wire.AttachRequest{}, &resp); err == nil {
					t.Errorf("%s: the call succeeds with %+v", name, resp)
				}
				if p.done() != 0 {
					t.Errorf("%s: %d was believed", name, p.done())
				}
				b.Unbind()
			}
			cancel()
			if st := l.Status(); n.Conns() > 20 {
				t.Errorf("%s: %d connections, %+v", name, n.Conns(), st)
			}
			stop()
		})
	}
}
