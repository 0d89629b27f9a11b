package nbd

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"slices"
	"sync"
	"syscall"
	"time"
)

// ErrExists is returned by Add for a name that is taken.
var ErrExists = errors.New("export exists")

// Options bound a server. Zero values stand for the defaults.
type Options struct {
	Log *slog.Logger // why connections ended; nil: nowhere
	// Budget bounds memory in common with other servers; nil: one of this server's own.
	Budget *Budget
	// MaxMemory is the most this server takes of it, bytes; default 64 MiB.
	MaxMemory int64
	// MaxClients is how many connections may be in transmission; default 64. One
	// that was lost counts until its last request has returned.
	MaxClients int
	// MaxHandshakes is how many may be on their way there; default 64.
	MaxHandshakes int
	// MaxInFlight is how many requests of one connection run at once beside
	// its reader; default 128.
	MaxInFlight int
	// HandshakeTimeout is for the whole way; default 10 s.
	HandshakeTimeout time.Duration
	// WriteTimeout is how long a client may leave its replies unread, at least
	// half of it; default 60 s.
	WriteTimeout time.Duration
}

func (o Options) withDefaults() Options {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	o.MaxMemory = cmp.Or(o.MaxMemory, 64<<20)
	if o.Budget == nil {
		o.Budget = NewBudget(o.MaxMemory)
	}
	o.MaxClients = cmp.Or(o.MaxClients, 64)
	o.MaxHandshakes = cmp.Or(o.MaxHandshakes, 64)
	o.MaxInFlight = cmp.Or(o.MaxInFlight, 128)
	o.HandshakeTimeout = cmp.Or(o.HandshakeTimeout, 10*time.Second)
	o.WriteTimeout = cmp.Or(o.WriteTimeout, 60*time.Second)
	return o
}

// Server serves exports on any number of listeners.
type Server struct {
	opts   Options
	memory *Budget
	wg     sync.WaitGroup // running Serve calls

	mu         sync.Mutex
	closed     bool
	byName     map[string]*export
	serving    map[net.Listener]context.CancelCauseFunc
	handshakes []*conn // oldest first
	clients    int
	lastID     uint64
}

// NewServer makes a server without exports.
func NewServer(opts Options) *Server {
	opts = opts.withDefaults()
	return &Server{
		opts:   opts,
		memory: opts.Budget.Part(opts.MaxMemory),
		byName: map[string]*export{}, serving: map[net.Listener]context.CancelCauseFunc{},
	}
}

// Add registers an export. Clients can open it at once.
func (s *Server) Add(e Export) error {
	e, err := e.normalized()
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.byName[e.Name] != nil {
		return fmt.Errorf("%w: %q", ErrExists, e.Name)
	}
	s.byName[e.Name] = &export{Export: e, conns: map[*conn]bool{}}
	return nil
}

// Remove takes an export away, drops its clients hard, and returns when none
// of their requests is running. A device that is stalled must be told to
// return ErrGone first. Removing a name that is not there does nothing.
func (s *Server) Remove(name string) {
	s.mu.Lock()
	e := s.byName[name]
	delete(s.byName, name)
	var conns []*conn
	if e != nil {
		e.removed = true
		conns = sortedConns(e)
	}
	s.mu.Unlock()
	dropAll(conns, errRemoved)
}

// dropAll drops connections and waits for their ends.
func dropAll(conns []*conn, why error) {
	for _, c := range conns {
		c.drop(why)
	}
	for _, c := range conns {
		<-c.ended
	}
}

func sortedConns(e *export) []*conn {
	var conns []*conn
	for c := range e.conns {
		conns = append(conns, c)
	}
	slices.SortFunc(conns, func(a, b *conn) int { return cmp.Compare(a.id, b.id) })
	return conns
}

// exports lists the exports by name.
func (s *Server) exports() []*export {
	s.mu.Lock()
	defer s.mu.Unlock()
	var list []*export
	for _, e := range s.byName {
		list = append(list, e)
	}
	slices.SortFunc(list, func(a, b *export) int { return cmp.Compare(a.Name, b.Name) })
	return list
}

// find looks an export up. The empty name means the only export there is.
func (s *Server) find(name string) *export {
	s.mu.Lock()
	defer s.mu.Unlock()
	if e := s.byName[name]; e != nil || name != "" || len(s.byName) != 1 {
		return e
	}
	for _, e := range s.byName {
		return e
	}
	return nil
}

// Serve accepts clients on l until ctx ends or Close is called, then returns
// nil; or until accepting fails for good. It closes l, drops the clients that
// came through it hard, and waits for their requests.
func (s *Server) Serve(ctx context.Context, l net.Listener) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(errClosing)
	if !s.addListener(l, cancel) {
		return l.Close()
	}
	defer s.wg.Done()
	// The listener goes before the clients: one that is dropped and dials again
	// at once must wait for the next server, and not meet this one.
	attached, drop := context.WithCancelCause(context.WithoutCancel(ctx))
	context.AfterFunc(ctx, func() { _ = l.Close(); drop(errClosing) }) // Accept returns
	var conns sync.WaitGroup
	err := s.accept(ctx, attached, l, &conns)
	if ctx.Err() != nil {
		err = nil
	}
	s.removeListener(l)
	_ = l.Close() // has to be over when Serve returns; closing twice does no harm
	drop(errClosing)
	conns.Wait()
	return err
}

// addListener is false on a closed server.
func (s *Server) addListener(l net.Listener, cancel context.CancelCauseFunc) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return false
	}
	s.serving[l] = cancel
	s.wg.Add(1)
	return true
}

func (s *Server) removeListener(l net.Listener) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.serving, l)
}

// accept starts connections, which end with attached, until ctx ends.
func (s *Server) accept(ctx, attached context.Context, l net.Listener, conns *sync.WaitGroup) error {
	for pause := time.Duration(0); ; {
		nc, err := l.Accept()
		if err == nil {
			pause = 0
			s.begin(attached, nc, conns)
			continue
		}
		if !temporary(err) {
			return fmt.Errorf("accept: %w", err)
		}
		pause = min(max(2*pause, 5*time.Millisecond), time.Second)
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

// temporary says whether accepting may work again later.
func temporary(err error) bool {
	for _, e := range []error{syscall.EMFILE, syscall.ENFILE, syscall.ENOBUFS, syscall.ENOMEM, syscall.ECONNABORTED} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// begin starts a connection. Of too many in the handshake the oldest goes.
func (s *Server) begin(ctx context.Context, nc net.Conn, conns *sync.WaitGroup) {
	s.mu.Lock()
	s.lastID++
	c := newConn(s, nc, s.lastID)
	var oldest *conn
	if len(s.handshakes) >= s.opts.MaxHandshakes {
		oldest = s.handshakes[0]
		s.handshakes = slices.Delete(s.handshakes, 0, 1)
	}
	s.handshakes = append(s.handshakes, c)
	s.mu.Unlock()
	if oldest != nil {
		oldest.drop(errEvicted)
	}
	stop := context.AfterFunc(ctx, func() { c.drop(errClosing) })
	conns.Go(func() {
		defer stop()
		err := c.serve()
		s.leave(c)
		s.report(c, err)
	})
}

// enter counts c among exp's clients.
func (s *Server) enter(c *conn, exp *export) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || exp.removed {
		return refuseOpt(repErrUnknown, "no export %.64q", exp.Name)
	}
	if s.clients >= s.opts.MaxClients {
		return refuseOpt(repErrPolicy, "%d clients are connected, which is the limit", s.clients)
	}
	i := slices.Index(s.handshakes, c)
	if i < 0 {
		return errEvicted
	}
	s.handshakes = slices.Delete(s.handshakes, i, i+1)
	s.clients++
	exp.conns[c] = true
	return nil
}

// leave forgets a connection that has ended.
func (s *Server) leave(c *conn) {
	s.mu.Lock()
	if i := slices.Index(s.handshakes, c); i >= 0 {
		s.handshakes = slices.Delete(s.handshakes, i, i+1)
	}
	if c.exp != nil {
		delete(c.exp.conns, c)
		s.clients--
	}
	s.mu.Unlock()
	close(c.ended)
}

// report logs why a connection ended: for a client's own doing there is
// nobody else to tell.
func (s *Server) report(c *conn, err error) {
	log := s.opts.Log.With("connection", c.id)
	switch cause := c.whyGone(); {
	case c.exp == nil:
		log.Debug("NBD handshake ended", "err", err)
	case err == nil || errors.Is(cause, errHungUp) || errors.Is(cause, errClosing) ||
		errors.Is(cause, errRemoved) || errors.Is(cause, ErrGone):
		log.Info("NBD client left", "export", c.exp.Name, "why", cause)
	default:
		log.Warn("NBD client dropped", "export", c.exp.Name, "err", cause)
	}
}

// others are the connections to c's export but for c.
func (s *Server) others(c *conn) []*conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.DeleteFunc(sortedConns(c.exp), func(o *conn) bool { return o == c })
}

// Close ends the server hard: listeners and then sockets are closed at once,
// running requests stay unanswered, so that clients send them again to the
// next server. It returns when all goroutines have ended; a device that is
// stalled must be told to return ErrGone first.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	for _, cancel := range s.serving {
		cancel(errClosing)
	}
	s.mu.Unlock()
	s.wg.Wait()
}

// Client describes a connection in transmission.
type Client struct {
	ID       uint64    // of the connection, unique in its server
	Since    time.Time // when it was accepted
	PID      int       // of the process at the other end of a unix socket, else 0
	Requests uint64    // received so far
	Read     uint64    // bytes sent to the client
	Written  uint64    // bytes received from it
	Running  int       // requests running beside the reader just now
}

// Clients lists the clients of an export, the oldest first.
func (s *Server) Clients(name string) []Client {
	s.mu.Lock()
	defer s.mu.Unlock()
	e := s.byName[name]
	if e == nil {
		return nil
	}
	var list []Client
	for _, c := range sortedConns(e) {
		list = append(list, c.info())
	}
	return list
}
