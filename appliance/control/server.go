package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"sync"
	"time"
)

// maxBody bounds a request's body, in bytes.
const maxBody = 64 << 10

// bodyPatience bounds how long a body may take to arrive.
const bodyPatience = 30 * time.Second

// maxName and maxDisks bound what a request may name.
const (
	maxName  = 255
	maxDisks = 256
)

// ServerOptions is what a Server needs beside the backend.
type ServerOptions struct {
	Version string
	Metrics http.Handler // of /metrics; nil: not found
	Log     *slog.Logger // operations are logged; nil: nowhere
}

// Server serves the API.
type Server struct {
	backend Backend
	opts    ServerOptions
	http    *http.Server
	life    context.Context // of every operation
	stop    context.CancelFunc

	mu      sync.Mutex // guards closing against running.Add
	closing bool
	running sync.WaitGroup // handlers
}

// NewServer makes a server; Serve starts it.
func NewServer(b Backend, o ServerOptions) *Server {
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{backend: b, opts: o}
	s.life, s.stop = context.WithCancel(context.Background())
	s.http = &http.Server{
		Handler:           s.routes(),
		ReadHeaderTimeout: 10 * time.Second,
		IdleTimeout:       time.Minute,
		MaxHeaderBytes:    16 << 10,
		ErrorLog:          slog.NewLogLogger(o.Log.Handler(), slog.LevelWarn),
		ConnContext: func(ctx context.Context, c net.Conn) context.Context {
			return context.WithValue(ctx, callerKey{}, callerOf(c))
		},
	}
	return s
}

// Serve answers on l, and closes it, until Close.
func (s *Server) Serve(l net.Listener) error {
	if err := s.http.Serve(l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve control API: %w", err)
	}
	return nil
}

// Close cancels every operation, waits for all of them, and ends Serve.
func (s *Server) Close() {
	s.mu.Lock()
	s.closing = true
	s.mu.Unlock()
	s.stop()
	// New requests are refused (see track); those that run send their last line.
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	if err := s.http.Shutdown(ctx); err != nil {
		_ = s.http.Close() // cuts clients that do not read; the operations are waited for below
	}
	s.running.Wait()
}

func (s *Server) routes() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/version", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, Version{Version: s.opts.Version, API: APIVersion})
	})
	mux.HandleFunc("GET /v1/status", s.status)
	mux.HandleFunc("POST /v1/protect", s.protect)
	mux.HandleFunc("POST /v1/unprotect", s.unprotect)
	mux.HandleFunc("POST /v1/failover", s.failover)
	mux.HandleFunc("POST /v1/forget", s.forget)
	mux.HandleFunc("POST /v1/set", s.set)
	mux.HandleFunc("POST /v1/verify", s.verify)
	mux.HandleFunc("POST /v1/reprotect", s.reprotect)
	mux.HandleFunc("POST /v1/switchover", s.switchover)
	mux.HandleFunc("POST /v1/failback", s.failback)
	mux.HandleFunc("POST /v1/survivor", s.survivor)
	mux.HandleFunc("POST /v1/branches", s.branches)
	if s.opts.Metrics != nil {
		mux.Handle("GET /metrics", s.opts.Metrics)
	}
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		fail(w, http.StatusNotFound, &Error{
			Code: "unknown-request", Message: fmt.Sprintf("this daemon (%s) does not know %s %s", s.opts.Version, r.Method, r.URL.Path),
			Hint: "command line and daemon may be of different releases", Exit: ExitFailed,
		})
	})
	return s.track(mux)
}

// track lets Close wait for handlers.
func (s *Server) track(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.enter() {
			fail(w, http.StatusServiceUnavailable, stopping())
			return
		}
		defer s.running.Done()
		h.ServeHTTP(w, r)
	})
}

func (s *Server) enter() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.closing {
		s.running.Add(1)
	}
	return !s.closing
}

func stopping() *Error {
	return &Error{Code: "stopping", Message: "the daemon is stopping", Hint: "try again when it has started", Exit: ExitUnreachable}
}

func (s *Server) status(w http.ResponseWriter, r *http.Request) {
	st, err := s.backend.Status(r.Context())
	if err != nil {
		fail(w, http.StatusInternalServerError, asError(err))
		return
	}
	reply(w, http.StatusOK, st)
}

func (s *Server) protect(w http.ResponseWriter, r *http.Request) {
	var req ProtectRequest
	if !read(w, r, &req) {
		return
	}
	if err := errors.Join(named("vm", req.VM), named("to", req.To), listed("disks", req.Disks)); err != nil {
		fail(w, http.StatusBadRequest, badRequest(err))
		return
	}
	s.stream(w, r, job{op: "protect", vm: req.VM, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return nil, s.backend.Protect(ctx, req, emit)
	}})
}

func (s *Server) unprotect(w http.ResponseWriter, r *http.Request) {
	var req UnprotectRequest
	if !read(w, r, &req) {
		return
	}
	var disks []string
	for d := range req.Files {
		disks = append(disks, d)
	}
	if err := errors.Join(named("vm", req.VM), listed("files", disks)); err != nil {
		fail(w, http.StatusBadRequest, badRequest(err))
		return
	}
	s.stream(w, r, job{op: "unprotect", vm: req.VM, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return nil, s.backend.Unprotect(ctx, req, emit)
	}})
}

func (s *Server) failover(w http.ResponseWriter, r *http.Request) {
	var req FailoverRequest
	if !read(w, r, &req) {
		return
	}
	if err := named("vm", req.VM); err != nil {
		fail(w, http.StatusBadRequest, badRequest(err))
		return
	}
	s.stream(w, r, job{op: "failover", vm: req.VM, goesOn: true, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return s.backend.Failover(ctx, req, emit)
	}})
}

func (s *Server) forget(w http.ResponseWriter, r *http.Request) {
	var req ForgetRequest
	if !read(w, r, &req) {
		return
	}
	if err := named("group", req.Group); err != nil {
		fail(w, http.StatusBadRequest, badRequest(err))
		return
	}
	s.stream(w, r, job{op: "forget", vm: req.Group, goesOn: true, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return nil, s.backend.Forget(ctx, req, emit)
	}})
}

func (s *Server) verify(w http.ResponseWriter, r *http.Request) {
	var req VerifyRequest
	if !read(w, r, &req) {
		return
	}
	if err := named("group", req.Group); err != nil {
		fail(w, http.StatusBadRequest, badRequest(err))
		return
	}
	s.stream(w, r, job{op: "verify", vm: req.Group, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return s.backend.Verify(ctx, req, emit)
	}})
}

func (s *Server) reprotect(w http.ResponseWriter, r *http.Request) {
	var req ReprotectRequest
	if !read(w, r, &req) || !s.names(w, "group", req.Group) {
		return
	}
	s.stream(w, r, job{op: "reprotect", vm: req.Group, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return nil, s.backend.Reprotect(ctx, req, emit)
	}})
}

func (s *Server) switchover(w http.ResponseWriter, r *http.Request) {
	var req SwitchoverRequest
	if !read(w, r, &req) || !s.names(w, "vm", req.VM) {
		return
	}
	s.stream(w, r, job{op: "switchover", vm: req.VM, goesOn: true, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return s.backend.Switchover(ctx, req, emit)
	}})
}

func (s *Server) failback(w http.ResponseWriter, r *http.Request) {
	var req SwitchoverRequest
	if !read(w, r, &req) || !s.names(w, "vm", req.VM) {
		return
	}
	s.stream(w, r, job{op: "failback", vm: req.VM, goesOn: true, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return s.backend.Failback(ctx, req, emit)
	}})
}

func (s *Server) survivor(w http.ResponseWriter, r *http.Request) {
	var req SurvivorRequest
	if !read(w, r, &req) || !s.names(w, "group", req.Group) {
		return
	}
	s.stream(w, r, job{op: "survivor", vm: req.Group, goesOn: true, run: func(ctx context.Context, emit func(Event)) (any, error) {
		return nil, s.backend.Survivor(ctx, req, emit)
	}})
}

func (s *Server) branches(w http.ResponseWriter, r *http.Request) {
	var req BranchesRequest
	if !read(w, r, &req) || req.Group+req.Delete != "" && !s.names(w, "group", req.Group) {
		return
	}
	bs, err := s.backend.Branches(r.Context(), req)
	if err != nil {
		fail(w, http.StatusConflict, asError(err))
		return
	}
	if bs == nil {
		bs = []Branch{}
	}
	reply(w, http.StatusOK, bs)
}

// names answers a request whose field names nothing, and tells whether it does.
func (s *Server) names(w http.ResponseWriter, field, value string) bool {
	err := named(field, value)
	if err != nil {
		fail(w, http.StatusBadRequest, badRequest(err))
	}
	return err == nil
}

func (s *Server) set(w http.ResponseWriter, r *http.Request) {
	var req SetRequest
	if !read(w, r, &req) {
		return
	}
	if err := named("group", req.Group); err != nil {
		fail(w, http.StatusBadRequest, badRequest(err))
		return
	}
	p, err := s.backend.Set(r.Context(), req)
	if err != nil {
		fail(w, http.StatusConflict, asError(err))
		return
	}
	reply(w, http.StatusOK, p)
}

// read takes one JSON value of known keys from the body, or answers why not.
func read(w http.ResponseWriter, r *http.Request, into any) bool {
	// The server has no ReadTimeout: it would end operations that take longer.
	ctl := http.NewResponseController(w)
	_ = ctl.SetReadDeadline(time.Now().Add(bodyPatience))
	defer func() { _ = ctl.SetReadDeadline(time.Time{}) }()
	dec := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxBody))
	dec.DisallowUnknownFields()
	err := dec.Decode(into)
	if err == nil {
		// The rest is read too: only then does the server notice a client that goes away.
		if _, more := dec.Token(); !errors.Is(more, io.EOF) {
			err = errors.New("more than one JSON value")
		}
	}
	if err != nil {
		fail(w, http.StatusBadRequest, badRequest(fmt.Errorf("read request: %w", err)))
		return false
	}
	return true
}

func badRequest(err error) *Error {
	return &Error{Code: "bad-request", Message: err.Error(), Hint: "see kagami help; command line and daemon may be of different releases", Exit: ExitUsage}
}

func named(key, value string) error {
	if value == "" || len(value) > maxName {
		return fmt.Errorf("%s must have 1 to %d characters", key, maxName)
	}
	return nil
}

func listed(key string, values []string) error {
	if len(values) > maxDisks {
		return fmt.Errorf("%s: at most %d", key, maxDisks)
	}
	for _, v := range values {
		if err := named(key, v); err != nil {
			return err
		}
	}
	return nil
}

// asError makes any error fit for the API.
func asError(err error) *Error {
	var e *Error
	switch {
	case errors.As(err, &e):
		return e
	case errors.Is(err, context.Canceled):
		return &Error{Code: "cancelled", Message: "cancelled: " + err.Error(), Exit: ExitFailed}
	}
	return &Error{Code: "failed", Message: err.Error(), Exit: ExitFailed}
}

func fail(w http.ResponseWriter, status int, e *Error) {
	reply(w, status, line{Error: e})
}

func reply(w http.ResponseWriter, status int, body any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(body) // a client that is gone needs no answer
}
