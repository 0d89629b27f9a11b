package replica

import (
	"bufio"
	"context"
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// Peer is who is at the other end of a connection, as its certificate says.
type Peer interface {
	Site() string
	// May reports whether the peer may touch the group of that name.
	May(group string) bool
}

// Backend is what the server asks of the daemon. Methods are called from
// several goroutines; errors that are *wire.Error reach the peer as they are.
type Backend interface {
	// Identify completes the TLS handshake within ctx, tells who the peer is,
	// and returns the connection to go on with.
	Identify(ctx context.Context, c net.Conn) (Peer, net.Conn, error)
	// Attach finds, or with req.Create makes, the replica of a group, and attaches ch to it.
	Attach(ctx context.Context, p Peer, req wire.AttachRequest, ch *Channel) (*Group, wire.AttachResponse, error)
	// Find returns a group of this site's replicas that the peer may touch.
	Find(p Peer, id epoch.UUID) (*Group, error)
	// Call serves the methods that concern more than one Group object.
	Call(ctx context.Context, p Peer, method string, params []byte) (any, error)
}

// ServerOptions of a Server.
type ServerOptions struct {
	Backend Backend
	Codec   *wire.Codec
	Site    string
	SiteID  epoch.UUID
	Release string
	Timeout time.Duration // a link that is silent for so long is dead
	Event   func(text string)
}

// Limits of one server.
const (
	maxLinks        = 64
	maxLinksPerSite = 4 // one is in use; others are on their way out after a lost link
	maxConnsPerLink = 33
	maxHandshakes   = 128
	// handshakeTime is the most that a connection may take to be known, and less if Timeout is.
	handshakeTime = 10 * time.Second
)

// Server accepts the connections of peers that replicate to this site.
type Server struct {
	o  ServerOptions
	mu sync.Mutex
	// links by id; a link is there from its control connection's welcome to its end.
	links map[epoch.UUID]*link
	conns map[net.Conn]struct{} // all open ones, to be closed by Close
	// unknown are those that may be anybody's as yet, oldest first.
	unknown []net.Conn
	done    bool
	wg      sync.WaitGroup
}

// NewServer makes a server.
func NewServer(o ServerOptions) *Server {
	if o.Event == nil {
		o.Event = func(string) {}
	}
	return &Server{o: o, links: map[epoch.UUID]*link{}, conns: map[net.Conn]struct{}{}}
}

// Serve accepts connections until the listener is closed.
func (s *Server) Serve(l net.Listener) error {
	for {
		c, err := l.Accept()
		switch {
		case errors.Is(err, net.ErrClosed):
			return nil
		case err != nil && temporary(err):
			time.Sleep(acceptPause)
			continue
		case err != nil:
			return fmt.Errorf("accept peer connection: %w", err)
		}
		if !s.track(c) {
			continue
		}
		go func() {
			defer s.wg.Done()
			defer s.untrack(c)
			s.serve(c)
		}()
	}
}

func (s *Server) track(c net.Conn) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.done {
		_ = c.Close()
		return false
	}
	s.conns[c] = struct{}{}
	s.wg.Add(1)
	s.unknown = append(s.unknown, c)
	if len(s.unknown) > maxHandshakes {
		i := crowd(s.unknown)
		_ = s.unknown[i].Close() // its goroutine ends with that
		s.unknown = slices.Delete(s.unknown, i, i+1)
	}
	return true
}

// known takes a connection out of those in the handshake.
func (s *Server) known(c net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if i := slices.Index(s.unknown, c); i >= 0 {
		s.unknown = slices.Delete(s.unknown, i, i+1)
	}
}

func (s *Server) untrack(c net.Conn) {
	_ = c.Close() // what it would report was reported by the read or write before
	s.mu.Lock()
	delete(s.conns, c)
	s.mu.Unlock()
}

// Close drops every connection and waits for their goroutines. The caller has
// closed the listener.
func (s *Server) Close() {
	s.mu.Lock()
	s.done = true
	for c := range s.conns {
		_ = c.Close()
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Sites lists the sites with a live link.
func (s *Server) Sites() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, l := range s.links {
		out = append(out, l.peer.Site())
	}
	return out
}

// serve carries one connection from its handshake to its end.
func (s *Server) serve(c net.Conn) {
	raw := c
	peer, c, hello, err := s.handshake(raw)
	s.known(raw)
	if err != nil {
		s.o.Event(fmt.Sprintf("connection from %s refused: %v", raw.RemoteAddr(), err))
		return
	}
	l, werr := s.admit(c, peer, hello)
	if err := s.welcome(c, l, werr); err != nil || werr != nil {
		if werr != nil {
			s.o.Event(fmt.Sprintf("connection from %s at %s refused: %v", peer.Site(), c.RemoteAddr(), werr))
		}
		if l != nil {
			s.leave(l, c, hello.Data)
		}
		return
	}
	defer s.leave(l, c, hello.Data)
	r := bufio.NewReaderSize(c, 64<<10)
	if hello.Data {
		err = l.readData(r)
	} else {
		err = l.runControl(c, r)
	}
	if err != nil && !l.ended() {
		s.o.Event(fmt.Sprintf("link from %s: %v", peer.Site(), err))
	}
	if errors.Is(err, wire.ErrProtocol) || !hello.Data {
		l.close()
	}
}

// handshake learns who the peer is and reads its hello, both within handshakeTime.
func (s *Server) handshake(raw net.Conn) (peer Peer, c net.Conn, h wire.Hello, err error) {
	patience := min(s.o.Timeout, handshakeTime)
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if err := raw.SetDeadline(time.Now().Add(patience)); err != nil {
		return nil, nil, h, fmt.Errorf("set deadline: %w", err)
	}
	if peer, c, err = s.o.Backend.Identify(ctx, raw); err != nil {
		return nil, nil, h, err
	}
	t, body, _, err := wire.ReadFrame(c, nil, wire.MaxHello, 0)
	if err != nil {
		return nil, nil, h, fmt.Errorf("read hello: %w", err)
	}
	if t != wire.TypeHello {
		return nil, nil, h, fmt.Errorf("%w: first frame is of type %d, not a hello", wire.ErrProtocol, t)
	}
	if err := wire.DecodeJSON(body, &h); err != nil {
		return nil, nil, h, err
	}
	return peer, c, h, c.SetDeadline(time.Time{})
}

// admit finds the link a connection belongs to, or makes one for a control connection.
func (s *Server) admit(c net.Conn, peer Peer, h wire.Hello) (*link, *wire.Error) {
	if _, err := wire.Negotiate(h); err != nil {
		return nil, err
	}
	if h.Site != peer.Site() {
		return nil, wire.Errorf(wire.CodeDenied, "the certificate is of site %q, the hello says %q", peer.Site(), h.Site)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	l := s.links[h.Link]
	switch {
	case s.done:
		return nil, wire.Errorf(wire.CodeBusy, "site %s is shutting down", s.o.Site)
	case h.Data && (l == nil || l.ended()): // close takes mu after it has ended the link: it closes all that were let in before
		return nil, wire.Errorf(wire.CodeStale, "no such link")
	case h.Data && l.peer.Site() != peer.Site():
		return nil, wire.Errorf(wire.CodeDenied, "the link belongs to another site")
	case h.Data && len(l.data) >= maxConnsPerLink:
		return nil, wire.Errorf(wire.CodeBusy, "the link has %d connections already", len(l.data))
	case h.Data:
		l.data[c] = struct{}{}
		return l, nil
	case l != nil || h.Link.IsZero():
		return nil, wire.Errorf(wire.CodeConflict, "the link exists already")
	case s.linksOf(peer.Site()) >= maxLinksPerSite:
		return nil, wire.Errorf(wire.CodeBusy, "site %s has %d links already", peer.Site(), maxLinksPerSite)
	case len(s.links) >= maxLinks:
		return nil, wire.Errorf(wire.CodeBusy, "site %s has %d links already", s.o.Site, maxLinks)
	}
	l = newLink(s, peer, h.Link)
	s.links[h.Link] = l
	return l, nil
}

// linksOf counts a site's links; the caller holds mu.
func (s *Server) linksOf(site string) int {
	n := 0
	for _, l := range s.links {
		if l.peer.Site() == site {
			n++
		}
	}
	return n
}

func (s *Server) welcome(c net.Conn, l *link, refusal *wire.Error) error {
	w := wire.Welcome{Version: wire.Version, Site: s.o.Site, SiteID: s.o.SiteID, Release: s.o.Release, Error: refusal}
	if l != nil {
		w.Seed = l.seed
	}
	b, err := wire.AppendJSON(nil, wire.TypeWelcome, w, 0)
	if err != nil {
		return err
	}
	if err := c.SetWriteDeadline(time.Now().Add(s.o.Timeout)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("send welcome: %w", err)
	}
	return c.SetWriteDeadline(time.Time{})
}

// leave takes a connection out of its link; the link ends with its control connection.
func (s *Server) leave(l *link, c net.Conn, data bool) {
	s.mu.Lock()
	if data {
		delete(l.data, c)
		s.mu.Unlock()
		return
	}
	delete(s.links, l.id)
	s.mu.Unlock()
	l.close()
}

func newSeed() uint32 {
	var b [4]byte
	_, _ = rand.Read(b[:]) // never fails
	return binary.LittleEndian.Uint32(b[:])
}
