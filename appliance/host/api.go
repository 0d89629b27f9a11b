package host

import (
	"errors"
	"fmt"
	"net"
	"net/http"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"kagami/appliance/control"
)

// controlServer serves the control API; the daemon is its backend.
func (d *Daemon) controlServer() *control.Server {
	return control.NewServer(d, control.ServerOptions{Version: d.release, Metrics: d.metrics(), Log: d.log})
}

func (d *Daemon) metrics() http.Handler {
	reg := prometheus.NewRegistry()
	reg.MustRegister(collector{d}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(reg, promhttp.HandlerOpts{})
}

// scraper serves metrics over TCP, for a Prometheus that is not on this host.
type scraper struct {
	l    net.Listener
	http *http.Server
}

// listenMetrics opens the address of the config file's metrics; nil where there is none.
func (d *Daemon) listenMetrics() (*scraper, error) {
	if d.cfg.Metrics == "" {
		return nil, nil
	}
	l, err := net.Listen("tcp", d.cfg.Metrics)
	if err != nil {
		return nil, refused(fmt.Sprintf("listen for metrics: %v", err), "stop what listens there (ss -ltnp shows it), or change metrics in the config file")
	}
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", d.metrics())
	return &scraper{l, &http.Server{Handler: mux, ReadTimeout: 10 * time.Second, WriteTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}}, nil
}

func (s *scraper) serve() error {
	if err := s.http.Serve(s.l); !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("serve metrics: %w", err)
	}
	return nil
}

func (s *scraper) close() error { return s.http.Close() }
