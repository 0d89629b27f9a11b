package ship

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"kagami/ext4j/epoch"
	"kagami/replica/wire"
)

// Source is a stream of records to ship; ext4j.Group implements it.
type Source interface {
	// Take hands out the next run of consecutive records: at most limit, and
	// no more than budget bytes unless one record is larger.
	Take(budget, limit int) []epoch.Record
	// Requeue gives back records that were lost with a connection.
	Requeue(session uint64, first, last epoch.LSN)
	// Unsent reports whether Take has something, and whether a FLUSH waits.
	Unsent() (any, urgent bool)
	// Acked brings the replica's position; an error means that the replica lies.
	Acked(session uint64, received, durable epoch.LSN) error
	// SetWake names the function to call when Take may have something new.
	SetWake(func())
}

// Options of a Link. Sizes are bytes.
type Options struct {
	// Dial opens a connection to the peer, TLS handshake included.
	Dial          func(ctx context.Context) (net.Conn, error)
	Peer          string // the peer's site name
	Site          string
	SiteID        epoch.UUID
	Release       string
	Connections   int
	InflightBytes int64
	Heartbeat     time.Duration
	Timeout       time.Duration // a link that is silent for so long is dead
	Codec         *wire.Codec
	Compress      bool
	Event         func(text string) // what an operator should know; must not block
}

// Link keeps connections to one peer.
type Link struct {
	o       Options
	mu      sync.Mutex
	session *Session      // nil while down
	changed chan struct{} // closed and replaced at each change of session
	lastErr error
	since   time.Time
}

// NewLink makes a link; Run brings it up.
func NewLink(o Options) *Link {
	if o.Event == nil {
		o.Event = func(string) {}
	}
	return &Link{o: o, changed: make(chan struct{}), since: time.Now()}
}

// Back-off between attempts to connect.
const (
	firstRetry = 200 * time.Millisecond
	lastRetry  = 5 * time.Second
)

// Run keeps the link up until ctx ends, and has closed everything when it returns.
func (l *Link) Run(ctx context.Context) {
	wait := firstRetry
	for ctx.Err() == nil {
		began := time.Now()
		s, err := l.connect(ctx)
		if err == nil {
			l.publish(s, nil)
			l.o.Event(fmt.Sprintf("link to %s is up", l.o.Peer))
			err = s.run(ctx)
		}
		if ctx.Err() != nil {
			l.publish(nil, nil)
			return
		}
		if l.publish(nil, err) {
			l.o.Event(fmt.Sprintf("link to %s is down: %v", l.o.Peer, err))
		}
		if time.Since(began) > lastRetry {
			wait = firstRetry
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
		wait = min(2*wait, lastRetry)
	}
}

// publish sets the current session and reports whether that is news.
func (l *Link) publish(s *Session, err error) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	news := s != l.session || (err != nil && (l.lastErr == nil || l.lastErr.Error() != err.Error()))
	if s != l.session {
		l.since = time.Now()
	}
	l.session, l.lastErr = s, err
	close(l.changed)
	l.changed = make(chan struct{})
	return news
}

// Session returns the current session, waiting until there is one.
func (l *Link) Session(ctx context.Context) (*Session, error) {
	for {
		l.mu.Lock()
		s, changed, last := l.session, l.changed, l.lastErr
		l.mu.Unlock()
		if s != nil && !s.ended() {
			return s, nil
		}
		select {
		case <-ctx.Done():
			if last != nil {
				return nil, fmt.Errorf("site %s is not connected: %w", l.o.Peer, last)
			}
			return nil, fmt.Errorf("site %s is not connected: %w", l.o.Peer, context.Cause(ctx))
		case <-changed:
		}
	}
}

// Status of a link.
type Status struct {
	Connected   bool
	Since       time.Time
	Connections int // data connections up
	RTT         time.Duration
	Inflight    int64
	Sent        uint64 // bytes put on data connections in this session
	Error       error  // why it is down
	Release     string // of the peer
}

// Status returns a snapshot.
func (l *Link) Status() Status {
	l.mu.Lock()
	s, st := l.session, Status{Since: l.since, Error: l.lastErr}
	l.mu.Unlock()
	if s == nil || s.ended() {
		return st
	}
	st.Connected, st.Release = true, s.release
	s.mu.Lock()
	defer s.mu.Unlock()
	st.Connections, st.RTT, st.Inflight, st.Sent = s.up, s.rtt, s.inflight, s.sent
	return st
}

// connect dials the control connection and says hello.
func (l *Link) connect(ctx context.Context) (*Session, error) {
	id := epoch.NewUUID()
	c, w, err := l.hello(ctx, id, false)
	if err != nil {
		return nil, err
	}
	return newSession(l, c, id, w), nil
}

// hello dials one connection and exchanges hello and welcome within Timeout.
func (l *Link) hello(ctx context.Context, link epoch.UUID, data bool) (net.Conn, wire.Welcome, error) {
	ctx, cancel := context.WithTimeout(ctx, l.o.Timeout)
	defer cancel()
	var w wire.Welcome
	c, err := l.o.Dial(ctx)
	if err != nil {
		return nil, w, fmt.Errorf("connect to %s: %w", l.o.Peer, err)
	}
	if err := l.exchange(c, link, data, &w); err != nil {
		_ = c.Close() // TLS may fail to say goodbye on a broken connection; why it broke is the error to report
		return nil, w, err
	}
	return c, w, nil
}

func (l *Link) exchange(c net.Conn, link epoch.UUID, data bool, w *wire.Welcome) error {
	if err := c.SetDeadline(time.Now().Add(l.o.Timeout)); err != nil {
		return fmt.Errorf("set deadline: %w", err)
	}
	h := wire.Hello{MinVersion: wire.MinVersion, MaxVersion: wire.Version, Site: l.o.Site, SiteID: l.o.SiteID,
		Link: link, Data: data, Release: l.o.Release}
	b, err := wire.AppendJSON(nil, wire.TypeHello, h, 0)
	if err != nil {
		return err
	}
	if _, err := c.Write(b); err != nil {
		return fmt.Errorf("send hello to %s: %w", l.o.Peer, err)
	}
	t, body, _, err := wire.ReadFrame(c, nil, wire.MaxHello, 0)
	if err != nil {
		return fmt.Errorf("read welcome of %s: %w", l.o.Peer, err)
	}
	if t != wire.TypeWelcome {
		return fmt.Errorf("%w: %s answered hello with a frame of type %d", wire.ErrProtocol, l.o.Peer, t)
	}
	if err := wire.DecodeJSON(body, w); err != nil {
		return err
	}
	if err := w.Check(); err != nil && err == w.Error {
		return fmt.Errorf("%s refuses the link: %w", l.o.Peer, err)
	} else if err != nil {
		return err
	}
	if w.Site != l.o.Peer {
		return fmt.Errorf("expected site %s, the welcome is from %s", l.o.Peer, w.Site)
	}
	return c.SetDeadline(time.Time{})
}

func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
