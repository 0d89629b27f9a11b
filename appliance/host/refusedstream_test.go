package host

import (
	"crypto/tls"
	"encoding/json"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"kagami/appliance/pki"
	"kagami/replica/wire"
)

// refusingSite answers as a replica's site that follows the group, and then
// finds a record in its stream that it does not support.
type refusingSite struct {
	attached        wire.AttachResponse
	attaches, links atomic.Int32
}

const refusingSeed = 7

func (r *refusingSite) serve(c net.Conn) {
	_, body, _, err := wire.ReadFrame(c, nil, wire.MaxHello, 0)
	var h wire.Hello
	if err != nil || wire.DecodeJSON(body, &h) != nil {
		return
	}
	b, err := wire.AppendJSON(nil, wire.TypeWelcome, wire.Welcome{Version: 1, Site: "dr", Seed: refusingSeed, Release: "0.0"}, 0)
	if !h.Data {
		r.links.Add(1)
	}
	for err == nil {
		if _, err = c.Write(b); err != nil {
			return
		}
		var typ wire.Type
		if typ, body, _, err = wire.ReadFrame(c, nil, wire.MaxBody, refusingSeed); err != nil {
			return
		}
		b = nil
		switch typ {
		case wire.TypePing:
			b = wire.AppendFrame(r.refusal(), wire.TypePong, body, refusingSeed)
		case wire.TypeRequest:
			b, err = r.answer(body)
		}
	}
}

// refusal is the ack that follows the record.
func (r *refusingSite) refusal() []byte {
	if r.attaches.Load() == 0 {
		return nil
	}
	pos := r.attached.Pos
	a := wire.Ack{Channel: r.attached.Channel, Flags: wire.AckRefused, Session: pos.Session, Received: pos.LSN, Durable: pos.LSN, Applied: pos.LSN}
	return wire.AppendFrame(nil, wire.TypeAck, a.Append(nil), refusingSeed)
}

// answer lets the group attach once.
func (r *refusingSite) answer(body []byte) ([]byte, error) {
	var req wire.Request
	if err := wire.DecodeJSON(body, &req); err != nil {
		return nil, err
	}
	resp := wire.Response{ID: req.ID}
	if req.Method == wire.MethodAttach && r.attaches.Add(1) == 1 {
		resp.Result, _ = json.Marshal(r.attached)
	} else {
		resp.Error = wire.Errorf(wire.CodeVersion, "the replica cannot go on: upgrade its site")
	}
	return wire.AppendJSON(nil, wire.TypeResponse, resp, refusingSeed)
}

// TestStreamRefused: the replica cannot take a record of the stream. The source
// attaches again, over the same link, learns why, and says so; it goes on when
// the replica can.
func TestStreamRefused(t *testing.T) {
	p := newPair(t).up()
	vm := p.main.addVM(testVM, "vda")
	p.main.mustProtect(testVM)
	sameAtReplica(t, p, vm)
	st, f := p.dr.d.find(testVM).rep.Status(), p.main.d.find(testVM).snapshot()
	r := &refusingSite{attached: wire.AttachResponse{Channel: 1, Replica: f.Replica, Applied: st.Applied, Complete: true, SpoolBytes: 32 << 20}}
	r.attached.Pos.Lineage, r.attached.Pos.Session, r.attached.Pos.LSN = f.Lineage, f.Session, st.Durable
	conf, err := pki.ServerConfig(pki.Files{CA: p.dr.path("pki", pki.CAName), Cert: p.dr.path("pki", pki.CertName), Key: p.dr.path("pki", pki.KeyName)})
	must(t, err)
	p.dr.stop()
	t.Run("refused", func(t *testing.T) {
		serveFake(t, p.dr.address, func(c net.Conn) { r.serve(tls.Server(c, conf)) })
		await(t, "the refusal to be told", func() bool {
			g := p.main.group(testVM)
			return r.attaches.Load() > 1 && g.State == string(Stalled) && strings.Contains(strings.Join(g.Alarms, " "), "the replica cannot go on: upgrade its site")
		})
		if n := r.links.Load(); n != 1 {
			t.Errorf("%d links for one refused stream", n)
		}
	})
	p.start(p.dr, p.main)
	p.main.awaitState(testVM, string(Streaming))
	sameAtReplica(t, p, vm)
}
